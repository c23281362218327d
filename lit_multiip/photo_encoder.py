"""What makes an embedding of a photo that conditions: CLIP, a face-recognition network, or both side by side."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_multiip.backbone import fingerprint_image_encoder, load_embed_dim, load_image_encoder
from lit_multiip.data.people import Photo

if TYPE_CHECKING:
    from lit_multiip.evaluation.faces import FaceRecognition

YUNET = "opencv/face_detection_yunet/face_detection_yunet_2023mar.onnx"


@dataclass(frozen=True)
class FaceEncoder:
    """A face-recognition network whose embedding conditions. It sees the largest face of a photo; see FaceRecognition.

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

    def load(self) -> FaceRecognition:
        """Load the network, and the detector.

        Raises:
            FileNotFoundError: there is no such file, here or on the hub.
            ValueError: onnxruntime or OpenCV is not installed, or the file is no such network.
        """
        from lit_multiip.evaluation.faces import FaceDetector, FaceRecognition

        detector = None if self.detector is None else FaceDetector(self.detector)
        return FaceRecognition(
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
        from lit_multiip.evaluation.faces import weights_file

        return hashlib.sha256(weights_file(self.path).read_bytes()).hexdigest()

    def fingerprint(self) -> str:
        """Name the network's content and what is shown to it; 16 hexadecimal digits."""
        facts = asdict(self) | {"path": self.sha256()}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


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
        self.clip: Any = None
        if uses_clip(face_encoder):
            processor, encoder = load_image_encoder(backbone, image_encoder)
            self.clip = processor, encoder.to(device)
        self.faces = None if face_encoder is None else face_encoder.load()
        self.device = device
        self.without_face: list[Photo] = []  # of those encoded so far

    def __call__(self, photos: Sequence[Photo]) -> Tensor:
        """Embeddings of photos, (B, D) float32. Where no face is found, the face's part is zero, as a dropped one."""
        parts = []
        if self.clip is not None:
            processor, encoder = self.clip
            parts.append(encode_photos(processor, encoder, photos))
        if self.faces is not None:
            found = encode_faces(self.faces, photos)
            missing = found.isnan().any(dim=1)
            self.without_face += [photo for photo, gone in zip(photos, missing.tolist(), strict=True) if gone]
            parts.append(found.nan_to_num(0.0).to(self.device))
        return torch.cat(parts, dim=1)


def encode_photos(processor: Any, encoder: Any, photos: Sequence[Photo]) -> Tensor:
    """CLIP image embeddings of photos, (B, D) float32."""
    pixels = processor([photo.image() for photo in photos], return_tensors="pt").pixel_values
    return encoder(pixel_values=pixels.to(encoder.device)).image_embeds.float()


def encode_faces(network: FaceRecognition, photos: Sequence[Photo]) -> Tensor:
    """Embeddings of the largest faces, (B, E) float32 with a mean square of 1, as CLIP's about have; else NaN."""
    from lit_multiip.features import to_tensor

    rows = [network.embed(to_tensor([photo.image()])) for photo in photos]  # (1, E), of norm 1
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
