"""People and their captioned photos: where they come from, which are kept, and who trains and who tests."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import re
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path, PureWindowsPath
from typing import Literal

import numpy as np
from tqdm import tqdm

from lit_multiip.data import mini_faces
from lit_multiip.data.photos import DataError, DrawnPhoto, FilePhoto, Photo, Photos

logger = logging.getLogger(__name__)

TEMPLATE = "a photo of a person"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
METADATA = ("metadata.csv", "metadata.jsonl")
SIDES = ("train", "validation", "test")


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
            logger.warning("%s: no photos in %s: ignored", root, _some(empty))
        if loose := [photo.name for photo in _photo_files(root)]:
            logger.warning("%s: ignored %s: photos belong into a folder per person", root, _some(loose))
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


def check_template(template: str) -> str:
    """Return ``template`` if it is a prompt whose only placeholder is ``{name}``; raise :class:`DataError` if not."""
    if not template.strip() or re.search("[{}]", template.replace("{name}", "")):
        raise DataError(f"template {template!r} must be a prompt, with no placeholder but {{name}}: try {TEMPLATE!r}")
    return template


def natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key that puts ``Ann_2.jpg`` before ``Ann_10.jpg``; the name itself breaks ties."""
    parts = re.split("([0-9]+)", name)
    return [(0, int(part)) if i % 2 else (1, part.casefold()) for i, part in enumerate(parts)] + [(2, name)]


def nfc(name: str) -> str:
    """Normalise a name, so that an accent typed on one system matches the file name of another."""
    return unicodedata.normalize("NFC", name)


def _some(names: Sequence[object], most: int = 5) -> str:
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def _entries(folder: Path) -> list[Path]:
    """List a folder without hidden entries. Only this one level is read, so links that form a loop do no harm."""
    if not folder.is_dir():
        fault = "is not a folder" if folder.exists() else "does not exist"
        raise DataError(f"photo folder {folder} {fault}: set the source's path to a folder of photos")
    try:
        found = [entry for entry in folder.iterdir() if not entry.name.startswith((".", "__MACOSX"))]
    except OSError as error:
        raise DataError(f"photo folder {folder} cannot be listed ({error.strerror}): make it readable") from error
    return sorted(found, key=lambda entry: natural(entry.name))


def _is_photo(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not file.is_dir()


def _photo_files(folder: Path) -> list[Path]:
    files = [entry for entry in _entries(folder) if not entry.is_dir()]
    photos = list(filter(_is_photo, files))
    captions = [file for file in files if file.suffix.lower() == ".txt" or file.name in METADATA]
    if photos and (others := [file.name for file in files if file not in {*photos, *captions}]):
        logger.warning("%s: ignored %s: not %s", folder, _some(others), ", ".join(SUFFIXES))
    return photos


def _person(folder: Path, files: Sequence[Path], template: str, prompts: Mapping[Path, str]) -> Person:
    name = nfc(folder.name)
    prompts = {**prompts, **_metadata_prompts(folder, files), **_caption_prompts(folder, files)}
    shown = name.encode("utf-8", "replace").decode()  # the name of a folder may hold bytes that are no text
    default = template.replace("{name}", shown.replace("_", " "))
    return Person(name, tuple(FilePhoto(name, file.name, prompts.get(file, default), file) for file in files))


def _read_text(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():  # opening a FIFO would wait for ever
            raise OSError("it is no file")
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}): save it as UTF-8 text") from error


def _is_text(text: str) -> bool:
    """Whether it holds no half of a surrogate pair, which JSON can write and no tokenizer can read."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _caption_prompts(folder: Path, files: Iterable[Path]) -> dict[Path, str]:
    """Read the ``.txt`` captions of a person's folder, one for every photo of the same stem."""
    prompts: dict[Path, str] = {}
    for caption in _entries(folder):
        if caption.suffix.lower() != ".txt" or caption.is_dir():
            continue
        if not (photos := [file for file in files if file.stem == caption.stem]):
            raise DataError(
                f"caption {caption} has no photo {caption.stem}.jpg (or .png, ...) beside it: add or delete"
            )
        if not (prompt := " ".join(_read_text(caption).split())):
            raise DataError(f"caption {caption} is empty: write the prompt into it, or delete it")
        prompts.update(dict.fromkeys(photos, prompt))
    return prompts


def _metadata_prompts(folder: Path, files: Iterable[Path]) -> dict[Path, str]:
    """Read the prompts that a folder's ``metadata.csv`` and ``metadata.jsonl`` give to some of ``files`` inside it."""
    prompts: dict[Path, str] = {}
    if not (given_in := [path for path in (folder / name for name in METADATA) if path.exists()]):
        return prompts
    known = {nfc(file.relative_to(folder).as_posix()): file for file in files}
    for path in given_in:
        for place, row in _metadata_rows(path):
            name, given = row.get("file_name"), [row[key] for key in ("text", "prompt") if row.get(key) is not None]
            texts = [text for text in given if isinstance(text, str) and text.strip()]
            if not isinstance(name, str) or len(given) != 1 or len(texts) != 1 or not _is_text(texts[0]):
                raise DataError(
                    f"{place} must give file_name and one prompt, called text or prompt; it is {str(row)[:500]!a}"
                )
            inside = PureWindowsPath(name)  # understands both / and \, on every system
            if inside.drive or inside.root or ".." in inside.parts:
                raise DataError(f"{place} names {name[:200]!r}, which lies outside {folder}: give a path inside it")
            if (file := known.get(nfc(inside.as_posix()))) is None:
                raise DataError(
                    f"{place} names {name[:200]!r}, and {folder} has no such photo: add it or delete the row"
                )
            if file in prompts:
                raise DataError(f"{place} names {name[:200]!r}, which has a prompt already: keep one")
            prompts[file] = " ".join(texts[0].split())
    return prompts


def _metadata_rows(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield each row of a metadata file with its place, for messages."""
    text = _read_text(path)
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number}, is not JSON ({error}): write one object a line") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}, is not a JSON object: write {{'file_name': ..., 'text': ...}}")
            yield f"{path}, line {number},", row
        return
    reader = csv.DictReader(io.StringIO(text))
    try:
        for record in reader:
            place = f"{path}, line {reader.line_num},"
            if None in record:  # the rest of an unquoted prompt would be lost
                raise DataError(f"{place} has more cells than the header: put prompts with commas into quotes")
            yield place, dict(record)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}, is not CSV: {error}") from error


def _refuse_duplicates(people: Iterable[Person]) -> None:
    if twice := [name for name, count in Counter(nfc(person.name) for person in people).items() if count > 1]:
        raise DataError(f"several people are called {_some(twice)}: rename their folders apart")


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


def select_people(
    people: Sequence[Person], min_photos: int = 10, max_people: int | None = None, seed: int = 0
) -> list[Person]:
    """Keep the people who have at least ``min_photos`` photos, and of them a seeded ``max_people``.

    A smaller ``max_people`` keeps a subset of what a larger one keeps. The order is that of ``people``.

    Raises:
        DataError: Nobody is left, ``min_photos`` is below 2 or ``max_people`` below 1.
    """
    if min_photos < 2:
        raise DataError(f"min_photos is {min_photos}: a target and one reference make at least 2")
    if max_people is not None and max_people < 1:
        raise DataError(f"max_people is {max_people}: it must be 1 or more, or null for everyone")
    kept = [person for person in people if len(person.photos) >= min_photos]
    if not kept:
        richest = max(people, key=lambda person: len(person.photos), default=None)
        most = f"{richest.name} has the most, {len(richest.photos)}" if richest else "there is nobody at all"
        raise DataError(
            f"none of {len(people)} people has min_photos = {min_photos} photos ({most}): lower it, or add photos"
        )
    if len(kept) < len(people):
        logger.info("left out %d of %d people: fewer than %d photos", len(people) - len(kept), len(people), min_photos)
    if max_people is not None and max_people < len(kept):
        logger.info("kept max_people = %d of %d people by seed %d", max_people, len(kept), seed)
        chosen = np.random.default_rng(seed).permutation(len(kept))[:max_people]
        kept = [kept[i] for i in sorted(chosen)]
    return kept


@dataclass
class Split:
    """Three groups of people; nobody is in two of them and none is empty, or :class:`DataError` is raised."""

    train: list[Person]
    validation: list[Person]
    test: list[Person]

    def __post_init__(self) -> None:
        """Check that the sides are disjoint and that none is empty."""
        for side in SIDES:
            if not getattr(self, side):
                sizes = ", ".join(f"{len(getattr(self, other))} {other}" for other in SIDES)
                raise DataError(
                    f"the split leaves no {side} people ({sizes}): add people, raise max_people, lower min_photos, "
                    "or change the fractions or lists of names"
                )
        _refuse_duplicates([*self.train, *self.validation, *self.test])


def split_people(
    people: Sequence[Person],
    seed: int = 0,
    test_fraction: float = 1 / 3,
    validation_fraction: float = 0.1,
    train_names: str | None = None,
    test_names: str | None = None,
    validation_names: str | None = None,
) -> Split:
    """Split by person: as the source fixes it, else by lists of names, else by seed.

    A list of names decides its side; whoever is on no list goes to the side (train or test) that has no list, and is
    left out where both have one. Without a list, ``test_fraction`` of the people are drawn for test, and
    ``validation_fraction`` of the train side for validation. The order of ``people`` does not matter.

    Args:
        people: Whom to split; see :func:`select_people`.
        seed: Seed of the draws.
        test_fraction: Share of the people that is for test, in (0, 1). The paper's 2:1 is 1/3.
        validation_fraction: Share of the train side that is for validation, in (0, 1).
        train_names: File with one name a line, or one of LFW's own (``peopleDevTrain.txt``), as are the next two.
        test_names: The same for test, such as LFW's ``peopleDevTest.txt``.
        validation_names: The same for validation.

    Raises:
        DataError: A side is empty, a name is on two lists or unknown, a fraction is out of range, or there are lists
            for a source that fixes its own split.
    """
    for name, fraction in (("test_fraction", test_fraction), ("validation_fraction", validation_fraction)):
        if not 0 < fraction < 1:
            raise DataError(f"{name} is {fraction}: it must lie between 0 and 1, both excluded")
    people = sorted(people, key=lambda person: natural(person.name))
    _refuse_duplicates(people)
    paths = {"train": train_names, "validation": validation_names, "test": test_names}
    lists = {side: path for side, path in paths.items() if path is not None}
    if any(person.split for person in people):
        if lists:
            raise DataError(f"the source fixes its own split: remove {', '.join(f'{side}_names' for side in lists)}")
        if unknown := [f"{person.name}: {person.split}" for person in people if person.split not in SIDES]:
            raise DataError(f"{_some(unknown)}: where one person has a split, all need one of {', '.join(SIDES)}")
        sides = {side: [person for person in people if person.split == side] for side in SIDES}
        return Split(**sides)

    sides = _named_sides(people, lists)
    placed = {person.name for side in sides.values() for person in side}
    rest = [person for person in people if person.name not in placed]
    if "train" in sides and "test" in sides:
        if rest:
            logger.info("left out %d people who are on no list: %s", len(rest), _some([p.name for p in rest]))
    elif "train" in sides:
        sides["test"] = rest
    elif "test" in sides:
        sides["train"] = rest
    else:
        sides["train"], sides["test"] = _draw(rest, "test_fraction", test_fraction, seed)
    if "validation" not in sides and sides["train"]:
        sides["train"], sides["validation"] = _draw(sides["train"], "validation_fraction", validation_fraction, seed)
    return Split(sides["train"], sides.get("validation", []), sides["test"])


def _draw(people: list[Person], name: str, fraction: float, seed: int) -> tuple[list[Person], list[Person]]:
    from sklearn.model_selection import train_test_split

    if len(people) < 2:
        raise DataError(
            f"{len(people)} people cannot be divided by {name} = {fraction:.3g}, and a split takes at least 3 in all: "
            "add people, raise max_people, or lower min_photos"
        )
    try:
        kept, drawn = train_test_split(range(len(people)), test_size=fraction, random_state=seed)
    except ValueError as error:
        raise DataError(f"{name} = {fraction:.3g} of {len(people)} people leaves a side empty: lower it") from error
    return [people[i] for i in sorted(kept)], [people[i] for i in sorted(drawn)]


def _named_sides(people: Sequence[Person], lists: Mapping[str, str]) -> dict[str, list[Person]]:
    """Look the listed names up among ``people``."""
    known = {nfc(person.name) for person in people}
    sides: dict[str, list[Person]] = {}
    owner: dict[str, str] = {}
    for side, path in lists.items():
        names, whole_data_set = _read_names(Path(path).expanduser())
        absent = sorted(names - known)
        if whole_data_set:  # LFW's lists name everyone, and most have too few photos to be among people
            logger.info("%s: %d of %d names are not among the %d people", path, len(absent), len(names), len(people))
        elif absent:
            raise DataError(
                f"{path} names {_some(absent)}, not among the {len(people)} people: correct the name, or, "
                "if min_photos or max_people left the person out, change that or delete the line"
            )
        for name in sorted(names):
            if name in owner:
                raise DataError(f"{name} is in both {owner[name]} and {path}: delete one of the two lines")
            owner[name] = path
        sides[side] = [person for person in people if nfc(person.name) in names]
    return sides


def _read_names(path: Path) -> tuple[set[str], bool]:
    """Return the names in a list, and whether it is one of LFW's, which name the whole data set.

    LFW's begin with the number of rows, each ``name<TAB>number of photos``.
    """
    lines = [line.strip() for line in _read_text(path).splitlines() if line.strip()]
    if not lines:
        raise DataError(f"list of names {path} is empty: write one name a line")
    if not (lines[0].isdecimal() and len(lines) > 1 and "\t" in lines[1]):
        return {nfc(line) for line in lines}, False
    if int(lines[0]) != len(lines) - 1:
        raise DataError(f"list of names {path} announces {lines[0]} people and has {len(lines) - 1}: fetch it again")
    return {nfc(line.split("\t")[0].strip()) for line in lines[1:]}, True


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
