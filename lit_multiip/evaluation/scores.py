"""From the features of images to scores: FID, KID, IS, identity, diversity, and all of them with intervals.

Everything here takes arrays that an extractor made once per image, and computes in float64 on the CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import poly_kernel

from lit_multiip.evaluation.intervals import (
    FloatArray,
    Mask,
    Score,
    Statistic,
    delete_group_jackknife,
    paired_difference,
    paired_jackknife,
    person_bootstrap,
)

Features = npt.NDArray[Any] | Tensor


class TooFewSamples(ValueError):
    """A score that is undefined for so few images."""


def fid(real: Features, fake: Features) -> float:
    """Fréchet distance of two Gaussians fitted to features (eq. 4), by torchmetrics.

        FID = |mu_r - mu_f|^2 + tr(S_r + S_f - 2 (S_r S_f)^(1/2)),    S with n - 1 in the denominator

    Biased upward for few images, and the more the wider the features: report N, and compare at equal N only.

    Args:
        real: features of real images, (N, D).
        fake: features of generated images, (M, D).

    Raises:
        TooFewSamples: fewer than 2 images on either side.
        ValueError: not finite, or shapes do not fit.
    """
    real_, fake_ = _pair("FID", real, fake)  # (N, D), (M, D)
    # The distance is invariant to shifts and rotations: centred, the moments keep their digits; in a basis of the
    # joint span, 2048-d features of 200 + 200 images need the eigenvalues of 400 x 400, not of 2048 x 2048 matrices.
    stacked = torch.cat([real_, fake_]) - real_.mean(dim=0)  # (N + M, D)
    if stacked.shape[1] > len(stacked):
        stacked = torch.linalg.qr(stacked.T).R.T.contiguous()  # (N + M, N + M)
    metric = FrechetInceptionDistance(_Precomputed(stacked.shape[1]), sync_on_compute=False)
    metric.update(stacked[: len(real_)], real=True)
    metric.update(stacked[len(real_) :], real=False)
    return float(metric.compute())


def kid(real: Features, fake: Features) -> float:
    """Kernel distance: the unbiased estimate of MMD^2 with torchmetrics' kernel k(x, y) = (x.y / D + 1)^3.

        KID = mean_{i != j} k(r_i, r_j) + mean_{i != j} k(f_i, f_j) - 2 mean_{i, j} k(r_i, f_j)

    This is torchmetrics' KernelInceptionDistance at one subset of all images, to which it is equal where N = M. Its
    random subsets exist to save time at many images; here they would only add noise, and they cannot use all images
    of two sets of unequal size. Zero on average for independent images of equal distributions, so it may be negative;
    with the same few people on both sides it reads a little below zero (50 people x 4 images, 32-d: -0.02, where a
    shift by 0.3 standard deviations reads 0.28).

    Args:
        real: features of real images, (N, D).
        fake: features of generated images, (M, D).

    Raises:
        TooFewSamples: fewer than 2 images on either side.
        ValueError: not finite, or shapes do not fit.
    """
    real_, fake_ = _pair("KID", real, fake)
    return float(_off_diagonal_mean(real_) + _off_diagonal_mean(fake_) - 2 * poly_kernel(real_, fake_).mean())


def inception_score(logits: Features) -> float:
    """The usual inception score, exp(mean_x KL(p(y|x) || p(y))) with the marginal p(y) = mean_x p(y|x), one split.

    By torchmetrics. Between 1 and min(K, N). Not the paper's eq. (5): see `inception_score_uniform`.

    Args:
        logits: class logits of generated images, (N, K); not probabilities.

    Raises:
        TooFewSamples: fewer than 2 images, of which the marginal would be the prediction itself.
        ValueError: not finite, or not (N, K).
    """
    logits_ = _finite("logits", logits)
    if len(logits_) < 2:
        raise TooFewSamples(f"IS of {len(logits_)} images is undefined: generate at least 2")
    # torchmetrics makes 0 * inf of a class to which no image gives a probability above zero
    logits_ = (logits_ - logits_.amax(dim=1, keepdim=True)).clamp(min=-700)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # on its memory, and on the standard deviation over a single split
        torch.default_generator.manual_seed(0)  # it shuffles by the global generator: same digits every time
        metric = InceptionScore(_Precomputed(logits_.shape[1]), splits=1, sync_on_compute=False)
        metric.update(logits_)
        return float(metric.compute()[0])


def inception_score_uniform(logits: Features) -> float:
    """The inception score as the paper writes it (eq. 5), exp(mean_x KL(p(y|x) || U)) with uniform U = 1 / K.

    Between 1 and K. It rewards confident predictions alone: K images of one class score K, where the usual score is 1.

    Args:
        logits: class logits of generated images, (N, K); not probabilities.

    Raises:
        TooFewSamples: no images.
        ValueError: not finite, or not (N, K).
    """
    logits_ = _finite("logits", logits)
    if not len(logits_):
        raise TooFewSamples("IS (uniform) of 0 images is undefined: generate at least 1")
    log_p = logits_.log_softmax(dim=1)  # (N, K)
    divergence = (log_p.exp() * (log_p + np.log(logits_.shape[1]))).sum(dim=1)  # (N,)
    return float(divergence.mean().exp())


def cosine(a: Features, b: Features) -> FloatArray:
    """Cosine a.b / (|a| |b|) of matching rows, (..., D) and (..., D) -> (...).

    Raises:
        ValueError: shapes differ, or a row is zero or not finite, so that it has no direction.
    """
    a_, b_ = _array(a), _array(b)
    if a_.shape != b_.shape:
        raise ValueError(f"cannot compare embeddings of shapes {a_.shape} and {b_.shape}: give one row for each row")
    return (_unit(a_) * _unit(b_)).sum(axis=-1)


def identity_scores(
    generated: Features, held_out: Features, references: Features, people: npt.ArrayLike
) -> dict[str, FloatArray]:
    """How much each generated face looks like its person, by cosine of identity embeddings.

    Args:
        generated: embeddings of the generated images, (T, D).
        held_out: of each task's held-out photo, (T, D); a photo that several seeds share stands in each of its rows.
        references: of each task's R reference photos, (T, R, D).
        people: the person of each task, (T,).

    Returns:
        Three scores, (T,) each: `held_out`, to the task's own held-out photo; `held_out_mean`, to the mean of the unit
        embeddings of all held-out photos of that person (less of one photo's pose and light); `references`, to the
        mean of those of the references, which the method has seen: copying scores high there.

    Raises:
        ValueError: shapes do not fit, or an embedding is zero or not finite.
    """
    generated_, held_out_, references_ = _unit(_array(generated)), _unit(_array(held_out)), _unit(_array(references))
    labels = np.asarray(people)
    if labels.shape != generated_.shape[:1] or references_.ndim != 3 or len(references_) != len(labels):
        shapes = f"generated {generated_.shape}, references {references_.shape} and people {labels.shape}"
        raise ValueError(f"{shapes} do not fit: give (T, D), (T, R, D) and (T,)")
    _, person = np.unique(labels, return_inverse=True)  # (T,)
    return {
        "held_out": cosine(generated_, held_out_),
        # a sum has the direction of the mean
        "held_out_mean": cosine(generated_, _sums(held_out_, person)[person]),
        "references": cosine(generated_, references_.sum(axis=1)),
    }


def nearest_reference(generated: Features, references: Features) -> FloatArray:
    """How near each image comes to any one of its references, max_r cos(g, x_r): where it is copied, 1.

    Read it beside the same of real held-out photos: photos of one person are alike, copied or not.

    Args:
        generated: embeddings or features of the images, (T, D).
        references: those of each task's R references, (T, R, D).

    Returns:
        (T,), in -1..1.

    Raises:
        ValueError: shapes do not fit, or an embedding is zero or not finite.
    """
    generated_, references_ = _unit(_array(generated)), _unit(_array(references))
    if references_.ndim != 3 or not references_.shape[1] or references_[:, 0].shape != generated_.shape:
        shapes = f"generated {generated_.shape} and references {references_.shape}"
        raise ValueError(f"{shapes} do not fit: give (T, D) and (T, R, D)")
    return np.einsum("td,trd->tr", generated_, references_).max(axis=1)


def diversity(features: Features, groups: npt.ArrayLike) -> FloatArray:
    """How different the images of one task are over its seeds: mean of 1 - cos to the task's other images.

    The mean over a task's images is its mean pairwise cosine distance; 0 where every seed makes the same image.

    Args:
        features: of the generated images, (T, D).
        groups: the task each image belongs to, seeds apart, (T,), labels of any kind.

    Returns:
        (T,), NaN for the only image of its task.

    Raises:
        ValueError: shapes do not fit, or features are zero or not finite.
    """
    unit, labels = _unit(_array(features)), np.asarray(groups)
    if unit.ndim != 2 or labels.shape != unit.shape[:1]:
        raise ValueError(f"features {unit.shape} and groups {labels.shape} do not fit: give (T, D) and (T,)")
    _, group = np.unique(labels, return_inverse=True)  # (T,)
    others = np.bincount(group)[group] - 1.0  # (T,), how many
    cosines = ((_sums(unit, group)[group] - unit) * unit).sum(axis=1)  # (T,), summed over the others
    with np.errstate(invalid="ignore"):
        return np.where(others > 0, 1 - cosines / others, np.nan)


@dataclass(frozen=True)
class ImageSet:
    """What one extractor says of a set of images, one row an image. Leave out what it cannot say."""

    people: npt.NDArray[Any]  # (T,)
    features: Features | None = None  # (T, D), for FID and KID
    logits: Features | None = None  # (T, K), for both inception scores
    per_image: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)  # name -> (T,), NaN where undefined

    def __post_init__(self) -> None:
        """Refuse rows that do not match."""
        arrays = {"features": self.features, "logits": self.logits, **self.per_image}
        for name, array in arrays.items():
            if array is not None and len(array) != len(self.people):
                rows = f"{name!r} has {len(array)} rows and people {len(self.people)}"
                raise ValueError(f"{rows}: give one row an image, in the same order")


def summarise(
    extractor: str,
    generated: ImageSet,
    real: ImageSet,
    groups: int = 20,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Score]:
    """All scores of one method by one extractor, with intervals by person.

    FID, KID and both inception scores take the delete-a-group jackknife, which leaves a group of people out of the
    generated and the real images at once; scores per image take the bootstrap.

    Args:
        extractor: its name, such as `critic` or `inception-2048`; part of every key, so that scores are never mixed up.
        generated: the method's images.
        real: the real photos for FID and KID, each photo once; not used where they or `generated` have no features.
        groups: of the jackknife.
        resamples: of the bootstrap.
        level: confidence level, in (0, 1).
        seed: of the dealing into groups and of the resampling.

    Returns:
        `fid/<extractor>`, `kid/<extractor>`, `is/<extractor>`, `is_uniform/<extractor>` and `<name>/<extractor>` for
        each of `generated.per_image`; `n` counts generated images. A score undefined for these images is left out
        with a warning (diversity of a single seed, silently).
    """
    people = np.concatenate([generated.people, real.people])
    scores = {}
    for name, statistic in _set_statistics(generated, real).items():
        key = f"{name}/{extractor}"
        score = delete_group_jackknife(statistic, people, groups, level, seed, description=key)
        scores[key] = _count_generated(score, generated)
    for name, values in generated.per_image.items():
        scores[f"{name}/{extractor}"] = person_bootstrap(values, generated.people, seed, resamples, level)
    return {key: score for key, score in scores.items() if not np.isnan(score.value)}


def summarise_difference(
    extractor: str,
    a: ImageSet,
    b: ImageSet,
    real: ImageSet,
    groups: int = 20,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Score]:
    """Paired differences A - B of two methods on the same tasks, keyed as `summarise`, for the scores that both have.

    Args:
        extractor: its name.
        a: images of method A.
        b: images of method B, row for row on the same tasks.
        real: the real photos for FID and KID.
        groups: of the jackknife.
        resamples: of the bootstrap.
        level: confidence level, in (0, 1).
        seed: of the dealing into groups and of the resampling.

    Raises:
        ValueError: the rows of A and B are not of the same people.
    """
    if not np.array_equal(a.people, b.people):
        raise ValueError("the rows of A and B are not of the same people: score both methods on the same tasks")
    people = np.concatenate([a.people, real.people])
    statistics_a, statistics_b = _set_statistics(a, real), _set_statistics(b, real)
    scores = {}
    for name in statistics_a.keys() & statistics_b.keys():
        options = {"groups": groups, "level": level, "seed": seed, "description": f"{name}/{extractor}"}
        score = paired_jackknife(statistics_a[name], statistics_b[name], people, **options)
        scores[f"{name}/{extractor}"] = _count_generated(score, a)
    for name in a.per_image.keys() & b.per_image.keys():
        values = a.per_image[name], b.per_image[name]
        scores[f"{name}/{extractor}"] = paired_difference(*values, a.people, seed, resamples, level)
    return {key: score for key, score in sorted(scores.items()) if not np.isnan(score.value)}


def _set_statistics(generated: ImageSet, real: ImageSet) -> dict[str, Statistic]:
    """Scores of sets as functions of a mask over the generated and then the real images."""
    split = len(generated.people)
    statistics: dict[str, Callable[[Mask], float]] = {}
    if generated.features is not None and real.features is not None:
        features, real_features = _array(generated.features), _array(real.features)
        statistics["fid"] = lambda keep: fid(real_features[keep[split:]], features[keep[:split]])
        statistics["kid"] = lambda keep: kid(real_features[keep[split:]], features[keep[:split]])
    if generated.logits is not None:
        logits = _array(generated.logits)
        statistics["is"] = lambda keep: inception_score(logits[keep[:split]])
        statistics["is_uniform"] = lambda keep: inception_score_uniform(logits[keep[:split]])
    return {name: _nan_if_too_few(statistic) for name, statistic in statistics.items()}


def _nan_if_too_few(statistic: Statistic) -> Statistic:
    """A run over a person or two must still write the scores it has."""

    def tolerant(keep: Mask) -> float:
        try:
            return statistic(keep)
        except TooFewSamples as error:
            warnings.warn(f"score or interval left out: {error}", stacklevel=2)
            return float("nan")

    return tolerant


def _count_generated(score: Score, generated: ImageSet) -> Score:
    return score._replace(n=len(generated.people), people=len(np.unique(generated.people)))


class _Precomputed(nn.Module):
    """Stands where torchmetrics expects a feature extractor, and passes on features that one made before."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features  # (N, D)


def _off_diagonal_mean(x: Tensor) -> Tensor:
    kernel = poly_kernel(x, x)  # (N, N)
    return (kernel.sum() - kernel.trace()) / (len(x) * (len(x) - 1))


def _pair(score: str, real: Features, fake: Features) -> tuple[Tensor, Tensor]:
    real_, fake_ = _finite("real features", real), _finite("generated features", fake)
    if real_.shape[1] != fake_.shape[1]:
        widths = f"real features are {real_.shape[1]}-d and generated ones {fake_.shape[1]}-d"
        raise ValueError(f"{widths}: take both from one extractor")
    if min(len(real_), len(fake_)) < 2:
        counts = f"{len(real_)} real and {len(fake_)} generated images"
        raise TooFewSamples(f"{score} of {counts} is undefined: give at least 2 of each, better hundreds")
    return real_, fake_


def _finite(name: str, values: Features) -> Tensor:
    """Rows as float64 on the CPU, (N, D)."""
    rows = torch.as_tensor(values).detach().to("cpu", torch.float64)
    if rows.ndim != 2 or not rows.shape[1]:
        raise ValueError(f"{name} have shape {tuple(rows.shape)}: give one row an image, (N, D)")
    bad = (~rows.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"{name} of images {bad[:5]} ({len(bad)} of {len(rows)}) hold NaN or infinity: check the images"
        )
    return rows


def _array(values: Features) -> FloatArray:
    """Values as float64 in numpy, from any device and dtype."""
    return torch.as_tensor(values).detach().to("cpu", torch.float64).numpy()


def _unit(rows: FloatArray) -> FloatArray:
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)  # (..., 1)
    bad = np.argwhere(~(np.isfinite(norms[..., 0]) & (norms[..., 0] > 0))).tolist()
    if bad:
        raise ValueError(f"embeddings at {bad[:5]} ({len(bad)} in all) are zero or not finite: check the images")
    return rows / norms


def _sums(rows: FloatArray, group: npt.NDArray[np.intp]) -> FloatArray:
    """Sum of the rows of each group, (T, D) and (T,) -> (G, D)."""
    sums = np.zeros((group.max(initial=-1) + 1, rows.shape[1]))
    np.add.at(sums, group, rows)
    return sums
