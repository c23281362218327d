"""Score the rows of a test: each extractor sees each image once, and every score draws on that pass."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lit_multiip.data.people import Person
from lit_multiip.data.photos import Photo
from lit_multiip.data.tasks import Task
from lit_multiip.evaluation.extractors import Extraction, Extractor
from lit_multiip.evaluation.intervals import FloatArray, Score, person_mean
from lit_multiip.evaluation.scores import copy_paste, diversity, identity_scores, nearest_reference
from lit_multiip.evaluation.summaries import ImageSet, summarise
from lit_multiip.pixels import square, to_tensor

BATCH = 64  # images a pass of an extractor
NO_SEEDS = ("vae_round_trip", "real_other_photo")  # rows that do not depend on the noise


class RealPhotos:
    """Real photos, each read once.

    Args:
        photos: any number, repeats included.
        side: px.
        show_progress: show a bar while they are read.
    """

    def __init__(self, photos: Iterable[Photo], side: int, show_progress: bool = True) -> None:
        self.place = {photo: i for i, photo in enumerate(dict.fromkeys(photos))}
        bar = tqdm(self.place, "reading real photos", unit="photo", delay=1, disable=not show_progress)
        self.pixels = torch.cat([to_tensor([square(photo.image(), side)]) for photo in bar])  # (M, 3, side, side) uint8

    def find(self, photos: Iterable[Photo]) -> list[int]:
        """Return where photos lie in `pixels`."""
        return [self.place[photo] for photo in photos]


@dataclass
class RowScores:
    """What all extractors say of all rows."""

    # by row, then by `<score>/<extractor>`
    rows: dict[str, dict[str, Score]] = field(default_factory=lambda: defaultdict(dict))
    # by row, one dict a task: an image's scores by `<score>/<extractor>`, NaN where undefined
    cells: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    # by extractor: the method's images and the held-out photos
    sets: dict[str, tuple[ImageSet, ImageSet]] = field(default_factory=dict)
    # by extractor that looks for faces, then by row: [missing, images]
    faces_not_found: dict[str, dict[str, list[int]]] = field(default_factory=lambda: defaultdict(dict))

    def add_cells(self, row: str, key: str, values: FloatArray) -> None:
        """Add a score of each image of a row, (T,)."""
        cells = self.cells.setdefault(row, [{} for _ in values])
        for cell, value in zip(cells, values.tolist(), strict=True):
            cell[key] = value


class Scorer:
    """Scores the rows of one test.

    Args:
        tasks: what was tested.
        photos: their held-out photos and references, and the strangers.
        strangers: photos of training people for the row real_vs_real; empty makes no such row.
        groups: of the jackknife over people.
        resamples: of the bootstrap over people.
        device: of the extractors.
        show_progress: show a bar.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        photos: RealPhotos,
        strangers: Sequence[Photo] = (),
        groups: int = 20,
        resamples: int = 2000,
        device: torch.device | str = "cpu",
        show_progress: bool = True,
    ) -> None:
        self.tasks, self.photos, self.strangers = tasks, photos, strangers
        self.groups, self.resamples = groups, resamples
        self.device, self.show_progress = torch.device(device), show_progress
        self.people = np.array([task.person for task in tasks])  # (T,)
        self.held_out = photos.find(task.held_out for task in tasks)  # T places
        self.references = torch.tensor([photos.find(task.references) for task in tasks])  # (T, R)

    def score(
        self, extractors: Sequence[Extractor], rows: Mapping[str, Tensor], method: str, anchors: bool
    ) -> RowScores:
        """Score all rows by all extractors.

        Args:
            extractors: of different names.
            rows: the images of each row, (T, 3, H, W) uint8.
            method: the row whose features are kept.
            anchors: add the rows of real photos, real_held_out and real_vs_real.
        """
        found = RowScores()
        images_each = len(self.photos.pixels) + sum(map(len, rows.values()))
        total = len(extractors) * images_each
        with tqdm(desc="scoring", total=total, unit="image", disable=not self.show_progress) as bar:
            for extractor in extractors:
                bar.set_description(f"scoring real photos by {extractor.name}")
                real, _ = extract_all(extractor, self.photos.pixels, self.device, bar)
                if real.embedding is not None:
                    found.faces_not_found[extractor.name]["real_photos"] = count_missing_faces(real.embedding)
                held_out = self._select(real, list(dict.fromkeys(task.held_out for task in self.tasks)))
                for row, images in rows.items():
                    bar.set_description(f"scoring {row.replace('_', ' ')} by {extractor.name}")
                    prompts = [task.prompt for task in self.tasks]
                    made, agreement = extract_all(extractor, images, self.device, bar, prompts)
                    generated = self._score_row(extractor, row, made, agreement, real, held_out, found)
                    if row == method:
                        found.sets[extractor.name] = generated, held_out
                if anchors:
                    self._score_real_photos(extractor, real, held_out, found)
            bar.set_description("scored")
        return found

    def _score_row(
        self,
        extractor: Extractor,
        row: str,
        made: Extraction,
        agreement: FloatArray,
        real: Extraction,
        held_out: ImageSet,
        found: RowScores,
    ) -> ImageSet:
        """Add the scores of one row by one extractor to what is found, and return the row's images as it saw them."""
        per_image = self._score_images(extractor, made, real, with_diversity=row not in NO_SEEDS)
        per_image["prompt"] = agreement
        # a score that is undefined everywhere is dropped; of identity, missing faces are the reason, and are reported
        for name in ("prompt", "diversity"):
            if name in per_image and np.isnan(per_image[name]).all():
                del per_image[name]
        if made.embedding is not None:
            found.faces_not_found[extractor.name][row] = count_missing_faces(made.embedding)
        generated = ImageSet(self.people, made.features, made.logits, per_image)
        found.rows[row] |= summarise(extractor.name, generated, held_out, self.groups, self.resamples)
        for name, values in per_image.items():
            found.add_cells(row, f"{name}/{extractor.name}", values)
        return generated

    def _score_images(
        self, extractor: Extractor, made: Extraction, real: Extraction, with_diversity: bool
    ) -> dict[str, FloatArray]:
        """Score each image: copying; identity, where the extractor tells people apart; diversity over seeds; (T,)."""
        vectors = real.vectors()
        scores = {"nearest_reference": nearest_reference(made.vectors(), vectors[self.references])}
        if extractor.can_identify and made.embedding is not None and real.embedding is not None:
            held_out, references = real.embedding[self.held_out], real.embedding[self.references]  # (T, E), (T, R, E)
            identity = identity_scores(made.embedding, held_out, references, self.people)
            scores |= {f"{extractor.likeness}_{name}": values for name, values in identity.items()}
            scores["copy_paste"] = copy_paste(made.embedding, held_out, references)
        if with_diversity and made.features is not None:
            scores["diversity"] = diversity(made.features, self.held_out)
        return scores

    def _score_real_photos(self, extractor: Extractor, real: Extraction, held_out: ImageSet, found: RowScores) -> None:
        """Add the rows real_held_out (how near a photo comes to its references) and real_vs_real."""
        vectors, key = real.vectors(), f"nearest_reference/{extractor.name}"
        copying = nearest_reference(vectors[self.held_out], vectors[self.references])  # (T,)
        if not np.isnan(copying).all():
            found.rows["real_held_out"][key] = person_mean(copying, self.people, resamples=self.resamples)
        found.add_cells("real_held_out", key, copying)
        if self.strangers:
            others = self._select(real, self.strangers)
            found.rows["real_vs_real"] |= summarise(extractor.name, others, held_out, self.groups, self.resamples)

    def _select(self, real: Extraction, photos: Sequence[Photo]) -> ImageSet:
        """Some of the real photos, for the scores of sets."""
        at = self.photos.find(photos)
        features, logits = (None if values is None else values[at] for values in (real.features, real.logits))
        return ImageSet(np.array([photo.person for photo in photos]), features, logits)


def extract_all(
    extractor: Extractor, images: Tensor, device: torch.device, bar: tqdm[Any], prompts: Sequence[str] | None = None
) -> tuple[Extraction, FloatArray]:
    """Have an extractor see images (N, 3, H, W), batch by batch, on a device; the bar counts them.

    Returns:
        What it says of them, and how well they follow their prompts, (N,), or (0,) without prompts; all on the CPU.
    """
    extractor.to(device)
    parts: list[Extraction] = []
    agreement = [torch.empty(0)]
    for number in range(0, len(images), BATCH):
        batch = images[number : number + BATCH].to(device)
        parts.append(extractor.extract(batch))
        if prompts is not None:
            agreement.append(extractor.prompt_agreement(batch, prompts[number : number + BATCH]).cpu())
        bar.update(len(batch))

    def join(tensors: Sequence[Tensor | None]) -> Tensor | None:
        present = [tensor.cpu() for tensor in tensors if tensor is not None]
        return torch.cat(present) if present else None

    seen = Extraction(*(join([getattr(part, field.name) for part in parts]) for field in fields(Extraction)))
    return seen, torch.cat(agreement).double().numpy()


def count_missing_faces(embedding: Tensor) -> list[int]:
    """Count the images without a face, [missing, images], by their embeddings (N, E): rows of NaN."""
    return [int(embedding.isnan().all(dim=1).sum()), len(embedding)]


def draw_strangers(tasks: Sequence[Task], people: Sequence[Person], seed: int) -> list[Photo]:
    """Draw as many photos of training people as there are tasks, evenly from as many people as are tested."""
    rng = np.random.default_rng(seed)
    drawn = [[photos[j] for j in rng.permutation(len(photos))] for photos in (tuple(p.photos) for p in people)]
    drawn = [drawn[i] for i in rng.permutation(len(drawn))]
    n_people = len({task.person for task in tasks})
    order: list[Photo] = []
    for part in (drawn[:n_people], drawn[n_people:]):  # the second only where the first has too few photos
        depth = max(map(len, part), default=0)
        order += [photos[d] for d in range(depth) for photos in part if d < len(photos)]
    return order[: len(tasks)]


def choose_other_photos(tasks: Sequence[Task]) -> list[Photo]:
    """Choose for each task one of its references, another for each task of a person as far as there are so many."""
    count: Counter[str] = Counter()
    photos = []
    for task in tasks:
        photos.append(task.references[count[task.person] % len(task.references)])
        count[task.person] += 1
    return photos
