"""What is measured on: people without pictures, and features without encoders.

Speed does not depend on any of their values.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lit_multiip.backbone.features import Features, prompt_key
from lit_multiip.data.people import PeopleSource, Person
from lit_multiip.data.photos import DrawnPhoto, Photo

PROMPTS = [f"a photo of a person, scene {number}" for number in range(16)]


class Strangers(PeopleSource):
    """People whose photos are never looked at.

    Args:
        train: how many to train on; one validates and one tests.
        photos: of each.
    """

    def __init__(self, train: int = 4, photos: int = 10) -> None:
        self.counts, self.photos = {"train": train, "validation": 1, "test": 1}, photos

    def people(self) -> list[Person]:
        """Return them; the numbers of all their photos differ."""
        people, index = [], 0
        for side, count in self.counts.items():
            for number in range(count):
                name = f"{side}_{number:06d}"
                photos = tuple(
                    DrawnPhoto(name, f"{name}_{i:04d}.png", PROMPTS[(index + i) % 16], 0, index, i)
                    for i in range(self.photos)
                )
                people.append(Person(name, photos, side))
                index += 1
        return people


def fill(features: Features, photos: Sequence[Photo], seed: int = 0) -> None:
    """Store features of photos that no encoder made, as ``Features.build`` stores the encoders'."""
    rng = np.random.default_rng(seed)
    shapes = features.backbone.feature_shapes() | features.backbone.photo_shapes()
    for kind, shape in ((kind, shapes[kind]) for kind in ("embeds", "latent")):
        dtype = np.dtype(np.float32 if kind == "embeds" else np.float16)
        keys = features.store[kind].missing(photo.content_key() for photo in photos)
        for first in range(0, len(keys), 1024):
            part = keys[first : first + 1024]
            _sparse_shard(features.store[kind].folder, part, shape, dtype, rng)
    text = features.store["text"]
    keys = text.missing(map(prompt_key, ["", *PROMPTS]))
    if keys:
        tokens, width = shapes["text"]
        text.add(keys, rng.standard_normal((len(keys), tokens, width)).astype(np.float16))
    features.refresh()


def _sparse_shard(
    folder: Path, keys: Sequence[str], shape: tuple[int, ...], dtype: np.dtype, rng: np.random.Generator
) -> None:
    """Write a shard of which 16 rows are random and the others are holes in the file, zeros."""
    folder.mkdir(parents=True, exist_ok=True)
    name = uuid.uuid4().hex
    array = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, (len(keys), *shape))
    array[:16] = rng.standard_normal(array[:16].shape)
    array.flush()
    (folder / f"{name}.json").write_text(json.dumps(list(keys)))
