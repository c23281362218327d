"""Folders of photos, and people without any, for the tests of the data."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from lit_multiip.data import FilePhoto, Person


def save(path: Path, size: tuple[int, int] = (32, 32), colour: object = (200, 40, 10), **options: object) -> Path:
    """Write a photo of one colour, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)  # type: ignore[arg-type]
    return path


def people_of(count: int, photos: int = 10) -> list[Person]:
    """Return people `p000`, `p001`, ... whose photos exist on no disk."""
    numbers = [f"{j}.jpg" for j in range(photos)]
    return [
        Person(name, tuple(FilePhoto(name, file, "a photo", Path(file)) for file in numbers))
        for name in (f"p{i:03d}" for i in range(count))
    ]


def names(people: Iterable[Person]) -> list[str]:
    """Return the people's names."""
    return [person.name for person in people]
