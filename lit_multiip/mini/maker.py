"""The maker of a small backbone: its networks, stage by stage.

Every stage reads what earlier ones wrote to `out`, goes on from its own checkpoint in `work`, and writes what it
measured to `<out>/made/<stage>.json`. A stage that is made is passed over.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from lit_multiip.backbone.faces import FaceEncoder
from lit_multiip.backbone.ip_adapter import install_ip_adapter, ip_adapter_from_text, ip_adapter_state
from lit_multiip.backbone.pipeline import TRAINED_ON
from lit_multiip.cli import CLI
from lit_multiip.data import mini_faces
from lit_multiip.data.record import read_record, training_record
from lit_multiip.evaluation.results import write_json
from lit_multiip.files import hash_text, only_writer, package_file, write_durably
from lit_multiip.mini import measured, stages
from lit_multiip.mini.photos import ChosenPeople, PhotoSet, Pictures, TrainingPhotos
from lit_multiip.mini.portraits import Portraits
from lit_multiip.mini.recipe import (
    AdapterTraining,
    CLIPTraining,
    CriticTraining,
    Training,
    UNetTraining,
    VAETraining,
)
from lit_multiip.mini.start import Start
from lit_multiip.mini.tokenizer import MAX_LENGTH, make_tokenizer
from lit_multiip.mini.training import RecipeError, check_same, train
from lit_multiip.pixels import to_signal

logger = logging.getLogger(__name__)

# In the order in which they are made; the number is added to the seed.
STAGES = {"critic": 0, "critic_b": 1, "clip": 2, "vae": 3, "vae_decoder": 6, "unet": 4, "ip_adapter": 5}
NEEDS = {"vae_decoder": ("clip", "vae"), "unet": ("clip", "vae"), "ip_adapter": ("clip", "vae", "unet")}
PIPELINE = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}

ADAPTERS = {
    "image_encoder": "ip_adapter/ip-adapter_mini.safetensors",
    "face": "face_adapter/ip-adapter_face.safetensors",
}

Settings = Training | AdapterTraining
Measured = dict[str, Any]


class Maker:
    """Makes a backbone's folder stage by stage.

    Args:
        photos: what trains it.
        out: the folder to write; a diffusers pipeline folder, plus `made/` and, of drawn portraits, the critics.
        work: where pictures and training states are kept between calls.
        seed: decides every drawn portrait, every initial weight and every draw.
        side: of a picture in px.
        start: the backbone to begin at.
        recipe: settings of the stages that the recipe has.
        precision: of Lightning's Trainer.
    """

    def __init__(
        self,
        photos: TrainingPhotos,
        out: Path,
        work: Path,
        seed: int,
        side: int,
        start: Start,
        recipe: Mapping[str, Settings],
        precision: str,
    ) -> None:
        self.photos, self.out, self.work, self.seed, self.side = photos, out, work, seed, side
        self.start, self.recipe, self.precision = start, recipe, precision

    @cached_property
    def pictures(self) -> PhotoSet:
        """The pictures, read or drawn once."""
        self.work.mkdir(parents=True, exist_ok=True)
        with only_writer(self.work):
            return self.photos.read(self.work, self.side, self.seed)

    # ---- one stage after another ------------------------------------------------------------------------------------

    def make(self, name: str) -> None:
        """Make one stage, unless it is made by the same settings already."""
        self._require(name)
        facts, report = self._facts(name), self.out / "made" / f"{name}.json"
        if (made := _read_json(report)) is not None and made["facts"] == facts:
            logger.info("%s: made already, see %s", name, report)
            return
        self._record_people()
        with only_writer(self.work / name):
            L.seed_everything(self.seed + STAGES[name])
            settings: Any = self.recipe[name]
            stage: Callable[[Any, Mapping[str, Any]], Measured] = getattr(self, name)
            found = stage(settings, facts)
        write_json(report, {"measured": found, "facts": facts})
        logger.info("%s: %s", name, ", ".join(f"{key} {value:.6g}" for key, value in found.items()))

    def _require(self, name: str) -> None:
        """Refuse a stage whose earlier ones are not made."""
        for earlier in NEEDS.get(name, ()):
            if not (self.out / "made" / f"{earlier}.json").exists():
                raise RecipeError(f"stage {name} needs {earlier}, which '{self.out}' lacks: first --stage {earlier}")

    def _facts(self, name: str) -> dict[str, Any]:
        """Return all that decides a stage's result, and the earlier stages by a digest of their own facts."""
        settings = asdict(self.recipe[name])
        training = self.recipe[name]
        if isinstance(training, CLIPTraining) and training.face is not None:
            settings["face"] = training.face.fingerprint()
        if isinstance(training, UNetTraining) and training.adapter == "face":
            settings["face"] = self._face().fingerprint()
        earlier = {one: _read_json(self.out / "made" / f"{one}.json") for one in NEEDS.get(name, ())}
        facts = {
            "settings": settings,
            "seed": self.seed,
            "side": self.side,
            "pictures": self.pictures.training.fingerprint("captions" in settings),
            "start_from": self.start.path,
            "earlier": {one: hash_text(json.dumps(made))[:16] for one, made in earlier.items()},
        }
        plain: dict[str, Any] = json.loads(json.dumps(facts))  # as it is read again
        return plain

    def _record_people(self) -> None:
        """Write down whom the backbone is trained on, so that nobody is tested on them; see `evaluation.audit`."""
        known = self.out / TRAINED_ON
        earlier = read_record(load_file(known)) if known.exists() else None
        people = [*self.pictures.people, *self.pictures.measuring]
        if not people and earlier is None and self.start.record() is None:
            return
        record = training_record(people, earlier, self.start.record())
        with only_writer(self.work):
            write_durably(known, lambda file: file.write(save(record)))

    def _train(
        self, stage: str, module: Any, data: Any, settings: Training, facts: Mapping[str, Any], name: str | None = None
    ) -> Measured:
        file = self.work / stage / f"{name or stage}.ckpt"
        facts = {**facts, "steps": settings.steps}
        return dict(train(module, data, len(data), settings, file, facts, self.precision))

    # ---- the stages -------------------------------------------------------------------------------------------------

    def critic(self, settings: CriticTraining, facts: Mapping[str, Any], role: str = "critic") -> Measured:
        """Train one critic on its own drawn people. After 1400 steps it knew 76 % from one photo, see gate.py."""
        if not isinstance(self.pictures.training, Portraits):
            raise RecipeError(f"stage {role} learns the classes of drawn portraits, and photos have none: leave it out")
        people = mini_faces.ROLES[role][: settings.people]
        data = Portraits(self.work, role, people, settings.photos, self.seed)
        stage = stages.CriticStage(settings.architecture, settings.people, settings.photos, settings.learning_rate)
        done = self._train(role, stage, data, settings, facts)
        stage.critic.save(self.out / role)
        return done

    def critic_b(self, settings: CriticTraining, facts: Mapping[str, Any]) -> Measured:
        """Train the second critic: another architecture, other people."""
        return self.critic(settings, facts, "critic_b")

    def clip(self, settings: CLIPTraining, facts: Mapping[str, Any]) -> Measured:
        """Train tokenizer, text encoder and image encoder."""
        data, unseen = self.pictures.training, self.pictures.unseen
        _check_kinds("clip", settings.captions, data)
        tokenizer = make_tokenizer(self.out / "tokenizer", data.phrases())
        faces = None if settings.face is None else measured.face_embeds(settings.face, data, self.work)
        width = {} if faces is None else {"projection_dim": faces.shape[1]}
        vision_config = CLIPVisionConfig.from_dict(
            self.start.config("image_encoder", settings.vision) | {"image_size": self.side} | width
        )
        text_config = CLIPTextConfig.from_dict(
            self.start.config("text_encoder", settings.text)
            | {
                "vocab_size": len(tokenizer),
                "max_position_embeddings": MAX_LENGTH,
                "projection_dim": vision_config.projection_dim,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
            }
        )
        text, vision = CLIPTextModelWithProjection(text_config), CLIPVisionModelWithProjection(vision_config)
        self.start.fill(text.text_model, "text_encoder")
        self.start.fill(vision, "image_encoder")
        stage = stages.CLIPStage(
            vision,
            text,
            tokenizer,
            data,
            settings.captions,
            settings.learning_rate,
            faces,
            settings.face_weight,
            settings.skip_equal,
            settings.varied,
        )
        done = self._train("clip", stage, data, settings, facts, "pair")
        if settings.image_steps:
            further = Training(settings.image_steps, settings.batch_size, settings.learning_rate, settings.ema)
            image = self._train("clip", stages.CLIPImageStage(stage), data, further, facts, "image")
            done |= {f"image_{key}": value for key, value in image.items()}
        self._save_clip(vision, text, text_config)
        return done | measured.know_people(vision, unseen)

    def _save_clip(self, vision: Any, text: Any, text_config: Any) -> None:
        _save_for_float32(vision, self.out / "image_encoder")
        plain = CLIPTextModel(text_config)
        plain.load_state_dict({key.removeprefix("text_model."): v for key, v in text.text_model.state_dict().items()})
        _save_for_float32(plain, self.out / "text_encoder")
        weights = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in plain.state_dict().items()}
        save_file(weights, self.out / "text_encoder" / "model.safetensors", {"format": "pt"})  # all versions read these
        CLIPImageProcessor(
            size={"shortest_edge": self.side},
            crop_size={"height": self.side, "width": self.side},
            image_mean=stages.MEAN,
            image_std=stages.STD,
        ).save_pretrained(self.out / "feature_extractor")

    def vae(self, settings: VAETraining, facts: Mapping[str, Any]) -> Measured:
        """Train the autoencoder, then set its scaling factor so that latents have unit variance."""
        data, unseen = self.pictures.training, self.pictures.unseen
        vae: Any = AutoencoderKL(**self.start.config("vae", settings.network) | {"sample_size": self.side})
        self.start.fill(vae, "vae")
        stage = stages.VAEStage(vae, settings.learning_rate, settings.kl_weight)
        done = self._train("vae", stage, data, settings, facts)
        vae.eval()
        with torch.no_grad():
            images = torch.stack([data[i]["image"] for i in range(0, len(data), max(1, len(data) // 512))])
            latents = torch.cat([vae.encode(to_signal(part)).latent_dist.mean for part in images.split(64)])
        vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
        vae.half().save_pretrained(self.out / "vae")
        return done | measured.round_trips(vae.float(), unseen)

    def vae_decoder(self, settings: Training, facts: Mapping[str, Any]) -> Measured:
        """Train the autoencoder's decoder further; latents stay as they are."""
        vae: Any = AutoencoderKL.from_config(AutoencoderKL.load_config(self.out / "vae"))  # keeps no path in its config
        vae.load_state_dict(load_file(self.out / "vae" / "diffusion_pytorch_model.safetensors"))
        vision = CLIPVisionModelWithProjection.from_pretrained(self.out / "image_encoder").float()
        stage = stages.VAEDecoderStage(vae, vision, settings.learning_rate)
        done = self._train("vae_decoder", stage, self.pictures.training, settings, facts)
        vae.half().save_pretrained(self.out / "vae")
        return done | measured.round_trips(vae.float().eval(), self.pictures.unseen)

    def unet(self, settings: UNetTraining, facts: Mapping[str, Any]) -> Measured:
        """Train the UNet on latents, and an IP-Adapter with it where the recipe says so."""
        data, unseen = self.pictures.training, self.pictures.unseen
        _check_kinds("unet", settings.captions, data)
        vae: Any = AutoencoderKL.from_pretrained(self.out / "vae").float().eval()
        text = CLIPTextModel.from_pretrained(self.out / "text_encoder").float()
        scheduler: Any = DDPMScheduler(**self.start.scheduler())
        sizes = {
            "sample_size": self.side // 2 ** (len(vae.config.block_out_channels) - 1),
            "in_channels": vae.config.latent_channels,
            "out_channels": vae.config.latent_channels,
            "cross_attention_dim": text.config.hidden_size,
        }
        config = self.start.config("unet", settings.network) | sizes
        unet: Any = UNet2DConditionModel(**config)
        self.start.fill(unet, "unet")
        embeds = self._photo_embeds(settings.adapter, data)
        if embeds is not None:
            install_ip_adapter(unet, ip_adapter_from_text(unet, embeds.shape[1], seed=self.seed))
            unet.requires_grad_(True)
        stage = stages.UNetStage(
            unet,
            scheduler,
            self._moments(vae, data, facts),
            vae.config.scaling_factor,
            text,
            CLIPTokenizer.from_pretrained(self.out / "tokenizer"),
            data,
            settings.captions,
            settings.learning_rate,
            embeds,
        )
        done = self._train("unet", stage, [{"index": i} for i in range(len(data))], settings, facts)
        seen = self._photo_embeds(settings.adapter, unseen)
        done |= measured.denoising(stage, _encode(vae, unseen, self.precision), unseen, seen)
        plain: Any = UNet2DConditionModel(**config)
        state = unet.state_dict()
        plain.load_state_dict({key: state[key] for key in plain.state_dict()})
        plain.half().save_pretrained(self.out / "unet")
        if settings.adapter is not None:
            self._save_adapter(unet, ADAPTERS[settings.adapter])
        DDIMScheduler.from_config(scheduler.config, steps_offset=1, set_alpha_to_one=False).save_pretrained(
            self.out / "scheduler"
        )
        (self.out / "model_index.json").write_text(json.dumps(PIPELINE, indent=2) + "\n")
        return done

    def _photo_embeds(self, adapter: str | None, data: Pictures) -> Tensor | None:
        """Return what conditions the UNet beside captions, (P, D); None for nothing."""
        if adapter is None:
            return None
        if adapter == "image_encoder":
            vision = CLIPVisionModelWithProjection.from_pretrained(self.out / "image_encoder").float().eval()
            return measured.image_embeds(vision, data)
        faces = measured.face_embeds(self._face(), data, self.work)
        return faces.nan_to_num() * faces.shape[1] ** 0.5  # of mean square 1, as `backbone.face_encoder` conditions

    def _face(self) -> FaceEncoder:
        """Return the face network that the UNet's adapter is of."""
        clip = self.recipe.get("clip")
        if not isinstance(clip, CLIPTraining) or clip.face is None:
            raise RecipeError(
                "unet.adapter is face, and clip.face names no face network: give its path, or image_encoder"
            )
        return clip.face

    def _moments(self, vae: Any, data: Pictures, facts: Mapping[str, Any]) -> Tensor:
        """Return mean and logvar of all latents, (P, 2C, h, w); they are kept as long as the VAE stays."""
        key = hash_text(json.dumps([facts["earlier"]["vae"], facts["pictures"]]))[:16]
        path = self.work / "unet" / f"moments_{key}.pt"
        if not path.exists():
            moments = _encode(vae, data, self.precision)
            write_durably(path, lambda file: torch.save(moments, file))
        found: Tensor = torch.load(path, weights_only=True)
        return found

    def ip_adapter(self, settings: AdapterTraining, facts: Mapping[str, Any]) -> Measured:
        """Train the single-photo IP-Adapter as the published one was, by the project's own `fit`."""
        options = {
            "config": package_file("mini/ip_adapter.yaml"),
            "backbone.path": self.out,
            "seed_everything": self.seed,
            "data.cache_dir": self.work / "features",
            "trainer.max_steps": settings.steps,
            "trainer.precision": self.precision,
            "trainer.logger.init_args.save_dir": self.work,
            "trainer.logger.init_args.version": 0,
            **settings.options,
        }
        cli = CLI([f"--{key}={value}" for key, value in options.items()], run=False)
        if self.pictures.people:  # cut already, and nobody of the experiment is among them
            cli.datamodule.source, cli.datamodule.crop = ChosenPeople(self.pictures.people), None
        last, known = cli.run_folder / "checkpoints" / "last.ckpt", cli.run_folder / "facts.json"
        if last.exists() and (then := _read_json(known)) is not None:
            check_same(last, then, facts)
        write_json(known, facts)
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=str(last) if last.exists() else None, weights_only=True)
        self._save_adapter(cli.model.unet, ADAPTERS["image_encoder"])
        logged = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
        return {"steps": cli.trainer.global_step, **logged}

    def _save_adapter(self, unet: Any, name: str) -> None:
        state = ip_adapter_state(unet)
        flat = {f"{part}.{key}": value.half() for part, values in state.items() for key, value in values.items()}
        write_durably(self.out / name, lambda opened: opened.write(save(flat)))


@torch.inference_mode()
def _encode(vae: Any, data: Pictures, precision: str) -> Tensor:
    """Return mean and logvar of the latents of all pictures, (P, 2C, h, w) float16."""
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        batches = tqdm(DataLoader(data, 64), "encoding pictures")
        parts = [vae.encode(to_signal(b["image"])).latent_dist.parameters.half() for b in batches]
    return torch.cat(parts)  # which autocast refuses of float16


def _save_for_float32(module: Any, folder: Path) -> None:
    """Save weights as float16 with a configuration that reads them as float32, as diffusers reads the UNet's."""
    module.half().save_pretrained(folder)
    config = folder / "config.json"
    values = json.loads(config.read_text(encoding="utf-8")) | {"dtype": "float32"}
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_kinds(stage: str, captions: Mapping[str, float], data: Pictures) -> None:
    if unknown := sorted(set(captions) - set(data.kinds)):
        raise RecipeError(f"{stage}.captions has {', '.join(unknown)}: these pictures have {', '.join(data.kinds)}")


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
