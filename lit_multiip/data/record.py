"""The record of whom weights were trained on, as digests, in checkpoints and exported adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lit_multiip.data.names import normalise_name
from lit_multiip.data.people import Person
from lit_multiip.data.photos import Photo
from lit_multiip.files import hash_text

RECORD = "trained_on"  # key in a checkpoint, section of an exported adapter's file
HELD_OUT = "held_out"  # key in a record: photos of one person that chose a checkpoint and that none was trained on
INCOMPLETE = "incomplete"  # key in a record, present where some weights carry no record of their own

Record = Mapping[str, Tensor]


def training_record(
    people: Sequence[Person], *earlier: Record | None, held_out: Sequence[Photo] = ()
) -> dict[str, Tensor]:
    """Record whom weights have seen, in training or in their choice by validation.

    It holds SHA-256 of names and photos alone, so that a checkpoint that is passed on reveals no name.

    Args:
        people: the training and validation people.
        earlier: records of the weights that this training started from; None where those were trained on nobody.
        held_out: photos of one person by which the weights were chosen.

    Returns:
        `people` (P, 32) and `photos` (Q, 32): sorted digests of names and of photos' contents, uint8; and
        `incomplete` (), where an earlier record is incomplete; and `held_out` (H, 32), where there are any.
    """
    found = {
        "people": (digest_name(person.name) for person in people),
        "photos": (bytes.fromhex(photo.original().content_key()) for person in people for photo in person.photos),
        HELD_OUT: (bytes.fromhex(photo.original().content_key()) for photo in held_out),
    }
    known = [record for record in earlier if record is not None]
    record: dict[str, Tensor] = {}
    for key, digests in found.items():
        rows = sorted(set(digests).union(*(digests_in(one, key) for one in known)))
        if rows or key != HELD_OUT:
            record[key] = torch.from_numpy(np.frombuffer(b"".join(rows), np.uint8).reshape(-1, 32).copy())
    return record | {INCOMPLETE: torch.tensor(1)} if any(map(is_incomplete, known)) else record


def merge_records(*records: Record | None) -> dict[str, Tensor] | None:
    """Join records; None if there is none."""
    return training_record([], *records) if any(record is not None for record in records) else None


def unknown_record() -> dict[str, Tensor]:
    """Return the record of weights that carry none: empty and incomplete."""
    return training_record([]) | {INCOMPLETE: torch.tensor(1)}


def read_record(section: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return the record in a section of a file; what is missing or malformed is an unknown record."""
    keys = ("people", "photos")
    if section is None or any(
        key not in section or section[key].dtype != torch.uint8 or section[key].shape[1:] != (32,) for key in keys
    ):
        return unknown_record()
    return {key: value for key, value in section.items() if key in (*keys, HELD_OUT, INCOMPLETE)}


def is_incomplete(record: Record) -> bool:
    """Return whether some of the weights may have seen people who are not on the record."""
    return INCOMPLETE in record


def digest_name(name: str) -> bytes:
    """Return the SHA-256 of a person's name in Unicode's NFC."""
    return bytes.fromhex(hash_text(normalise_name(name)))


def digests_in(record: Record, key: str) -> set[bytes]:
    """Return the digests of a record, of `people`, `photos` or `held_out`."""
    return {row.tobytes() for row in record[key].numpy()} if key in record else set()
