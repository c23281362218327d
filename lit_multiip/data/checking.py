"""Checking photos before work depends on them: every photo is decoded in full once."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Literal

from tqdm import tqdm

from lit_multiip.data.people import Person
from lit_multiip.data.photos import DataError, DrawnPhoto, Photo

logger = logging.getLogger(__name__)

QUEUE = 1024  # photos that wait for a thread; a million would take gigabytes


def check_photos(
    people: Sequence[Person], on_unreadable: Literal["refuse", "skip"] = "refuse", progress: bool = True
) -> list[Person]:
    """Decode every photo in full once. Drawn ones need no check.

    Args:
        people: whose photos to check.
        on_unreadable: `refuse` raises one error that names every unreadable photo; `skip` warns of them and leaves them
            out. A person may then have too few: call `select_people` after it.
        progress: show a progress bar.

    Returns:
        The people, less unreadable photos and whoever has no other.

    Raises:
        DataError: photos cannot be read and `on_unreadable` is `refuse`, or no readable photo is left.
    """
    if on_unreadable not in ("refuse", "skip"):
        raise DataError(f"on_unreadable is {on_unreadable!r}: choose refuse or skip")
    photos = [photo for person in people for photo in person.photos if not isinstance(photo, DrawnPhoto)]
    if not photos:
        return list(people)
    faults: dict[tuple[str, str], str] = {}
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,  # Pillow decodes outside the interpreter lock
        tqdm(total=len(photos), desc="checking photos", unit="photo", disable=not progress) as bar,
    ):
        for start in range(0, len(photos), QUEUE):
            part = photos[start : start + QUEUE]
            for photo, fault in zip(part, pool.map(_find_fault, part), strict=True):
                bar.update()
                if fault is not None:
                    faults[photo.person, photo.name] = fault
    if not faults:
        return list(people)

    report = f"{len(faults)} of {len(photos)} photos cannot be used:" + "".join(f"\n  {f}" for f in faults.values())
    if on_unreadable == "refuse":
        raise DataError(f"{report}\nreplace or delete them, or set on_unreadable to skip")
    logger.warning("%s\nthey are skipped", report)
    kept = [
        replace(person, photos=tuple(photo for photo in person.photos if (person.name, photo.name) not in faults))
        for person in people
    ]
    if not any(person.photos for person in kept):
        raise DataError(f"{report}\nno readable photo is left: replace them")
    return [person for person in kept if person.photos]


def _find_fault(photo: Photo) -> str | None:
    """Return why a photo cannot be used, beginning with its path; None if it can."""
    try:
        photo.image()
    except DataError as error:
        return str(error)
    return None
