"""Photos cut to a square at the face, where the largest centred square would cut it off or leave it small."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from lit_multiip.backbone.dlib_faces import detector_digest, load_detector
from lit_multiip.backbone.faces import YUNET
from lit_multiip.backbone.store import SHARD_ROWS, Shards
from lit_multiip.data.people import Person
from lit_multiip.data.photos import MIN_SIDE, DataError, Photo
from lit_multiip.files import hash_text

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CroppedPhoto(Photo):
    """A square of another photo; `box` is its left, top and side in px."""

    photo: Photo
    box: tuple[int, int, int]

    def image(self) -> Image.Image:
        """Decode the photo and cut the square out."""
        left, top, side = self.box
        return self.photo.image().crop((left, top, left + side, top + side))

    def content_key(self) -> str:
        """Return the SHA-256 of the photo's key and the box."""
        return hash_text(f"{self.photo.content_key()} {self.box}")

    def original(self) -> Photo:
        """Return the whole photo."""
        return self.photo


@dataclass(frozen=True)
class CentralPhoto(Photo):
    """The central square of another photo; `share` is its side by the photo's shorter side."""

    photo: Photo
    share: float

    def image(self) -> Image.Image:
        """Decode the photo and cut the square out."""
        whole = self.photo.image()
        side = max(round(self.share * min(whole.size)), MIN_SIDE)
        left, top = (whole.width - side) // 2, (whole.height - side) // 2
        return whole.crop((left, top, left + side, top + side))

    def content_key(self) -> str:
        """Return the SHA-256 of the photo's key and the share."""
        return hash_text(f"{self.photo.content_key()} centre {self.share}")

    def original(self) -> Photo:
        """Return the whole photo."""
        return self.photo


@dataclass
class FaceCrop:
    """Cuts every photo to a square with its largest face as near the middle as the photo's borders allow.

    A photo in which no face is found keeps its central square. Warnings count these photos, and those with several
    faces. What was found is kept in the feature store.

    Args:
        detector: `dlib`, or YuNet: its file or `org/repository/file.onnx` on the hub.
        size: side of the square by the longer side of the face's box; None takes the largest square of the photo.
        share: take the central square of this share of the photo's shorter side, above 0 and at most 1, and look for no
            face: for faces that are aligned already. 0.6 of LFW deep-funneled's 250 px holds head and collar.
    """

    detector: str = YUNET
    size: float | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        if self.size is not None and not self.size >= 1:
            raise DataError(f"data.crop.size={self.size} would cut into the face: give at least 1, or null")
        if self.share is not None and not 0 < self.share <= 1:
            raise DataError(f"data.crop.share={self.share} is no share of a photo: give more than 0 and at most 1")
        if self.share is not None and (self.size is not None or self.detector != YUNET):
            raise DataError(f"data.crop.share={self.share} looks for no face: leave data.crop.size and detector out")

    def __call__(self, people: Sequence[Person], cache_dir: str | Path) -> list[Person]:
        """Return people with their photos cut; all photos must be readable."""
        if self.share is not None:
            return _with_photos(people, partial(_cut_centre, share=self.share))
        photos = [photo for person in people for photo in person.photos]
        rows = find_faces(self.detector, photos, cache_dir)
        for what, bad, done in (
            ("no face", [p for p in photos if rows[p][4] == 0], "their central squares are taken"),
            ("several faces", [p for p in photos if rows[p][4] > 1], "the largest is taken"),
        ):
            if bad:
                names = ", ".join(f"'{photo.name}' of '{photo.person}'" for photo in bad[:3])
                logger.warning("%d of %d photos have %s, such as %s: %s", len(bad), len(photos), what, names, done)

        def cut(photo: Photo) -> Photo:
            return CroppedPhoto(photo.person, photo.name, photo.prompt, photo, self.box(rows[photo]))

        return _with_photos(people, cut)

    def box(self, row: np.ndarray) -> tuple[int, int, int]:
        """Return left, top and side of the square, in px.

        Args:
            row: of `find_faces`, (7,).
        """
        x, y, face_width, face_height, count, width, height = (float(value) for value in row)
        side = min(width, height)
        if count == 0:
            x, y, face_width, face_height = 0, 0, width, height
        elif self.size is not None:
            side = min(side, max(round(self.size * max(face_width, face_height)), MIN_SIDE))
        left = min(max(x + face_width / 2 - side / 2, 0), width - side)
        top = min(max(y + face_height / 2 - side / 2, 0), height - side)
        return int(left), int(top), int(side)


def find_faces(detector: str, photos: Sequence[Photo], cache_dir: str | Path) -> dict[Photo, np.ndarray]:
    """Find the faces of photos that the store lacks, and keep them there.

    Args:
        detector: `dlib`, or YuNet: its file or `org/repository/file.onnx` on the hub.
        photos: all readable.
        cache_dir: of the feature store.

    Returns:
        A row of every photo, (7,): x, y, width and height of the largest face, number of faces, width and height of
        the photo.
    """
    store = Shards(Path(cache_dir) / f"faces-{detector_digest(detector)}")
    store.refresh()
    by_key = {photo.content_key(): photo for photo in photos}
    if missing := store.missing(by_key):
        network = load_detector(detector)
        rows: list[list[float]] = []
        for number, key in enumerate(tqdm(missing, "finding faces", unit="photo", delay=3), 1):
            pixels = np.asarray(by_key[key].image())
            found = network.boxes(pixels)  # (F, 4), the largest first
            largest = found[0] if len(found) else np.zeros(4)
            rows.append([*largest, len(found), pixels.shape[1], pixels.shape[0]])
            if len(rows) == SHARD_ROWS or number == len(missing):
                store.add(missing[number - len(rows) : number], np.array(rows, dtype=np.float32))
                rows = []
        store.refresh()
    table = store.get([photo.content_key() for photo in photos]).numpy()
    return dict(zip(photos, table, strict=True))


def _cut_centre(photo: Photo, share: float) -> CentralPhoto:
    return CentralPhoto(photo.person, photo.name, photo.prompt, photo, share)


def _with_photos(people: Sequence[Person], cut: Callable[[Photo], Photo]) -> list[Person]:
    return [replace(person, photos=tuple(cut(photo) for photo in person.photos)) for person in people]
