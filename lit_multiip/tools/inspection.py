"""What did the method look at? The weight and the worth of each reference photo, in pictures and numbers.

Weight: what the aggregator gives a photo, where that can be read off (attention, dimensions won). Worth: what is lost
without it, a photo left out at a time (N - 1 photos in place of N). On drawn portraits it is known what each photo
shows, so that both can be held against the truth: do they go to photos that show what the others hide?
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from lightning.fabric.utilities import move_data_to_device
from PIL import Image
from scipy import stats
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import default_collate
from tqdm import tqdm

from lit_multiip.data import mini_faces
from lit_multiip.data.photos import DrawnPhoto, Photo
from lit_multiip.data.tasks import Task
from lit_multiip.evaluation import results as report
from lit_multiip.evaluation.intervals import FloatArray, Score, person_bootstrap
from lit_multiip.evaluation.pictures import Bars, photos_with_bars, to_picture
from lit_multiip.files import UsageError
from lit_multiip.methods.adapter import VALIDATION_TIMES
from lit_multiip.runs import load_trained

# What is measured of a photo -> how it is called.
MEASURES = {
    "weight": "weight",
    "loss_increase": "loss without it",
    "token_shift": "image tokens without it, 1 - cos",
}
TRUTHS = {
    "rarity": "shows what others hide",
    "needed": "shows what others hide and the held-out photo shows",
    "visible_regions": "regions it shows",
}


# ---- measures of one person -------------------------------------------------------------------------------------


def leave_one_out(photos: Tensor) -> Tensor:
    """All photos but one, (N, D) -> (N, N - 1, D); row n is without photo n."""
    return torch.stack([torch.cat([photos[:n], photos[n + 1 :]]) for n in range(len(photos))])


def restoration_losses(model: Any, item: Mapping[str, Any], conditions: Tensor, batch_size: int = 16) -> Tensor:
    """Denoising loss of one held-out photo under several conditions, at the noise and times that validation uses.

    Args:
        model: Has `denoising_loss`, `noise` and `scaling_factor`, as `MultiIPAdapter`.
        item: Of `TaskDataset`: moments (2C, h, w), text (what the UNet takes besides) and seed ().
        conditions: Aggregated embeddings, (K, M, D).
        batch_size: Conditions a pass of the UNet.

    Returns:
        (K,), the mean over `VALIDATION_TIMES`; noise and times are the same for all K.
    """
    x = item["moments"].chunk(2)[0][None] * model.backbone.scaling_factor  # (1, C, h, w)
    steps = model.noise.config.num_train_timesteps
    losses = torch.zeros(len(conditions), device=x.device)
    for number, time in enumerate(VALIDATION_TIMES):
        generator = torch.Generator().manual_seed(int(item["seed"]) + number)
        eps = torch.randn(x.shape[1:], generator=generator)[None].to(x)
        parts = []
        for part in conditions.split(batch_size):
            k = len(part)
            t = torch.full((k,), int(time * steps), device=x.device)
            text = {name: value.expand(k, *value.shape) for name, value in item["text"].items()}
            parts.append(model.denoising_loss(x.expand(k, -1, -1, -1), eps.expand(k, -1, -1, -1), t, text, part))
        losses += torch.cat(parts) / len(VALIDATION_TIMES)
    return losses


def mean_token(model: Any, embeds: Tensor) -> Tensor:
    """Mean of the image tokens that the UNet attends to, (K, M, D) -> (K, E)."""
    project = model.unet.encoder_hid_proj.image_projection_layers[0]
    tokens = project(embeds.flatten(0, 1))  # (K M, 4, E)
    return tokens.unflatten(0, embeds.shape[:2]).mean(dim=(1, 2))


def visible_traits(photo: Photo) -> npt.NDArray[np.bool_] | None:
    """Which of `mini_faces.TRAITS` a drawn photo shows, (T,); None of a real one."""
    if not isinstance(photo, DrawnPhoto):
        return None
    scene = mini_faces.scene(photo.seed, photo.index, photo.number)
    return np.array([scene.shows(trait) for trait in mini_faces.TRAITS])


def rarity(shows: npt.NDArray[np.bool_]) -> FloatArray:
    """How much a photo shows that the others hide: r_n = sum_t shows_nt / sum_m shows_mt.

    A trait that one photo alone shows counts 1 for it, a trait that all N show 1 / N for each.

    Args:
        shows: Whether photo n shows trait t, (N, T).

    Returns:
        (N,), which sum to the number of traits that anything shows.
    """
    counts = shows.sum(axis=0)  # (T,)
    return (shows / np.maximum(counts, 1)).sum(axis=1)


def visible_regions(shows: npt.NDArray[np.bool_]) -> FloatArray:
    """How many of the three regions that can be hidden are not, (N, T) -> (N,)."""
    hidden_by = [trait.hidden_by for trait in mini_faces.TRAITS.values()]
    return np.stack([shows[:, hidden_by.index(name)] for name in mini_faces.OCCLUDERS]).sum(axis=0).astype(float)


def spearman(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Rank correlation of two measures over one person's photos; NaN where one of them is constant."""
    rows = np.array([a, b], dtype=np.float64)  # (2, N)
    # what is equal but for rounding is a tie
    rows = np.round(rows / np.maximum(np.abs(rows).max(axis=1, keepdims=True), 1e-300), 6)
    if rows.shape[1] < 2 or (np.ptp(rows, axis=1) == 0).any():
        return float("nan")
    return float(stats.spearmanr(*rows).statistic)


def effective_number(weights: npt.ArrayLike) -> float:
    """Number of photos among which weights are shared, exp(-sum_n w_n log w_n): N where all are equal, 1 of one."""
    w = np.asarray(weights, float)
    w = w[w > 0] / w.sum()
    return float(np.exp(-(w * np.log(w)).sum()))


@dataclass
class Inspected:
    """What was measured of one person's references; all (N,)."""

    person: str
    references: Sequence[Photo]
    held_out: Sequence[Photo]
    loss: float  # with all references, the mean over the held-out photos
    values: dict[str, FloatArray] = field(default_factory=dict)  # of MEASURES and TRUTHS, what there is


def inspect_person(model: Any, tasks: Sequence[Task], items: Sequence[Mapping[str, Tensor]]) -> Inspected:
    """Measure the references of one person.

    Args:
        model: A method with an `aggregator`.
        tasks: All of this person, of a held-out photo each.
        items: Of `TaskDataset`, a task each, on the model's device.

    Raises:
        ValueError: There is one reference, which cannot be left out.
    """
    references = tasks[0].references
    if len(references) < 2:
        raise ValueError(f"'{tasks[0].person}' has a single reference, and one is left out: set data.references to 2")
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


# ---- over people ------------------------------------------------------------------------------------------------


def summarise(people: Sequence[Inspected]) -> dict[str, Score]:
    """Means over people, with 95% intervals by person.

    Returns:
        `spearman/<measure>/<truth>` and `spearman/weight/loss_increase`, rank correlations within a person, of people
        for whom both vary; `effective_photos`, see `effective_number`; `loss` and `loss_increase`, of a photo left out.
    """
    names = np.array([person.person for person in people])
    values: dict[str, list[float]] = {}
    pairs = [(measure, truth) for truth in TRUTHS for measure in MEASURES]
    for a, b in [*pairs, ("weight", "loss_increase")]:
        if all({a, b} <= person.values.keys() for person in people):
            values[f"spearman/{a}/{b}"] = [spearman(person.values[a], person.values[b]) for person in people]
    if all("weight" in person.values for person in people):
        values["effective_photos"] = [effective_number(person.values["weight"]) for person in people]
    values["loss"] = [person.loss for person in people]
    values["loss_increase"] = [float(person.values["loss_increase"].mean()) for person in people]
    return {name: person_bootstrap(row, names) for name, row in values.items()}


def picture(person: Inspected, weights_are: str | None, generated: Image.Image, side: int, title: str) -> Image.Image:
    """The references with bars of what was measured, the first held-out photo and what was generated."""
    from lit_multiip.pixels import square

    n, values = len(person.references), person.values
    bars = []
    if "weight" in values:
        texts = [f"{100 * value:.1f} %" for value in values["weight"]]
        bars.append(Bars(f"{weights_are} (line: all alike)", values["weight"].tolist(), texts, even=1 / n))
    relative = 100 * values["loss_increase"] / person.loss
    bars.append(Bars("change of the loss without it", relative.tolist(), [f"{value:+.2f} %" for value in relative]))
    if "rarity" in values:
        bars.append(Bars(TRUTHS["rarity"], values["rarity"].tolist(), [f"{value:.2f}" for value in values["rarity"]]))
    beside = {"held-out photo": square(person.held_out[0].image(), side), "generated": generated}
    return photos_with_bars(
        [square(photo.image(), side) for photo in person.references], bars, beside, side, f"{person.person}, {title}"
    )


# ---- the command ------------------------------------------------------------------------------------------------


def inspect(
    trainer: Any,
    model: Any,
    data: Any,
    checkpoint: str | None,
    split: Literal["test", "validation"] = "test",
    people: int = 6,
    measured: int = 50,
    output: str | None = None,
) -> None:
    """Look at what a method sees in its references: write a picture a person, inspect.json and photos.csv.

    Args:
        trainer: Of one process; says which device, and where the run lies.
        model: Not built yet.
        data: Whose people.
        checkpoint: File of the model's weights; None looks at the untrained method.
        split: Whose people.
        people: Those with a picture.
        measured: Those in the numbers, at least those with a picture.
        output: Folder; None takes inspect/ in the run's.
    """
    if people < 0 or measured < 1:
        raise UsageError(f"people={people} and measured={measured}: give at least 0 and at least 1")
    load(trainer, model, data, checkpoint, split)
    device = trainer.strategy.root_device
    folder = Path(output) if output else Path(trainer.log_dir or trainer.default_root_dir) / "inspect"
    folder.mkdir(parents=True, exist_ok=True)
    if getattr(model, "aggregator", None) is None:
        raise ValueError(f"{type(model).__name__} has no aggregator: inspect a method that looks at reference photos")

    tasks = data.tasks if split == "test" else data.validation_tasks
    dataset = (data.test_dataloader() if split == "test" else data.val_dataloader()).dataset
    first: dict[str, dict[Photo, int]] = {}  # a task a held-out photo; its other seeds change the noise alone
    for number, task in enumerate(tasks):
        first.setdefault(task.person, {}).setdefault(task.held_out, number)
    chosen = list(first.items())[: max(people, measured)]
    # weights of 16 bits take autocast; a difference of losses deserves float32 where there is no need
    dtype = model.unet.dtype
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
    weights_are, looked_at = model.aggregator.weights_are, list[Inspected]()
    for stale in folder.glob("*.png"):
        stale.unlink()
    with torch.no_grad(), autocast:
        for name, numbers in tqdm(chosen, "inspecting", unit="person", delay=3):
            items = [_to(dataset[number], device) for number in numbers.values()]
            person = inspect_person(model, [tasks[number] for number in numbers.values()], items)
            looked_at.append(person)
            if len(looked_at) <= people:
                [image] = model.generate(default_collate(items[:1]))
                drawn = to_picture(image)
                made = picture(person, weights_are, drawn, model.image_side, model.method())
                slug = re.sub(r"[^\w-]+", "-", name)
                made.save(folder / f"{len(looked_at):02d}_{slug}.png")

    scores = summarise(looked_at[:measured])
    report.write_csv(folder / "photos.csv", _rows(looked_at))
    report.write_json(
        folder / "inspect.json",
        {
            "model": model.describe(),
            "checkpoint": checkpoint,
            "split": split,
            "weights_are": weights_are,
            "summary": {name: score._asdict() for name, score in scores.items()},
            "people": [_facts(person) for person in looked_at],
            "versions": report.versions(),
            "commit": report.commit(),
        },
    )
    print(f"\n{_text(model.method(), weights_are, looked_at[:measured], scores)}\n\nPictures and numbers: {folder}")


def load(trainer: Any, model: Any, data: Any, checkpoint: str | None, split: str) -> None:
    """Build a method, with a checkpoint's weights where there is one, and make the features of a split's people."""
    data.trainer = trainer
    data.prepare_data()
    data.setup("test" if split == "test" else "validate")
    model.configure_model()
    if checkpoint is not None:
        load_trained(model, Path(checkpoint))
    model.to(trainer.strategy.root_device).eval()


def _to(item: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    numbers = {key: value for key, value in item.items() if not isinstance(value, str)}  # prompts are words
    return move_data_to_device(numbers, device)


def _facts(person: Inspected) -> dict[str, Any]:
    return {
        "person": person.person,
        "references": [photo.name for photo in person.references],
        "held_out": [photo.name for photo in person.held_out],
        "loss": person.loss,
        **{name: values.tolist() for name, values in person.values.items()},
    }


def _rows(people: Sequence[Inspected]) -> list[dict[str, Any]]:
    return [
        {"person": person.person, "reference": photo.name}
        | {name: float(values[number]) for name, values in person.values.items()}
        for person in people
        for number, photo in enumerate(person.references)
    ]


def _text(method: str, weights_are: str | None, people: Sequence[Inspected], scores: Mapping[str, Score]) -> str:
    """The summary as it is printed."""

    def interval(score: Score, factor: float = 1.0, form: str = ".3f") -> str:
        if score.low is None or score.high is None:
            return format(factor * score.value, form)
        low, high = (format(factor * bound, form) for bound in (score.low, score.high))
        return f"{format(factor * score.value, form)} [{low}, {high}]"

    photos = len(people[0].references)
    lines = [f"{method}: {len(people)} people, {photos} references each; 95% intervals by person"]
    if "effective_photos" in scores:
        lines.append(
            f"- {weights_are} is shared among {interval(scores['effective_photos'], form='.2f')} photos (exp H)"
        )
    lost = interval(scores["loss_increase"], 100 / scores["loss"].value, "+.3f")
    lines.append(f"- loss when a photo is left out: {lost} % of {scores['loss'].value:.4f}")
    called = {**MEASURES, **TRUTHS, "weight": weights_are or "weight"}
    correlations = [name for name in scores if name.startswith("spearman/")]
    if correlations:
        lines.append("- rank correlation within a person (Spearman), mean over those for whom both vary:")
    for name in correlations:
        _, a, b = name.split("/")
        score = scores[name]
        value = "undefined, one is constant" if math.isnan(score.value) else f"{interval(score, form='+.3f')}"
        lines.append(f"    {called[a]} ~ {called[b]}: {value} ({score.people} people)")
    return "\n".join(lines)
