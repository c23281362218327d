"""The miniature's critic as an extractor: set scores, identity, and what it reads of the prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_multiip.data import mini_faces
from lit_multiip.evaluation.extractors import Extraction, Extractor
from lit_multiip.mini.critic import WIDTH, Critic

_COLOUR = f"({'|'.join(mini_faces.COLOUR_NAMES)})"
_BACKGROUND, _SHIRT = re.compile(rf"\bin front of an? {_COLOUR} wall\b"), re.compile(rf"\bin an? {_COLOUR} shirt\b")
_EXPRESSION = re.compile(rf"\b({'|'.join(mini_faces.EXPRESSIONS)})\b")
_WORN = rf"(?:sunglasses|an? (?:{'|'.join(mini_faces.OCCLUDERS)}))"
_WEARING = re.compile(rf"\bwearing ({_WORN}(?: and {_WORN})*)\b")
# the whole form of `mini_faces.prompt`, in which what is not named is absent
_COMPLETE = re.compile(
    rf"a photo of a (?:{_EXPRESSION.pattern} )?person(?: {_WEARING.pattern})?, {_SHIRT.pattern}, {_BACKGROUND.pattern}"
)


def shipped_critic(name: str = "critic") -> Path:
    """Folder of a critic that ships with the miniature: `critic` or `critic_b`. It may not exist."""
    return Path(str(resources.files("lit_multiip"))) / "mini" / "weights" / name


class CriticExtractor(Extractor):
    """A critic of drawn portraits. On real photos its scores mean little.

    Features are 64-d; logits are over the K people that it was trained on; features of unit norm are the identity.

    Args:
        folder: What `Critic.save` wrote; its name becomes part of every score's key. None takes the package's own.

    Raises:
        FileNotFoundError: there is no critic in the folder.
    """

    can_identify = True

    def __init__(self, folder: str | None = None) -> None:
        super().__init__()
        path = shipped_critic() if folder is None else Path(folder).expanduser()
        if missing := [name for name in ("config.json", "model.safetensors") if not (path / name).is_file()]:
            raise FileNotFoundError(
                f"no critic in '{path}' ({' and '.join(missing)} missing): give the folder of a critic, or make the "
                "miniature's with `python -m lit_multiip make-mini`"
            )
        self.critic = Critic.load(path)
        self.name, self.source = path.resolve().name, str(path)
        self.num_features, self.num_classes = WIDTH, self.critic.people.out_features
        self.freeze()

    def compute(self, images: Tensor) -> Extraction:
        """See `Extractor.compute`. Features have unit variance over their 64 entries, as KID's cubic kernel expects."""
        raw, logits, _ = self.critic(_at_its_size(images))  # (B, 64), (B, K)
        features = raw.shape[1] ** 0.5 * F.normalize(raw, dim=1)
        return Extraction(features, logits, features)

    def prompt_agreement(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Share of the scene attributes named by the prompt that the critic reads back, (B, 3, H, W) -> (B,) in 0..1.

        Attributes count as `named_attributes` says; NaN for prompts that name none.
        """
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            heads = self.critic(_at_its_size(images))[2]
        read = {name: heads[name].argmax(dim=1).tolist() for name in mini_faces.SCENE_ATTRIBUTES}  # (B,) each
        shares = []
        for number, prompt in enumerate(prompts):
            named = named_attributes(prompt)
            correct = [read[name][number] == label for name, label in named.items()]
            shares.append(sum(correct) / len(correct) if correct else float("nan"))
        return torch.tensor(shares)


def named_attributes(prompt: str) -> dict[str, int]:
    """Class index of each scene attribute that a prompt names and that is visible by construction.

    Background and shirt by their colours; the expression, unless a scarf hides it; sunglasses, hat and scarf as present
    where the prompt has someone "wearing" them, and as absent where it has the whole form of `mini_faces.prompt`.
    """
    prompt = prompt.lower()
    wearing = _WEARING.search(prompt)
    named = {name: 1 for name in mini_faces.OCCLUDERS if wearing and name in wearing[1]}
    if _COMPLETE.fullmatch(prompt):
        named = {name: named.get(name, 0) for name in mini_faces.OCCLUDERS}
    if background := _BACKGROUND.search(prompt):
        named["background"] = mini_faces.COLOUR_NAMES.index(background[1])
    if shirt := _SHIRT.search(prompt):
        named["shirt"] = mini_faces.COLOUR_NAMES.index(shirt[1])
    if (expression := _EXPRESSION.search(prompt)) and not named.get("scarf"):
        named["expression"] = mini_faces.EXPRESSIONS.index(expression[1])
    return named


def _at_its_size(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> uint8 (B, 3, 64, 64)."""
    size = (mini_faces.SIDE, mini_faces.SIDE)
    if images.shape[-2:] == size:
        return images
    resized = F.interpolate(images.float(), size, mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)
