"""From the features of images to scores: FID, KID, IS, identity, diversity, and all of them with intervals.

Everything here takes arrays that an extractor made once per image, and computes in float64 on the CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
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

    An embedding that is all NaN is a face that the network did not find: in a generated image or its held-out photo it
    leaves the score undefined (NaN), among several photos it is left out of their mean.

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
        ValueError: shapes do not fit, or an embedding is zero, infinite, or NaN in part.
    """
    generated_, held_out_, references_ = (_unit_if_found(_array(rows)) for rows in (generated, held_out, references))
    labels = np.asarray(people)
    if labels.shape != generated_.shape[:1] or references_.ndim != 3 or len(references_) != len(labels):
        shapes = f"generated {generated_.shape}, references {references_.shape} and people {labels.shape}"
        raise ValueError(f"{shapes} do not fit: give (T, D), (T, R, D) and (T,)")
    _, person = np.unique(labels, return_inverse=True)  # (T,)
    return {
        "held_out": (generated_ * held_out_).sum(axis=1),
        # a sum has the direction of the mean
        "held_out_mean": _cosine_if_found(generated_, _sums(np.nan_to_num(held_out_), person)[person]),
        "references": _cosine_if_found(generated_, np.nansum(references_, axis=1)),
    }


def nearest_reference(generated: Features, references: Features) -> FloatArray:
    """How near each image comes to any one of its references, max_r cos(g, x_r): where it is copied, 1.

    An embedding that is all NaN is a face that the network did not find: such references are left out. Read it beside
    the same of real held-out photos: photos of one person are alike, copied or not.

    Args:
        generated: embeddings or features of the images, (T, D).
        references: those of each task's R references, (T, R, D).

    Returns:
        (T,), in -1..1; NaN where the image's face or those of all references were not found.

    Raises:
        ValueError: shapes do not fit, or an embedding is zero, infinite, or NaN in part.
    """
    generated_, references_ = _unit_if_found(_array(generated)), _unit_if_found(_array(references))
    if references_.ndim != 3 or not references_.shape[1] or references_[:, 0].shape != generated_.shape:
        shapes = f"generated {generated_.shape} and references {references_.shape}"
        raise ValueError(f"{shapes} do not fit: give (T, D) and (T, R, D)")
    return np.fmax.reduce(np.einsum("td,trd->tr", generated_, references_), axis=1)  # which prefers numbers to NaN


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


@dataclass(frozen=True, eq=False)
class ImageSet:
    """What one extractor says of a set of images, one row an image. Leave out what it cannot say.

    Scores of sets are remembered, so that a set may stand in many differences and is computed once.
    """

    people: npt.NDArray[Any]  # (T,)
    features: Features | None = None  # (T, D), for FID and KID
    logits: Features | None = None  # (T, K), for both inception scores
    per_image: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)  # name -> (T,), NaN where undefined
    known: dict[tuple[str, ImageSet, bytes], float] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse rows that do not match."""
        arrays = {"features": self.features, "logits": self.logits, **self.per_image}
        for name, array in arrays.items():
            if array is not None and len(array) != len(self.people):
                rows = f"{name!r} has {len(array)} rows and people {len(self.people)}"
                raise ValueError(f"{rows}: give one row an image, in the same order")


def summarise(
    extractor: str,
    generated: ImageSet | Sequence[ImageSet],
    real: ImageSet,
    groups: int = 20,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    left_out: dict[str, str] | None = None,
) -> dict[str, Score]:
    """All scores of one method by one extractor, with intervals by person.

    FID, KID and both inception scores take the delete-a-group jackknife, which leaves a group of people out of the
    generated and the real images at once; scores per image take the bootstrap.

    Args:
        extractor: its name, such as `critic` or `inception-2048`; part of every key, so that scores are never mixed up.
        generated: the method's images. Several sets are those of several trainings, row for row on the same tasks: a
            score of sets is then the mean over the trainings, and an image's score the mean over those trainings in
            which it is defined.
        real: the real photos for FID and KID, each photo once; not used where they or `generated` have no features.
        groups: of the jackknife.
        resamples: of the bootstrap.
        level: confidence level, in (0, 1).
        seed: of the dealing into groups and of the resampling.
        left_out: is given the reason of every score that is left out, by its key; None warns of it instead.

    Returns:
        `fid/<extractor>`, `kid/<extractor>`, `is/<extractor>`, `is_uniform/<extractor>` and `<name>/<extractor>` for
        each of `generated.per_image`; `n` counts generated images, of one training. A score undefined for these images
        is left out (diversity of a single seed, without a warning).

    Raises:
        ValueError: the sets are not of the same people, row for row.
    """
    sets = _trainings(generated)
    people = np.concatenate([sets[0].people, real.people])
    scores = {}
    for name, statistic in _mean_statistics(sets, real).items():
        key = f"{name}/{extractor}"
        options: dict[str, Any] = {"groups": groups, "level": level, "seed": seed, "description": key}
        score = delete_group_jackknife(_nan_if_too_few(statistic, key, left_out), people, **options)
        scores[key] = _count_generated(score, sets[0])
    for name, values in _mean_per_image(sets).items():
        key = f"{name}/{extractor}"
        scores[key] = person_bootstrap(values, sets[0].people, seed, resamples, level)
        if left_out is not None and np.isnan(scores[key].value):
            left_out[key] = f"it is undefined for all {len(values)} images"
    return {key: score for key, score in scores.items() if not np.isnan(score.value)}


def summarise_difference(
    extractor: str,
    a: ImageSet | Sequence[ImageSet],
    b: ImageSet | Sequence[ImageSet],
    real: ImageSet,
    groups: int = 20,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    left_out: dict[str, str] | None = None,
) -> dict[str, Score]:
    """Paired differences A - B of two methods on the same tasks, keyed as `summarise`, for the scores that both have.

    Args:
        extractor: its name.
        a: images of method A; several sets are those of several trainings, as `summarise` takes them.
        b: images of method B, row for row on the same tasks; it may have been trained more or less often.
        real: the real photos for FID and KID.
        groups: of the jackknife.
        resamples: of the bootstrap.
        level: confidence level, in (0, 1).
        seed: of the dealing into groups and of the resampling.
        left_out: as `summarise` takes it.

    Raises:
        ValueError: the rows of A and B are not of the same people.
    """
    a, b = _trainings(a), _trainings(b)
    if not np.array_equal(a[0].people, b[0].people):
        raise ValueError("the rows of A and B are not of the same people: score both methods on the same tasks")
    people = np.concatenate([a[0].people, real.people])
    statistics_a, statistics_b = _mean_statistics(a, real), _mean_statistics(b, real)
    scores = {}
    for name in statistics_a.keys() & statistics_b.keys():
        key = f"{name}/{extractor}"
        options: dict[str, Any] = {"groups": groups, "level": level, "seed": seed, "description": key}
        both = [_nan_if_too_few(found[name], key, left_out) for found in (statistics_a, statistics_b)]
        scores[key] = _count_generated(paired_jackknife(both[0], both[1], people, **options), a[0])
    values_a, values_b = _mean_per_image(a), _mean_per_image(b)
    for name in values_a.keys() & values_b.keys():
        values = values_a[name], values_b[name]
        scores[f"{name}/{extractor}"] = paired_difference(*values, a[0].people, seed, resamples, level)
    return {key: score for key, score in sorted(scores.items()) if not np.isnan(score.value)}


def values_of_each(extractor: str, generated: Sequence[ImageSet], real: ImageSet) -> dict[str, list[float]]:
    """Every score of each training alone, without intervals, keyed as `summarise`; NaN where it is undefined."""
    everyone = np.ones(len(generated[0].people) + len(real.people), dtype=bool)
    found: dict[str, list[float]] = {}
    for images in generated:
        values = {}
        for name, statistic in _set_statistics(images, real).items():
            try:
                values[name] = statistic(everyone)
            except TooFewSamples:
                values[name] = float("nan")
        for name, scores in images.per_image.items():
            values[name] = float(np.mean(scores[~np.isnan(scores)])) if not np.isnan(scores).all() else float("nan")
        for name, value in values.items():
            found.setdefault(f"{name}/{extractor}", []).append(value)
    return found


def _trainings(generated: ImageSet | Sequence[ImageSet]) -> list[ImageSet]:
    sets = [generated] if isinstance(generated, ImageSet) else list(generated)
    if not sets:
        raise ValueError("there are no images to score: give those of at least one training")
    if any(not np.array_equal(images.people, sets[0].people) for images in sets[1:]):
        raise ValueError("the trainings' rows are not of the same people: score all of them on the same tasks")
    return sets


def _mean_statistics(sets: Sequence[ImageSet], real: ImageSet) -> dict[str, Statistic]:
    each = [_set_statistics(images, real) for images in sets]

    def mean(name: str) -> Statistic:
        return lambda keep: float(np.mean([statistics[name](keep) for statistics in each]))

    return {name: mean(name) for name in each[0] if all(name in statistics for statistics in each)}


def _mean_per_image(sets: Sequence[ImageSet]) -> dict[str, FloatArray]:
    """Each image's mean score over the trainings in which it is defined, (T,) by name."""
    means = {}
    for name in sets[0].per_image:
        if all(name in images.per_image for images in sets):
            values = np.stack([np.asarray(images.per_image[name], dtype=np.float64) for images in sets])  # (S, T)
            defined = ~np.isnan(values)
            with np.errstate(invalid="ignore"):
                means[name] = np.where(defined, values, 0.0).sum(axis=0) / defined.sum(axis=0)
    return means


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

    def remembered(name: str, statistic: Statistic) -> Statistic:
        def look_up(keep: Mask) -> float:
            key = (name, real, keep.tobytes())
            if key not in generated.known:
                generated.known[key] = statistic(keep)
            return generated.known[key]

        return look_up

    return {name: remembered(name, statistic) for name, statistic in statistics.items()}


def _nan_if_too_few(statistic: Statistic, key: str, left_out: dict[str, str] | None) -> Statistic:
    """A run over a person or two must still write the scores it has."""

    def tolerant(keep: Mask) -> float:
        try:
            return statistic(keep)
        except TooFewSamples as error:
            if left_out is None:
                warnings.warn(f"score or interval left out: {error}", stacklevel=2)
            elif keep.all():
                left_out[key] = str(error)
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


def _unit_if_found(rows: FloatArray) -> FloatArray:
    """Unit embeddings; those that are all NaN stay so."""
    found = ~np.isnan(rows).all(axis=-1)
    unit = np.full_like(rows, np.nan)
    unit[found] = _unit(rows[found])
    return unit


def _cosine_if_found(unit: FloatArray, sums: FloatArray) -> FloatArray:
    """Cosine of unit rows to sums of rows, (T, D) and (T, D) -> (T,); NaN where nothing was summed."""
    norms = np.linalg.norm(sums, axis=-1)  # (T,)
    return (unit * sums).sum(axis=-1) / np.where(norms > 0, norms, np.nan)


def _sums(rows: FloatArray, group: npt.NDArray[np.intp]) -> FloatArray:
    """Sum of the rows of each group, (T, D) and (T,) -> (G, D)."""
    sums = np.zeros((group.max(initial=-1) + 1, rows.shape[1]))
    np.add.at(sums, group, rows)
    return sums
