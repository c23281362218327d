"""What a small backbone is trained on: square pictures in one array, their captions, and whom they show."""

from __future__ import annotations

import logging
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from lit_multiip.backbone.face_crop import FaceCrop
from lit_multiip.data.captions import TEMPLATE
from lit_multiip.data.names import normalise_name
from lit_multiip.data.people import PeopleSource, Person
from lit_multiip.data.photos import DataError, Photo, distinct_photos
from lit_multiip.files import hash_text, shorten, write_durably
from lit_multiip.pixels import square

logger = logging.getLogger(__name__)

Pixels = npt.NDArray[np.uint8]
MOST_NAMED = 20  # photos that an error lists


class Pictures(Dataset[dict[str, Tensor]], ABC):
    """Square pictures; where they are mirrored too, these follow after all others.

    An item holds `image` (3, S, S) uint8 and `index` ().

    Args:
        images: (n, S, S, 3) uint8, which may be memory-mapped.
        person: number of the person whom each shows, (n,).
        mirrored: have every picture twice, as it is and mirrored.
    """

    kinds: ClassVar[tuple[str, ...]] = ("bare", "drop")  # of caption
    traits: Mapping[str, int] = {}  # by name, the number of classes; the last columns of an item's `labels`

    def __init__(self, images: Pixels, person: npt.NDArray[Any], mirrored: bool = False) -> None:
        self.images, self.person, self.mirrored = images, person, mirrored

    def __len__(self) -> int:
        return len(self.images) * (1 + self.mirrored)

    def __deepcopy__(self, memo: dict[int, Any]) -> Pictures:
        return self  # an average of weights copies all that its module holds

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        pixels = self.images[index % len(self.images)]
        if index >= len(self.images):
            pixels = pixels[:, ::-1]
        return {"image": torch.from_numpy(pixels.transpose(2, 0, 1).copy()), "index": torch.tensor(index)}

    def caption(self, index: int, rng: np.random.Generator, kinds: Mapping[str, float]) -> str:
        """Draw a caption of picture `index`.

        Args:
            index: of the picture.
            rng: draws the kind, and what a caption of that kind leaves open.
            kinds: probabilities of `bare` (a photo of a person), of `drop` (none at all), and of the set's own kinds.
        """
        kind = rng.choice(list(kinds), p=list(kinds.values()))
        if kind == "drop":
            return ""
        return TEMPLATE if kind == "bare" else self.describe(index, kind, rng)

    @abstractmethod
    def describe(self, index: int, kind: str, rng: np.random.Generator) -> str:
        """Return a caption of one of the set's own kinds."""

    @abstractmethod
    def phrases(self) -> list[str]:
        """Return texts that hold every word of every caption."""

    @abstractmethod
    def fingerprint(self, captions: bool = False) -> str:
        """Name the pictures, and with them the captions, by what defines them, 16 hexadecimal digits."""


class PhotoSet(NamedTuple):
    """What trains a backbone, and what measures it."""

    training: Pictures
    unseen: Pictures  # of people whom no part is trained on
    people: Sequence[Person]  # of `training`, their photos cut; none of drawn portraits
    measuring: Sequence[Person]  # of `unseen`, likewise


class ChosenPeople(PeopleSource):
    """People that are there already, for `fit`.

    Args:
        chosen: in natural order of their names.
    """

    def __init__(self, chosen: Sequence[Person]) -> None:
        self.chosen = chosen

    def people(self) -> list[Person]:
        """Return them."""
        return list(self.chosen)


class TrainingPhotos(ABC):
    """Where the pictures come from. Constructing one is cheap; `read` does the work."""

    @abstractmethod
    def read(self, work: Path, side: int, seed: int) -> PhotoSet:
        """Read or draw the pictures.

        Args:
            work: folder in which they are kept between calls.
            side: of a picture in px.
            seed: of the drawn people, and of who is left unseen.
        """


class Prompted(Pictures):
    """Photos of real people with the prompts that their source gives them.

    Args:
        photos: in the order of the images.
        images: (n, S, S, 3) uint8.
        mirrored: have every photo twice, as it is and mirrored; left and right change places in a mirrored one's
            prompt.
    """

    kinds = (*Pictures.kinds, "prompt")

    def __init__(self, photos: Sequence[Photo], images: Pixels, mirrored: bool = False) -> None:
        numbers = {name: number for number, name in enumerate(dict.fromkeys(photo.person for photo in photos))}
        super().__init__(images, np.array([numbers[photo.person] for photo in photos]), mirrored)
        self.prompts = [photo.prompt for photo in photos]
        self.content = hash_text("\n".join(photo.content_key() for photo in photos))

    def describe(self, index: int, kind: str, rng: np.random.Generator) -> str:
        """Return the photo's prompt."""
        prompt = self.prompts[index % len(self.prompts)]
        return prompt if index < len(self.prompts) else swap_sides(prompt)

    def phrases(self) -> list[str]:
        """Return the prompts, of mirrored photos too."""
        distinct = list(dict.fromkeys(self.prompts))
        return [TEMPLATE, *distinct, *(map(swap_sides, distinct) if self.mirrored else ())]

    def fingerprint(self, captions: bool = False) -> str:
        """Name contents and mirroring, and the prompts if asked."""
        return hash_text("\n".join([self.content, str(self.mirrored), *(self.prompts if captions else ())]))[:16]


def swap_sides(prompt: str) -> str:
    """Let `left` and `right` change places, as in a mirror."""
    return re.sub(r"\b(left|right)\b", lambda found: {"left": "right", "right": "left"}[found[0]], prompt)


class RealPeople(TrainingPhotos):
    """Photos of real people, of any source.

    Args:
        source: where people come from, such as LFW or Folder.
        crop: how photos are cut before they are scaled, as `data.crop`; None takes the central square.
        fewer_than: people with this many photos or more are the experiment's, and are left out; None takes everyone.
        experiment: the people whom the finished backbone will be tested on, as far as they have `fewer_than` photos or
            more: a recipe whose training people are among them, by name or by a photo, is refused.
        measured: number of people who are kept from training and measure it.
        mirrored: train on every photo as it is and mirrored.
    """

    def __init__(
        self,
        source: PeopleSource,
        crop: FaceCrop | None = None,
        fewer_than: int | None = 10,
        experiment: PeopleSource | None = None,
        measured: int = 200,
        mirrored: bool = True,
    ) -> None:
        if measured < 1 or (fewer_than is not None and fewer_than < 2):
            raise DataError(f"measured is {measured} and fewer_than {fewer_than}: give at least 1 and at least 2")
        self.source, self.crop, self.fewer_than, self.experiment = source, crop, fewer_than, experiment
        self.measured, self.mirrored = measured, mirrored

    def read(self, work: Path, side: int, seed: int) -> PhotoSet:
        """See `TrainingPhotos.read`."""
        people = [replace(p, photos=distinct_photos(p.photos)) for p in self._choose(self.source.people())]
        if self.experiment is not None:
            least = self.fewer_than or 0
            check_apart(people, [p for p in self.experiment.people() if len(p.photos) >= least])
        if self.crop is not None:
            people = self.crop(people, work / "features")
        names = self._draw_unseen(people, seed)
        training = [person for person in people if person.name not in names]
        measuring = [person for person in people if person.name in names]
        seen, unseen = ([photo for person in one for photo in person.photos] for one in (training, measuring))
        return PhotoSet(
            Prompted(seen, read_pixels(seen, side, work), self.mirrored),
            Prompted(unseen, read_pixels(unseen, side, work)),
            training,
            measuring,
        )

    def _choose(self, people: Sequence[Person]) -> list[Person]:
        kept = [p for p in people if self.fewer_than is None or len(p.photos) < self.fewer_than]
        if len(kept) < len(people):
            what = "left out %d of %d people: they have %d photos or more, and are the experiment's"
            logger.info(what, len(people) - len(kept), len(people), self.fewer_than)
        if len(kept) <= self.measured:
            raise DataError(
                f"{len(kept)} people are left to train and measure a backbone, and {self.measured} of them measure it: "
                "give more people, or lower photos.measured"
            )
        return kept

    def _draw_unseen(self, people: Sequence[Person], seed: int) -> set[str]:
        """Draw the names of those who measure, of people with two photos or more as far as there are enough."""
        rng = np.random.default_rng([seed, 7])
        order = sorted(rng.permutation(len(people)), key=lambda i: len(people[i].photos) < 2)
        return {people[i].name for i in order[: self.measured]}


def check_apart(people: Sequence[Person], experiment: Sequence[Person]) -> None:
    """Refuse people of whom an experiment would test the backbone, by name or by the content of a photo."""
    names = {normalise_name(person.name) for person in experiment}
    keys = {photo.original().content_key() for person in experiment for photo in person.photos}
    known = [
        person.name
        for person in people
        if normalise_name(person.name) in names or keys & {photo.original().content_key() for photo in person.photos}
    ]
    if known:
        raise DataError(
            f"{len(known)} of {len(people)} training people are the experiment's, by name or by a photo: "
            f"{shorten(known)}: take them out of photos.source or out of photos.experiment"
        )


def read_pixels(photos: Sequence[Photo], side: int, work: Path) -> Pixels:
    """Read photos as squares of `side` px, (n, S, S, 3) uint8, memory-mapped from a file in `work`.

    Raises:
        DataError: some cannot be read, or are smaller than `side`; all are counted.
    """
    key = hash_text("\n".join([str(side), *(photo.content_key() for photo in photos)]))[:16]
    path = work / f"photos_{side}_{key}.npy"
    if not path.exists():
        images = np.zeros((len(photos), side, side, 3), np.uint8)
        faults: list[str] = []
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # Pillow decodes outside the interpreter lock
            bar = tqdm(pool.map(partial(_read_square, side=side), photos), "reading photos", len(photos), unit="photo")
            for number, found in enumerate(bar):
                if isinstance(found, str):
                    faults.append(found)
                else:
                    images[number] = found
        if faults:
            more = f"\n  and {len(faults) - MOST_NAMED} more" if len(faults) > MOST_NAMED else ""
            raise DataError(
                f"{len(faults)} of {len(photos)} photos cannot be used:"
                + "".join(f"\n  {fault}" for fault in faults[:MOST_NAMED])
                + f"{more}\nreplace them, leave them out, or lower side"
            )
        write_durably(path, lambda file: np.save(file, images))
    pixels: Pixels = np.load(path, mmap_mode="r")
    return pixels


def _read_square(photo: Photo, side: int) -> Pixels | str:
    """Return a photo's pixels, (S, S, 3), or why it cannot be used."""
    try:
        image = photo.image()
    except DataError as error:
        return str(error)
    if min(image.size) < side:
        cut = "" if photo.original() is photo else " after it is cut"
        size = f"{image.width} x {image.height} px{cut}"
        return f"'{photo.name}' of '{photo.person}' has {size}, fewer than the side of {side} px"
    return np.asarray(square(image, side))
