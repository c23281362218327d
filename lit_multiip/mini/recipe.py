"""What a recipe says of each stage: how long it trains, and the shape of its network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lit_multiip.backbone.faces import FaceEncoder
from lit_multiip.data.photos import DataError


@dataclass
class Training:
    """How a network is trained: AdamW with a short warm-up, then a cosine to zero.

    Args:
        steps: in all.
        batch_size: pictures a step.
        learning_rate: the highest.
        ema: decay of the average of the weights, which is what is kept; None keeps the last weights.
    """

    steps: int
    batch_size: int
    learning_rate: float
    ema: float | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        if self.steps < 2 or self.batch_size < 1 or not self.learning_rate > 0:
            raise DataError(
                f"steps={self.steps}, batch_size={self.batch_size}, learning_rate={self.learning_rate}: give two steps "
                "or more, a picture or more, and a rate above zero"
            )
        if self.ema is not None and not 0 < self.ema < 1:
            raise DataError(f"ema={self.ema} is no decay: give more than 0 and less than 1, or null")
        captions = getattr(self, "captions", None)
        if captions is not None:
            check_captions(captions)


def check_captions(captions: Mapping[str, float]) -> None:
    """Refuse kinds of captions whose probabilities are none."""
    if min(captions.values(), default=-1) < 0 or abs(sum(captions.values()) - 1) > 1e-6:
        raise DataError(f"captions={dict(captions)} are no probabilities: they must add to 1")


@dataclass
class CriticTraining(Training):
    """A critic of drawn portraits, which have classes. It has people of its own.

    Args:
        architecture: of `evaluation.critic.Critic`.
        people: whom it tells apart.
        photos: of each.
    """

    architecture: Literal["convnet", "patchnet"] = "convnet"
    people: int = 500
    photos: int = 40


@dataclass
class CLIPTraining(Training):
    """Tokenizer, text encoder and image encoder: the pair by contrast, then the image encoder alone.

    Args:
        image_steps: further steps of the image encoder, the text encoder locked.
        text: of the text encoder's configuration, what differs from that of `start_from`.
        vision: of the image encoder's, likewise; `projection_dim` is both towers', and the face network's where one is.
        captions: probabilities of the kinds of captions.
        skip_equal: do not hold pictures apart whose captions are equal.
        varied: scale, shift and brighten the pictures a little.
        face: a face network whose embedding the image encoder learns, distilled.
        face_weight: of its loss.
    """

    image_steps: int = 0
    text: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    captions: dict[str, float] = field(default_factory=lambda: {"bare": 1.0})
    skip_equal: bool = True
    varied: bool = False
    face: FaceEncoder | None = None
    face_weight: float = 4.0


@dataclass
class VAETraining(Training):
    """The autoencoder.

    Args:
        network: of its configuration, what differs from that of `start_from`; latents may have any number of channels.
        kl_weight: of the KL term. 1e-4 left one of four latent channels unused.
    """

    network: dict[str, Any] = field(default_factory=dict)
    kl_weight: float = 1e-6


@dataclass
class UNetTraining(Training):
    """The UNet, on latents of the VAE. Its sizes follow from VAE and text encoder.

    Args:
        network: of its configuration, what differs from that of `start_from`.
        captions: probabilities of the kinds of captions.
        adapter: train a single-photo IP-Adapter with it, by the picture's own embedding. A UNet whose captions do not
            tell people apart learns to draw them so. `image_encoder` is the backbone's own, and the adapter goes to
            `ip_adapter/`; `face` is the face network of the stage `clip`, and it goes to `face_adapter/`.
    """

    network: dict[str, Any] = field(default_factory=dict)
    captions: dict[str, float] = field(default_factory=lambda: {"bare": 0.9, "drop": 0.1})
    adapter: Literal["image_encoder", "face"] | None = None


@dataclass
class AdapterTraining:
    """The single-photo IP-Adapter, by `fit` of `lit_multiip/mini/ip_adapter.yaml` on the frozen backbone.

    Args:
        steps: in all.
        options: of `fit`, by their names, such as `data.min_photos: 2`; real people and their crop are the recipe's.
    """

    steps: int
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        if self.steps < 1:
            raise DataError(f"steps={self.steps}: it must be above zero")
