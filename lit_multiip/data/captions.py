"""Prompts of photos: a text file beside the photo, a metadata table of its folder, or a template."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PureWindowsPath

from lit_multiip.data.names import normalise_name
from lit_multiip.data.photos import DataError

TEMPLATE = "a photo of a person"
METADATA = ("metadata.csv", "metadata.jsonl")


def check_template(template: str) -> str:
    """Return `template` if it is a prompt whose only placeholder is `{name}`; raise `DataError` if not."""
    if not template.strip() or re.search("[{}]", template.replace("{name}", "")):
        raise DataError(f"template {template!r} must be a prompt, with no placeholder but {{name}}: try {TEMPLATE!r}")
    return template


def fill_template(template: str, name: str) -> str:
    """Return the prompt of `template` for the person `name`: `Ann_Lee` becomes "Ann Lee"."""
    readable = name.encode("utf-8", "replace").decode()  # a folder's name may hold bytes that are not UTF-8
    return template.replace("{name}", readable.replace("_", " "))


def read_text(path: Path) -> str:
    """Return the content of a UTF-8 text file, without a byte order mark."""
    try:
        if path.exists() and not path.is_file():  # opening a FIFO would wait for ever
            raise OSError("it is not a file")
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}): save it as UTF-8 text") from error


def read_captions(texts: Iterable[Path], photos: Sequence[Path]) -> dict[Path, str]:
    """Read the text files of a person's folder; `1.txt` is the prompt of every photo with the stem `1`."""
    prompts: dict[Path, str] = {}
    for text in texts:
        if not (captioned := [photo for photo in photos if photo.stem == text.stem]):
            raise DataError(f"caption {text} has no photo {text.stem}.jpg (or .png, ...) beside it: add or delete")
        if not (prompt := " ".join(read_text(text).split())):
            raise DataError(f"caption {text} is empty: write the prompt into it, or delete it")
        prompts.update(dict.fromkeys(captioned, prompt))
    return prompts


def read_metadata(folder: Path, photos: Iterable[Path]) -> dict[Path, str]:
    """Read the prompts that a folder's `metadata.csv` and `metadata.jsonl` give to some of the `photos` inside it."""
    prompts: dict[Path, str] = {}
    photo_of = {normalise_name(photo.relative_to(folder).as_posix()): photo for photo in photos}
    for table in (path for path in (folder / name for name in METADATA) if path.exists()):
        for place, row in (_jsonl_rows if table.suffix == ".jsonl" else _csv_rows)(table):
            name, prompt = _check_row(place, row)
            path = PureWindowsPath(name)  # understands both / and \, on every system
            if path.drive or path.root or ".." in path.parts:
                raise DataError(f"{place} names {name[:200]!r}, which lies outside {folder}: give a path inside it")
            if (photo := photo_of.get(normalise_name(path.as_posix()))) is None:
                raise DataError(
                    f"{place} names {name[:200]!r}, and {folder} has no such photo: add it or delete the row"
                )
            if photo in prompts:
                raise DataError(f"{place} names {name[:200]!r}, which has a prompt already: keep one")
            prompts[photo] = " ".join(prompt.split())
    return prompts


def _check_row(place: str, row: dict[str, object]) -> tuple[str, str]:
    """Return the file name and the prompt of a row."""
    name, given = row.get("file_name"), [row[key] for key in ("text", "prompt") if row.get(key) is not None]
    prompts = [prompt for prompt in given if isinstance(prompt, str) and prompt.strip() and not _has_surrogates(prompt)]
    if not isinstance(name, str) or len(given) != 1 or len(prompts) != 1:
        raise DataError(f"{place} must give file_name and one prompt, called text or prompt; it is {str(row)[:500]!a}")
    return name, prompts[0]


def _has_surrogates(text: str) -> bool:
    """Tell whether `text` holds half of a surrogate pair, which JSON can write and no tokenizer can read."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield each row with its place, for messages."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}, is not JSON ({error}): write one object a line") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}, is not a JSON object: write {{'file_name': ..., 'text': ...}}")
        yield f"{path}, line {number},", row


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield each row with its place, for messages."""
    reader = csv.DictReader(io.StringIO(read_text(path)))
    try:
        for record in reader:
            place = f"{path}, line {reader.line_num},"
            if None in record:  # the rest of an unquoted prompt would be lost
                raise DataError(f"{place} has more cells than the header: put prompts with commas into quotes")
            yield place, dict(record)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}, is not CSV ({error}): write file_name,text rows") from error
