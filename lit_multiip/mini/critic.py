"""The critics: small networks that stand in for Inception and for a face recogniser on drawn portraits."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lit_multiip.data import mini_faces

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
        return x + self.mlp(self.norm(self.spatial(x)))


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
        architecture: ``convnet`` or ``patchnet``; two critics of different build check each other.
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
        """Write ``config.json`` and ``model.safetensors`` (fp16)."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        state = {k: v.half() if v.is_floating_point() else v for k, v in self.state_dict().items()}
        save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")

    @classmethod
    def load(cls, folder: Path) -> Critic:
        """Read what ``save`` wrote, in fp32 and eval mode."""
        config = json.loads((folder / "config.json").read_text())
        critic = cls(config["architecture"], config["people"])
        critic.load_state_dict(load_file(folder / "model.safetensors"))
        return critic.eval().requires_grad_(False)
