"""Scores that other libraries lack, as torchmetrics Metrics for anybody's module: means over all images seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_multiip.evaluation.extractors import Extractor
from lit_multiip.evaluation.intervals import FloatArray
from lit_multiip.evaluation.scores import copy_paste, identity_similarity, nearest_reference


class MeanOfImages(Metric):
    """A mean over images; those whose score is undefined, as no face was found, are left out.

    Args:
        extractor: that sees images, uint8 (B, 3, H, W); None where embeddings are given in their place. It is no
            submodule, so that no checkpoint holds it, and runs where the images are.
        kwargs: of `torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False
    total: Tensor  # sum of the scores
    count: Tensor  # of the images that have one

    def __init__(self, extractor: Extractor | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._extractor = [] if extractor is None else [extractor]
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0.0), dist_reduce_fx="sum")

    def embed(self, images: Tensor) -> Tensor:
        """Embed images (..., 3, H, W) to (..., E); embeddings are returned as they are."""
        if not self._extractor:
            return images
        [extractor] = self._extractor
        found = extractor.to(images.device).extract(images.flatten(0, -4)).vectors()  # (B, E)
        return found.reshape(*images.shape[:-3], found.shape[1])

    def add(self, scores: FloatArray) -> None:
        """Add the scores of some images, (B,)."""
        values = torch.from_numpy(scores).to(self.total)
        self.total += values.nansum()
        self.count += (~values.isnan()).sum()

    def compute(self) -> Tensor:
        """Return the mean; NaN where no image has a score."""
        return self.total / self.count


class IdentitySimilarity(MeanOfImages):
    """Cosine of each image's face to the mean direction of its person's real photos, in -1..1."""

    higher_is_better = True

    def update(self, images: Tensor, photos: Tensor) -> None:
        """Add images (B, 3, H, W) and K photos of the person of each, (B, K, 3, H, W); or embeddings of both."""
        self.add(identity_similarity(self.embed(images), self.embed(photos)))


class NearestReference(MeanOfImages):
    """Cosine of each image to the nearest of its references; a copy has 1. Read it beside that of real photos."""

    higher_is_better = False

    def update(self, images: Tensor, references: Tensor) -> None:
        """Add images (B, 3, H, W) and R references of each, (B, R, 3, H, W); or embeddings of both."""
        self.add(nearest_reference(self.embed(images), self.embed(references)))


class CopyPaste(MeanOfImages):
    """How much nearer each image is to a reference than to a photo that was held out; see `scores.copy_paste`."""

    higher_is_better = False

    def update(self, images: Tensor, held_out: Tensor, references: Tensor) -> None:
        """Add images and held-out photos, (B, 3, H, W), and R references, (B, R, 3, H, W); or embeddings of all."""
        self.add(copy_paste(self.embed(images), self.embed(held_out), self.embed(references)))
