"""Which photos of a folder to take: strangers, missing and further faces, copies, blur, size, and an order of merit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from lit_multiip.backbone.faces import FaceDetector
from lit_multiip.data.people import Person
from lit_multiip.data.photos import DataError, Photo
from lit_multiip.evaluation.extractors import Extractor
from lit_multiip.files import LitMultiIPError
from lit_multiip.pixels import square, to_tensor

Matrix = npt.NDArray[np.float64]

SHARP = 0.2  # `sharpness` below it: as if blurred by a Gaussian of 1 % of the side or more
SHARP_SIDE, SEEN_SIDE, COPY_SIDE = 128, 1024, 32  # px at which sharpness is measured, networks look, copies are sought
COPY_DIFFERENCE = 3.0  # grey levels, root mean square between two photos at `COPY_SIDE`
# What may be wrong with a photo -> how much it weighs in the order of merit. From 10 on a photo is better left out.
FAULTS = {"unreadable": 1000, "stranger": 100, "no face": 50, "copy": 20, "several faces": 3, "blurred": 2, "small": 1}
LEAVE_OUT = 10


@dataclass
class CheckedPhoto:
    """What was found of one photo.

    Attributes:
        photo: it.
        faults: of `FAULTS`, each with what was seen in words.
        size: width and height in px.
        faces: how many the detector found; None without one.
        sharpness: of the central square, see `sharpness`.
        likeness: cosine to the mean of the person's other photos (leave-one-out); NaN where that is unknown.
        nearest: cosine to the most similar other photo.
        rank: its place in the order of merit, from 1.
    """

    photo: Photo
    faults: dict[str, str] = field(default_factory=dict)
    size: tuple[int, int] = (0, 0)
    faces: int | None = None
    sharpness: float = float("nan")
    likeness: float = float("nan")
    nearest: float = float("nan")
    rank: int = 0

    @property
    def usable(self) -> bool:
        """Whether no fault says that it is better left out."""
        return all(FAULTS[fault] < LEAVE_OUT for fault in self.faults)

    def _merit(self) -> tuple[float, float, str]:
        likeness = -1.0 if np.isnan(self.likeness) else self.likeness
        return sum(FAULTS[fault] for fault in self.faults), -likeness, self.photo.name


@dataclass
class PhotoCheck:
    """What was found of one person's photos, best first."""

    person: str
    photos: list[CheckedPhoto]

    def best(self, count: int) -> list[Photo]:
        """Return the best photos that are usable, at most `count`, in the order of merit."""
        return [checked.photo for checked in self.photos if checked.usable][:count]

    def with_fault(self, fault: str) -> list[Photo]:
        """Return the photos with a fault of `FAULTS`."""
        return [checked.photo for checked in self.photos if fault in checked.faults]

    def table(self, take: int) -> str:
        """Return a table for the console, in the order of merit, that says which `take` photos to take."""
        taken = set(self.best(take))
        width = max(len(checked.photo.name) for checked in self.photos)
        lines = [f"{'':4} {'photo':{width}} {'px':>11} {'faces':>5} {'sharp':>5} {'like':>5} {'next':>5}  what to know"]
        for checked in self.photos:
            mark = "take" if checked.photo in taken else ""
            size = f"{checked.size[0]} x {checked.size[1]}" if checked.size[0] else ""
            faces = "" if checked.faces is None else str(checked.faces)
            numbers = (checked.sharpness, checked.likeness, checked.nearest)
            shown = " ".join(f"{'' if np.isnan(number) else format(number, '.2f'):>5}" for number in numbers)
            faults = "; ".join(checked.faults.values())
            lines.append(f"{mark:4} {checked.photo.name:{width}} {size:>11} {faces:>5} {shown}  {faults}".rstrip())
        return "\n".join(lines)


def check_person(
    person: Person,
    extractor: Extractor,
    detector: FaceDetector | None = None,
    same_person: float | None = None,
    side: int = 64,
) -> PhotoCheck:
    """Look at every photo of a person, and put them into an order of merit.

    A photo is a stranger's if its cosine to every other photo is below `same_person`. The nearest photo tells more than
    the mean of all, as photos of one person hide different things. It does not find two photos of one stranger, and of
    two photos alone nothing is said.

    Args:
        person: with any number of photos; those that cannot be read are reported.
        extractor: whose embedding tells people apart.
        detector: finds faces; without one their number is not known.
        same_person: cosine from which two photos show one person; None takes the extractor's own.
        side: px that a photo's shorter side should have.
    """
    if not extractor.can_identify:
        raise LitMultiIPError(f"{extractor.name} does not tell people apart: give an extractor of identity")
    threshold = extractor.same_person if same_person is None else same_person
    if threshold is None:
        raise LitMultiIPError(
            f"same_person is not known of {extractor.name}: give the cosine of two photos of one person"
        )
    if not -1 <= threshold <= 1 or side < 1:
        raise LitMultiIPError(f"same_person={threshold} and side={side}: give a cosine, -1 to 1, and at least 1 px")
    found = [CheckedPhoto(photo) for photo in person.photos]
    seen: list[Tensor] = []
    thumbnails: list[Matrix] = []
    for checked in found:
        try:
            image = checked.photo.image()
        except DataError as error:
            checked.faults["unreadable"] = str(error)
            continue
        small = _look(checked, image, detector, side)
        thumbnails.append(_grey(small, COPY_SIDE))
        embedding = extractor.extract(to_tensor([small])).vectors()
        seen.append(embedding[0].cpu())
    readable = [checked for checked in found if "unreadable" not in checked.faults]
    _find_copies(readable, np.stack(thumbnails) if thumbnails else np.empty((0, COPY_SIDE, COPY_SIDE)))
    _find_strangers(readable, seen, threshold)
    found.sort(key=CheckedPhoto._merit)
    for rank, checked in enumerate(found, 1):
        checked.rank = rank
    return PhotoCheck(person.name, found)


def sharpness(image: Image.Image) -> float:
    """Return how sharp an image is: the standard deviation of its Laplacian by that of its grey levels.

    Both are of the central square, at `SHARP_SIDE` px or less. Contrast does not matter; an even area has 0.
    """
    grey = _grey(image, min(SHARP_SIDE, *image.size))
    around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    return float((4 * grey[1:-1, 1:-1] - around).std() / max(grey.std(), 1e-9))


def _grey(image: Image.Image, side: int) -> Matrix:
    """Return the central square in grey levels, (side, side)."""
    return np.asarray(square(image.convert("L"), side), dtype=np.float64)


def _look(checked: CheckedPhoto, image: Image.Image, detector: FaceDetector | None, side: int) -> Image.Image:
    """Note what one photo tells by itself; return what networks see of it: its square, `SEEN_SIDE` px at most."""
    checked.size, checked.sharpness = image.size, sharpness(image)
    seen = square(image, min(SEEN_SIDE, *image.size))
    if detector is not None:
        checked.faces = len(detector.boxes(np.asarray(image)))
        if checked.faces > 1:
            checked.faults["several faces"] = f"{checked.faces} faces: cut the others off"
        elif checked.faces == 0:
            checked.faults["no face"] = "no face is found"
    if checked.sharpness < SHARP:
        checked.faults["blurred"] = "blurred"
    if min(image.size) < side:
        checked.faults["small"] = f"small: the shorter side should have {side} px"
    return seen


def _find_copies(photos: Sequence[CheckedPhoto], thumbnails: Matrix) -> None:
    """Mark photos whose content, or whose thumbnail (N, s, s) but for compression, an earlier photo has.

    The larger one of two is kept.
    """
    kept: list[int] = []
    order = sorted(range(len(photos)), key=lambda i: (-photos[i].size[0] * photos[i].size[1], i))
    for i in order:
        for j in kept:
            difference = float(np.sqrt(((thumbnails[i] - thumbnails[j]) ** 2).mean()))
            if photos[i].photo.content_key() == photos[j].photo.content_key() or difference < COPY_DIFFERENCE:
                photos[i].faults["copy"] = f"a copy of {photos[j].photo.name}"
                break
        else:
            kept.append(i)


def _find_strangers(photos: Sequence[CheckedPhoto], embeddings: Sequence[Tensor], threshold: float) -> None:
    """Note likenesses, and mark photos without a face and photos of somebody else; copies count once."""
    for checked, embedding in zip(photos, embeddings, strict=True):
        if embedding.isnan().any() and "no face" not in checked.faults:
            checked.faults["no face"] = "no face is found"
    pairs = [
        (checked, embedding.double().numpy())
        for checked, embedding in zip(photos, embeddings, strict=True)
        if not {"no face", "copy"} & checked.faults.keys()
    ]
    if len(pairs) < 2:
        return
    rows = np.stack([embedding / max(float(np.linalg.norm(embedding)), 1e-12) for _, embedding in pairs])  # (N, E)
    cosines = rows @ rows.T
    np.fill_diagonal(cosines, -np.inf)
    for (checked, _), row, others in zip(pairs, rows, rows.sum(axis=0) - rows, strict=True):
        checked.likeness = float(row @ others / max(float(np.linalg.norm(others)), 1e-12))
    for (checked, _), row in zip(pairs, cosines, strict=True):
        checked.nearest = float(row.max())
        if checked.nearest < threshold and len(pairs) > 2:
            checked.faults["stranger"] = (
                f"somebody else? cosine to the next photo {checked.nearest:.2f} < {threshold:g}"
            )
