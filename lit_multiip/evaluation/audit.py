"""Was anything known that should not have been? What a test checks of its own tasks, and of the record of training.

Everything is worked out again from the tasks and the record, not by the code that drew and split them. An exact leak
is refused before anything is drawn; near-duplicates, which may be honest photos that look alike, are listed for a
person to look at.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lit_multiip.data import mini_faces
from lit_multiip.data.photos import DrawnPhoto, Photo
from lit_multiip.data.record import (
    RECORD,
    Record,
    digest_name,
    digests_in,
    is_incomplete,
    merge_records,
    training_record,
    unknown_record,
)
from lit_multiip.data.tasks import Task
from lit_multiip.evaluation.pictures import to_picture
from lit_multiip.files import LitMultiIPError
from lit_multiip.methods.method import Method
from lit_multiip.pixels import square
from lit_multiip.runs import read_checkpoint

logger = logging.getLogger(__name__)

NO_TEST = {  # sides other than the test's that can be scored
    "validation": "- training: NO TEST, validation people: for choosing options, which then suit them",
    "train": "- training: NO TEST, training people: for seeing what was learned by heart",
}
NO_RECORD = "the weights, or those they started from, carry no record of whom they were trained on"
SIGNATURE_SIDE = 32  # px
SIMILAR_PIXELS = 0.95

FloatArray = npt.NDArray[np.float64]
Pairs = Sequence[tuple[Photo, Photo | str]]  # a held-out photo, and a reference of it or an image's name


class LeakError(LitMultiIPError):
    """A held-out photo is among its references, or a test person was trained on; the message names them."""


# ---- what the weights were trained on ---------------------------------------------------------------------------


def find_record(trainer: Any, method: Method) -> tuple[str, Record | None]:
    """Find out what tested weights were trained on: a checkpoint's, the method's first ones, and the backbone's.

    Returns:
        `recorded`, `nothing` where this project trained nothing, or `unknown` where some weights carry no record; and
        the record, as far as there is one. Where those who are scored are no test people (`data.tested`): their side,
        `validation` or `train`, and no record.
    """
    side: str = getattr(trainer.datamodule, "tested", "test")
    if side != "test":
        return side, None
    path, own = trainer.ckpt_path, None
    if path is not None:
        own = unknown_record() if "://" in str(path) else read_checkpoint(Path(path)).get(RECORD, unknown_record())
    elif trainer.global_step > 0:  # fit and test of one Trainer
        own = training_record([*trainer.datamodule.split.train, *trainer.datamodule.split.validation])
    record = merge_records(own, method.trained_on, method.backbone.trained_on())
    if record is None:
        return "nothing", None
    return "unknown" if is_incomplete(record) else "recorded", record if len(record["people"]) else None


# ---- exact leaks, and copies by pixels --------------------------------------------------------------------------


def audit_tasks(
    tasks: Sequence[Task], status: str, record: Record | None, show_progress: bool = True
) -> dict[str, Any]:
    """Check all that can be known before anything is drawn.

    Args:
        tasks: the test.
        status: what is known of training; see `find_record`.
        record: of `training_record`, where there is one.
        show_progress: show a bar while photos are compared.

    Returns:
        JSON-able. What is 0 "or refused" never reaches a file with another value.

        | key                         | what                                                                 |
        |-----------------------------|----------------------------------------------------------------------|
        | people, tasks, photos       | counts; photos are distinct ones, held-out and references            |
        | pairs                       | of a held-out photo and a reference of its own task, all compared    |
        | same_photo                  | pairs of equal (person, name), content or pixels: 0, or refused      |
        | near_duplicates.pixels      | see `near_duplicates`                                                |
        | training.status             | `recorded`, `nothing`, `unknown`; `validation` or `train` where no   |
        |                             | test people are scored                                               |
        | training.people, .photos    | on record; None without one                                          |
        | training.people_seen        | test people among these: 0, or refused                               |
        | training.photos_seen        | test photos among these, by content: 0, or refused                   |
        | training.drawn_people_of_other_roles | drawn test people of a range that the miniature's parts or a fit |
        |                             | are trained on: 0, or refused; None for real people                  |
    """
    shown = list(dict.fromkeys(photo for task in tasks for photo in (task.held_out, *task.references)))
    pairs = list(dict.fromkeys((task.held_out, reference) for task in tasks for reference in task.references))
    keys = {photo: photo.original().content_key() for photo in shown}
    # before photos are read: a leak of training is told at once
    training = _check_training(tasks, keys, status, record)
    bar = tqdm(shown, "comparing photos", unit="photo", delay=3, disable=not show_progress)
    signatures = {photo: make_signature(photo.image()) for photo in bar}
    for held_out, reference in pairs:
        for what, same in (
            ("the same file", (held_out.person, held_out.name) == (reference.person, reference.name)),
            ("equal in content", keys[held_out] == keys[reference]),
            ("equal in every pixel", signatures[held_out].digest == signatures[reference].digest),
        ):
            if same:
                raise LeakError(
                    f"held-out photo '{held_out.name}' of '{held_out.person}' is {what} as its reference "
                    f"'{reference.name}': delete one of the two"
                )
    similar = np.array([pixel_similarity(signatures[a], signatures[b]) for a, b in pairs])
    return {
        "people": len({task.person for task in tasks}),
        "tasks": len(tasks),
        "photos": len(shown),
        "pairs": len(pairs),
        "same_photo": 0,
        "near_duplicates": {"pixels": near_duplicates(pairs, similar, SIMILAR_PIXELS)},
        "training": training,
    }


def _check_training(
    tasks: Sequence[Task], keys: Mapping[Photo, str], status: str, record: Record | None
) -> dict[str, Any]:
    facts: dict[str, Any] = dict.fromkeys(("people", "photos", "people_seen", "photos_seen"))
    if record is not None:
        people, photos = digests_in(record, "people"), digests_in(record, "photos")
        names = {task.person: digest_name(task.person) for task in tasks}
        if seen := [name for name, digest in names.items() if digest in people]:
            raise LeakError(
                f"{len(seen)} of {len(names)} test people were trained or validated on, such as '{seen[0]}': test with "
                "the split, seed and source that the weights and their backbone were trained with, or leave them out"
            )
        if copies := [photo for photo, key in keys.items() if bytes.fromhex(key) in photos]:
            raise LeakError(
                f"{len(copies)} of {len(keys)} test photos were trained or validated on under other people's names, "
                f"such as '{copies[0].name}' of '{copies[0].person}': one person has two names; keep one"
            )
        facts |= {"people": len(people), "photos": len(photos), "people_seen": 0, "photos_seen": 0}
    if status in NO_TEST:
        return {"status": status, **facts, "drawn_people_of_other_roles": None}
    whole = [photo.original() for photo in keys]
    drawn = {photo.person: photo.index for photo in whole if isinstance(photo, DrawnPhoto)}
    if wrong := [name for name, index in drawn.items() if index not in mini_faces.ROLES["test"]]:
        raise LeakError(
            f"{len(wrong)} drawn test people, such as '{wrong[0]}', are of a range that the miniature or a fit is "
            "trained on: test on the range called test"
        )
    return {"status": status, **facts, "drawn_people_of_other_roles": 0 if drawn else None}


def audit_images(
    tasks: Sequence[Task], images: Tensor, files: Sequence[str], show_progress: bool = True
) -> dict[str, Any]:
    """Check images that were drawn elsewhere: none may be a held-out photo.

    Args:
        tasks: the test.
        images: one a task, (T, 3, H, W) uint8.
        files: their names.
        show_progress: show a bar while they are compared.

    Returns:
        `same_photo`, 0 or refused, and `near_duplicates` of each image and the held-out photo of its task.

    Raises:
        LeakError: an image is a held-out photo, pixel by pixel, as the scores see it.
    """
    held_out = dict.fromkeys(task.held_out for task in tasks)
    real = {photo: make_signature(square(photo.image(), images.shape[-1])) for photo in held_out}
    photos = {signature.digest: photo for photo, signature in real.items()}
    similar = []
    bar = tqdm(images, "comparing images", unit="image", delay=3, disable=not show_progress)
    for task, image, file in zip(tasks, bar, files, strict=True):
        made = make_signature(to_picture(image))
        if (copy := photos.get(made.digest)) is not None:
            raise LeakError(
                f"image '{file}' is the held-out photo '{copy.name}' of '{copy.person}': draw it from its prompt and "
                "its references, for held-out photos are what it is compared with"
            )
        similar.append(pixel_similarity(made, real[task.held_out]))
    pairs = [(task.held_out, file) for task, file in zip(tasks, files, strict=True)]
    near = near_duplicates(pairs, np.array(similar), SIMILAR_PIXELS, "image")
    if near["count"]:
        logger.warning(
            "%d of %d images are near-duplicates of their held-out photo, such as '%s' (%.3f): look at them; "
            "metrics.json lists all",
            *(near["count"], len(tasks), near["largest"]["image"], near["largest"]["similarity"]),
        )
    return {"same_photo": 0, "near_duplicates": {"pixels": near}}


# ---- near-duplicates --------------------------------------------------------------------------------------------


class Signature(NamedTuple):
    """A photo reduced to what its copies share."""

    digest: str  # SHA-256 of size and pixels
    grey: FloatArray  # (32, 32), zero mean and unit variance
    colour: FloatArray  # (32, 32, 3), zero mean and unit variance over all


def make_signature(image: Image.Image) -> Signature:
    """Reduce an RGB photo for `pixel_similarity`: its central square at 32 x 32 px, standardised."""
    small = square(image, SIGNATURE_SIDE)
    digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
    return Signature(digest, _standardise(np.asarray(small.convert("L"))), _standardise(np.asarray(small)))


def pixel_similarity(a: Signature, b: Signature) -> float:
    """Return how nearly two photos are one, in -1..1: the correlation of their pixels, as they are or mirrored.

    The lesser of the correlations in greyscale and in colour, at 32 x 32 px, so that neither equal outlines in other
    colours nor equal colours make a copy. Blind to re-encoding, scaling, brightness and contrast; not to cropping: 4%
    less on every side read 0.86 to 0.97.

    Measured, where `SIMILAR_PIXELS` is 0.95:

    - Different photos of one person of LFW deep-funneled: of 8,167 pairs of 108 people three reach it, and these are
      copies (Ari_Fleischer_0006 and _0011, 0.999; Renee_Zellweger_0010 and _0013, 0.977; Julianne_Moore_0001 and
      _0008, 0.962: one shot each, encoded or cropped twice). The next are two shots of one moment, 0.920, and then
      0.854; the 99.9% quantile is 0.84. Mirrored, none (at most 0.854).
    - Drawn people: of 34,580 pairs of 380 people one reaches it, by chance (0.955; 99.9% quantile 0.83). Mirrored, none
      (at most 0.91).
    - Copies, the least of 68 photos of LFW and of 80 drawn ones: JPEG quality 20, 0.998 and 0.951; half the size, 1.000
      and 1.000; a third of the size and JPEG 50, 0.992 and, for drawings then 21 px wide, 0.86.
    """
    views = ((b.grey, b.colour), (b.grey[:, ::-1], b.colour[:, ::-1]))  # as it is, and mirrored
    return float(max(min((a.grey * grey).mean(), (a.colour * colour).mean()) for grey, colour in views))


def near_duplicates(pairs: Pairs, similarity: FloatArray, threshold: float, other: str = "reference") -> dict[str, Any]:
    """List the pairs that are as similar as `threshold` or more; `other` is what the second of a pair is called.

    Returns:
        `threshold`, `count`, `largest` (the most similar pair, whether near or not) and `pairs`, all of them, the most
        similar first; a pair has `person`, `held_out`, `reference` (or what `other` says) and `similarity`.
    """
    order = np.argsort(-similarity, kind="stable")
    count = int((similarity >= threshold).sum())

    def describe(i: int) -> dict[str, Any]:
        held_out, second = pairs[i]
        name = second if isinstance(second, str) else second.name
        names = {"person": held_out.person, "held_out": held_out.name, other: name}
        return {**names, "similarity": float(similarity[i])}

    near = [describe(i) for i in order[:count]]
    return {"threshold": threshold, "count": count, "largest": describe(order[0]), "pairs": near}


# ---- for people to read -----------------------------------------------------------------------------------------


def summary(audit: Mapping[str, Any]) -> str:
    """Write what was checked and found, a line each."""
    lines = [
        f"Audit: {audit['people']} people, {audit['tasks']} tasks, {audit['photos']} photos; "
        f"{audit['pairs']} pairs of a held-out photo and a reference of it",
        "- the same photo in a pair, by name, content or pixels: none",
    ]
    for by, near in audit["near_duplicates"].items():
        most = near["largest"]
        nearest = f"nearest {most['similarity']:.3f}, {most['person']}: {most['held_out']} and {most['reference']}"
        lines.append(f"- near-duplicates by {by} ({near['threshold']:g} or more): {near['count'] or 'none'}; {nearest}")
    if "images" in audit:
        near = audit["images"]["near_duplicates"]["pixels"]
        most = near["largest"]
        nearest = f"{near['count'] or 'none'}; nearest {most['similarity']:.3f}, {most['image']}"
        lines.append(f"- a held-out photo among the images: none; near-duplicates of its own: {nearest}")
    training = audit["training"]
    known = f"; no test person among the {training['people']} people on record" if training["people"] else ""
    lines.append(
        {
            "recorded": f"- training: {training['people']} people and {training['photos']} photos on the weights' "
            "record, training and validation; no test person and no test photo among them",
            "nothing": "- training: nothing was trained in this project",
            "unknown": f"- training: UNKNOWN, {NO_RECORD}{known}",
            **NO_TEST,
        }[training["status"]]
    )
    if training["drawn_people_of_other_roles"] is not None:
        lines.append("- drawn test people of the ranges that the miniature's own parts were trained on: none")
    return "\n".join(lines)


def warn(audit: Mapping[str, Any]) -> None:
    """Log what a person should look at before they believe the scores."""
    for by, near in audit["near_duplicates"].items():
        if near["count"]:
            most = near["largest"]
            logger.warning(
                "%d of %d pairs of a held-out photo and its reference are near-duplicates by %s, such as '%s' and '%s' "
                "of '%s' (%.3f): look at them, and delete copies; metrics.json lists all",
                *(near["count"], audit["pairs"], by),
                *(most["held_out"], most["reference"], most["person"], most["similarity"]),
            )
    if audit["training"]["status"] == "unknown":
        logger.warning("%s: test people may be among them", NO_RECORD)


def _standardise(pixels: npt.NDArray[Any]) -> FloatArray:
    centred: FloatArray = pixels - pixels.mean(dtype=np.float64)
    return np.divide(centred, max(float(centred.std()), 1e-9))
