"""People and their captioned photos: where they come from, which are kept, and who trains and who tests."""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from lit_multiip.data import mini_faces
from lit_multiip.data.captions import (
    METADATA,
    TEMPLATE,
    _caption_prompts,
    _entries,
    _metadata_prompts,
    check_template,
    natural,
    nfc,
)
from lit_multiip.data.photos import DataError, DrawnPhoto, FilePhoto, Photo, Photos
from lit_multiip.files import shorten

logger = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass(frozen=True, slots=True)
class Person:
    """A person and their photos.

    Attributes:
        name: Unique within the source, Unicode NFC.
        photos: In natural order of their names; kept packed, see :class:`Photos`.
        split: ``train``, ``validation`` or ``test`` where the source itself fixes it.
    """

    name: str
    photos: Sequence[Photo]
    split: str | None = None

    def __post_init__(self) -> None:
        """Pack the photos."""
        if not isinstance(self.photos, Photos):
            object.__setattr__(self, "photos", Photos(self.photos))


class PeopleSource(ABC):
    """Where people come from. Constructing one is cheap; :meth:`people` does the reading."""

    @abstractmethod
    def people(self) -> list[Person]:
        """Return everyone, in natural order of their names, the same on every call.

        Raises:
            DataError: There are none, or a caption or file is at fault.
        """


class Folder(PeopleSource):
    """A folder of folders, one per person, named after them: ``photos/Ann_Lee/1.jpg``.

    The prompt of ``1.jpg`` is ``1.txt`` beside it; else its row in a ``metadata.csv`` or ``metadata.jsonl`` in the
    person's folder or the top one (``file_name``, relative to that folder, and ``text`` or ``prompt``: the layout of
    Hugging Face's ImageFolder); else ``template``. Hidden files and folders inside a person's folder are not read.

    Args:
        path: The folder that holds the people's folders.
        template: Prompt of photos without a caption. ``{name}`` in it becomes the person's name, for control runs.
    """

    def __init__(self, path: str, template: str = TEMPLATE) -> None:
        self.path = path
        self.template = check_template(template)

    def people(self) -> list[Person]:
        """Scan the folders; photos are not opened."""
        root = Path(self.path).expanduser()
        folders = [folder for folder in _entries(root) if folder.is_dir()]
        prompts = _metadata_prompts(root, filter(_is_photo, (file for folder in folders for file in _entries(folder))))
        people, empty = [], []
        for folder in folders:
            if files := _photo_files(folder):
                people.append(_person(folder, files, self.template, prompts))
            else:
                empty.append(folder.name)
        if empty:
            logger.warning("%s: no photos in %s: ignored", root, shorten(empty))
        if loose := [photo.name for photo in _photo_files(root)]:
            logger.warning("%s: ignored %s: photos belong into a folder per person", root, shorten(loose))
        if not people:
            raise DataError(f"no photos in {root}: it must hold a folder per person with {', '.join(SUFFIXES)} files")
        _refuse_duplicates(people)
        return people


def read_person(path: str | Path, template: str = TEMPLATE) -> Person:
    """Read one person's folder, as :class:`Folder` reads each of its people.

    Raises:
        DataError: The folder is missing or holds no photos, or a caption is at fault.
    """
    folder = Path(os.path.abspath(Path(path).expanduser()))  # "." and ".." have names, links keep theirs
    if not (photos := _photo_files(folder)):
        raise DataError(f"no photos in {folder}: it must hold one person's {', '.join(SUFFIXES)} files")
    return _person(folder, photos, check_template(template), {})


def _is_photo(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not file.is_dir()


def _photo_files(folder: Path) -> list[Path]:
    files = [entry for entry in _entries(folder) if not entry.is_dir()]
    photos = list(filter(_is_photo, files))
    captions = [file for file in files if file.suffix.lower() == ".txt" or file.name in METADATA]
    if photos and (others := [file.name for file in files if file not in {*photos, *captions}]):
        logger.warning("%s: ignored %s: not %s", folder, shorten(others), ", ".join(SUFFIXES))
    return photos


def _person(folder: Path, files: Sequence[Path], template: str, prompts: Mapping[Path, str]) -> Person:
    name = nfc(folder.name)
    prompts = {**prompts, **_metadata_prompts(folder, files), **_caption_prompts(folder, files)}
    shown = name.encode("utf-8", "replace").decode()  # the name of a folder may hold bytes that are no text
    default = template.replace("{name}", shown.replace("_", " "))
    return Person(name, tuple(FilePhoto(name, file.name, prompts.get(file, default), file) for file in files))


def _refuse_duplicates(people: Iterable[Person]) -> None:
    if twice := [name for name, count in Counter(nfc(person.name) for person in people).items() if count > 1]:
        raise DataError(f"several people are called {shorten(twice)}: rename their folders apart")


class MiniFaces(PeopleSource):
    """Drawn portraits; the split is fixed by the disjoint ranges of :data:`mini_faces.ROLES`.

    Args:
        seed: Which world of people.
        train: Number of people to train on.
        validation: Number of people to validate on.
        test: Number of people to test on.
        photos: Photos per person.
        train_role: Whose range the people to train on come from; ``adapter`` is that of the published-style adapter.
    """

    def __init__(
        self,
        seed: int = 0,
        train: int = 300,
        validation: int = 30,
        test: int = 50,
        photos: int = 14,
        train_role: Literal["train", "adapter"] = "train",
    ) -> None:
        self.seed, self.photos = seed, photos
        self.roles = {"train": train_role, "validation": "validation", "test": "test"}
        self.counts = {"train": train, "validation": validation, "test": test}
        for name, count in {**self.counts, "photos": photos}.items():
            most = 10_000 if name == "photos" else len(mini_faces.ROLES[name])
            if not 1 <= count <= most:
                raise DataError(f"{name} is {count}: drawn portraits take 1 to {most}")
        if seed < 0:
            raise DataError(f"seed is {seed}: it must not be negative")

    def people(self) -> list[Person]:
        """Return people called after role and number, such as ``train_000012``; nothing is drawn yet."""
        return sorted(
            (self._person(side, number) for side, count in self.counts.items() for number in range(count)),
            key=lambda person: natural(person.name),
        )

    def _person(self, side: str, number: int) -> Person:
        role = self.roles[side]
        name, index = f"{role}_{number:06d}", mini_faces.ROLES[role].start + number
        prompts = [mini_faces.prompt(mini_faces.scene(self.seed, index, i)) for i in range(self.photos)]
        photos = (DrawnPhoto(name, f"{name}_{i:04d}.png", p, self.seed, index, i) for i, p in enumerate(prompts))
        return Person(name, tuple(photos), side)


@dataclass
class Unreadable:
    """A photo that cannot be used, and why; the reason begins with its path."""

    photo: Photo
    reason: str


def check_photos(
    people: Sequence[Person], on_unreadable: Literal["refuse", "skip"] = "refuse", progress: bool = True
) -> list[Person]:
    """Decode every photo in full once, before work depends on it. Drawn ones need no check.

    Args:
        people: Whose photos to check.
        on_unreadable: ``refuse`` raises one error that names every unreadable photo; ``skip`` drops them with a warning
            that does. A person may then have too few: call :func:`select_people` after it.
        progress: Show a progress bar.

    Raises:
        DataError: Photos cannot be read and ``on_unreadable`` is ``refuse``, or nothing readable is left.
    """
    if on_unreadable not in ("refuse", "skip"):
        raise DataError(f"on_unreadable is {on_unreadable!r}: choose refuse or skip")
    total = sum(not isinstance(photo, DrawnPhoto) for person in people for photo in person.photos)
    if not total:
        return list(people)
    photos = (photo for person in people for photo in person.photos if not isinstance(photo, DrawnPhoto))
    faults: list[Unreadable] = []
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,  # Pillow decodes outside the interpreter lock
        tqdm(total=total, desc="checking photos", unit="photo", disable=not progress) as bar,
    ):
        while part := list(islice(photos, 1024)):  # of a million, few are unpacked and waiting at a time
            for fault in pool.map(_unreadable, part):
                bar.update()
                faults += [fault] if fault is not None else []
    if not faults:
        return list(people)
    report = f"{len(faults)} of {total} photos cannot be used:" + "".join(f"\n  {f.reason}" for f in faults)
    if on_unreadable == "refuse":
        raise DataError(f"{report}\nreplace or delete them, or set on_unreadable to skip")
    logger.warning("%s\nthey are skipped", report)
    bad = {(fault.photo.person, fault.photo.name) for fault in faults}
    kept = [
        replace(person, photos=tuple(photo for photo in person.photos if (person.name, photo.name) not in bad))
        for person in people
    ]
    kept = [person for person in kept if person.photos]
    if not kept:
        raise DataError(f"{report}\nnone is left: replace them")
    return kept


def _unreadable(photo: Photo) -> Unreadable | None:
    try:
        photo.image()
    except DataError as error:
        return Unreadable(photo, str(error))
    return None
