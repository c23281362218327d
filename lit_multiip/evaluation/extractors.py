"""Frozen networks that look at images for the scores: each image passes once, and every score draws on that pass."""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.image.fid import NoTrainInceptionV3

from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.files import LitMultiIPError
from lit_multiip.methods.identity_loss import digest_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Extraction:
    """What an extractor says of B images."""

    features: Tensor | None = None  # (B, D), for FID, KID and diversity
    logits: Tensor | None = None  # (B, K), for the inception scores
    embedding: Tensor | None = None  # (B, E), unit norm: who is shown; a row of NaN where no face was found

    def vectors(self) -> Tensor:
        """Return what images are compared by: embeddings of identity (B, E), else features (B, D)."""
        vectors = self.features if self.embedding is None else self.embedding
        if vectors is None:
            raise LitMultiIPError(
                "an extractor gave neither features nor an embedding: give one of them in its `compute`"
            )
        return vectors


class Extractor(nn.Module, ABC):
    """A frozen network that scores images. A subclass gives `compute` and the attributes below, and calls `freeze`.

    It never trains. `extract` passes no gradients, and runs in its own precision whatever autocast surrounds it, so
    that the same image has the same score in every run.
    """

    name: str  # part of every score's key
    num_features: int | None = None  # None: no features
    num_classes: int | None = None  # None: no logits
    can_identify: bool = False
    same_person: float | None = None  # cosine of embeddings from which two photos show one person
    likeness: str = "identity"  # what closeness of embeddings says, the first part of those scores' keys
    source: str | None = None  # folder, file or hub id of its weights; what conditions the images may not score them
    sha256: str | None = None  # of its weights, where they are one file; tests by other weights are not compared

    @abstractmethod
    def compute(self, images: Tensor) -> Extraction:
        """One pass over checked images, uint8 (B, 3, H, W); `extract` makes embeddings unit norm."""

    def shares_weights(self, file: Path) -> bool:
        """Whether its network is that of a safetensors file; a subclass that could be a conditioning encoder says."""
        return False

    def freeze(self) -> None:
        """Last line of a subclass's constructor: no gradients, evaluation mode for good."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Extractor:
        """Stay in evaluation mode, also inside a module that is put into training mode."""
        return super().train(False)

    def extract(self, images: Tensor) -> Extraction:
        """All outputs of one pass, in float32.

        Args:
            images: uint8 in 0..255, (B, 3, H, W), on the extractor's device.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            given = f"{images.dtype} {tuple(images.shape)}"
            raise LitMultiIPError(
                f"images are {given}: give uint8 (B, 3, H, W), rounded from (x * 255).round() and not cut"
            )
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            raw = self.compute(images)
            return Extraction(
                features=None if raw.features is None else raw.features.float(),
                logits=None if raw.logits is None else raw.logits.float(),
                embedding=None if raw.embedding is None else F.normalize(raw.embedding.float(), dim=-1),
            )

    def prompt_agreement(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """How well each image follows its prompt, uint8 (B, 3, H, W) and B prompts -> (B,), higher is better.

        NaN where that is undefined: here for every image, since most extractors cannot read.
        """
        return torch.full((len(images),), float("nan"))


def refuse_conditioning_network(extractor: Extractor, backbone: Backbone) -> None:
    """Refuse an extractor whose network conditions the images: a network may not both condition and score.

    It is known by its source (the backbone's folder or hub id, its image encoder's, the face network's file) and by its
    weights. Other copies elsewhere are not recognised.
    """
    if extractor.source is None:
        return
    face = backbone.face_encoder
    if face is not None and (extractor.source == face.path or extractor.sha256 == face.sha256()):
        raise LitMultiIPError(
            f"extractor {extractor.name!r} is the face network that conditions ({face.path}), and would score its own "
            "work: take another extractor"
        )
    if not backbone.uses_clip:
        return
    encoder, weights = backbone.image_encoder_file()
    source = os.path.realpath(extractor.source)
    places = (backbone.path, backbone.place, encoder)
    same = [place for place in places if extractor.source == place or source == os.path.realpath(place)]
    if weights is not None and weights.is_file() and extractor.shares_weights(weights):
        same.append(encoder)
    if same or Path(source).is_relative_to(os.path.realpath(encoder)):
        raise LitMultiIPError(
            f"extractor {extractor.name!r} has the weights of the image encoder that conditions "
            f"({(same or [encoder])[0]}), and would score its own work: take another extractor"
        )


def refuse_training_network(extractor: Extractor, identity_networks: Mapping[str, str]) -> None:
    """Refuse an extractor whose network trained the model by an identity loss: it would score its own work.

    It is known by its weights, wherever they lie.

    Args:
        extractor: is to score.
        identity_networks: the names of those that trained, by `digest_weights`.
    """
    if identity_networks and digest_weights(extractor) in identity_networks:
        raise LitMultiIPError(
            f"extractor {extractor.name!r} is the network of the identity loss that trained the model, and would score "
            "its own work: take another extractor"
        )


def leave_out_trainers(extractors: Iterable[Extractor], identity_networks: Mapping[str, str]) -> list[Extractor]:
    """Return the extractors that `refuse_training_network` lets pass, and warn of each other one."""
    kept = []
    for extractor in extractors:
        try:
            refuse_training_network(extractor, identity_networks)
            kept.append(extractor)
        except LitMultiIPError as error:
            logger.warning("%s is left out: %s", extractor.name, error)
    return kept


class Inception(Extractor):
    """Inception v3 with the weights that published FID, KID and IS use, as torchmetrics and torch-fidelity have it.

    Args:
        weights_path: torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`; None downloads it.
        feature: layer of the features, by its width: 64, 192, 768 or 2048.
        antialias: resize as torchmetrics does by default; False resizes as TensorFlow 1 and pytorch-fid do, and is
            named apart.
    """

    URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"

    def __init__(self, weights_path: str | None = None, feature: int = 2048, antialias: bool = True) -> None:
        super().__init__()
        if feature not in (64, 192, 768, 2048):
            raise LitMultiIPError(f"feature is {feature}: Inception has layers of 64, 192, 768 and 2048 features")
        if weights_path is not None:
            if not Path(weights_path).is_file():
                raise FileNotFoundError(f"no Inception weights at {weights_path!r}: fetch {self.URL}")
            # torch-fidelity unpickles whatever the file holds: see first that it holds tensors only
            torch.load(weights_path, map_location="meta", weights_only=True)
        self.network = NoTrainInceptionV3(
            "inception-v3-compat", ["logits_unbiased", str(feature)], weights_path, antialias=antialias
        )
        self.name = f"inception-{feature}" + ("" if antialias else "-tf1")
        self.num_features = feature
        self.num_classes = self.network.fc.out_features  # 1008
        self.freeze()

    def compute(self, images: Tensor) -> Extraction:
        """See `Extractor.compute`."""
        # its public forward returns the first output alone, which would cost a second pass
        logits, features = self.network._torch_fidelity_forward(images)  # (B, 1008), (B, D)
        return Extraction(features, logits)
