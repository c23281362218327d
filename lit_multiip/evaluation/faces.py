"""Face recognisers as extractors: who is shown in photos of real people, and whether a face is found at all.

They give an embedding of identity and no features: FID, KID and diversity are for other extractors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lit_multiip.backbone.dlib_faces import DESCRIPTOR, DlibDescriptor, DlibDetector
from lit_multiip.backbone.faces import (
    TEMPLATE_SIDE,
    FaceDetector,
    FaceNetwork,
    arrays_of,
    load_opencv,
    rows_with_gaps,
    to_bgr,
)
from lit_multiip.backbone.onnx import IMAGENET_MEAN, IMAGENET_STD, Pixels, import_faces, weights_file
from lit_multiip.evaluation.extractors import Extraction, Extractor
from lit_multiip.evaluation.reading import FaceReader
from lit_multiip.files import LitMultiIPError, first_line, hash_file, hash_text, package_file

SFACE = "opencv/face_recognition_sface/face_recognition_sface_2021dec.onnx"


class FaceRecognition(Extractor):
    """Any face-recognition network in an ONNX file, as `FaceNetwork` takes it, as an extractor of identity.

    Args:
        path: the ONNX file, or `org/repository/file.onnx` on the Hugging Face hub.
        name: part of every score's key; None takes the file's.
        side: as `FaceNetwork`, and so are the next five.
        mean: of each colour channel.
        std: of each colour channel.
        colours: order of the channels.
        crop: the square that is seen without a detector.
        detector: finds and aligns the face.
    """

    can_identify = True

    def __init__(
        self,
        path: str,
        name: str | None = None,
        side: int | None = None,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        colours: str = "rgb",
        crop: tuple[float, float, float] = (0.5, 0.5, 1.0),
        detector: FaceDetector | None = None,
    ) -> None:
        super().__init__()
        self.network = FaceNetwork(path, side, mean, std, colours, crop, detector)
        self.name = name or re.sub(r"[^\w.-]", "_", self.network.file.stem)
        self.source, self.sha256 = path, self.network.sha256
        self.freeze()

    def compute(self, images: Tensor) -> Extraction:
        """See `Extractor.compute`."""
        return Extraction(embedding=self.network.embed(images))


class SFace(Extractor):
    """SFace by OpenCV, on the largest face that YuNet finds, aligned by its landmarks.

    Its authors report 99.60 % on LFW's pairs, at a cosine of 0.363. A face that is not found has an embedding of NaN.

    Args:
        path: the ONNX file, or `org/repository/file.onnx` on the Hugging Face hub.
        detector: finds the face; None is YuNet from the hub.
        name: part of every score's key.
    """

    can_identify = True
    same_person = 0.363

    def __init__(self, path: str = SFACE, detector: FaceDetector | None = None, name: str = "sface") -> None:
        super().__init__()
        file = weights_file(path)
        self._network = load_opencv(import_faces("cv2").FaceRecognizerSF.create, file, "")
        self.detector = detector if detector is not None else FaceDetector()
        self.name, self.source, self.sha256 = name, path, hash_file(file)
        blank = np.zeros((TEMPLATE_SIDE, TEMPLATE_SIDE, 3), dtype=np.uint8)
        self._width = self._network.feature(blank).size
        self.freeze()

    def compute(self, images: Tensor) -> Extraction:
        """See `Extractor.compute`."""
        found, present = [], []
        for pixels in arrays_of(images):
            row = self.detector.largest(pixels)
            present.append(row is not None)
            if row is not None:
                face = self._network.alignCrop(to_bgr(pixels), row)  # (112, 112, 3)
                found.append(np.array(self._network.feature(face), dtype=np.float32).reshape(-1))
        embeddings = np.stack(found) if found else np.empty((0, self._width), dtype=np.float32)
        return Extraction(embedding=rows_with_gaps(embeddings, present).to(images.device))


class Dlib(Extractor):
    """dlib's recogniser, and what its landmarks read of the prompt: all that it needs, pip installs.

    Its 128 numbers are compared by distance where they come from, and have a large mean, which makes all people alike
    by cosine. So the mean descriptor of people is subtracted before. That mean is a constant of this extractor, and not
    of a test's data: the same image has the same score in every run, and a test without training people has scores.

    A face that is not found has an embedding of NaN, and its image no `prompt`.

    Args:
        mean: a .npy file of 128 numbers that are subtracted, as `mean_descriptor` makes them; None takes those of 1,000
            people of LFW with fewer than ten photos.
        side: px of the longer side at which images are looked at; faces of less than 80 px there are not found.
        words: what the prompts say, where `caption --by landmarks` was given other words; see `FaceReader`.
        name: part of every score's key.
    """

    can_identify = True
    same_person = 0.5  # see tools/README.md
    MEAN = "evaluation/dlib_mean.npy"

    def __init__(
        self,
        mean: str | None = None,
        side: int = 320,
        words: Mapping[str, Mapping[str, str]] | None = None,
        name: str = "dlib",
    ) -> None:
        super().__init__()
        self.detector = DlibDetector(side)
        self._describe = DlibDescriptor(self.detector)
        self.mean = read_mean(package_file(self.MEAN) if mean is None else Path(mean).expanduser())
        self._reader = FaceReader(self.detector, words)
        self.name, self.source = name, DESCRIPTOR
        # tests by another mean are not compared either
        self.sha256 = hash_text(hash_file(self._describe.file) + self.mean.tobytes().hex())
        self.freeze()

    def compute(self, images: Tensor) -> Extraction:
        """See `Extractor.compute`."""
        rows = [self._describe(pixels) for pixels in arrays_of(images)]
        found = [row - self.mean for row in rows if row is not None]
        embeddings = np.stack(found) if found else np.empty((0, len(self.mean)), dtype=np.float32)
        return Extraction(embedding=rows_with_gaps(embeddings, [row is not None for row in rows]).to(images.device))

    def prompt_agreement(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Share of what each prompt says that landmarks read back, (B, 3, H, W) and B prompts -> (B,) in 0..1.

        NaN for prompts that name nothing that `caption --by landmarks` says, and for images without a face.
        """
        shares = []
        for pixels, prompt in zip(arrays_of(images), prompts, strict=True):
            values = self._reader.measure(pixels) if self._reader.named(prompt) else None
            shares.append(float("nan") if values is None else self._reader.agreement(values, prompt))
        return torch.tensor(shares)


def mean_descriptor(images: Iterable[Pixels], side: int = 320) -> npt.NDArray[np.float32]:
    """Return the mean of dlib's descriptors over the faces found in images, such as one photo each of many people."""
    describe = DlibDescriptor(DlibDetector(side))
    found = [row for row in map(describe, images) if row is not None]
    if not found:
        raise LitMultiIPError("no face was found in any image: a mean descriptor needs photos of people")
    return np.asarray(np.stack(found).mean(axis=0, dtype=np.float64), dtype=np.float32)


def read_mean(file: Path) -> npt.NDArray[np.float32]:
    """Read a mean descriptor, (128,)."""
    try:
        values = np.load(file, allow_pickle=False)
        if values.shape != (128,) or not np.isfinite(values).all():
            raise LitMultiIPError(f"it holds {values.dtype} of shape {values.shape}")
    except (OSError, ValueError, TypeError) as error:
        reason = first_line(error)
        raise LitMultiIPError(f"'{file}' is no mean of dlib's descriptors ({reason}): give a .npy of 128") from error
    return np.asarray(values, dtype=np.float32)
