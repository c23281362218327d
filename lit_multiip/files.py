"""Files that appear whole or not at all, and folders with one writer."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

LOCK = ".lock"
PATIENCE = 10  # seconds: workers that a killed process leaves hold its locks until they look for it, every 5 s


def write_durably(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Have ``write`` fill a file that is on the disk before it appears as ``path``, replacing what was there.

    The file is made beside ``path``, flushed, synchronised and renamed, so that whatever stops the process or the
    machine, ``path`` holds the old content or the new, and an error leaves the old.

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
    """Return the SHA-256 (hex) of a file, read a piece at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def move_into(part: Path, folder: Path) -> None:
    """Have all that lies in ``part`` replace what is called the same in ``folder``; ``part`` is gone then."""
    for new in sorted(part.iterdir()):
        old = folder / new.name
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        os.replace(new, old)
    part.rmdir()


def _sync_folder(folder: Path) -> None:
    """Have a rename in ``folder`` survive a power cut, where the system can promise that."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Keep other processes from writing into ``folder`` for a while; a process that dies lets go of it.

    Raises:
        OSError: another one does; the message names the folder and the remedy.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        raise OSError(
            f"another process is writing into '{folder}': wait until it has ended, or give this one a folder of its own"
        ) from None
    try:
        yield
    finally:
        lock.release()
