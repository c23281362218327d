"""The people of a batch, for methods that tune on one person at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor

from lit_multiip.methods.method import Batch


class Draws(NamedTuple):
    """The random draws of one term of eq. (13) in one step, a row a sample."""

    which: Tensor  # (B,) int64, of the photos
    t: Tensor  # (B,) int64
    latent_noise: Tensor  # (B, C, h, w), of the VAE's posterior
    eps: Tensor  # (B, C, h, w)


class Who(NamedTuple):
    """A person to tune on."""

    person: str
    reference_set: str
    moments: Tensor  # of the VAE's posteriors of the references, (R, 2C, h, w)
    sizes: Mapping[str, Tensor] = MappingProxyType({})  # `Features.sizes` of the references, (R, ...) each


def people_of(batch: Batch) -> Iterator[tuple[Who, list[int]]]:
    """Yield each person of a batch and their rows, in order; rows of one person follow one another."""
    keys = list(zip(batch["person"], batch["reference_set"], strict=True))
    for (person, reference_set), rows in groupby(range(len(keys)), keys.__getitem__):
        own = list(rows)
        sizes = {name: size[own[0]] for name, size in batch["reference_sizes"].items()}
        yield Who(person, reference_set, batch["reference_moments"][own[0]], sizes), own
