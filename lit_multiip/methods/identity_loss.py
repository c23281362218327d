"""The identity loss: does the image that the UNet predicts at low noise show the person of the held-out photo?"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_multiip.files import LitMultiIPError


class IdentityNetwork(nn.Module, ABC):
    """A network in torch that tells people apart, and passes gradients to its images. It stays in evaluation mode."""

    name: str

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """Return embeddings of who is shown, (B, E) of any norm, with a gradient to the images.

        Args:
            images: RGB in 0..255, not rounded, (B, 3, H, W) float32.
        """

    def train(self, mode: bool = True) -> Any:
        """Stay in evaluation mode, also inside a module that is put into training mode."""
        return super().train(False)


@dataclass
class IdentityLoss:
    """Adds weight * (1 - cosine) of the embeddings of the predicted x_0 and of the held-out photo, both decoded.

    Both pass the VAE's decoder, so that a perfect prediction has loss 0. The mean is over the whole batch. Samples
    above `max_time`, and those whose photos are dropped, count as 0 and are not decoded. The network may not score
    afterwards.

    Args:
        network: tells people apart; it is frozen.
        weight: of the loss, beside the squared error.
        max_time: t / T below which x_0 is decoded; above it the prediction is too blurred to show a person.
    """

    network: IdentityNetwork
    weight: float = 0.1
    max_time: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise LitMultiIPError(
                f"model.identity_loss.weight={self.weight} must be above 0: 0.1 is usual; without the loss set "
                "model.identity_loss to null"
            )
        if not 0 < self.max_time <= 1:
            raise LitMultiIPError(f"model.identity_loss.max_time={self.max_time} must be in (0, 1]: 0.25 is usual")
        self.network.requires_grad_(False).eval()

    def __call__(self, predicted: Tensor, held_out: Tensor) -> Tensor:
        """Return 1 - cosine of each pair of images, (B,) float32.

        Args:
            predicted: the decoder's output in [-1, 1] and, a little, beyond, (B, 3, H, W).
            held_out: likewise; it gets no gradient.
        """
        with torch.autocast(predicted.device.type, enabled=False):
            made = self.network.embed(_shown(predicted))  # (B, E)
            with torch.no_grad():
                wanted = self.network.embed(_shown(held_out))
            return 1 - F.cosine_similarity(made.float(), wanted.float(), dim=1)

    def describe(self) -> dict[str, Any]:
        """Return the settings for a results file."""
        return {"network": self.network.name, "weight": self.weight, "max_time": self.max_time}


def _shown(signal: Tensor) -> Tensor:
    """Map the decoder's output to what a picture shows, RGB in 0..255."""
    return (signal.float().clamp(-1, 1) + 1) * 127.5


def digest_weights(network: nn.Module) -> str:
    """Name a network by the values of its weights, whatever their file and names, 16 hexadecimal digits."""
    values = [value.detach().cpu().float().contiguous().numpy().tobytes() for value in network.state_dict().values()]
    return hashlib.sha256(b"".join(sorted(hashlib.sha256(value).digest() for value in values))).hexdigest()[:16]
