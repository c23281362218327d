"""dlib's face detector, landmarks and descriptor, whose models pip installs: nothing is fetched from a hub."""

from __future__ import annotations

import threading
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lit_multiip.backbone.faces import FaceDetector, Landmarks
from lit_multiip.backbone.onnx import Pixels, import_faces, resized, weights_file
from lit_multiip.files import LitMultiIPError, hash_file, hash_text

DLIB = "dlib"  # in place of YuNet's file, where a detector is chosen by a string
FIVE = "shape_predictor_5_face_landmarks.dat"  # corners of the eyes and the nose
ALL_68 = "shape_predictor_68_face_landmarks.dat"  # trained on 300-W, whose licence excludes commercial use
DESCRIPTOR = "dlib_face_recognition_resnet_model_v1.dat"
CHIP_SIDE = 150  # px of the aligned face that the descriptor's network sees


class DlibDetector(FaceDetector):
    """dlib's detector of upright faces (HOG and a linear classifier), in place of YuNet.

    It needs no file of its own. Landmarks need one that comes with `face-recognition-models`.

    Args:
        side: px of the longer side at which images are looked at; faces of less than 80 px there are not found.
        min_score: faces that are less certain are not found; 0 is dlib's own threshold.
    """

    def __init__(self, side: int = 320, min_score: float = 0.0) -> None:
        if side < 80:
            raise LitMultiIPError(f"side is {side}: dlib finds no face of less than 80 px, so give at least that")
        self.side, self.min_score = side, min_score
        self._detector = import_faces("dlib").get_frontal_face_detector()
        self._lock = threading.Lock()  # its buffers are state

    def look(self, pixels: Pixels) -> tuple[Pixels, list[tuple[Any, float]]]:
        """Return an image at the detector's side, and dlib's rectangles and scores in it, the largest first."""
        scale = self.side / max(pixels.shape[:2])
        size = round(pixels.shape[1] * scale), round(pixels.shape[0] * scale)
        seen = np.ascontiguousarray(pixels if scale == 1 else resized(pixels, size))
        with self._lock:
            boxes, scores, _ = self._detector.run(seen, 0, self.min_score)
        return seen, sorted(zip(boxes, scores, strict=True), key=lambda found: -found[0].area())

    def boxes(self, pixels: Pixels) -> npt.NDArray[np.float32]:
        """See `FaceDetector.boxes`."""
        seen, found = self.look(pixels)
        rows = [[box.left(), box.top(), box.width(), box.height()] for box, _ in found]
        return np.array(rows, np.float32).reshape(-1, 4) * _scale(pixels, seen)

    def faces(self, pixels: Pixels) -> npt.NDArray[np.float32]:
        """Return rows of all faces as OpenCV has them, (F, 15); see `FaceDetector.faces`."""
        seen, found = self.look(pixels)
        rows = [
            [box.left(), box.top(), box.width(), box.height(), *five_of(self._points(seen, box)).ravel(), score]
            for box, score in found
        ]
        faces = np.array(rows, np.float32).reshape(-1, 15)
        faces[:, :14] *= _scale(pixels, seen)
        return faces

    def points(self, pixels: Pixels) -> Landmarks | None:
        """Return the 68 landmarks of the largest face, (68, 2), or None where no face is found.

        Their order is that of iBUG's 300-W: jaw 0-16, brows 17-26, nose 27-35, eyes 36-47, mouth 48-67.
        """
        seen, found = self.look(pixels)
        return self._points(seen, found[0][0]) * _scale(pixels, seen) if found else None

    @cached_property
    def _predictor(self) -> Any:
        return import_faces("dlib").shape_predictor(str(model_file(ALL_68)))

    def _points(self, seen: Pixels, box: Any) -> Landmarks:
        return np.array([(point.x, point.y) for point in self._predictor(seen, box).parts()], np.float32)


class DlibDescriptor:
    """dlib's 128 numbers of the largest face of an image, aligned by the corners of its eyes and its nose.

    Args:
        detector: finds the face.
    """

    def __init__(self, detector: DlibDetector) -> None:
        dlib, self.file, self.detector = import_faces("dlib"), model_file(DESCRIPTOR), detector
        self._predictor = dlib.shape_predictor(str(model_file(FIVE)))
        self._network = dlib.face_recognition_model_v1(str(self.file))

    def __call__(self, pixels: Pixels) -> npt.NDArray[np.float32] | None:
        """Return the descriptor, (128,), not centred and not of unit norm; None where no face is found."""
        seen, found = self.detector.look(pixels)
        if not found:
            return None
        face = import_faces("dlib").get_face_chip(seen, self._predictor(seen, found[0][0]), CHIP_SIDE)  # (150, 150, 3)
        return np.array(self._network.compute_face_descriptor(face), np.float32)


def five_of(points: Landmarks) -> Landmarks:
    """Return eyes, tip of the nose and corners of the mouth, (5, 2), of 68 landmarks or of these five themselves."""
    if len(points) == 5:
        return points
    parts = points[36:42].mean(axis=0), points[42:48].mean(axis=0), points[30], points[48], points[54]
    return np.stack(parts).astype(np.float32)


def load_detector(given: str) -> FaceDetector:
    """Return dlib's detector for `dlib`, else YuNet of a file or `org/repository/file.onnx` on the hub."""
    return DlibDetector() if given == DLIB else FaceDetector(given)


def detector_digest(given: str) -> str:
    """Name what a detector finds by 16 hexadecimal digits: the content of YuNet's file, or the version of dlib."""
    if given == DLIB:
        return hash_text(f"dlib {import_faces('dlib').__version__} {DlibDetector().side}")[:16]
    return hash_file(weights_file(given))[:16]


def model_file(name: str) -> Path:
    """Return the path of a model that `face-recognition-models` installs.

    The package itself is not imported, for its code needs `pkg_resources`, which setuptools has no more.
    """
    spec = find_spec("face_recognition_models")
    for folder in [] if spec is None else spec.submodule_search_locations or []:
        if (file := Path(folder) / "models" / name).is_file():
            return file
    raise LitMultiIPError(
        f"this needs {name} of face-recognition-models, which is not installed: pip install 'lit_multiip[faces]'"
    )


def _scale(pixels: Pixels, seen: Pixels) -> float:
    return max(pixels.shape[:2]) / max(seen.shape[:2])
