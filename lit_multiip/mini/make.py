"""`python -m lit_multiip make-mini`: make a small backbone by a recipe, one network after another."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lit_multiip.defaults import choose_precision
from lit_multiip.mini.maker import STAGES, Maker, Settings
from lit_multiip.mini.photos import RealPeople, TrainingPhotos  # noqa: F401  so that a recipe may call it by name
from lit_multiip.mini.portraits import DrawnPeople  # noqa: F401  likewise
from lit_multiip.mini.recipe import (
    AdapterTraining,
    CLIPTraining,
    CriticTraining,
    Training,
    UNetTraining,
    VAETraining,
)
from lit_multiip.mini.start import Start
from lit_multiip.mini.training import RecipeError

Stage = Literal["critic", "critic_b", "clip", "vae", "vae_decoder", "unet", "ip_adapter"]


def make_mini(
    photos: TrainingPhotos,
    out: str,
    work: str,
    stage: Stage | None = None,
    seed: int = 0,
    side: int = 64,
    start_from: str | None = None,
    precision: str | None = None,
    critic: CriticTraining | None = None,
    critic_b: CriticTraining | None = None,
    clip: CLIPTraining | None = None,
    vae: VAETraining | None = None,
    vae_decoder: Training | None = None,
    unet: UNetTraining | None = None,
    ip_adapter: AdapterTraining | None = None,
) -> None:
    """Make a small backbone by a recipe: --config lit_multiip/mini/portraits.yaml, or faces.yaml.

    Args:
        photos: what it is trained on: DrawnPeople, or RealPeople of any source.
        out: folder to write; `--backbone.path` takes it.
        work: folder for pictures and training states, so that an interrupted training goes on.
        stage: the one to make; all of the recipe's by default. A stage that is made is passed over.
        seed: decides drawn portraits, initial weights and draws.
        side: of a picture in px.
        start_from: a backbone whose weights the networks begin at; those of other sizes are named and begin anew.
        precision: of Lightning's Trainer, such as bf16-mixed or 32-true; None takes what the machine has a unit for.
        critic: scores drawn portraits.
        critic_b: a second one.
        clip: tokenizer, text encoder and image encoder.
        vae: the autoencoder.
        vae_decoder: its decoder once more, with a perceptual loss by the image encoder.
        unet: the UNet.
        ip_adapter: the single-photo IP-Adapter.
    """
    given = (critic, critic_b, clip, vae, vae_decoder, unet, ip_adapter)
    recipe: dict[str, Settings] = {n: s for n, s in zip(STAGES, given, strict=True) if s is not None}
    if not recipe or (stage is not None and stage not in recipe):
        wanted = "no stage" if stage is None else f"no stage {stage}"
        raise RecipeError(f"the recipe has {wanted}: it has {', '.join(recipe) or 'none'}; --config takes a recipe")
    maker = Maker(photos, Path(out), Path(work), seed, side, Start(start_from), recipe, precision or choose_precision())
    for name in recipe if stage is None else [stage]:
        maker.make(name)
