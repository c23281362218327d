"""Encoders of the photos that condition: CLIP, a face-recognition network, or both side by side."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lit_multiip.backbone.faces import FaceNetwork
from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.data.photos import Photo
from lit_multiip.pixels import square, to_signal, to_tensor

logger = logging.getLogger(__name__)


class Encoder(NamedTuple):
    """A frozen encoder in two parts: `read` on the CPU, which may run in other threads, and `encode` on the device."""

    read: Callable[[Sequence[Any]], Any]  # photos, pictures or prompts => a batch
    encode: Callable[[Any], Tensor]  # batch => rows of features, on the device


def load_clip(backbone: Backbone, device: torch.device | str) -> Encoder:
    """CLIP image embeddings: pictures => (B, 3, S, S) => (B, D) float32."""
    processor, encoder = backbone.load_image_encoder()
    encoder.to(device)

    def read(images: Sequence[Image.Image]) -> Tensor:
        return processor(list(images), return_tensors="pt").pixel_values

    def encode(pixels: Tensor) -> Tensor:
        return encoder(pixel_values=pixels.to(device)).image_embeds.float()

    return Encoder(read, encode)


class PhotoEncoder:
    """CLIP's image encoder, a face encoder, or both.

    Args:
        backbone: whose networks embed photos.
        device: of CLIP; face networks run on the CPU.
    """

    def __init__(self, backbone: Backbone, device: torch.device | str = "cpu") -> None:
        self.clip = load_clip(backbone, device) if backbone.uses_clip else None
        self.faces = None if backbone.face_encoder is None else backbone.face_encoder.load()
        self.device = device

    def read(self, photos: Sequence[Photo]) -> tuple[Tensor | None, Tensor | None]:
        """Return CLIP's pixels (B, 3, S, S), and embeddings of faces (B, E).

        A photo without a face gives NaN; of several faces the largest counts. Both are logged.
        """
        images = [photo.image() for photo in photos]
        pixels = None if self.clip is None else self.clip.read(images)
        if self.faces is None:
            return pixels, None
        faces = encode_faces(self.faces, images)
        for photo, image, missing in zip(photos, images, faces.isnan().any(dim=1).tolist(), strict=True):
            if missing:
                logger.warning("%s of %s: no face is found, other photos take its place", photo.name, photo.person)
            elif self.faces.detector is not None:
                count = len(self.faces.detector.faces(np.asarray(image.convert("RGB"))))
                if count > 1:
                    logger.warning("%s of %s: of %d faces the largest conditions", photo.name, photo.person, count)
        return pixels, faces

    def encode(self, batch: tuple[Tensor | None, Tensor | None]) -> Tensor:
        """Return embeddings of what was read, (B, D) float32; NaN for a photo without a face."""
        pixels, faces = batch
        parts = [] if self.clip is None or pixels is None else [self.clip.encode(pixels)]
        if faces is None:
            return parts[0]
        faces = faces.to(self.device)
        missing = faces.isnan().any(dim=1, keepdim=True)  # (B, 1)
        return torch.cat([*parts, faces], dim=1).masked_fill(missing, float("nan"))

    def __call__(self, photos: Sequence[Photo]) -> Tensor:
        """Return embeddings of one person's references, (R, D) float32; see `replace_missing`."""
        return replace_missing(self.encode(self.read(photos)), photos[0].person)


def replace_missing(embeds: Tensor, person: str) -> Tensor:
    """Put embeddings of one person's other references in the place of those without a face, in turn.

    Args:
        embeds: of the references, (R, D); a row of NaN is of a photo without a face.
        person: for the message.

    Returns:
        (R, D); all NaN where no photo has a face: a method then drops the condition.
    """
    missing = embeds.isnan().any(dim=1)  # (R,)
    if not missing.any():
        return embeds
    if missing.all():
        _warn_of_no_face(person)
        return embeds
    source, faces = torch.arange(len(embeds), device=embeds.device), (~missing).nonzero()[:, 0]
    source[missing] = faces[torch.arange(len(embeds) - len(faces), device=embeds.device) % len(faces)]
    return embeds[source]


@cache
def _warn_of_no_face(person: str) -> None:
    logger.warning("%s: no reference shows a face, so they condition as if dropped", person)


def encode_faces(network: FaceNetwork, images: Sequence[Image.Image]) -> Tensor:
    """Return embeddings of the largest faces, (B, E) float32 of mean square 1, about as CLIP's; NaN without a face."""
    rows = [network.embed(to_tensor([image])) for image in images]  # (1, E), of norm 1
    return torch.cat(rows) * rows[0].shape[1] ** 0.5


def load_latent_encoder(backbone: Backbone, device: torch.device | str) -> Encoder:
    """Posterior mean and logvar of the VAE: photos => (B, 3, side, side) uint8 => (B, 2C, h, w) float16."""
    vae = backbone.load("vae").to(device)

    def read(photos: Sequence[Photo]) -> Tensor:
        return to_tensor(square(photo.image(), backbone.image_side) for photo in photos)

    def encode(pixels: Tensor) -> Tensor:
        posterior = vae.encode(to_signal(pixels.to(device))).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1).half()

    return Encoder(read, encode)
