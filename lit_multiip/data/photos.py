"""Photos: where their pixels are, what names their content, and how a person's are kept in memory."""

from __future__ import annotations

import pickle
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import overload

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lit_multiip.data import mini_faces
from lit_multiip.files import LitMultiIPError, hash_file, hash_text

MIN_SIDE = 16  # px


class DataError(LitMultiIPError):
    """Photos, captions or lists of people that cannot be used; the message names the value and the remedy."""


@dataclass(frozen=True)
class Photo(ABC):
    """One captioned photo. Cheap and picklable: pixels are read when asked for.

    Attributes:
        person: Name of the person shown.
        name: Unique among the person's photos, such as ``Ann_Lee_0001.jpg``.
        prompt: What the photo shows, for the text encoder.
    """

    person: str
    name: str
    prompt: str

    @abstractmethod
    def image(self) -> Image.Image:
        """Return the picture, decoded in full, as RGB.

        Raises:
            DataError: It cannot be read, or is smaller than 16 px on a side.
        """

    @abstractmethod
    def content_key(self) -> str:
        """Return the SHA-256 (hex) of what defines the pixels."""

    def original(self) -> Photo:
        """Return the photo that this one was cut from, or itself."""
        return self


@dataclass(frozen=True)
class FilePhoto(Photo):
    """A photo in a JPEG, PNG, WebP or BMP file; EXIF rotation is applied and transparency laid over white."""

    path: Path

    def image(self) -> Image.Image:
        """Decode the file in full; see :meth:`Photo.image`."""
        try:
            if not self.path.is_file():  # opening a FIFO would wait for ever
                raise DataError("there is no such file")
            if self.path.stat().st_size == 0:
                raise DataError("the file is empty")
            with Image.open(self.path, formats=("JPEG", "PNG", "WEBP", "BMP")) as file:
                file.load()
                image = _to_rgb(ImageOps.exif_transpose(file))
            if min(image.size) < MIN_SIDE:
                raise DataError(f"{image.width} x {image.height} px, and {MIN_SIDE} px a side are the least")
            return image
        except UnidentifiedImageError:
            raise DataError(f"{self.path}: not a JPEG, PNG, WebP or BMP picture") from None
        except Exception as error:  # Pillow's decoders also raise SyntaxError, struct.error, zlib.error, ...
            raise DataError(f"{self.path}: {error}") from error

    def content_key(self) -> str:
        """Return the SHA-256 of the file's bytes, which are read once."""
        return self._digest.hex()

    @cached_property
    def _digest(self) -> bytes:
        return bytes.fromhex(hash_file(self.path))


@dataclass(frozen=True)
class DrawnPhoto(Photo):
    """A drawn portrait: a pure function of (seed, index of the person, number of the photo)."""

    seed: int
    index: int
    number: int

    def image(self) -> Image.Image:
        """Draw the portrait, 64 x 64 px."""
        return Image.fromarray(mini_faces.photo(self.seed, self.index, self.number))

    def content_key(self) -> str:
        """Return the SHA-256 of the recipe, the drawing code included: an edited drawing is another picture."""
        recipe = f"mini_faces {_drawing_code()} seed={self.seed} index={self.index} number={self.number}"
        return hash_text(recipe)


@cache
def _drawing_code() -> str:
    return hash_file(Path(mini_faces.__file__))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: Pillow would clip it at 255
        grey = np.clip(np.rint(np.asarray(image, np.float64) / 257), 0, 255)  # (H, W), 65535 => 255
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


class Photos(Sequence[Photo]):
    """A tuple of photos, packed: they are unpacked when asked for, so that a million take 50 to 100 MB of memory.

    A loop that asks for several by number unpacks them once, ``tuple(person.photos)``.
    """

    __slots__ = ("_count", "_packed")

    def __init__(self, photos: Iterable[Photo]) -> None:
        photos = tuple(photos)
        self._count, self._packed = len(photos), zlib.compress(pickle.dumps(photos, pickle.HIGHEST_PROTOCOL), 1)

    def _unpacked(self) -> tuple[Photo, ...]:
        photos: tuple[Photo, ...] = pickle.loads(zlib.decompress(self._packed))  # of this process
        return photos

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Photo]:
        return iter(self._unpacked())

    @overload
    def __getitem__(self, index: int) -> Photo: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Photo, ...]: ...
    def __getitem__(self, index: int | slice) -> Photo | tuple[Photo, ...]:
        return self._unpacked()[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (tuple, Photos)) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(self._unpacked())

    def __repr__(self) -> str:
        return repr(self._unpacked())
