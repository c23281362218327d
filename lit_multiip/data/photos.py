"""Photos: where their pixels come from, and what identifies their content."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lit_multiip.data import mini_faces
from lit_multiip.files import LitMultiIPError, hash_file, hash_text

MIN_SIDE = 16  # px


class DataError(LitMultiIPError):
    """Photos, captions or lists of people that cannot be used; the message names the value and the remedy."""


class FaceBox(NamedTuple):
    """Where a face lies in a photo, and the photo's size, in px."""

    left: float
    top: float
    width: float
    height: float
    photo_width: float
    photo_height: float


@dataclass(frozen=True, slots=True)
class Photo(ABC):
    """One captioned photo. Cheap and picklable: pixels are read when asked for.

    Attributes:
        person: name of the person shown.
        name: unique among the person's photos, such as `Ann_Lee_0001.jpg`.
        prompt: what the photo shows, for the text encoder.
    """

    person: str
    name: str
    prompt: str

    @abstractmethod
    def image(self) -> Image.Image:
        """Return the picture, decoded in full, as RGB.

        Raises:
            DataError: it cannot be read, or is smaller than 16 px on a side.
        """

    @abstractmethod
    def content_key(self) -> str:
        """Return the SHA-256 (hex) of what defines the pixels."""

    def original(self) -> Photo:
        """Return the photo that this one was cut from, or itself."""
        return self

    def face_box(self) -> FaceBox | None:
        """Return where the face lies if the photo's source knows it; None leaves it to a detector."""
        return None


@dataclass(frozen=True, slots=True)
class FilePhoto(Photo):
    """A photo in a JPEG, PNG, WebP or BMP file; EXIF rotation is applied and transparency laid over white."""

    path: Path
    _digest: str = field(default="", init=False, repr=False, compare=False)  # of the file, once read

    def image(self) -> Image.Image:
        """Decode the file in full; see `Photo.image`."""
        try:
            if not self.path.is_file():  # opening a FIFO would wait for ever
                raise DataError("it is not a file" if self.path.exists() else "it does not exist")
            if self.path.stat().st_size == 0:
                raise DataError("the file is empty")
        except (OSError, DataError) as error:
            raise DataError(f"{self.path}: {error}") from error
        return decode(self.path, str(self.path))

    def content_key(self) -> str:
        """Return the SHA-256 (hex) of the file's bytes, which are read once."""
        if not self._digest:
            object.__setattr__(self, "_digest", hash_file(self.path))
        return self._digest


@dataclass(frozen=True, slots=True)
class DrawnPhoto(Photo):
    """A drawn portrait: a pure function of (seed, index of the person, number of the photo)."""

    seed: int
    index: int
    number: int

    def image(self) -> Image.Image:
        """Draw the portrait, 64 x 64 px."""
        return Image.fromarray(mini_faces.photo(self.seed, self.index, self.number))

    def content_key(self) -> str:
        """Return the SHA-256 (hex) of the recipe and the drawing code: an edited drawing is another picture."""
        recipe = f"mini_faces {_hash_of_drawing_code()} seed={self.seed} index={self.index} number={self.number}"
        return hash_text(recipe)

    def face_box(self) -> FaceBox:
        """Return the box around the head, without hair, hat and ears."""
        traits = mini_faces.person(self.seed, self.index).values
        shot = mini_faces.scene(self.seed, self.index, self.number)
        half_width, half_height = 15.6 + 1.8 * traits["face_width"], 20.5  # of the ellipse in `mini_faces.draw`
        cos, sin = math.cos(shot.tilt), math.sin(shot.tilt)
        half_x = shot.scale * math.hypot(half_width * cos, half_height * sin)
        half_y = shot.scale * math.hypot(half_width * sin, half_height * cos)
        x, y = mini_faces.SIDE / 2 + shot.shift[0], 33 + shot.shift[1]
        return FaceBox(x - half_x, y - half_y, 2 * half_x, 2 * half_y, mini_faces.SIDE, mini_faces.SIDE)


def decode(source: Path | IO[bytes], where: str) -> Image.Image:
    """Decode a JPEG, PNG, WebP or BMP picture in full, as RGB; see `Photo.image`.

    Args:
        source: its file, or its bytes.
        where: what messages call it.
    """
    try:
        with Image.open(source, formats=("JPEG", "PNG", "WEBP", "BMP")) as file:
            file.load()
            image = _to_rgb(ImageOps.exif_transpose(file))
        if min(image.size) < MIN_SIDE:
            raise DataError(f"it has {image.width} x {image.height} px, and each side needs at least {MIN_SIDE} px")
        return image
    except UnidentifiedImageError:
        raise DataError(f"{where}: not a JPEG, PNG, WebP or BMP picture") from None
    except Exception as error:  # Pillow's decoders also raise SyntaxError, struct.error, zlib.error, ...
        raise DataError(f"{where}: {error}") from error


@cache
def _hash_of_drawing_code() -> str:
    return hash_file(Path(mini_faces.__file__))


def distinct_photos(photos: Sequence[Photo]) -> tuple[Photo, ...]:
    """Return one photo of each content: the first of several, in the place of the last."""
    by_content = {photo.content_key(): photo for photo in reversed(photos)}
    return tuple(reversed(by_content.values()))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: Pillow would clip it at 255
        grey = np.clip(np.rint(np.asarray(image, np.float64) / 257), 0, 255)  # (H, W), 65535 => 255
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")
