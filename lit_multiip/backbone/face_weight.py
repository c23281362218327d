"""Weights of the places of a training loss: more in the face, where a person is told from others, less around it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lit_multiip.backbone.face_crop import find_faces
from lit_multiip.backbone.faces import YUNET
from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.data.photos import DataError, FaceBox, Photo

logger = logging.getLogger(__name__)


@dataclass
class FaceMaps:
    """Makes the map of a photo from the box of its face.

    Attributes:
        boxes: by photo; None where no face is found.
        weight: of a place in the face, by that of a place outside.
        shape: h and w of the latents.
    """

    boxes: Mapping[Photo, FaceBox | None]
    weight: float
    shape: tuple[int, int]

    def __call__(self, photo: Photo) -> Tensor:
        """Return the weights of the latent's places, (h, w) float32 of mean 1; all 1 without a face."""
        box = self.boxes[photo]
        if box is None:
            return torch.ones(self.shape)
        edge = min(box.photo_width, box.photo_height)  # of the central square, which is encoded
        left, top = box.left - (box.photo_width - edge) // 2, box.top - (box.photo_height - edge) // 2
        height, width = self.shape
        rows = _overlaps(top / edge, (top + box.height) / edge, height)
        columns = _overlaps(left / edge, (left + box.width) / edge, width)
        weights = 1 + (self.weight - 1) * rows[:, None] * columns  # (h, w)
        return weights / weights.mean()


@dataclass
class FaceWeight:
    """Multiplies the squared error by a map of mean 1 that is larger in the box of the largest face.

    A photo in which no face is found weighs all places alike. Where the faces lie is kept in the feature store.

    Args:
        weight: of a place in the face, by that of a place outside.
        detector: `dlib`, or YuNet: its file or `org/repository/file.onnx` on the hub; not needed for drawn portraits,
            whose faces are known.
    """

    weight: float = 2.0
    detector: str = YUNET

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise DataError(f"data.face_weight.weight={self.weight} must be above 0: 1 weighs all places alike")

    def maps(self, photos: Sequence[Photo], backbone: Backbone, cache_dir: str | Path) -> FaceMaps:
        """Find the faces of photos, which must be readable."""
        boxes = {photo: photo.face_box() for photo in photos}
        unknown = [photo for photo, box in boxes.items() if box is None]
        if unknown:
            rows = find_faces(self.detector, unknown, cache_dir)
            boxes |= {photo: FaceBox(*row[:4], *row[5:]) for photo, row in rows.items() if row[4] > 0}
        missing = [photo for photo, box in boxes.items() if box is None]
        if missing:
            one = f"'{missing[0].name}' of '{missing[0].person}'"
            such = f"{len(missing)} of {len(boxes)} photos have no face, such as {one}"
            if len(missing) == len(boxes):
                raise DataError(f"{such}: leave data.face_weight out, or give a detector that knows such faces")
            logger.warning("%s: all their places weigh alike", such)
        return FaceMaps(boxes, self.weight, backbone.latent_shape[1:])


def _overlaps(start: float, stop: float, cells: int) -> Tensor:
    """Return the share of each of `cells` equal parts of [0, 1] that lies in [start, stop], (cells,)."""
    edges = torch.arange(cells + 1, dtype=torch.float64) / cells
    inside = edges.clamp(min(max(start, 0), 1), min(max(stop, 0), 1))
    return (inside.diff() * cells).float()
