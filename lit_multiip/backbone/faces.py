"""Face detectors and recognisers: frozen networks that find a face and say whose it is.

They run on the CPU whatever the device of the images, so that the same image gives the same numbers in every run.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from lit_multiip.backbone.onnx import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    OnnxNetwork,
    Pixels,
    check_normalisation,
    import_faces,
    normalise,
    resized,
    weights_file,
)
from lit_multiip.files import LitMultiIPError, first_line, hash_file, hash_text

YUNET = "opencv/face_detection_yunet/face_detection_yunet_2023mar.onnx"
Landmarks = npt.NDArray[np.float32]  # (5, 2), x and y in px: eyes, nose, corners of the mouth; or (68, 2)

# Where recognisers that were trained on aligned faces (ArcFace, SFace, ...) expect the landmarks in a square of 112 px:
# https://github.com/deepinsight/insightface, arcface_dst
TEMPLATE: Landmarks = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]],
    dtype=np.float32,
)
TEMPLATE_SIDE = 112  # px


class FaceDetector:
    """YuNet by OpenCV: finds the largest face of an image and five landmarks of it.

    Args:
        path: its ONNX file, or `org/repository/file.onnx` on the Hugging Face hub.
        min_score: faces that are less certain are not found.
        side: px of the longer side at which images are looked at. YuNet was trained on faces of about 10 to 300 px.
    """

    def __init__(self, path: str = YUNET, min_score: float = 0.7, side: int = 320) -> None:
        if not 0 < min_score < 1 or side < 32:
            raise LitMultiIPError(f"min_score is {min_score} and side {side}: give a score in 0..1 and at least 32 px")
        self.path, self.side = path, side
        create = import_faces("cv2").FaceDetectorYN.create
        self._network = load_opencv(create, weights_file(path), "", (side, side), min_score)
        self._lock = threading.Lock()  # its input size is state

    def faces(self, pixels: Pixels) -> npt.NDArray[np.float32]:
        """Return OpenCV's rows of all faces, (F, 15), that with the largest box first.

        A row holds, in px of the image, x, y, width, height and the five `Landmarks`, and its score.
        """
        height, width = pixels.shape[:2]
        scale = self.side / max(height, width)
        seen = pixels if scale == 1 else resized(pixels, (round(width * scale), round(height * scale)))
        with self._lock:
            self._network.setInputSize((seen.shape[1], seen.shape[0]))
            _, rows = self._network.detect(to_bgr(seen))  # (F, 15), or None
        found = np.array([] if rows is None else rows, dtype=np.float32).reshape(-1, 15)
        found[:, :14:2] *= width / seen.shape[1]
        found[:, 1:14:2] *= height / seen.shape[0]
        return found[np.argsort(-found[:, 2] * found[:, 3], kind="stable")]

    def boxes(self, pixels: Pixels) -> npt.NDArray[np.float32]:
        """Return x, y, width and height of all faces in px, (F, 4), the largest first."""
        return self.faces(pixels)[:, :4]

    def largest(self, pixels: Pixels) -> npt.NDArray[np.float32] | None:
        """Return the row of the face with the largest box, (15,), or None where no face is found."""
        found = self.faces(pixels)
        return found[0] if len(found) else None

    def landmarks(self, pixels: Pixels) -> Landmarks | None:
        """Return five landmarks of the largest face, or None where no face is found."""
        row = self.largest(pixels)
        return None if row is None else row[4:14].reshape(5, 2)

    def points(self, pixels: Pixels) -> Landmarks | None:
        """Return all landmarks of the largest face that the detector knows, (L, 2), or None where no face is found."""
        return self.landmarks(pixels)


class FaceNetwork:
    """Any face-recognition network in an ONNX file, (B, 3, S, S) -> (B, E), by onnxruntime.

    It sees a fixed square of the image, or, with a detector, the largest face turned and scaled so that its landmarks
    lie where recognisers are trained to have them. A face that is not found has an embedding of NaN.

    Args:
        path: the ONNX file, or `org/repository/file.onnx` on the Hugging Face hub.
        side: px of the network's square input; None reads it from the file, where it is fixed there.
        mean: of each colour channel in 0..1, in the order of `colours`, subtracted before the division by `std`.
        std: of each colour channel. ArcFace, for one, takes 0.5 for all of both.
        colours: order of the channels that the network expects, `rgb` or `bgr`.
        crop: the square of the image that is seen without a detector: its centre, as shares of width and height, and
            its side, as share of the shorter side. (0.5, 0.48, 0.448) is the 112 px square centred at (125, 120) of
            LFW's 250 px.
        detector: finds and aligns the face in place of `crop`.
    """

    def __init__(
        self,
        path: str,
        side: int | None = None,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        colours: str = "rgb",
        crop: tuple[float, float, float] = (0.5, 0.5, 1.0),
        detector: FaceDetector | None = None,
    ) -> None:
        check_normalisation(std, colours)
        x, y, share = crop
        if not (0 < share <= 1 and 0 <= x <= 1 and 0 <= y <= 1):
            raise LitMultiIPError(
                f"crop is {tuple(crop)}: its centre and its side are shares in 0..1, the side above zero"
            )
        self._network = OnnxNetwork(path, side)
        self.side, self.file, self.sha256 = self._network.side, self._network.file, self._network.sha256
        self.width = self._network.widths[0]  # E
        if self.width < 2:
            raise LitMultiIPError(
                f"'{self.file}' gives one number an image: give a network whose first output is (B, E)"
            )
        self.colours, self.crop, self.detector = colours, (x, y, share), detector
        self.path, self.mean, self.std = path, mean, std

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Return embeddings of unit norm, uint8 (B, 3, H, W) -> (B, E) float32; rows of NaN where no face is found."""
        faces = [self._face(pixels) for pixels in arrays_of(images)]
        seen = [face for face in faces if face is not None]
        found = np.empty((0, self.width), dtype=np.float32)
        if seen:
            [found] = self._network(normalise(np.stack(seen), self.mean, self.std, self.colours))  # (F, E)
        rows = rows_with_gaps(found, [face is not None for face in faces])
        return F.normalize(rows, dim=-1).to(images.device)

    def _face(self, pixels: Pixels) -> Pixels | None:
        """Return what the network sees of an image, (S, S, 3); None where there is no face."""
        if self.detector is not None:
            landmarks = self.detector.landmarks(pixels)
            return None if landmarks is None else aligned(pixels, landmarks, self.side)
        height, width = pixels.shape[:2]
        x, y, share = self.crop
        edge = share * min(height, width)
        left = min(max(x * width - edge / 2, 0.0), width - edge)
        top = min(max(y * height - edge / 2, 0.0), height - edge)
        return resized(pixels, (self.side, self.side), (left, top, left + edge, top + edge))


@dataclass(frozen=True)
class FaceEncoder:
    """A face-recognition network whose embedding conditions. It sees the largest face of a photo; see FaceNetwork.

    Args:
        path: its ONNX file, (B, 3, S, S) -> (B, E), or `org/repository/file.onnx` on the hub.
        beside_clip: join its embedding to CLIP's, (D + E,), rather than take its place.
        detector: of YuNet, by whose landmarks faces are aligned; None shows the network `crop` of every photo.
        side: px of the network's input; None reads it from the file.
        mean: of each colour channel in 0..1, subtracted before the division by `std`.
        std: of each colour channel.
        colours: order of the channels, `rgb` or `bgr`.
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
        """Load the network and the detector."""
        detector = None if self.detector is None else FaceDetector(self.detector)
        return FaceNetwork(self.path, self.side, self.mean, self.std, self.colours, self.crop, detector)

    def sha256(self) -> str:
        """Return the SHA-256 of the network's file."""
        return hash_file(weights_file(self.path))

    def fingerprint(self) -> str:
        """Name the network's content and what is shown to it; 16 hexadecimal digits."""
        detector = None if self.detector is None else hash_file(weights_file(self.detector))
        facts = asdict(self) | {"path": self.sha256(), "detector": detector}
        return hash_text(json.dumps(facts, sort_keys=True))[:16]


def aligned(pixels: Pixels, landmarks: Landmarks, side: int = TEMPLATE_SIDE) -> Pixels:
    """Turn, scale and shift an image so that landmarks come to lie on `TEMPLATE`, and cut the square out, (S, S, 3).

    The similarity is that of least squares, x' = s R x + t (Umeyama 1991).
    """
    cv2 = import_faces("cv2")
    target = TEMPLATE.astype(np.float64) * side / TEMPLATE_SIDE
    source = landmarks.astype(np.float64)
    centre, target_centre = source.mean(axis=0), target.mean(axis=0)
    a, b = source - centre, target - target_centre  # (5, 2)
    u, singular, vt = np.linalg.svd(b.T @ a)
    sign = np.array([1.0, np.sign(np.linalg.det(u @ vt)) or 1.0])  # a rotation, and no mirroring
    matrix = (u * sign) @ vt * (singular @ sign) / max((a**2).sum(), 1e-12)  # s R, (2, 2)
    shift = target_centre - matrix @ centre
    warped = cv2.warpAffine(np.ascontiguousarray(pixels), np.column_stack([matrix, shift]), (side, side))
    return np.asarray(warped, dtype=np.uint8)


def load_opencv(create: Any, file: Path, *options: Any) -> Any:
    """Build one of OpenCV's networks from a file."""
    try:
        return create(str(file), *options)
    except import_faces("cv2").error as error:
        raise LitMultiIPError(f"'{file}' is no ONNX network that OpenCV reads ({first_line(error)})") from error


def arrays_of(images: Tensor) -> Iterator[Pixels]:
    """Yield each image of (B, 3, H, W) as an array, (H, W, 3)."""
    yield from images.permute(0, 2, 3, 1).contiguous().cpu().numpy()  # (B, 3, H, W) => (H, W, 3)


def to_bgr(pixels: Pixels) -> Pixels:
    """Turn RGB into the order of channels that OpenCV takes."""
    return np.ascontiguousarray(pixels[..., ::-1])


def rows_with_gaps(found: npt.NDArray[np.float32], present: Sequence[bool]) -> Tensor:
    """Return rows of `found` (F, E) where `present` (B,), and NaN elsewhere, (B, E)."""
    rows = np.full((len(present), found.shape[1]), np.nan, dtype=np.float32)
    rows[np.asarray(present, dtype=bool)] = found
    return torch.from_numpy(rows)
