"""What did the method look at? The weight and the worth of each reference photo, in pictures and numbers.

Weight: what the aggregator gives a photo, where that can be read off (attention, dimensions won). Worth: what is lost
without it, a photo left out at a time (N - 1 photos in place of N). On drawn portraits it is known what each photo
shows, so that both can be held against the truth: do they go to photos that show what the others hide?
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate
from tqdm import tqdm

from lit_multiip.callbacks import Trainer, run_folder
from lit_multiip.data.photos import Photo
from lit_multiip.evaluation import results as report
from lit_multiip.evaluation.intervals import Score, person_mean
from lit_multiip.evaluation.pictures import Bars, photos_with_bars, squares, to_picture
from lit_multiip.runs import load_trained
from lit_multiip.tools.measures import (
    MEASURES,
    ROWS,
    TRUTHS,
    Inspected,
    InspectError,
    effective_number,
    inspect_person,
    spearman,
)

# ---- over people ------------------------------------------------------------------------------------------------


def summarise(people: Sequence[Inspected]) -> dict[str, Score]:
    """Return means over people, with 95% intervals by person.

    Returns:
        `spearman/<measure>/<truth>` and `spearman/weight/loss_increase`, rank correlations within a person, of people
        for whom both vary; `effective_photos`, see `effective_number`; `row_spread` and `own_weight`, see
        `attention_rows`; `loss` and `loss_increase`, of a photo left out.
    """
    names = np.array([person.person for person in people])
    values: dict[str, list[float]] = {}
    pairs = [(measure, truth) for truth in TRUTHS for measure in MEASURES]
    for a, b in [*pairs, ("weight", "loss_increase")]:
        if all({a, b} <= person.values.keys() for person in people):
            values[f"spearman/{a}/{b}"] = [spearman(person.values[a], person.values[b]) for person in people]
    if all("weight" in person.values for person in people):
        values["effective_photos"] = [effective_number(person.values["weight"]) for person in people]
    for name in ROWS:
        if all(name in person.values for person in people):
            values[name] = [float(person.values[name].mean()) for person in people]
    values["loss"] = [person.loss for person in people]
    values["loss_increase"] = [float(person.values["loss_increase"].mean()) for person in people]
    return {name: person_mean(row, names) for name, row in values.items()}


def draw_person(
    person: Inspected, weights_are: str | None, generated: Image.Image, side: int, title: str
) -> Image.Image:
    """Draw the references with bars of what was measured, the first held-out photo and what was generated."""
    n, values = len(person.references), person.values
    bars = []
    if "weight" in values:
        texts = [f"{100 * value:.1f} %" for value in values["weight"]]
        bars.append(Bars(f"{weights_are} (line: all alike)", values["weight"].tolist(), texts, even=1 / n))
    relative = 100 * values["loss_increase"] / person.loss
    bars.append(Bars("change of the loss without it", relative.tolist(), [f"{value:+.2f} %" for value in relative]))
    if "rarity" in values:
        bars.append(Bars(TRUTHS["rarity"], values["rarity"].tolist(), [f"{value:.2f}" for value in values["rarity"]]))
    *references, held_out = squares([*person.references, person.held_out[0]], side)
    beside = {"held-out photo": held_out, "generated": generated}
    return photos_with_bars(references, bars, beside, side, f"{person.person}, {title}")


# ---- the command ------------------------------------------------------------------------------------------------


def inspect(
    trainer: Trainer,
    model: Any,
    datamodule: Any,
    ckpt_path: str | None = None,
    weights_only: bool | None = None,
    split: Literal["test", "validation"] = "test",
    people: int = 6,
    measured: int = 50,
    output: str | None = None,
) -> None:
    """Show what a method looked at: the weight of each reference photo, and what is lost without it.

    Write a picture a person, inspect.json and photos.csv, and print the summary.

    Args:
        trainer: of one process.
        model: with an aggregator; not built yet.
        datamodule: its people.
        ckpt_path: the weights to look at; None looks at the untrained method.
        weights_only: as `fit` takes it.
        split: whose people.
        people: people with a picture.
        measured: people in the numbers, at least those with a picture.
        output: folder; None takes inspect/ in the run's.
    """
    if people < 0 or measured < 1:
        raise InspectError(f"people={people} and measured={measured}: give at least 0 and at least 1")
    load(trainer, model, datamodule, ckpt_path, split)
    if getattr(model, "aggregator", None) is None:
        raise InspectError(f"{type(model).__name__} has no aggregator: inspect a method that looks at reference photos")
    folder = Path(output) if output else run_folder(trainer) / "inspect"
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.png"):
        stale.unlink()
    found = []
    for person, picture in inspect_people(model, datamodule, split, max(people, measured), people):
        found.append(person)
        if picture is not None:
            slug = re.sub(r"[^\w-]+", "-", person.person)
            picture.save(folder / f"{len(found):02d}_{slug}.png")
    scores, weights_are = summarise(found[:measured]), model.aggregator.weights_are
    report.write_csv(folder / "photos.csv", _photo_rows(found))
    report.write_json(
        folder / "inspect.json",
        {
            "model": model.describe(),
            "checkpoint": ckpt_path,
            "split": split,
            "weights_are": weights_are,
            "summary": {name: score._asdict() for name, score in scores.items()},
            "people": [_describe_person(person) for person in found],
            "versions": report.versions(),
            "commit": report.commit(),
        },
    )
    summary = render_summary(model.method(), weights_are, found[:measured], scores)
    print(f"\n{summary}\n\nPictures and numbers: {folder}")


def load(trainer: Trainer, model: Any, data: Any, checkpoint: str | None, split: str) -> None:
    """Build a method, with a checkpoint's weights where there is one, and make the features of a split's people."""
    data.trainer = trainer
    data.prepare_data()
    data.setup("test" if split == "test" else "validate")
    model.configure_model()
    if checkpoint is not None:
        load_trained(model, Path(checkpoint))
    model.to(trainer.strategy.root_device).eval()


def inspect_people(
    model: Any, data: Any, split: str, most: int, pictured: int
) -> Iterator[tuple[Inspected, Image.Image | None]]:
    """Yield what was measured of each of the first people, with a picture of the first `pictured` of them."""
    tasks = data.tasks if split == "test" else data.validation_tasks
    dataset = (data.test_dataloader() if split == "test" else data.val_dataloader()).dataset
    first: dict[str, dict[Photo, int]] = {}  # a task a held-out photo; its other seeds change the noise alone
    for number, task in enumerate(tasks):
        first.setdefault(task.person, {}).setdefault(task.held_out, number)
    # weights of 16 bits take autocast; a difference of losses deserves float32 where there is no need
    dtype = model.unet.dtype
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(model.device.type, dtype)
    chosen = list(first.values())[:most]
    with torch.no_grad(), autocast:
        for place, numbers in enumerate(tqdm(chosen, "inspecting", unit="person", delay=3)):
            items = [_to_device(dataset[number], model.device) for number in numbers.values()]
            person, picture = inspect_person(model, [tasks[number] for number in numbers.values()], items), None
            if place < pictured:
                [image] = model.generate(default_collate(items[:1]))
                side, weights_are = model.image_side, model.aggregator.weights_are
                picture = draw_person(person, weights_are, to_picture(image), side, model.method())
            yield person, picture


def _to_device(item: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    numbers = {key: value for key, value in item.items() if not isinstance(value, str)}  # prompts are words
    return move_data_to_device(numbers, device)


def _describe_person(person: Inspected) -> dict[str, Any]:
    return {
        "person": person.person,
        "references": [photo.name for photo in person.references],
        "held_out": [photo.name for photo in person.held_out],
        "loss": person.loss,
        **{name: values.tolist() for name, values in person.values.items()},
    }


def _photo_rows(people: Sequence[Inspected]) -> list[dict[str, Any]]:
    return [
        {"person": person.person, "reference": photo.name}
        | {name: float(values[number]) for name, values in person.values.items()}
        for person in people
        for number, photo in enumerate(person.references)
    ]


def render_summary(
    method: str, weights_are: str | None, people: Sequence[Inspected], scores: Mapping[str, Score]
) -> str:
    """Return the summary as it is printed."""

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
    if all(name in scores for name in ROWS):
        spread, own = (interval(scores[name], form=form) for name, form in zip(ROWS, (".2f", ".3f"), strict=True))
        lines.append(f"- {weights_are} of a row: spread over {spread} photos (exp H), weight on itself {own}")
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
