"""Encoders of the photos that condition: CLIP, a face-recognition network, or both side by side.

What is encoded has kinds, of which a layout of the adapter takes one or two: `embeds` (CLIP's embedding, the face
network's in its place, or both joined), `tokens` (CLIP's patch tokens before its last layer) and `face` (the face
network's embedding as the FaceID adapters take it).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lit_multiip.backbone.faces import FaceNetwork
from lit_multiip.backbone.layouts import join_rows
from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.data.photos import Photo
from lit_multiip.pixels import square, to_signal, to_tensor

logger = logging.getLogger(__name__)


BLANK = None  # no photo


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


def load_patch_tokens(backbone: Backbone, device: torch.device | str) -> Encoder:
    """CLIP's patch tokens before its last layer, with that of the class: photos => (B, 3, S, S) => (B, T, H) float16.

    `BLANK` in a photo's place is an input of zeros, which stands for no photo as IP-Adapter Plus was trained.
    """
    processor, encoder = backbone.load_image_encoder()
    encoder.to(device)
    side = encoder.config.image_size

    def read(photos: Sequence[Photo | None]) -> Tensor:
        images = [photo.image() for photo in photos if photo is not BLANK]
        found = iter(processor(images, return_tensors="pt").pixel_values if images else ())
        return torch.stack([torch.zeros(3, side, side) if photo is BLANK else next(found) for photo in photos])

    def encode(pixels: Tensor) -> Tensor:
        return encoder(pixel_values=pixels.to(device), output_hidden_states=True).hidden_states[-2].half()

    return Encoder(read, encode)


class PhotoEncoder:
    """What embeds photos for a backbone's layout.

    Args:
        backbone: whose networks embed photos.
        device: of CLIP; face networks run on the CPU.
    """

    def __init__(self, backbone: Backbone, device: torch.device | str = "cpu") -> None:
        self.shapes = backbone.photo_shapes()
        self.encoders = {kind: load_photo_encoder(backbone, kind, device) for kind in self.shapes}

    def __call__(self, photos: Sequence[Photo]) -> Tensor:
        """Return one person's references as `Features.embeds` does, (R, ...) float32; see `replace_missing`."""
        parts = [encoder.encode(encoder.read(photos)).float() for encoder in self.encoders.values()]
        return replace_missing(join_rows(parts), photos[0].person)

    def blank(self) -> Tensor | None:
        """Return what stands for no photo, as `Features.blank` does."""
        if "tokens" not in self.shapes:
            return None
        tokens = self.encoders["tokens"]
        blank = tokens.encode(tokens.read([BLANK])).float()  # (1, T, H)
        return blank_row(blank, self.shapes)


def blank_row(tokens: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> Tensor:
    """Return the row that stands for no photo: patch tokens of an input of zeros (1, T, H), and zeros for a face."""
    parts = [tokens if kind == "tokens" else torch.zeros(1, *shape).to(tokens) for kind, shape in shapes.items()]
    return join_rows(parts)[0]


def load_photo_encoder(backbone: Backbone, kind: str, device: torch.device | str) -> Encoder:
    """Load what encodes one kind of a photo."""
    if kind == "tokens":
        return load_patch_tokens(backbone, device)
    networks = Networks(backbone, device, clip=kind == "embeds", unit=kind == "face")
    return Encoder(networks.read, networks.encode)


class Networks:
    """CLIP's image encoder, a face encoder, or both, to one embedding a photo.

    Args:
        backbone: whose networks embed photos.
        device: of CLIP; face networks run on the CPU.
        clip: whether CLIP has a part, where the backbone uses it.
        unit: give faces an embedding of norm 1, as FaceID was trained, in place of mean square 1, about as CLIP's.
    """

    def __init__(self, backbone: Backbone, device: torch.device | str, clip: bool = True, unit: bool = False) -> None:
        self.clip = load_clip(backbone, device) if clip and backbone.uses_clip else None
        self.faces = None if backbone.face_encoder is None else backbone.face_encoder.load()
        self.device, self.unit = device, unit

    def read(self, photos: Sequence[Photo]) -> tuple[Tensor | None, Tensor | None]:
        """Return CLIP's pixels (B, 3, S, S), and embeddings of faces (B, E).

        A photo without a face gives NaN; of several faces the largest counts. Both are logged.
        """
        images = [photo.image() for photo in photos]
        pixels = None if self.clip is None else self.clip.read(images)
        if self.faces is None:
            return pixels, None
        faces = encode_faces(self.faces, images, self.unit)
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


def replace_missing(embeds: Tensor, person: str) -> Tensor:
    """Put embeddings of one person's other references in the place of those without a face, in turn.

    Args:
        embeds: of the references, (R, ...); a row with NaN is of a photo without a face.
        person: for the message.

    Returns:
        (R, ...); NaN in all rows where no photo has a face: a method then drops the condition.
    """
    missing = embeds.flatten(1).isnan().any(dim=1)  # (R,)
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


def encode_faces(network: FaceNetwork, images: Sequence[Image.Image], unit: bool = False) -> Tensor:
    """Return embeddings of the largest faces, (B, E) float32 of mean square 1, about as CLIP's; NaN without a face.

    Args:
        network: that embeds them.
        images: B of them.
        unit: return embeddings of norm 1.
    """
    rows = torch.cat([network.embed(to_tensor([image])) for image in images])  # (B, E), of norm 1
    return rows if unit else rows * rows.shape[1] ** 0.5


def load_latent_encoder(backbone: Backbone, device: torch.device | str) -> Encoder:
    """Posterior mean and logvar of the VAE: photos => (B, 3, side, side) uint8 => (B, 2C, h, w) float16."""
    vae = backbone.load("vae").to(device)

    def read(photos: Sequence[Photo]) -> Tensor:
        return to_tensor(square(photo.image(), backbone.image_side) for photo in photos)

    def encode(pixels: Tensor) -> Tensor:
        posterior = vae.encode(to_signal(pixels.to(device))).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1).half()

    return Encoder(read, encode)
