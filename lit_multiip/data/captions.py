"""Prompts of photos: text files and metadata beside them, and the names of files."""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path, PureWindowsPath

from lit_multiip.data.photos import DataError

TEMPLATE = "a photo of a person"
METADATA = ("metadata.csv", "metadata.jsonl")


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
