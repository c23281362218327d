"""Scores from features: FID, KID and IS of sets of images; identity, copying and diversity of each image.

Everything here takes arrays that an extractor made once per image, and computes in float64 on the CPU.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import poly_kernel

from lit_multiip.evaluation.intervals import FloatArray
from lit_multiip.files import LitMultiIPError

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
    """
    logits_ = _finite("logits", logits)
    if not len(logits_):
        raise TooFewSamples("IS (uniform) of 0 images is undefined: generate at least 1")
    log_p = logits_.log_softmax(dim=1)  # (N, K)
    divergence = (log_p.exp() * (log_p + np.log(logits_.shape[1]))).sum(dim=1)  # (N,)
    return float(divergence.mean().exp())


def cosine(a: Features, b: Features) -> FloatArray:
    """Cosine a.b / (|a| |b|) of matching rows, (..., D) and (..., D) -> (...)."""
    a_, b_ = as_float64(a), as_float64(b)
    if a_.shape != b_.shape:
        raise LitMultiIPError(
            f"cannot compare embeddings of shapes {a_.shape} and {b_.shape}: give one row for each row"
        )
    cosines: FloatArray = (_to_unit(a_) * _to_unit(b_)).sum(axis=-1)
    return cosines


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
    """
    generated_, held_out_, references_ = (
        _to_unit_if_found(as_float64(rows)) for rows in (generated, held_out, references)
    )
    labels = np.asarray(people)
    if labels.shape != generated_.shape[:1] or references_.ndim != 3 or len(references_) != len(labels):
        shapes = f"generated {generated_.shape}, references {references_.shape} and people {labels.shape}"
        raise LitMultiIPError(f"{shapes} do not fit: give (T, D), (T, R, D) and (T,)")
    _, person = np.unique(labels, return_inverse=True)  # (T,)
    return {
        "held_out": (generated_ * held_out_).sum(axis=1),
        # a sum has the direction of the mean
        "held_out_mean": _cosine_if_found(generated_, _sum_groups(np.nan_to_num(held_out_), person)[person]),
        "references": identity_similarity(generated_, references_),
    }


def identity_similarity(generated: Features, photos: Features) -> FloatArray:
    """How much each generated face looks like the mean of K real photos, cos(g, sum_k x_k) of unit embeddings.

    Args:
        generated: embeddings of the generated images, (T, D); all NaN where no face was found.
        photos: of each image's K photos, (T, K, D); those that are all NaN are left out.

    Returns:
        (T,), in -1..1; NaN where the image's face or those of all photos were not found.
    """
    generated_, photos_ = _to_unit_if_found(as_float64(generated)), _to_unit_if_found(as_float64(photos))
    _require_rows(generated_, photos_)
    return _cosine_if_found(generated_, np.nansum(photos_, axis=1))


def nearest_reference(generated: Features, references: Features) -> FloatArray:
    """How near each image comes to any one of its references, max_r cos(g, x_r): where it is copied, 1.

    An embedding that is all NaN is a face that the network did not find: such references are left out. Read it beside
    the same of real held-out photos: photos of one person are alike, copied or not.

    Args:
        generated: embeddings or features of the images, (T, D).
        references: those of each task's R references, (T, R, D).

    Returns:
        (T,), in -1..1; NaN where the image's face or those of all references were not found.
    """
    generated_, references_ = _to_unit_if_found(as_float64(generated)), _to_unit_if_found(as_float64(references))
    _require_rows(generated_, references_)
    cosines = np.einsum("td,trd->tr", generated_, references_)
    nearest: FloatArray = np.fmax.reduce(cosines, axis=1)  # which prefers numbers to NaN
    return nearest


def copy_paste(generated: Features, held_out: Features, references: Features) -> FloatArray:
    """The published score of copying: how much nearer an image is to a reference than to the held-out photo.

        M = (theta_gt - theta_gr) / theta_tr,    theta_ab = arccos(cos(a, b))

    of the embeddings of the image g, the held-out photo t and a reference r: 1 where the reference is copied, -1 where
    the held-out photo is met, 0 where both are as near. From WithAnyone, arXiv 2510.14975, eq. (2), and `copy_geo` in
    MultiID_Bench of its repository, which is 0 where theta_tr is below 1e-6. It was published for one reference; of
    several, r is the one that the image is nearest to, as in `nearest_reference`. So the more references, the higher.

    An embedding that is all NaN is a face that the network did not find: such references are left out.

    Args:
        generated: embeddings of the images, (T, D).
        held_out: of each task's held-out photo, (T, D).
        references: of each task's R references, (T, R, D).

    Returns:
        (T,), in -1..1; NaN where the face of the image or of the held-out photo, or those of all references, were not
        found.
    """
    g, t, r = (_to_unit_if_found(as_float64(rows)) for rows in (generated, held_out, references))
    if r.ndim != 3 or not r.shape[1] or not r[:, 0].shape == t.shape == g.shape:
        raise LitMultiIPError(
            f"embeddings {g.shape}, {t.shape} and {r.shape} do not fit: give (T, D), (T, D), (T, R, D)"
        )
    to_references = np.einsum("td,trd->tr", g, r)  # (T, R), cosines
    nearest = np.where(np.isnan(to_references), -np.inf, to_references).argmax(axis=1)  # (T,)
    r = r[np.arange(len(r)), nearest]  # (T, D)
    theta_gt, theta_gr, theta_tr = (np.arccos(np.clip((a * b).sum(axis=1), -1, 1)) for a, b in ((g, t), (g, r), (t, r)))
    score: FloatArray = np.where(theta_tr < 1e-6, 0.0, (theta_gt - theta_gr) / np.maximum(theta_tr, 1e-6))
    score[np.isnan(theta_gt + theta_gr)] = np.nan
    return score


def diversity(features: Features, groups: npt.ArrayLike) -> FloatArray:
    """How different the images of one task are over its seeds: mean of 1 - cos to the task's other images.

    The mean over a task's images is its mean pairwise cosine distance; 0 where every seed makes the same image.

    Args:
        features: of the generated images, (T, D).
        groups: the task each image belongs to, seeds apart, (T,), labels of any kind.

    Returns:
        (T,), NaN for the only image of its task.
    """
    unit, labels = _to_unit(as_float64(features)), np.asarray(groups)
    if unit.ndim != 2 or labels.shape != unit.shape[:1]:
        raise LitMultiIPError(f"features {unit.shape} and groups {labels.shape} do not fit: give (T, D) and (T,)")
    _, group = np.unique(labels, return_inverse=True)  # (T,)
    others = np.bincount(group)[group] - 1.0  # (T,), how many
    cosines = ((_sum_groups(unit, group)[group] - unit) * unit).sum(axis=1)  # (T,), summed over the others
    with np.errstate(invalid="ignore"):
        return np.where(others > 0, 1 - cosines / others, np.nan)


def _require_rows(generated: FloatArray, photos: FloatArray) -> None:
    if photos.ndim != 3 or not photos.shape[1] or photos[:, 0].shape != generated.shape:
        shapes = f"generated {generated.shape} and references {photos.shape}"
        raise LitMultiIPError(f"{shapes} do not fit: give (T, D) and (T, R, D)")


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
        raise LitMultiIPError(f"{widths}: take both from one extractor")
    if min(len(real_), len(fake_)) < 2:
        counts = f"{len(real_)} real and {len(fake_)} generated images"
        raise TooFewSamples(f"{score} of {counts} is undefined: give at least 2 of each, better hundreds")
    return real_, fake_


def _finite(name: str, values: Features) -> Tensor:
    """Rows as float64 on the CPU, (N, D)."""
    rows = torch.as_tensor(values).detach().to("cpu", torch.float64)
    if rows.ndim != 2 or not rows.shape[1]:
        raise LitMultiIPError(f"{name} have shape {tuple(rows.shape)}: give one row an image, (N, D)")
    bad = (~rows.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise LitMultiIPError(
            f"{name} of images {bad[:5]} ({len(bad)} of {len(rows)}) hold NaN or infinity: check the images"
        )
    return rows


def as_float64(values: Features) -> FloatArray:
    """Return values as float64 in numpy, from any device and dtype."""
    return torch.as_tensor(values).detach().to("cpu", torch.float64).numpy()


def _to_unit(rows: FloatArray) -> FloatArray:
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)  # (..., 1)
    bad = np.argwhere(~(np.isfinite(norms[..., 0]) & (norms[..., 0] > 0))).tolist()
    if bad:
        raise LitMultiIPError(f"embeddings at {bad[:5]} ({len(bad)} in all) are zero or not finite: check the images")
    unit: FloatArray = rows / norms
    return unit


def _to_unit_if_found(rows: FloatArray) -> FloatArray:
    """Return unit embeddings; those that are all NaN stay so."""
    found = ~np.isnan(rows).all(axis=-1)
    unit = np.full_like(rows, np.nan)
    unit[found] = _to_unit(rows[found])
    return unit


def _cosine_if_found(unit: FloatArray, sums: FloatArray) -> FloatArray:
    """Return the cosine of unit rows to sums of rows, (T, D) and (T, D) -> (T,); NaN where nothing was summed."""
    norms = np.linalg.norm(sums, axis=-1)  # (T,)
    cosines: FloatArray = (unit * sums).sum(axis=-1) / np.where(norms > 0, norms, np.nan)
    return cosines


def _sum_groups(rows: FloatArray, group: npt.NDArray[np.intp]) -> FloatArray:
    """Add up the rows of each group, (T, D) and (T,) -> (G, D)."""
    sums = np.zeros((group.max(initial=-1) + 1, rows.shape[1]))
    np.add.at(sums, group, rows)
    return sums
