"""FID, KID and inception scores by any network in an ONNX file, where Inception's weights cannot be had."""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import Tensor

from lit_multiip.backbone.faces import arrays_of
from lit_multiip.backbone.onnx import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    OnnxNetwork,
    check_normalisation,
    normalise,
    resized,
)
from lit_multiip.evaluation.extractors import Extraction, Extractor


class OnnxFeatures(Extractor):
    """Any classifier in an ONNX file, (B, 3, S, S) -> features (B, D) and logits (B, K), by onnxruntime on the CPU.

    Images are scaled to S px by bicubic interpolation with antialiasing. The scores are called after the network, for
    those of different networks are not comparable: only Inception's are published FID, KID and IS.

    Args:
        path: the ONNX file, or `org/repository/file.onnx` on the Hugging Face hub.
        features: name of the output that FID, KID and diversity take, the layer before the classes.
        logits: name of the output that the inception scores take, logits and not probabilities; None makes none.
        name: part of every score's key; None takes the file's.
        side: px of the network's square input; None reads it from the file, where it is fixed there.
        mean: of each colour channel in 0..1, in the order of `colours`, subtracted before the division by `std`.
        std: of each colour channel.
        colours: order of the channels that the network expects, `rgb` or `bgr`.
    """

    def __init__(
        self,
        path: str,
        features: str = "features",
        logits: str | None = "logits",
        name: str | None = None,
        side: int | None = None,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        colours: str = "rgb",
    ) -> None:
        super().__init__()
        check_normalisation(std, colours)
        self.network = OnnxNetwork(path, side, [features, *([] if logits is None else [logits])])
        self.num_features, self.num_classes = (*self.network.widths, None)[:2]
        self.mean, self.std, self.colours = mean, std, colours
        self.name = name or re.sub(r"[^\w.-]", "_", self.network.file.stem)
        self.source, self.sha256 = path, self.network.sha256
        self.freeze()

    def compute(self, images: Tensor) -> Extraction:
        """See `Extractor.compute`."""
        side = self.network.side
        seen = np.stack([resized(pixels, (side, side)) for pixels in arrays_of(images)])  # (B, S, S, 3)
        found = self.network(normalise(seen, self.mean, self.std, self.colours))
        features, logits = (*(torch.from_numpy(rows).to(images.device) for rows in found), None)[:2]
        return Extraction(features, logits)
