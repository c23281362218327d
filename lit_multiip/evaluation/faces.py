"""Face recognisers as extractors: who is shown in photos of real people, and whether a face is found at all.

They give an embedding of identity and no features: FID, KID and diversity are for other extractors.
"""

from __future__ import annotations

import re

import numpy as np
from torch import Tensor

from lit_multiip.backbone.faces import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    TEMPLATE_SIDE,
    FaceDetector,
    FaceNetwork,
    arrays_of,
    import_faces,
    load_opencv,
    rows_with_gaps,
    to_bgr,
    weights_file,
)
from lit_multiip.evaluation.extractors import Extraction, Extractor
from lit_multiip.files import hash_file

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
