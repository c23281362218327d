"""Held-out groups: which photo is to be restored, and from which others, at every step of every epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from lit_multiip.files import hash_text

Balance = Literal["person", "photo"]
Target = Literal["held_out", "reference"]


class Group(NamedTuple):
    """A target photo and the reference photos it is to be restored from, as indices into a person's photos."""

    target: int
    references: list[int]


def stable_hash(*parts: object) -> int:
    """Hash to 64 bits, the same on every machine and in every process."""
    return int(hash_text("\0".join(map(str, parts)))[:16], 16)


def draw_references(others: Sequence[int], count: int, rng: np.random.Generator) -> list[int]:
    """Draw `count` of `others`: a subset where there are more, all topped up with replacement where fewer."""
    if len(others) >= count:
        return [int(others[i]) for i in rng.permutation(len(others))[:count]]
    extra = [int(others[i]) for i in rng.integers(len(others), size=count - len(others))]
    return [*map(int, others), *extra]


def held_out_group(photos: int, size: int, number: int, rng: np.random.Generator) -> Group:
    """Take photo `number` of a seeded group of `size` photos out and keep the others (the paper, section 2).

    Over `number = 0 .. size - 1` with the same `rng` state every photo of the group is held out once, so that
    j ~ U{1..N}. The target is never among its references.

    Args:
        photos: how many the person has, at least 2.
        size: N; a target and N - 1 references. With fewer photos the references are topped up with replacement.
        number: which of the group to hold out.
        rng: decides the group; the same state for all `number` of one person and epoch.
    """
    group = rng.permutation(photos)[:size]
    target = int(group[number % len(group)])
    others = [int(i) for i in group if i != target]
    return Group(target, draw_references(others, size - 1, rng))
