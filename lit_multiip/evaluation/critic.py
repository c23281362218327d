"""The miniature's critic as an extractor: set scores, identity, and what it reads of the prompt."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lit_multiip.data import mini_faces
from lit_multiip.evaluation.extractors import Extraction, Extractor
from lit_multiip.files import package_file
from lit_multiip.methods.identity_loss import IdentityNetwork

_COLOUR = f"({'|'.join(mini_faces.COLOUR_NAMES)})"
_BACKGROUND, _SHIRT = re.compile(rf"\bin front of an? {_COLOUR} wall\b"), re.compile(rf"\bin an? {_COLOUR} shirt\b")
_EXPRESSION = re.compile(rf"\b({'|'.join(mini_faces.EXPRESSIONS)})\b")
_WORN = rf"(?:sunglasses|an? (?:{'|'.join(mini_faces.OCCLUDERS)}))"
_WEARING = re.compile(rf"\bwearing ({_WORN}(?: and {_WORN})*)\b")
# the whole form of `mini_faces.prompt`, in which what is not named is absent
_COMPLETE = re.compile(
    rf"a photo of a (?:{_EXPRESSION.pattern} )?person(?: {_WEARING.pattern})?, {_SHIRT.pattern}, {_BACKGROUND.pattern}"
)


SHIPPED = ("critic", "critic_b")  # with the miniature


def shipped_critic(name: str = "critic") -> Path:
    """Folder of a critic that ships with the miniature: `critic` or `critic_b`. It may not exist."""
    return package_file(f"mini/weights/{name}")


class CriticExtractor(Extractor, IdentityNetwork):
    """A critic of drawn portraits. On real photos its scores mean little.

    Features are 64-d; logits are over the K people that it was trained on; features of unit norm are the identity.

    Args:
        folder: what `Critic.save` wrote; its name becomes part of every score's key. `critic` and `critic_b` are the
            package's own; None is `critic`.
    """

    can_identify = True

    def __init__(self, folder: str | None = None) -> None:
        super().__init__()
        path = shipped_critic(folder or SHIPPED[0]) if folder in (None, *SHIPPED) else Path(str(folder)).expanduser()
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
        raw, logits, _ = self.critic(_resize(images))  # (B, 64), (B, K)
        features = raw.shape[1] ** 0.5 * F.normalize(raw, dim=1)
        return Extraction(features, logits, features)

    def embed(self, images: Tensor) -> Tensor:
        """See `IdentityNetwork.embed`; (B, 64)."""
        side = mini_faces.SIDE
        if images.shape[-2:] != (side, side):
            images = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
        features: Tensor = self.critic(images)[0]
        return features

    def prompt_agreement(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Share of the scene attributes named by the prompt that the critic reads back, (B, 3, H, W) -> (B,) in 0..1.

        Attributes count as `named_attributes` says; NaN for prompts that name none.
        """
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            heads = self.critic(_resize(images))[2]
        read = {name: heads[name].argmax(dim=1).tolist() for name in mini_faces.SCENE_ATTRIBUTES}  # (B,) each
        shares = []
        for number, prompt in enumerate(prompts):
            named = named_attributes(prompt)
            correct = [read[name][number] == label for name, label in named.items()]
            shares.append(sum(correct) / len(correct) if correct else float("nan"))
        return torch.tensor(shares)


class Resemblance(Extractor):
    """Whom of the people that both critics know a drawn portrait resembles; it tells a stranger by one photo.

    The embedding is sqrt(softmax(logits / 2)) of each critic, side by side, so that a cosine is the mean of their
    Bhattacharyya coefficients.
    """

    name, can_identify = "resemblance", True
    same_person = 0.35  # see tools/README.md

    def __init__(self) -> None:
        super().__init__()
        self.critics = nn.ModuleList(Critic.load(shipped_critic(name)) for name in ("critic", "critic_b"))
        self.freeze()

    def compute(self, images: Tensor) -> Extraction:
        """See `Extractor.compute`."""
        small = _resize(images)
        parts = [F.softmax(critic(small)[1] / 2, dim=1).sqrt() for critic in self.critics]  # (B, K) each
        return Extraction(embedding=torch.cat(parts, dim=1))


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


def _resize(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> uint8 (B, 3, 64, 64)."""
    size = (mini_faces.SIDE, mini_faces.SIDE)
    if images.shape[-2:] == size:
        return images
    resized = F.interpolate(images.float(), size, mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)


WIDTH = 64  # of the penultimate features: FID and KID of a few hundred images need few dimensions
HEADS: dict[str, int] = {
    **{name: len(classes) for name, classes in mini_faces.SCENE_ATTRIBUTES.items()},
    **{name: len(trait.names) for name, trait in mini_faces.TRAITS.items()},
}


def _convnet() -> nn.Module:
    """Plain convolutions with batch norm: (B, 3, 64, 64) -> (B, 256)."""
    layers: list[nn.Module] = []
    for n_in, n_out, stride in ((3, 32, 2), (32, 64, 1), (64, 64, 2), (64, 128, 1), (128, 128, 2), (128, 256, 2)):
        layers += [nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(256, 256, 4), nn.ReLU(), nn.Flatten())


class _Mix(nn.Module):
    """A ConvNeXt block: depthwise 7 x 7, then a residual per-pixel MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.GroupNorm(1, width)
        self.mlp = nn.Sequential(nn.Conv2d(width, 3 * width, 1), nn.GELU(), nn.Conv2d(3 * width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.mlp(self.norm(self.spatial(x)))
        return x + mixed


def _patchnet() -> nn.Module:
    """4 x 4 patches, ConvNeXt blocks, then all positions at once: (B, 3, 64, 64) -> (B, 256)."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 4, 4),  # (B, 64, 16, 16)
        _Mix(64),
        _Mix(64),
        nn.Conv2d(64, 128, 2, 2),  # (B, 128, 8, 8)
        _Mix(128),
        _Mix(128),
        nn.Conv2d(128, 64, 2, 2),  # (B, 64, 4, 4)
        nn.Flatten(),
        nn.LayerNorm(1024),
        nn.Linear(1024, 256),
        nn.GELU(),
    )


ARCHITECTURES = {"convnet": _convnet, "patchnet": _patchnet}


class Critic(nn.Module):
    """One softmax over K training people on 64 features, and one head per scene attribute and trait.

    Args:
        architecture: `convnet` or `patchnet`; two critics of different build check each other.
        people: K, the number of people in the softmax.
    """

    def __init__(self, architecture: str, people: int) -> None:
        super().__init__()
        self.config = {"architecture": architecture, "people": people, "heads": list(HEADS)}
        self.trunk = ARCHITECTURES[architecture]()
        self.neck = nn.Linear(256, WIDTH)
        self.people = nn.Linear(WIDTH, people)
        self.heads = nn.ModuleDict({name: nn.Linear(256, classes) for name, classes in HEADS.items()})

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Read portraits.

        Args:
            images: RGB, (B, 3, 64, 64) uint8.

        Returns:
            Features (B, 64), logits over the training people (B, K), and a head's logits (B, classes) by name.
        """
        hidden = self.trunk((images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last))
        features = self.neck(hidden)
        return features, self.people(features), {name: head(hidden) for name, head in self.heads.items()}

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors` (fp16)."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        state = {k: v.half() if v.is_floating_point() else v for k, v in self.state_dict().items()}
        save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")

    @classmethod
    def load(cls, folder: Path) -> Critic:
        """Read what `save` wrote, in fp32 and eval mode."""
        config = json.loads((folder / "config.json").read_text())
        critic = cls(config["architecture"], config["people"])
        critic.load_state_dict(load_file(folder / "model.safetensors"))
        return critic.eval().requires_grad_(False)
