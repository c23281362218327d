"""Was anything known that should not have been? What a test checks of its own tasks, and of a checkpoint's record.

Everything is worked out again from the tasks and the record, not by the code that drew and split them. An exact leak
is refused before anything is sampled; near-duplicates, which may be honest photos that look alike, are counted and
listed for a person to look at.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lit_multiip.data import mini_faces
from lit_multiip.data.photos import DrawnPhoto, Photo
from lit_multiip.data.record import RECORD, _digests, _name_digest, training_record
from lit_multiip.data.tasks import Task
from lit_multiip.files import LitMultiIPError

logger = logging.getLogger(__name__)

NO_TEST = {  # sides other than the test's that can be scored
    "validation": "- training: NO TEST, validation people: for choosing options, which then suit them",
    "train": "- training: NO TEST, training people: for seeing what was learned by heart",
}
SIGNATURE_SIDE = 32  # px
SIMILAR_PIXELS = 0.95
SIMILAR_EMBEDDING = 0.995
LISTED = 20  # near-duplicates that are written out; all are counted

FloatArray = npt.NDArray[np.float64]
Pairs = list[tuple[Photo, Photo]]


class LeakError(LitMultiIPError):
    """A held-out photo is among its references, or a test person was trained on; the message names them."""


# ---- what a fit was trained on ----------------------------------------------------------------------------------


def find_record(trainer: Any, describe: Mapping[str, Any]) -> tuple[str, dict[str, Tensor] | None]:
    """Find out what the tested weights were trained on.

    Returns:
        `recorded` and the record; `nothing` where this project trained nothing; or `unknown`. Where those
        who are scored are no test people (`data.tested`): their side, `validation` or `train`, and no record.
    """
    from lit_multiip.runs import read_checkpoint

    side = getattr(trainer.datamodule, "tested", "test")
    if side != "test":
        return side, None
    path = trainer.ckpt_path
    if path is None and trainer.global_step > 0:  # fit and test of one Trainer
        split = trainer.datamodule.split
        return "recorded", training_record([*split.train, *split.validation])
    if path is None:
        return ("unknown" if describe.get("ip_adapter") == "file" else "nothing"), None
    record = None if "://" in str(path) else read_checkpoint(Path(path)).get(RECORD)
    return ("unknown", None) if record is None else ("recorded", record)


# ---- exact leaks, and copies by pixels --------------------------------------------------------------------------


def audit_tasks(tasks: Sequence[Task], status: str, record: Mapping[str, Tensor] | None) -> dict[str, Any]:
    """Check all that can be known before anything is sampled.

    Args:
        tasks: The test.
        status: What is known of training; see `find_record`.
        record: Of `training_record`, where there is one.

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

    Raises:
        LeakError: A held-out photo is among its references, or a test person or photo was trained on.
    """
    shown = list(dict.fromkeys(photo for task in tasks for photo in (task.held_out, *task.references)))
    pairs = _pairs(tasks)
    keys = {photo: photo.original().content_key() for photo in shown}
    # before photos are read: this is told at once
    training = _check_training(tasks, keys, status, record)
    looks = {photo: look(photo.image()) for photo in tqdm(shown, "comparing photos", unit="photo", delay=3)}
    for held_out, reference in pairs:
        for what, same in (
            ("the same file", (held_out.person, held_out.name) == (reference.person, reference.name)),
            ("equal in content", keys[held_out] == keys[reference]),
            ("equal in every pixel", looks[held_out].digest == looks[reference].digest),
        ):
            if same:
                raise LeakError(
                    f"held-out photo '{held_out.name}' of '{held_out.person}' is {what} as its reference "
                    f"'{reference.name}': delete one of the two"
                )
    similar = np.array([pixel_similarity(looks[a], looks[b]) for a, b in pairs])
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
    tasks: Sequence[Task], keys: Mapping[Photo, str], status: str, record: Mapping[str, Tensor] | None
) -> dict[str, Any]:
    facts: dict[str, Any] = dict.fromkeys(("people", "photos", "people_seen", "photos_seen"))
    if record is not None:
        people, photos = _digests(record, "people"), _digests(record, "photos")
        names = {task.person: _name_digest(task.person) for task in tasks}
        if seen := [name for name, digest in names.items() if digest in people]:
            raise LeakError(
                f"{len(seen)} of {len(names)} test people were trained or validated on, such as '{seen[0]}': test with "
                "the split, seed and source that the checkpoint was trained with, or leave them out"
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


# ---- near-duplicates --------------------------------------------------------------------------------------------


class Look(NamedTuple):
    """A photo reduced to what its copies share."""

    digest: str  # SHA-256 of size and pixels
    grey: FloatArray  # (32, 32), zero mean and unit variance
    colour: FloatArray  # (32, 32, 3), zero mean and unit variance over all


def look(image: Image.Image) -> Look:
    """Reduce an RGB photo for `pixel_similarity`: its central square at 32 x 32 px, standardised."""
    from lit_multiip.pixels import square

    small = square(image, SIGNATURE_SIDE)
    digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
    return Look(digest, _standardised(np.asarray(small.convert("L"))), _standardised(np.asarray(small)))


def pixel_similarity(a: Look, b: Look) -> float:
    """How nearly two photos are one, in -1..1: the correlation of their pixels, as they are or mirrored.

    The lesser of the correlations in greyscale and in colour, at 32 x 32 px, so that neither equal outlines in other
    colours nor equal colours make a copy. Blind to re-encoding, scaling, brightness and contrast; not to cropping: 4%
    less on every side read 0.86 to 0.97.

    Measured, where `SIMILAR_PIXELS` is 0.95. Different photos of one person: of 4,933 pairs of 68 people of LFW
    deep-funneled 1 reaches it, and that one is a copy (Julianne_Moore_0001 and _0008, 0.96, the same shot cropped
    twice; the next is 0.84, the 99.9% quantile 0.81); of 34,580 pairs of 380 drawn people 1 does, by chance (0.955;
    99.9% quantile 0.83). Mirrored, none (at most 0.85 and 0.91). Copies of those, the least of 68 and 80 photos: JPEG
    quality 20 0.998 and 0.951; half the size 1.000 and 1.000; a third of the size and JPEG 50 0.992 and, for drawings
    then 21 px wide, 0.86.
    """
    return float(max(min((a.grey * flipped).mean(), (a.colour * coloured).mean()) for flipped, coloured in _views(b)))


def embedding_similarity(pairs: Pairs, embedding: Tensor, place: Mapping[Photo, int]) -> FloatArray:
    """Cosine of the embeddings of each pair, (P,); rows of `embedding` (M, E) as `place` says.

    An embedding that tells people apart makes photos of one person alike, and is the weaker witness: by the
    miniature's critic, 4,550 pairs of different drawn photos of one person reach 0.992 (99% quantile 0.985), and
    4,933 of LFW 0.983, where copies at half the size fall to 0.81 and to 1.00. `SIMILAR_EMBEDDING` is above all
    different photos, so it finds light re-encoding alone; other extractors have not been measured.
    """
    unit = torch.nn.functional.normalize(embedding.double(), dim=1)
    rows = torch.tensor([[place[a], place[b]] for a, b in pairs])  # (P, 2)
    return (unit[rows[:, 0]] * unit[rows[:, 1]]).sum(dim=1).numpy()


def near_duplicates(pairs: Pairs, similarity: FloatArray, threshold: float) -> dict[str, Any]:
    """Pairs that are as similar as `threshold` or more.

    Returns:
        `threshold`, `count`, `largest` (the most similar pair, whether near or not) and `pairs`, of which the 20 most
        similar are written out; a pair has `person`, `held_out`, `reference` and `similarity`.
    """
    order = np.argsort(-similarity, kind="stable")
    count = int((similarity >= threshold).sum())

    def pair(i: int) -> dict[str, Any]:
        held_out, reference = pairs[i]
        names = {"person": held_out.person, "held_out": held_out.name, "reference": reference.name}
        return {**names, "similarity": float(similarity[i])}

    listed = [pair(i) for i in order[: min(count, LISTED)]]
    return {"threshold": threshold, "count": count, "largest": pair(order[0]), "pairs": listed}


def audit_embeddings(
    audit: dict[str, Any], name: str, tasks: Sequence[Task], embedding: Tensor, place: Mapping[Photo, int]
) -> None:
    """Add what an extractor finds near to an audit, as `near_duplicates.<name>`.

    Pairs of which a face was not found are left out; without any other pair nothing is added.
    """
    pairs = _pairs(tasks)
    similar = embedding_similarity(pairs, embedding, place)
    found = np.flatnonzero(~np.isnan(similar))
    if len(found):
        near = near_duplicates([pairs[i] for i in found], similar[found], SIMILAR_EMBEDDING)
        audit["near_duplicates"][name] = near


# ---- for people to read -----------------------------------------------------------------------------------------


def summary(audit: Mapping[str, Any]) -> str:
    """What was checked and found, a line each."""
    lines = [
        f"Audit: {audit['people']} people, {audit['tasks']} tasks, {audit['photos']} photos; "
        f"{audit['pairs']} pairs of a held-out photo and a reference of it",
        "- the same photo in a pair, by name, content or pixels: none",
    ]
    for by, near in audit["near_duplicates"].items():
        most = near["largest"]
        nearest = f"nearest {most['similarity']:.3f}, {most['person']}: {most['held_out']} and {most['reference']}"
        lines.append(f"- near-duplicates by {by} ({near['threshold']:g} or more): {near['count'] or 'none'}; {nearest}")
    training = audit["training"]
    lines.append(
        {
            "recorded": f"- training: {training['people']} people and {training['photos']} photos on the checkpoint's "
            "record, training and validation; no test person and no test photo among them",
            "nothing": "- training: nothing was trained in this project",
            "unknown": "- training: UNKNOWN, the weights carry no record of whom they were trained on",
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
                "%d held-out photos have a near-duplicate by %s among their references, such as '%s' and '%s' of '%s' "
                "(%.3f): look at them, and delete copies; all are in metrics.json",
                len({(pair["person"], pair["held_out"]) for pair in near["pairs"]}),
                *(by, most["held_out"], most["reference"], most["person"], most["similarity"]),
            )
    if audit["training"]["status"] == "unknown":
        logger.warning("the tested weights carry no record of whom they were trained on: test people may be among them")


def _pairs(tasks: Sequence[Task]) -> Pairs:
    """Each held-out photo with each of its references, once."""
    return list(dict.fromkeys((task.held_out, reference) for task in tasks for reference in task.references))


def _views(photo: Look) -> list[tuple[FloatArray, FloatArray]]:
    return [(photo.grey, photo.colour), (photo.grey[:, ::-1], photo.colour[:, ::-1])]


def _standardised(pixels: npt.NDArray[Any]) -> FloatArray:
    centred = pixels - pixels.mean(dtype=np.float64)
    return centred / max(float(centred.std()), 1e-9)
