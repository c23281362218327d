"""The record of whom a checkpoint was trained on, as digests."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lit_multiip.data.people import Person
from lit_multiip.files import hash_text

RECORD = "trained_on"  # key in a checkpoint


def training_record(people: Sequence[Person], earlier: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Record whom a checkpoint has seen, in training or in its choice by validation.

    Names and photos are kept as SHA-256 alone: a checkpoint that is passed on tells nobody's name.

    Args:
        people: The training and validation people.
        earlier: The record of a checkpoint that this training went on from.

    Returns:
        `people` (P, 32) and `photos` (Q, 32), uint8, sorted; digests of names (Unicode NFC) and of photos' contents.
    """
    found = {
        "people": (_name_digest(person.name) for person in people),
        "photos": (bytes.fromhex(photo.original().content_key()) for person in people for photo in person.photos),
    }
    return {key: _distinct(digests, None if earlier is None else earlier[key]) for key, digests in found.items()}


def _name_digest(name: str) -> bytes:
    return bytes.fromhex(hash_text(unicodedata.normalize("NFC", name)))


def _digests(record: Mapping[str, Tensor] | None, key: str) -> set[bytes]:
    return set() if record is None else {row.tobytes() for row in record[key].numpy()}


def _distinct(digests: Iterable[bytes], earlier: Tensor | None) -> Tensor:
    """Sorted rows (P, 32) uint8; packed all the way, for there may be millions."""
    packed = bytearray() if earlier is None else bytearray(earlier.numpy().tobytes())
    for digest in digests:
        packed += digest
    rows = np.unique(np.frombuffer(packed, "S32"))
    return torch.from_numpy(np.frombuffer(rows.tobytes(), np.uint8).reshape(-1, 32).copy())
