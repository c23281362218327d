"""Durable files, folders with one writer, hashes, quiet libraries, and the root of this package's errors."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

LOCK = ".lock"
PATIENCE = 10  # seconds: workers that a killed process leaves hold its locks until they look for it, every 5 s


class LitMultiIPError(ValueError):
    """What this package refuses: the message is one line, names the value and says what to do."""


class UsageError(LitMultiIPError):
    """A command line or config that cannot be carried out; the exit code is 2."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, cut at 200 characters, or its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def shorten(names: Iterable[object], most: int = 5) -> str:
    """List distinct names in words, the first `most` of them: "a, b and 3 more"."""
    distinct = list(dict.fromkeys(map(str, names)))
    return ", ".join(distinct[:most]) + (f" and {len(distinct) - most} more" if len(distinct) > most else "")


def package_file(name: str) -> Path:
    """Return the path of a file or folder of this package, such as `mini/weights`."""
    return Path(str(resources.files("lit_multiip"))) / name


def write_durably(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Have `write` fill a file that is on the disk before it appears as `path`, replacing what was there.

    The file is made beside `path`, flushed, synchronised and renamed, so that whatever stops the process or the
    machine, `path` holds the old content or the new, and an error leaves the old.

    Raises:
        OSError: it cannot be written; the message names the file and the remedy.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save wraps what the file raises
        reason = next((e for e in (error, error.__cause__, error.__context__) if isinstance(e, OSError)), None)
        if reason is None:
            raise
        raise OSError(
            f"'{path}' cannot be written ({reason.strerror or reason}): free space, or make the folder writable; what "
            "was there before is whole"
        ) from error


def hash_file(path: Path) -> str:
    """Return the SHA-256 (hex) of a file."""
    digest = hashlib.sha256()
    for piece in read_pieces(path):
        digest.update(piece)
    return digest.hexdigest()


def hash_text(text: str) -> str:
    """Return the SHA-256 (hex) of a text; bytes of a file name that are no UTF-8 count as they are."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def read_pieces(path: Path) -> Iterator[bytes]:
    """Yield a file's bytes, 1 MiB at a time."""
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            yield piece


def move_into(part: Path, folder: Path) -> None:
    """Move all entries of `part` into `folder`, over those of the same names, and delete `part`."""
    for new in sorted(part.iterdir()):
        old = folder / new.name
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        os.replace(new, old)
    part.rmdir()


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Keep other processes from writing into `folder` meanwhile; a process that dies frees it.

    Raises:
        OSError: another process is writing into it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / LOCK).acquire(timeout=PATIENCE)
    except Timeout:
        raise OSError(
            f"another process is writing into '{folder}': wait until it has ended, or give this one a folder of its own"
        ) from None
    with lock:
        yield


@contextmanager
def quiet_logger(name: str, level: int = logging.WARNING) -> Iterator[None]:
    """Keep a library's logger from telling what nobody asked for: all that is below `level`."""
    log = logging.getLogger(name)
    before = log.level
    log.setLevel(level)
    try:
        yield
    finally:
        log.setLevel(before)
