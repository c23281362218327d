"""Many drawn portraits as one memory-mapped array with their labels: the training data of the miniature."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm.auto import tqdm

from lit_multiip.data import mini_faces
from lit_multiip.data.captions import TEMPLATE
from lit_multiip.data.photos import DataError
from lit_multiip.files import hash_text, write_durably
from lit_multiip.mini.gate import GATE_PEOPLE
from lit_multiip.mini.photos import PhotoSet, Pictures, TrainingPhotos

HIDDEN = -100  # label of what a photo does not show; F.cross_entropy ignores it
MOST_PHRASES = 10  # so that the longest caption fits into the tokenizer's 64 tokens
SIDE = 64  # px of a portrait


def labels_of(who: mini_faces.Person, shot: mini_faces.Scene) -> list[int]:
    """Return the class of every scene attribute, then of every trait; `HIDDEN` where the photo cannot show it."""
    attributes = [shot.label(name) for name in mini_faces.SCENE_ATTRIBUTES]
    traits = [who.label(name) if shot.shows(name) else HIDDEN for name in mini_faces.TRAITS]
    return [HIDDEN if label is None else label for label in attributes] + traits


def _draw_person(job: tuple[int, int, int, bool]) -> npt.NDArray[np.uint8]:
    seed, person, photos, clean = job
    return np.stack([mini_faces.photo(seed, person, number, clean) for number in range(photos)])


class Portraits(Pictures):
    """`photos` drawn portraits of each of some people, drawn once and kept in `folder`.

    An item holds `image` (3, 64, 64) uint8, `index` () and `labels` (scene attributes, then traits).

    Args:
        folder: where they are kept.
        name: of the set.
        people: places of the people among all, such as a part of one of `mini_faces.ROLES`.
        photos: of each.
        seed: of the drawing.
        clean: leave out what covers a face.
    """

    kinds = (*Pictures.kinds, "scene", "traits", "both")
    traits = {name: len(trait.names) for name, trait in mini_faces.TRAITS.items()}  # noqa: RUF012  as the base's

    def __init__(
        self, folder: Path, name: str, people: Sequence[int], photos: int, seed: int, clean: bool = False
    ) -> None:
        self.seed, self.photos, self.clean, self.people = seed, photos, clean, people
        self.name = f"{name}_{len(people)}x{photos}_{seed}{'_clean' if clean else ''}"
        path = folder / f"{self.name}.npy"
        if not path.exists():
            self._draw_all(path)
        super().__init__(np.load(path, mmap_mode="r"), np.repeat(np.arange(len(people)), photos))
        self.labels = np.array([labels_of(*self.truth(i)) for i in range(len(self))])

    def _draw_all(self, path: Path) -> None:
        jobs = [(self.seed, person, self.photos, self.clean) for person in self.people]
        with multiprocessing.get_context("spawn").Pool(min(4, os.cpu_count() or 1)) as pool:
            drawn = pool.imap(_draw_person, jobs, chunksize=16)
            images = np.concatenate(list(tqdm(drawn, f"drawing {path.stem}", len(jobs), unit="person")))
        write_durably(path, lambda file: np.save(file, images))

    def truth(self, index: int) -> tuple[mini_faces.Person, mini_faces.Scene]:
        """Return the person and the scene of portrait `index`."""
        person, number = self.people[index // self.photos], index % self.photos
        return mini_faces.person(self.seed, person), mini_faces.scene(self.seed, person, number, self.clean)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return super().__getitem__(index) | {"labels": torch.from_numpy(self.labels[index])}

    def describe(self, index: int, kind: str, rng: np.random.Generator) -> str:
        """Return a caption of the `scene`, of the `traits` or of `both`."""
        who, shot = self.truth(index)
        if kind == "scene":
            return mini_faces.prompt(shot)
        phrases = mini_faces.trait_phrases(who, shot)
        most = min(len(phrases), MOST_PHRASES)
        keep = rng.permutation(len(phrases))[: rng.integers(max(1, most // 2), most + 1)]
        traits = " with " + ", ".join(phrases[k] for k in keep)
        return f"{TEMPLATE}{traits}" if kind == "traits" else mini_faces.prompt(shot, traits)

    def phrases(self) -> list[str]:
        """Return every phrase of the drawing."""
        return all_phrases()

    def fingerprint(self, captions: bool = False) -> str:
        """Name the set and what it draws."""
        return hash_text(f"{self.name} {self.people[0]}")[:16]


def all_phrases() -> list[str]:
    """Return texts that hold every word of every drawn portrait's captions."""
    phrases = ["a photo of a person with wearing and in front of wall shirt bald head hair eyes , ."]
    phrases += [name for names in mini_faces.SCENE_ATTRIBUTES.values() for name in names]
    phrases += [name for trait in mini_faces.TRAITS.values() for name in trait.names]
    return phrases + mini_faces.OCCLUDERS


class DrawnPeople(TrainingPhotos):
    """Drawn portraits of the range that is called `backbone`, so that nobody else meets them.

    Args:
        people: how many are drawn.
        photos: portraits of each.
        measured: further people, of another range, who measure.
    """

    def __init__(self, people: int = 8000, photos: int = 5, measured: int = 100) -> None:
        self.people, self.photos, self.measured = people, photos, measured
        for name, count, most in (
            ("people", people, len(mini_faces.ROLES["backbone"])),
            ("photos", photos, 10_000),
            ("measured", measured, len(GATE_PEOPLE)),
        ):
            if not 1 <= count <= most:
                raise DataError(f"photos.{name} is {count}: drawn portraits take 1 to {most}")

    def read(self, work: Path, side: int, seed: int) -> PhotoSet:
        """Draw the portraits, or find them drawn."""
        if side != SIDE:
            raise DataError(f"side is {side}: portraits are drawn at {SIDE} px; leave it out")
        training = Portraits(work, "backbone", mini_faces.ROLES["backbone"][: self.people], self.photos, seed)
        unseen = Portraits(work, "measured", GATE_PEOPLE[: self.measured], self.photos, seed)
        return PhotoSet(training, unseen, [], [])
