"""All scores of one method by one extractor, with intervals by person, and differences of two methods."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lit_multiip.evaluation.intervals import (
    FloatArray,
    Mask,
    Score,
    Statistic,
    delete_group_jackknife,
    paired_difference,
    paired_jackknife,
    person_mean,
)
from lit_multiip.evaluation.scores import (
    Features,
    TooFewSamples,
    as_float64,
    fid,
    inception_score,
    inception_score_uniform,
    kid,
)
from lit_multiip.files import LitMultiIPError


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
                raise LitMultiIPError(f"{rows}: give one row an image, in the same order")


def summarise(
    extractor: str,
    generated: ImageSet | Sequence[ImageSet],
    real: ImageSet,
    groups: int = 20,
    resamples: int = 2000,
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
        left_out: is given the reason of every score that is left out, by its key; None warns of it instead.

    Returns:
        `fid/<extractor>`, `kid/<extractor>`, `is/<extractor>`, `is_uniform/<extractor>` and `<name>/<extractor>` for
        each of `generated.per_image`; `n` counts generated images, of one training. A score undefined for these images
        is left out (diversity of a single seed, without a warning).
    """
    sets = _trainings(generated)
    labels = sets[0].people
    people = np.concatenate([labels, real.people])
    scores = {}
    for name, statistic in _mean_statistics(sets, real).items():
        key = f"{name}/{extractor}"
        tolerant = _nan_if_too_few(statistic, key, left_out)
        scores[key] = _count_generated(delete_group_jackknife(tolerant, people, groups, description=key), labels)
    for name, values in _mean_per_image(sets).items():
        key = f"{name}/{extractor}"
        scores[key] = person_mean(values, labels, resamples=resamples)
        if left_out is not None and np.isnan(scores[key].value):
            left_out[key] = f"it is undefined for all {len(values)} images"
    return {key: score for key, score in scores.items() if not np.isnan(score.value)}


def summarise_difference(
    extractor: str, a: ImageSet | Sequence[ImageSet], b: ImageSet | Sequence[ImageSet], real: ImageSet
) -> dict[str, Score]:
    """Paired differences A - B of two methods on the same tasks, keyed as `summarise`, for the scores that both have.

    Args:
        extractor: its name.
        a: images of method A; several sets are those of several trainings, as `summarise` takes them.
        b: images of method B, row for row on the same tasks; it may have been trained more or less often.
        real: the real photos for FID and KID.
    """
    a, b = _trainings(a), _trainings(b)
    labels = a[0].people
    if not np.array_equal(labels, b[0].people):
        raise LitMultiIPError("the rows of A and B are not of the same people: score both methods on the same tasks")
    people = np.concatenate([labels, real.people])
    statistics_a, statistics_b = _mean_statistics(a, real), _mean_statistics(b, real)
    scores = {}
    for name in statistics_a.keys() & statistics_b.keys():
        key = f"{name}/{extractor}"
        one, other = (_nan_if_too_few(found[name], key, {}) for found in (statistics_a, statistics_b))
        scores[key] = _count_generated(paired_jackknife(one, other, people, description=key), labels)
    values_a, values_b = _mean_per_image(a), _mean_per_image(b)
    for name in values_a.keys() & values_b.keys():
        scores[f"{name}/{extractor}"] = paired_difference(values_a[name], values_b[name], labels)
    return {key: score for key, score in sorted(scores.items()) if not np.isnan(score.value)}


def values_of_each(extractor: str, generated: Sequence[ImageSet], real: ImageSet) -> dict[str, list[float]]:
    """Every score of each training alone, without intervals, keyed as `summarise`; NaN where it is undefined."""
    everyone = np.ones(len(generated[0].people) + len(real.people), dtype=bool)
    found: dict[str, list[float]] = defaultdict(list)
    for images in generated:
        for name, statistic in _set_statistics(images, real).items():
            found[f"{name}/{extractor}"].append(_nan_if_too_few(statistic, name, {})(everyone))
        for name, scores in images.per_image.items():
            defined = scores[~np.isnan(scores)]
            found[f"{name}/{extractor}"].append(float(np.mean(defined)) if len(defined) else float("nan"))
    return dict(found)


def _trainings(generated: ImageSet | Sequence[ImageSet]) -> list[ImageSet]:
    sets = [generated] if isinstance(generated, ImageSet) else list(generated)
    if any(not np.array_equal(images.people, sets[0].people) for images in sets):
        raise LitMultiIPError("the trainings' rows are not of the same people: score all of them on the same tasks")
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
        features, real_features = as_float64(generated.features), as_float64(real.features)
        statistics["fid"] = lambda keep: fid(real_features[keep[split:]], features[keep[:split]])
        statistics["kid"] = lambda keep: kid(real_features[keep[split:]], features[keep[:split]])
    if generated.logits is not None:
        logits = as_float64(generated.logits)
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


def _count_generated(score: Score, people: npt.NDArray[Any]) -> Score:
    return score._replace(n=len(people), people=len(np.unique(people)))
