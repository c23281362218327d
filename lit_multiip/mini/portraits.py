"""Many drawn portraits as one memory-mapped array with their labels: the training data of the miniature."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from lit_multiip.data import mini_faces
from lit_multiip.files import write_durably

HIDDEN = -100  # label of what a photo does not show; F.cross_entropy ignores it


def labels_of(who: mini_faces.Person, shot: mini_faces.Scene) -> list[int]:
    """Return the class of every scene attribute, then of every trait; `HIDDEN` where the photo cannot show it."""
    attributes = [shot.label(name) for name in mini_faces.SCENE_ATTRIBUTES]
    traits = [who.label(name) if shot.shows(name) else HIDDEN for name in mini_faces.TRAITS]
    return [HIDDEN if label is None else label for label in attributes] + traits


def _draw_person(job: tuple[int, int, int, bool]) -> npt.NDArray[np.uint8]:
    seed, person, photos, clean = job
    return np.stack([mini_faces.photo(seed, person, number, clean) for number in range(photos)])


class Portraits(Dataset[dict[str, Tensor]]):
    """`people` x `photos` drawn portraits of one role, drawn once and kept in `folder`.

    An item holds `image` (3, 64, 64) uint8, `index` () and `labels` (scene attributes, then traits).
    """

    def __init__(self, folder: Path, role: str, people: int, photos: int, seed: int, clean: bool = False) -> None:
        self.seed, self.photos, self.clean = seed, photos, clean
        self.people = mini_faces.ROLES[role][:people]
        path = folder / f"{role}_{people}x{photos}_{seed}{'_clean' if clean else ''}.npy"
        if not path.exists():
            self._draw_all(path)
        self.images = np.load(path, mmap_mode="r")
        self.labels = np.array([labels_of(*self.truth(i)) for i in range(len(self))])

    def _draw_all(self, path: Path) -> None:
        jobs = [(self.seed, person, self.photos, self.clean) for person in self.people]
        with multiprocessing.get_context("spawn").Pool(min(4, os.cpu_count() or 1)) as pool:
            drawn = pool.imap(_draw_person, jobs, chunksize=16)
            images = np.concatenate(list(tqdm(drawn, f"drawing {path.stem}", len(jobs), unit="person")))
        write_durably(path, lambda file: np.save(file, images))

    def __len__(self) -> int:
        return len(self.people) * self.photos

    def truth(self, index: int) -> tuple[mini_faces.Person, mini_faces.Scene]:
        """Return the person and the scene of portrait `index`."""
        person, number = self.people[index // self.photos], index % self.photos
        return mini_faces.person(self.seed, person), mini_faces.scene(self.seed, person, number, self.clean)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {
            "image": torch.from_numpy(self.images[index].transpose(2, 0, 1).copy()),
            "index": torch.tensor(index),
            "labels": torch.from_numpy(self.labels[index]),
        }
