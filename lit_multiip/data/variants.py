"""Variants of a training photo: the photo augmented, each with a seed of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

from PIL import Image

from lit_multiip.data.groups import stable_hash
from lit_multiip.data.photos import DataError, Photo
from lit_multiip.files import hash_text

Augment = Callable[[Image.Image], Image.Image]

_GENERATOR = Lock()  # torch's generator is one for all threads that read photos


@dataclass(frozen=True, slots=True)
class VariantPhoto(Photo):
    """Another photo, augmented; `number` is 1, 2, ..., as variant 0 is the photo itself.

    What the augmentation draws from torch's generator is a function of the photo's content and the number alone.
    """

    photo: Photo
    number: int
    augment: Augment

    def image(self) -> Image.Image:
        """Decode the photo and augment it."""
        import torch

        image = self.photo.image()
        with _GENERATOR, torch.random.fork_rng(devices=[]):
            torch.manual_seed(stable_hash("variant", self.photo.content_key(), self.number) % 2**63)
            return self.augment(image).convert("RGB")

    def content_key(self) -> str:
        """Return the SHA-256 of the photo's key, the number and the augmentation's description."""
        return hash_text(f"{self.photo.content_key()} variant {self.number} of {describe_augment(self.augment)}")

    def original(self) -> Photo:
        """Return the photo before augmentation and cutting."""
        return self.photo.original()


def vary(photo: Photo, number: int, augment: Augment | None) -> Photo:
    """Return a photo's variant of that number."""
    if number == 0 or augment is None:
        return photo
    return VariantPhoto(photo.person, photo.name, photo.prompt, photo, number, augment)


def describe_augment(augment: Augment) -> str:
    """Return a description of an augmentation for the keys of its variants, the same in every process."""
    description = repr(augment)
    if " at 0x" in description:
        raise DataError(
            f"data.augment is {description}, whose repr does not name its settings: give a transform such as "
            "torchvision.transforms.v2.RandomHorizontalFlip"
        )
    return description
