"""People and where they come from: a folder of photos, or drawn portraits."""

from __future__ import annotations

import difflib
import logging
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from PIL import Image

from lit_multiip.data import mini_faces
from lit_multiip.data.captions import METADATA, TEMPLATE, check_template, fill_template, read_captions, read_metadata
from lit_multiip.data.names import natural_key, normalise_name
from lit_multiip.data.photos import DataError, DrawnPhoto, FilePhoto, Photo, PicturePhoto
from lit_multiip.files import shorten

logger = logging.getLogger(__name__)

PhotoLike = str | Path | Image.Image | Photo
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass(frozen=True, slots=True)
class Person:
    """A person and their photos.

    Attributes:
        name: unique within the source, Unicode NFC.
        photos: in natural order of their names.
        split: `train`, `validation` or `test` where the source itself fixes it.
    """

    name: str
    photos: tuple[Photo, ...]
    split: str | None = None


class PeopleSource(ABC):
    """Where people come from. Constructing one is cheap; `people` does the reading."""

    @abstractmethod
    def people(self) -> list[Person]:
        """Return everyone, in natural order of their names, the same on every call.

        Raises:
            DataError: there are none, or a caption or file is at fault.
        """


def check_names_differ(people: Iterable[Person]) -> None:
    """Raise `DataError` if two people have one name, however its accents are written."""
    if twice := [name for name, count in Counter(normalise_name(p.name) for p in people).items() if count > 1]:
        raise DataError(f"several people are called {shorten(twice)}: give each a name of their own")


class Folder(PeopleSource):
    """A folder of folders, one per person, named after them: `photos/Ann_Lee/1.jpg`.

    The prompt of `1.jpg` is `1.txt` beside it; else its row in a `metadata.csv` or `metadata.jsonl` in the person's
    folder or the top one (`file_name`, relative to that folder, and `text` or `prompt`: the layout of Hugging Face's
    ImageFolder); else `template`. Hidden files, and folders inside a person's folder, are not read.

    Args:
        path: the folder that holds the people's folders.
        template: prompt of photos without a caption; `{name}` in it becomes the person's name, for control runs.
    """

    def __init__(self, path: str, template: str = TEMPLATE) -> None:
        self.path = path
        self.template = check_template(template)

    def people(self) -> list[Person]:
        """Scan the folders; photos are not opened."""
        root = Path(self.path).expanduser()
        entries = list_folder(root)
        contents = {folder: list_folder(folder) for folder in entries if folder.is_dir()}
        prompts = read_metadata(root, (entry for inside in contents.values() for entry in inside if is_photo(entry)))
        people = [_read_person(folder, inside, self.template, prompts) for folder, inside in contents.items()]

        if empty := [folder.name for folder, person in zip(contents, people, strict=True) if not person.photos]:
            logger.warning("%s: ignored the folders %s: they hold no photos", root, shorten(empty))
        if loose := [entry.name for entry in entries if is_photo(entry)]:
            logger.warning("%s: ignored %s: put photos into a folder per person", root, shorten(loose))
        people = [person for person in people if person.photos]
        if not people:
            raise DataError(f"no photos in {root}: it must hold a folder per person with {', '.join(SUFFIXES)} files")
        check_names_differ(people)
        return people


def read_person(path: str | Path, template: str = TEMPLATE) -> Person:
    """Read one person's folder, as `Folder` reads each of its people.

    Raises:
        DataError: the folder is missing or holds no photos, or a caption is at fault.
    """
    folder = Path(os.path.abspath(Path(path).expanduser()))  # "." and ".." get a name, links keep theirs
    entries = list_folder(folder)
    person = _read_person(folder, entries, check_template(template), {})
    if person.photos:
        return person
    inside = [entry.name for entry in entries if entry.is_dir() and any(map(is_photo, list_folder(entry)))]
    if inside:
        raise DataError(
            f"{folder} holds the folders of {len(inside)} people ({shorten(inside)}), and one person's is wanted: give "
            f"{folder / inside[0]}; all together train an adapter: fit --config configs/self_attn.yaml --config "
            f"configs/data/folder.yaml --data.source.init_args.path {folder}"
        )
    raise DataError(f"no photos in {folder}: it must hold one person's {', '.join(SUFFIXES)} files")


def list_folder(folder: Path) -> list[Path]:
    """List a folder in natural order, without hidden entries. Only one level is read, so looping links do no harm."""
    if not folder.is_dir():
        fault = "is not a folder" if folder.exists() else "does not exist"
        raise DataError(f"photo folder {folder} {fault}: give a folder of photos")
    try:
        found = [entry for entry in folder.iterdir() if not entry.name.startswith((".", "__MACOSX"))]
    except OSError as error:
        raise DataError(f"photo folder {folder} cannot be listed ({error.strerror}): make it readable") from error
    return sorted(found, key=lambda entry: natural_key(entry.name))


def is_photo(path: Path) -> bool:
    """Tell whether a file is a photo, by its suffix."""
    return path.suffix.lower() in SUFFIXES and not path.is_dir()


def _read_person(folder: Path, entries: Sequence[Path], template: str, prompts: Mapping[Path, str]) -> Person:
    """Make a person of a folder's `entries`; `prompts` are those of a table above, which captions inside overrule."""
    files = [entry for entry in entries if not entry.is_dir()]
    photos = [file for file in files if is_photo(file)]
    texts = [file for file in files if file.suffix.lower() == ".txt"]
    name = normalise_name(folder.name)
    if not photos:
        return Person(name, ())
    if others := [file.name for file in files if file not in {*photos, *texts} and file.name not in METADATA]:
        logger.warning("%s: ignored %s: photos are %s files", folder, shorten(others), ", ".join(SUFFIXES))
    prompts = {**prompts, **read_metadata(folder, photos), **read_captions(texts, photos)}
    default = fill_template(template, name)
    return Person(name, tuple(FilePhoto(name, photo.name, prompts.get(photo, default), photo) for photo in photos))


def find_person(people: Sequence[Person], name: str | None) -> Person:
    """Return the person of that name, whom a method that learns one person is to learn."""
    for person in people:
        if person.name == name:
            return person
    known = [person.name for person in people]
    close = ", ".join(difflib.get_close_matches(name or "", known) or known[:3])
    wrong = "this method learns one person" if name is None else f"there is no person '{name}'"
    raise DataError(
        f"{wrong}: set data.person to one of the {len(known)}, such as {close}, or give photos of one, --photos FOLDER"
    )


def read_photos(given: PhotoLike | Sequence[PhotoLike], name: str) -> Person:
    """Make one person of files, folders, pictures and photos; a single folder gives its own name."""
    given = [given] if isinstance(given, str | Path | Image.Image | Photo) else list(given)
    if len(given) == 1 and isinstance(given[0], str | Path) and Path(given[0]).expanduser().is_dir():
        return read_person(given[0])
    photos: list[Photo] = []
    for number, one in enumerate(given, 1):
        if isinstance(one, Photo):
            photos.append(one)
        elif isinstance(one, Image.Image):
            photos.append(PicturePhoto.of(name, f"picture_{number}.png", TEMPLATE, one))
        elif not isinstance(one, str | Path):
            raise DataError(f"{one!r} is no photo: give files, folders of one person's photos, or pictures (PIL)")
        elif (path := Path(one).expanduser()).is_dir():
            photos += read_person(path).photos
        else:
            photos.append(_read_file(path))
    if not photos:
        raise DataError("there are no photos: give files, folders of one person's photos, or pictures")
    counts: dict[str, int] = {}
    named = []
    for photo in photos:  # names are unique within a person
        counts[photo.name] = counts.get(photo.name, 0) + 1
        unique = photo.name if counts[photo.name] == 1 else f"{counts[photo.name]}_{photo.name}"
        named.append(replace(photo, person=name, name=unique))
    return Person(name, tuple(named))


def _read_file(path: Path) -> Photo:
    """Return a photo's file, with the text file beside it as its prompt."""
    if not path.is_file():
        raise DataError(f"there is no photo '{path}': give a file, a folder of one person's photos, or a picture")
    if not is_photo(path):
        raise DataError(f"'{path}' is no photo: give a .jpg, .png, .webp or .bmp file")
    caption = path.with_suffix(".txt")
    prompts = read_captions([caption], [path]) if caption.is_file() else {}
    return FilePhoto("", path.name, prompts.get(path, TEMPLATE), path)


class MiniFaces(PeopleSource):
    """Drawn portraits; the split is fixed by the disjoint ranges of `mini_faces.ROLES`.

    Args:
        seed: another seed draws other people.
        train: number of people to train on.
        validation: number of people to validate on.
        test: number of people to test on.
        photos: photos per person.
        train_role: whose range the people to train on come from; `adapter` is that of the published-style adapter.
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
            raise DataError(f"seed is {seed}: it must be at least 0")

    def people(self) -> list[Person]:
        """Return people called after role and number, such as `train_000012`; nothing is drawn yet."""
        return sorted(
            (self._person(side, number) for side, count in self.counts.items() for number in range(count)),
            key=lambda person: natural_key(person.name),
        )

    def _person(self, side: str, number: int) -> Person:
        role = self.roles[side]
        name, index = f"{role}_{number:06d}", mini_faces.ROLES[role].start + number
        prompts = [mini_faces.prompt(mini_faces.scene(self.seed, index, i)) for i in range(self.photos)]
        photos = (DrawnPhoto(name, f"{name}_{i:04d}.png", p, self.seed, index, i) for i, p in enumerate(prompts))
        return Person(name, tuple(photos), side)
