"""What acts on a picture besides one person's photos: further people, masks, photos to draw away from, weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from lit_multiip.data.groups import draw_references, stable_hash
from lit_multiip.data.people import Person
from lit_multiip.data.photos import DataError, Photo, distinct_photos
from lit_multiip.files import first_line

logger = logging.getLogger(__name__)

Mask = npt.NDArray[np.bool_]  # (H, W), true where a person's photos act
MaskLike = str | Path | Image.Image

FINEST = 20  # a photo of the largest weight is given at most so often; weights are rounded to a share of it


@dataclass
class PredictArgs:
    """What `predict` draws: every prompt with every seed, of one person.

    Args:
        photos: folder with photos of the person, any number, or a folder each of several people in one picture; None
            takes data.person, else the first test person, and the references that a test gives them.
        prompts: what to draw; None takes a prompt a scene of the reference photos.
        seeds: one image each per prompt.
        weights: one a photo, in the order of the photos' names, folder after folder. A photo of weight 2 counts as two
            of them, one of weight 0 is left out, and all others are used, whatever data.references.
        negatives: folder with photos that guidance leads away from.
        masks: pictures in black and white of an image's size, one a person, white where that person's photos act.
    """

    photos: str | list[str] | None = None
    prompts: list[str] | None = None
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    weights: list[float] | None = None
    negatives: str | None = None
    masks: list[str] | None = None

    def __post_init__(self) -> None:
        if not self.photos and (self.weights or self.negatives or self.masks):
            raise DataError("weights, negatives and masks go with a person's photos: give --photos <folder>")


@dataclass(frozen=True)
class Drawing:
    """What acts on a picture besides the references of its first person; nothing by default.

    Args:
        beside: references of each further person in the picture; needs masks.
        masks: where in the picture each person's photos act, the first person's first.
        negatives: photos that guidance leads away from; without any these are zeros.
        weighted: whether references are repeated in the ratio of unequal weights.
    """

    beside: tuple[tuple[Photo, ...], ...] = ()
    masks: tuple[Mask, ...] = field(default=(), compare=False, repr=False)
    negatives: tuple[Photo, ...] = ()
    weighted: bool = False

    def __post_init__(self) -> None:
        people = 1 + len(self.beside)
        if len(self.masks) != people and (self.masks or self.beside):
            raise DataError(
                f"there are {len(self.masks)} masks and {people} people: give one mask a person, white where that "
                "person's photos act"
            )
        if not all(mask.any() for mask in self.masks):
            raise DataError("a mask is black all over: paint white where the person's photos act")

    def check_side(self, side: int) -> None:
        """Refuse masks that are not of the picture's size.

        Args:
            side: of the picture in px.
        """
        for number, mask in enumerate(self.masks, 1):
            if mask.shape != (side, side):
                raise DataError(
                    f"mask {number} has {mask.shape[1]} x {mask.shape[0]} px, and pictures have {side} x {side}: scale "
                    "it to that"
                )

    def photos(self) -> list[Photo]:
        """Return all photos in it."""
        return [*(photo for references in self.beside for photo in references), *self.negatives]

    def rows(self) -> dict[str, list[Photo]]:
        """Return its photos by what they are, for a picture of them: one row a person, and one of the negatives."""
        people = {references[0].person: list(references) for references in self.beside}
        return people | ({"drawn away from": list(self.negatives)} if self.negatives else {})


NOTHING = Drawing()


def draw_together(
    people: Sequence[Person],
    count: int,
    seed: int,
    weights: Sequence[float] | None = None,
    negatives: Sequence[Person] = (),
    masks: Sequence[Mask] = (),
) -> tuple[tuple[Photo, ...], Drawing]:
    """Draw the references of people in one picture.

    Args:
        people: one, or with masks several.
        count: references of a person, where there are no weights.
        seed: of the draws.
        weights: one a photo, for all people's photos in their order; see `draw_person`.
        negatives: whose photos guidance leads away from.
        masks: one a person, of the picture's size.

    Returns:
        The first person's references, and all else that acts on the picture.
    """
    shares: list[Sequence[float] | None] = [None] * len(people)
    if weights is not None:
        check_weights([photo for person in people for photo in person.photos], weights)
        ends = np.cumsum([len(person.photos) for person in people])
        shares = [weights[end - len(one.photos) : end] for one, end in zip(people, ends, strict=True)]
    first, *beside = (draw_person(one, count, seed, share) for one, share in zip(people, shares, strict=True))
    unlike = tuple(photo for person in negatives for photo in without_copies(person).photos)
    if len(unlike) > len(first):
        logger.warning(
            "%d photos are drawn away from, and %d are used: the surplus is dropped", len(unlike), len(first)
        )
        unlike = unlike[: len(first)]
    weighted = any(len({*repeats_of(share)} - {0}) > 1 for share in shares if share is not None)
    return first, Drawing(tuple(beside), tuple(masks), unlike, weighted)


def draw_person(person: Person, count: int, seed: int, weights: Sequence[float] | None = None) -> tuple[Photo, ...]:
    """Draw a person's references: a surplus of photos is dropped, missing ones are drawn again.

    By weights all photos are taken whose weight is above 0, each as often as `repeats_of` says.
    """
    if weights is not None:
        check_weights(person.photos, weights)
        repeats = dict(zip(person.photos, repeats_of(weights), strict=True))
        person = replace(person, photos=tuple(photo for photo in person.photos if repeats[photo]))
    photos = without_copies(person).photos
    if weights is not None:
        count = len(photos)
    elif len(photos) != count:
        what = "the surplus is dropped" if len(photos) > count else "missing ones are drawn again"
        logger.warning("%s has %d photos, %d are used: %s", person.name, len(photos), count, what)
    rng = np.random.default_rng([seed, stable_hash(person.name)])
    drawn = [photos[i] for i in draw_references(range(len(photos)), count, rng)]
    return tuple(drawn if weights is None else (photo for photo in drawn for _ in range(repeats[photo])))


def without_copies(person: Person) -> Person:
    """Keep one photo of those with equal content, so that a copy of a target is never among its references."""
    kept = distinct_photos(person.photos)
    if len(kept) < len(person.photos):
        logger.warning("%s: %d photos are copies of others and left out", person.name, len(person.photos) - len(kept))
    return replace(person, photos=kept)


def check_weights(photos: Sequence[Photo], weights: Sequence[float]) -> None:
    """Refuse weights that are not one a photo, finite, at least 0, and somewhere above it."""
    if len(weights) != len(photos):
        names = ", ".join(photo.name for photo in photos[:3]) + (", ..." if len(photos) > 3 else "")
        raise DataError(
            f"there are {len(weights)} weights for {len(photos)} photos: give one each, in the order {names}"
        )
    if wrong := [weight for weight in weights if not isinstance(weight, Real) or not 0 <= weight < math.inf]:
        raise DataError(f"a photo's weight is {wrong[0]}: give a number of at least 0; 0 leaves the photo out")
    if not any(weights):
        raise DataError(f"all weights of {photos[0].person}'s photos are 0: give one photo at least 1")


def repeats_of(weights: Sequence[float]) -> list[int]:
    """Return how often each photo is given so that these times are in the ratio of the weights.

    Ratios are exact where `FINEST` repeats or fewer of the photo of largest weight make them so; otherwise weights are
    rounded to a twentieth of the largest. A weight above 0 never becomes 0.
    """
    ratios = np.asarray(weights, dtype=np.float64) / max(weights)
    for most in range(1, FINEST + 1):
        counts = np.rint(ratios * most)
        if np.abs(ratios * most - counts).max() < 1e-6:
            break
    return [max(int(count), int(ratio > 0)) for count, ratio in zip(counts, ratios, strict=True)]


def read_masks(given: Sequence[MaskLike]) -> tuple[Mask, ...]:
    """Read masks from files and pictures: true where they are lighter than middle grey."""
    masks = []
    for number, one in enumerate(given, 1):
        if not isinstance(one, MaskLike):
            kind = type(one).__name__
            raise DataError(f"mask {number} is of type {kind}: give a file or a picture (PIL) in black and white")
        try:
            with nullcontext(one) if isinstance(one, Image.Image) else Image.open(one) as picture:
                masks.append(np.asarray(picture.convert("L")) > 127)  # (H, W)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            reason = first_line(error)
            raise DataError(f"mask '{one}' cannot be read ({reason}): give a picture in black and white") from error
    return tuple(masks)
