"""Measures of one person's reference photos: the weight that each has, its worth, and what is known of a drawn one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from lit_multiip.data import mini_faces
from lit_multiip.data.photos import DrawnPhoto, Photo
from lit_multiip.data.tasks import Task
from lit_multiip.evaluation.intervals import FloatArray
from lit_multiip.files import LitMultiIPError
from lit_multiip.methods.method import VALIDATION_TIMES

# What is measured of a photo -> how it is called.
MEASURES = {
    "weight": "weight",
    "loss_increase": "loss without it",
    "token_shift": "image tokens without it, 1 - cos",
}
ROWS = ("row_spread", "own_weight")  # of what attends with a row a photo
TRUTHS = {
    "rarity": "shows what others hide",
    "needed": "shows what others hide and the held-out photo shows",
    "visible_regions": "regions it shows",
}


class InspectError(LitMultiIPError):
    """What cannot be inspected; the message names the value and the remedy."""


def leave_one_out(photos: Tensor) -> Tensor:
    """Leave each photo out once, (N, D) -> (N, N - 1, D); row n is without photo n."""
    return torch.stack([torch.cat([photos[:n], photos[n + 1 :]]) for n in range(len(photos))])


def restoration_losses(model: Any, item: Mapping[str, Any], conditions: Tensor, batch_size: int = 16) -> Tensor:
    """Return the denoising loss of a held-out photo under several conditions, at the noise and times of validation.

    Args:
        model: has `denoising_loss` and `fixed_draws`, as `Method`.
        item: of `TaskDataset`: moments (2C, h, w), text (what the UNet takes besides) and seed ().
        conditions: aggregated embeddings, (K, M, D).
        batch_size: conditions a pass of the UNet.

    Returns:
        (K,), the mean over `VALIDATION_TIMES`; noise and times are the same for all K.
    """
    x = item["moments"].chunk(2)[0][None] * model.backbone.scaling_factor  # (1, C, h, w)
    losses = torch.zeros(len(conditions), device=x.device)
    for t, eps in model.fixed_draws(x, [int(item["seed"])]):
        parts = []
        for part in conditions.split(batch_size):
            k = len(part)
            text = {name: value.expand(k, *value.shape) for name, value in item["text"].items()}
            of_all = x.expand(k, -1, -1, -1), eps.expand(k, -1, -1, -1), t.expand(k)
            parts.append(model.denoising_loss(*of_all, text, part))
        losses += torch.cat(parts) / len(VALIDATION_TIMES)
    return losses


def mean_token(model: Any, embeds: Tensor) -> Tensor:
    """Return the mean of the image tokens that the UNet attends to, (K, M, D) -> (K, E)."""
    project = model.unet.encoder_hid_proj.image_projection_layers[0]
    tokens = project(embeds.flatten(0, 1))  # (K M, 4, E)
    return tokens.unflatten(0, embeds.shape[:2]).mean(dim=(1, 2))


def visible_traits(photo: Photo) -> npt.NDArray[np.bool_] | None:
    """Return which of `mini_faces.TRAITS` a drawn photo shows, (T,); None of a real one."""
    if not isinstance(photo, DrawnPhoto):
        return None
    scene = mini_faces.scene(photo.seed, photo.index, photo.number)
    return np.array([scene.shows(trait) for trait in mini_faces.TRAITS])


def rarity(shows: npt.NDArray[np.bool_]) -> FloatArray:
    """Return how much a photo shows that the others hide: r_n = sum_t shows_nt / sum_m shows_mt.

    A trait that one photo alone shows counts 1 for it, a trait that all N show 1 / N for each.

    Args:
        shows: whether photo n shows trait t, (N, T).

    Returns:
        (N,), which sum to the number of traits that anything shows.
    """
    counts = shows.sum(axis=0)  # (T,)
    return (shows / np.maximum(counts, 1)).sum(axis=1)


def visible_regions(shows: npt.NDArray[np.bool_]) -> FloatArray:
    """Return how many of the three regions that can be hidden are not, (N, T) -> (N,)."""
    hidden_by = [trait.hidden_by for trait in mini_faces.TRAITS.values()]
    return np.stack([shows[:, hidden_by.index(name)] for name in mini_faces.OCCLUDERS]).sum(axis=0).astype(float)


def spearman(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Return the rank correlation of two measures over one person's photos; NaN where one of them is constant."""
    rows = np.array([a, b], dtype=np.float64)  # (2, N)
    # what is equal but for rounding is a tie
    rows = np.round(rows / np.maximum(np.abs(rows).max(axis=1, keepdims=True), 1e-300), 6)
    if rows.shape[1] < 2 or (np.ptp(rows, axis=1) == 0).any():
        return float("nan")
    return float(stats.spearmanr(*rows).statistic)


def effective_number(weights: npt.ArrayLike) -> float:
    """Return among how many photos weights are shared, exp(-sum_n w_n log w_n): N where all are equal, 1 of one."""
    w = np.asarray(weights, float)
    w = w[w > 0] / w.sum()
    return float(np.exp(-(w * np.log(w)).sum()))


def attention_rows(aggregator: Any, embeds: Tensor) -> dict[str, FloatArray]:
    """Measure each photo's own row of attention; nothing where the aggregator has none.

    Args:
        aggregator: of N photos' embeddings.
        embeds: of one person's photos, (N, D).

    Returns:
        `row_spread`, among how many photos a photo's row is shared, exp H, and `own_weight`, what it gives to itself;
        (N,) each, means over heads.
    """
    if not hasattr(aggregator, "attention_weights"):
        return {}
    [rows] = aggregator.attention_weights(embeds[None]).double().cpu().numpy()  # (h, N, N)
    spread = [[effective_number(row) for row in head] for head in rows]
    return {"row_spread": np.mean(spread, axis=0), "own_weight": rows.diagonal(axis1=1, axis2=2).mean(axis=0)}


@dataclass
class Inspected:
    """What was measured of one person's references; all (N,)."""

    person: str
    references: Sequence[Photo]
    held_out: Sequence[Photo]
    loss: float  # with all references, the mean over the held-out photos
    values: dict[str, FloatArray] = field(default_factory=dict)  # of MEASURES, ROWS and TRUTHS, what there is


def inspect_person(model: Any, tasks: Sequence[Task], items: Sequence[Mapping[str, Tensor]]) -> Inspected:
    """Measure the references of one person.

    Args:
        model: A method with an `aggregator`.
        tasks: all of this person, of a held-out photo each.
        items: of `TaskDataset`, a task each, on the model's device.
    """
    references = tasks[0].references
    if len(references) < 2:
        raise InspectError(f"'{tasks[0].person}' has a single reference, and one is left out: set data.references to 2")
    embeds = items[0]["references"]  # (N, D)
    everything, without = model.condition(embeds[None]), model.condition(leave_one_out(embeds))
    losses, increases = [], []
    for item in items:
        with_all = restoration_losses(model, item, everything)  # (1,)
        losses.append(float(with_all))
        increases.append((restoration_losses(model, item, without) - with_all).double().cpu().numpy())
    found = Inspected(tasks[0].person, references, [task.held_out for task in tasks], float(np.mean(losses)))
    weights = model.aggregator.photo_weights(embeds[None])
    if weights is not None:
        found.values["weight"] = weights[0].double().cpu().numpy()
    found.values |= attention_rows(model.aggregator, embeds)
    found.values["loss_increase"] = np.mean(increases, axis=0)
    cosines = F.cosine_similarity(mean_token(model, everything), mean_token(model, without))  # (N,)
    found.values["token_shift"] = 1 - cosines.double().cpu().numpy()
    shows = [row for photo in references if (row := visible_traits(photo)) is not None]
    targets = [row for task in tasks if (row := visible_traits(task.held_out)) is not None]
    if len(shows) == len(references) and targets:
        table = np.stack(shows)  # (N, T)
        found.values |= {"rarity": rarity(table), "visible_regions": visible_regions(table)}
        found.values["needed"] = np.mean([rarity(table & target) for target in targets], axis=0)
    return found
