"""People from a data set of Hugging Face: a row a photo, with columns of the image, the person and the text."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from lit_multiip.data.captions import TEMPLATE, check_template, fill_template
from lit_multiip.data.names import natural_key, normalise_name
from lit_multiip.data.people import PeopleSource, Person
from lit_multiip.data.photos import DataError, Photo, decode
from lit_multiip.files import first_line, shorten

TABLES = (".parquet", ".arrow")


@dataclass(frozen=True, slots=True)
class RowPhoto(Photo):
    """A photo in a row of a data set; nothing but its own row is read, and only when it is asked for."""

    place: str  # of the data set, for messages
    row: int
    _images: Any = field(repr=False, compare=False)  # the column of images, memory-mapped
    _digest: str = field(default="", init=False, repr=False, compare=False)  # of the bytes, once read

    def image(self) -> Image.Image:
        """Decode the row's picture in full; see `Photo.image`."""
        where = f"{self.place}, row {self.row}"
        return decode(io.BytesIO(self._read(where)), where)

    def content_key(self) -> str:
        """Return the SHA-256 (hex) of the bytes, as of a file that holds them."""
        if not self._digest:
            digest = hashlib.sha256(self._read(f"{self.place}, row {self.row}")).hexdigest()
            object.__setattr__(self, "_digest", digest)
        return self._digest

    def _read(self, where: str) -> bytes:
        cell = self._images[self.row].column(0)[0].as_py()  # a table of one row
        if isinstance(cell, bytes):
            return cell
        given = cell or {}
        if given.get("bytes") is not None:
            return bytes(given["bytes"])
        path = Path(given.get("path") or "")
        if not path.is_file():
            raise DataError(f"{where}: it has no bytes, and no file '{path}'")
        return path.read_bytes()


class HFDataset(PeopleSource):
    """A data set that Hugging Face's `datasets` reads: of the hub, or local; `pip install -e ".[datasets]"`.

    Rows stay on the disk, in the memory-mapped cache of `datasets`. No code of a data set is run.

    Args:
        path: hub id, such as `org/name`; a `.parquet` or `.arrow` file; or a folder of such files.
        image: column of pictures: the Image feature, or their bytes.
        person: column that says who is shown: a name, number or class label.
        text: column of prompts; an empty one falls back to `template`. None takes `template` for all.
        name: of the data set's configuration, where it has several.
        split: `train`, `test[:50%]`, `train+test`, ... as `datasets` has it; who trains is not decided by it.
        revision: of the hub: branch, tag or commit.
        cache_dir: where `datasets` keeps it (default: its own).
        template: prompt of photos without one; see `Folder`.
    """

    def __init__(
        self,
        path: str,
        image: str = "image",
        person: str = "person",
        text: str | None = "text",
        name: str | None = None,
        split: str = "train",
        revision: str | None = None,
        cache_dir: str | None = None,
        template: str = TEMPLATE,
    ) -> None:
        self.path, self.name, self.split, self.revision, self.cache_dir = path, name, split, revision, cache_dir
        self.columns = {"image": image, "person": person, "text": text}
        self.template = check_template(template)

    def people(self) -> list[Person]:
        """Read who is shown and what is said of it; no picture is read."""
        table = self._load()
        self._check_columns(table)
        image, person, text = self.columns["image"], self.columns["person"], self.columns["text"]
        images = table.select_columns([image]).with_format("arrow")
        words = table.select_columns([column for column in (person, text) if column is not None]).with_format(None)[:]
        labels = getattr(table.features[person], "names", None)  # of a ClassLabel

        photos: dict[str, list[Photo]] = {}
        for row, given in enumerate(words[person]):
            name = self._name_of(given, row, labels)
            prompt = " ".join(str((words[text][row] if text is not None else "") or "").split())
            prompt = prompt or fill_template(self.template, name)
            photos.setdefault(name, []).append(RowPhoto(name, f"{row:06d}", prompt, self.path, row, images))
        if not photos:
            raise DataError(f"data set '{self.path}' has no rows in split '{self.split}': choose another split")
        return [Person(name, tuple(photos[name])) for name in sorted(photos, key=natural_key)]

    def _load(self) -> Any:
        try:
            from datasets import Dataset, load_dataset
        except ImportError as error:
            raise DataError(
                f"data set '{self.path}' needs Hugging Face's datasets ({first_line(error)}): "
                'pip install -e ".[datasets]"'
            ) from error
        place = Path(self.path).expanduser()
        known: dict[str, Any] = {"path": self.path, "revision": self.revision}
        if place.is_file():
            if place.suffix.lower() not in TABLES:
                raise DataError(f"'{self.path}' is no table: give {' or '.join(TABLES)}, a folder or a hub id")
            known = {"path": place.suffix[1:].lower(), "data_files": {"train": str(place)}}
        elif place.exists():
            known = {"path": str(place)}
        try:
            table = load_dataset(**known, name=self.name, split=self.split, cache_dir=self.cache_dir)
        except Exception as error:  # of the hub, the disk, the format, and of names that are not there
            raise DataError(
                f"data set '{self.path}' cannot be loaded ({first_line(error)}): give a hub id that can be reached, or "
                f"{' or '.join(TABLES)} files; check split '{self.split}' and name {self.name!r}"
            ) from error
        assert isinstance(table, Dataset)
        return table

    def _check_columns(self, table: Any) -> None:
        """Refuse columns that are not there or hold something else."""
        for role, column in self.columns.items():
            if column is not None and column not in table.column_names:
                otherwise = {
                    "text": ", or to null for one prompt for all",
                    "person": ", or lay a folder a person and use Folder",
                }
                raise DataError(
                    f"data set '{self.path}' has no column '{column}', but {shorten(table.column_names, 10)}: set "
                    f"data.source.init_args.{role} to the one of the {role}{otherwise.get(role, '')}"
                )
        kinds: Sequence[tuple[str, tuple[str, ...]]] = (
            ("image", ("Image", "binary", "large_binary")),
            ("person", ("ClassLabel", "string", "large_string", "int", "uint")),
            ("text", ("string", "large_string", "null")),
        )
        for role, allowed in kinds:
            column = self.columns[role]
            if column is None:
                continue
            feature = table.features[column]
            if role == "image" and isinstance(feature, dict) and "bytes" in feature:  # written without datasets
                continue
            kind = str(getattr(feature, "dtype", "")) if type(feature).__name__ == "Value" else type(feature).__name__
            if not kind.startswith(allowed):
                raise DataError(
                    f"column '{column}' of data set '{self.path}' holds {kind}, and the {role} is wanted: set "
                    f"data.source.init_args.{role} to another of {shorten(table.column_names, 10)}"
                )

    def _name_of(self, given: object, row: int, labels: Sequence[str] | None) -> str:
        """Return a person's name, which names a folder of results, too."""
        name = "" if given is None else str(given)
        if labels and name:  # -1 is the class label of nobody
            name = labels[int(name)] if int(name) >= 0 else ""
        name = normalise_name(name.strip())
        if not name or name in (".", "..") or any(letter in "/\\\0" for letter in name):
            raise DataError(
                f"row {row} of data set '{self.path}' says of the person {given!r}, which names nobody or no folder: "
                f"correct column '{self.columns['person']}', or leave the row out"
            )
        return name
