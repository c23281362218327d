"""What makes an embedding of a photo that conditions: CLIP, a face-recognition network, or both side by side."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lit_multiip.backbone.faces import YUNET, FaceDetector, FaceNetwork, weights_file
from lit_multiip.backbone.pipeline import (
    fingerprint_image_encoder,
    load_component,
    load_embed_dim,
    load_image_encoder,
)
from lit_multiip.data.photos import Photo
from lit_multiip.files import hash_file, hash_text
from lit_multiip.pixels import square, to_signal, to_tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FaceEncoder:
    """A face-recognition network whose embedding conditions. It sees the largest face of a photo; see FaceNetwork.

    Args:
        path: its ONNX file, (B, 3, S, S) -> (B, E), or ``org/repository/file.onnx`` on the hub.
        beside_clip: join its embedding to CLIP's, (D + E,), rather than take its place.
        detector: of YuNet, by whose landmarks faces are aligned; None shows the network ``crop`` of every photo.
        side: px of the network's input; None reads it from the file.
        mean: of each colour channel in 0..1, subtracted before the division by ``std``.
        std: of each colour channel.
        colours: order of the channels, ``rgb`` or ``bgr``.
        crop: centre and side of the square that is seen without a detector, as shares of the photo.
    """

    path: str
    beside_clip: bool = False
    detector: str | None = YUNET
    side: int | None = None
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    colours: str = "rgb"
    crop: tuple[float, float, float] = (0.5, 0.5, 1.0)

    def load(self) -> FaceNetwork:
        """Load the network, and the detector.

        Raises:
            FileNotFoundError: there is no such file, here or on the hub.
            ValueError: onnxruntime or OpenCV is not installed, or the file is no such network.
        """
        detector = None if self.detector is None else FaceDetector(self.detector)
        return FaceNetwork(
            self.path,
            side=self.side,
            mean=self.mean,
            std=self.std,
            colours=self.colours,
            crop=self.crop,
            detector=detector,
        )

    def sha256(self) -> str:
        """Of the network's file."""
        return hash_file(weights_file(self.path))

    def fingerprint(self) -> str:
        """Name the network's content and what is shown to it; 16 hexadecimal digits."""
        facts = asdict(self) | {"path": self.sha256()}
        return hash_text(json.dumps(facts, sort_keys=True))[:16]


class Encoder(NamedTuple):
    """A frozen encoder in two parts: the CPU's, which may run ahead in other threads or processes, and the device's."""

    read: Callable[[Sequence[Any]], Any]  # photos, pictures or prompts => a batch
    encode: Callable[[Any], Tensor]  # batch => rows of features, on the device


def load_clip(backbone: str, image_encoder: str | None, device: torch.device | str) -> Encoder:
    """CLIP image embeddings: pictures => (B, 3, S, S) => (B, D) float32."""
    processor, encoder = load_image_encoder(backbone, image_encoder)
    encoder.to(device)

    def encode(pixels: Tensor) -> Tensor:
        return encoder(pixel_values=pixels.to(device)).image_embeds.float()

    return Encoder(partial(_preprocess, processor), encode)


def _preprocess(processor: Any, images: Sequence[Image.Image]) -> Tensor:
    return processor(list(images), return_tensors="pt").pixel_values


class PhotoEncoder:
    """CLIP's image encoder, a face encoder, or both.

    Args:
        backbone: anything ``resolve_backbone`` takes.
        image_encoder: CLIP, anything ``load_image_encoder`` takes; None is the backbone's own.
        face_encoder: takes CLIP's place or stands beside it.
        device: of CLIP; face networks run on the CPU.
    """

    def __init__(
        self,
        backbone: str,
        image_encoder: str | None = None,
        face_encoder: FaceEncoder | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.clip = load_clip(backbone, image_encoder, device) if uses_clip(face_encoder) else None
        self.faces = None if face_encoder is None else face_encoder.load()
        self.device = device

    def read(self, photos: Sequence[Photo]) -> tuple[Tensor | None, Tensor | None]:
        """CLIP's pixels (B, 3, S, S), and embeddings of faces (B, E).

        Where no face is found these are zero, as if dropped; of several faces the largest counts. Either is told.
        """
        images = [photo.image() for photo in photos]
        pixels = None if self.clip is None else self.clip.read(images)
        if self.faces is None:
            return pixels, None
        faces = encode_faces(self.faces, images)
        for photo, image, missing in zip(photos, images, faces.isnan().any(dim=1).tolist(), strict=True):
            if missing:
                logger.warning("%s of %s: no face is found, so that no face conditions", photo.name, photo.person)
            elif self.faces.detector is not None:
                count = len(self.faces.detector.faces(np.asarray(image.convert("RGB"))))
                if count > 1:
                    logger.warning("%s of %s: of %d faces the largest conditions", photo.name, photo.person, count)
        return pixels, faces.nan_to_num(0.0)

    def encode(self, batch: tuple[Tensor | None, Tensor | None]) -> Tensor:
        """Embeddings of what was read, (B, D) float32."""
        pixels, faces = batch
        parts = [] if self.clip is None or pixels is None else [self.clip.encode(pixels)]
        return torch.cat(parts + ([] if faces is None else [faces.to(self.device)]), dim=1)

    def __call__(self, photos: Sequence[Photo]) -> Tensor:
        """Embeddings of photos, (B, D) float32."""
        return self.encode(self.read(photos))


def encode_faces(network: FaceNetwork, images: Sequence[Image.Image]) -> Tensor:
    """Embeddings of the largest faces, (B, E) float32 with a mean square of 1, as CLIP's about have; else NaN."""
    from lit_multiip.pixels import to_tensor

    rows = [network.embed(to_tensor([image])) for image in images]  # (1, E), of norm 1
    return torch.cat(rows) * rows[0].shape[1] ** 0.5


def uses_clip(face_encoder: FaceEncoder | None) -> bool:
    """Whether CLIP's image encoder has a part in the embedding."""
    return face_encoder is None or face_encoder.beside_clip


def photo_embed_dim(backbone: str, image_encoder: str | None = None, face_encoder: FaceEncoder | None = None) -> int:
    """Width D of the embeddings."""
    clip = load_embed_dim(backbone, image_encoder) if uses_clip(face_encoder) else 0
    return clip + (0 if face_encoder is None else face_encoder.load().width)


def fingerprint_photo_encoder(
    backbone: str, image_encoder: str | None = None, face_encoder: FaceEncoder | None = None
) -> str:
    """Name encoders and preprocessing by their content, for cache keys and checkpoints."""
    clip = fingerprint_image_encoder(backbone, image_encoder) if uses_clip(face_encoder) else ""
    return clip + ("" if face_encoder is None else face_encoder.fingerprint())


def name_photo_encoder(backbone: str, image_encoder: str | None = None, face_encoder: FaceEncoder | None = None) -> str:
    """Say in words what makes the embeddings."""
    clip = [image_encoder or f"that of {backbone}"] if uses_clip(face_encoder) else []
    return " beside ".join([*([] if face_encoder is None else [face_encoder.path]), *clip])


def load_latent_encoder(backbone: str, side: int, device: torch.device | str) -> Encoder:
    """Posterior mean and logvar of the VAE: pictures => (B, 3, side, side) uint8 => (B, 2C, h, w) float16."""
    vae = load_component(backbone, "vae").to(device)

    def encode(pixels: Tensor) -> Tensor:
        posterior = vae.encode(to_signal(pixels.to(device))).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1).half()

    return Encoder(partial(_read_latent, side), encode)


def _read_latent(side: int, images: Sequence[Image.Image]) -> Tensor:
    return to_tensor(square(image, side) for image in images)


def encode_prompts(pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """What a pipeline's own ``encode_prompt`` makes of prompts, under its own names; what is too long is cut, and told.

    Args:
        pipe: of ``load_text_pipeline``.
        prompts: B of them.

    Returns:
        ``prompt_embeds``, text states (B, L, E), and of SDXL ``pooled_prompt_embeds`` (B, P).
    """
    length = pipe.tokenizer.model_max_length
    cut = [prompt for prompt in prompts if len(pipe.tokenizer(prompt, verbose=False).input_ids) > length]
    if cut:
        logger.warning("%d prompts are cut to %d tokens, such as '%s'", len(cut), length, cut[0][:100])
    options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    with _without_warnings():  # of each cut prompt
        states = pipe.encode_prompt(list(prompts), device=pipe.text_encoder.device, **options)
    return {"prompt_embeds": states[0]} | ({"pooled_prompt_embeds": states[2]} if len(states) == 4 else {})


@contextmanager
def _without_warnings() -> Iterator[None]:
    log = logging.getLogger("diffusers")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
