"""Held-out groups: which photo is to be restored, and from which others, at every step of every epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from lit_multiip.data.people import Person
from lit_multiip.data.photos import Photo
from lit_multiip.features import Features, Pixels

Balance = Literal["person", "photo"]
Target = Literal["held_out", "reference"]


class Group(NamedTuple):
    """A target photo and the reference photos it is to be restored from, as indices into a person's photos."""

    target: int
    references: list[int]


def stable_hash(*parts: object) -> int:
    """Hash to 64 bits, the same on every machine and in every process."""
    text = "\0".join(map(str, parts)).encode(
        "utf-8", "surrogateescape"
    )  # names of files may hold bytes that are no text
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")


def draw_references(others: Sequence[int], count: int, rng: np.random.Generator) -> list[int]:
    """Draw ``count`` of ``others``: a subset where there are more, all topped up with replacement where fewer."""
    if len(others) >= count:
        return [int(others[i]) for i in rng.permutation(len(others))[:count]]
    extra = [int(others[i]) for i in rng.integers(len(others), size=count - len(others))]
    return [*map(int, others), *extra]


def held_out_group(photos: int, size: int, number: int, rng: np.random.Generator) -> Group:
    """Take photo ``number`` of a seeded group of ``size`` photos out and keep the others (the paper, section 2).

    Over ``number = 0 .. size - 1`` with the same ``rng`` state every photo of the group is held out once, so that
    j ~ U{1..N}. The target is never among its references.

    Args:
        photos: how many the person has, at least 2.
        size: N; a target and N - 1 references. With fewer photos the references are topped up with replacement.
        number: which of the group to hold out.
        rng: decides the group; the same state for all ``number`` of one person and epoch.
    """
    group = rng.permutation(photos)[:size]
    target = int(group[number % len(group)])
    others = [int(i) for i in group if i != target]
    return Group(target, draw_references(others, size - 1, rng))


class HeldOutGroups(Dataset[dict[str, Any]]):
    """Training samples, indexed by ``(epoch, index)``; every draw is a function of (seed, epoch, index) alone.

    Args:
        people: with at least two photos each.
        features: of all their photos and prompts.
        seed: of all draws.
        references: N - 1, the number of photos that condition.
        balance: ``person``: each person gives N targets an epoch; ``photo``: each photo is the target once.
        target: ``held_out``, or ``reference``, where the one reference is the target (the published IP-Adapter).
        drop: probabilities to drop the image condition, the text, and both (published: 5 % each).
    """

    def __init__(
        self,
        people: Sequence[Person],
        features: Features,
        seed: int = 0,
        references: int = 9,
        balance: Balance = "person",
        target: Target = "held_out",
        drop: tuple[float, float, float] = (0.05, 0.05, 0.05),
    ) -> None:
        self.people, self.features, self.seed = people, features, seed
        self.references, self.target, self.drop = references, target, drop
        counts = [references + 1 if balance == "person" else len(person.photos) for person in people]
        self.balance, self.ends = balance, np.cumsum(counts)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def draw(self, epoch: int, index: int) -> tuple[Photo, list[Photo]]:
        """Return the target photo and its references."""
        person_index = int(np.searchsorted(self.ends, index, side="right"))
        number = index - (int(self.ends[person_index - 1]) if person_index else 0)
        person = self.people[person_index]
        photos = tuple(person.photos)
        rng = np.random.default_rng([self.seed, epoch, stable_hash(person.name)])
        if self.balance == "photo":
            others = [i for i in range(len(photos)) if i != number]
            rng = np.random.default_rng([self.seed, epoch, stable_hash(person.name), number])
            group = Group(number, draw_references(others, self.references, rng))
        else:
            group = held_out_group(len(photos), self.references + 1, number, rng)
        chosen = [group.target] if self.target == "reference" else group.references
        return photos[group.target], [photos[i] for i in chosen]

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """Return one sample.

        Returns:
            photo: the target, as ``person/name``.
            references: image embeddings, (R, D).
            moments: posterior mean and logvar of the target, (2C, h, w).
            prompt_embeds: text states of the target's prompt, or of "" where text is dropped, (L, E); of SDXL also its
                pooled_prompt_embeds (P,), and the target's time_ids (6,).
            drop_image: whether the image condition is dropped, () bool.
            time: t / T in [0, 1), () float64.
            latent_noise, eps: standard normal, (C, h, w); the posterior's and the diffusion's.
        """
        epoch, index = key
        target, references = self.draw(epoch, index)
        rng = np.random.default_rng([self.seed, epoch, index, 1])
        u, (image, text, both) = rng.random(), self.drop
        drop_image = u < image or image + text <= u < image + text + both
        drop_text = image <= u < image + text + both
        moments = self.features.moments(target)
        shape = self._latent_shape(moments)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        return {
            "photo": f"{target.person}/{target.name}",
            "references": self.features.embeds(references),
            "moments": moments,
            **self.features.text("" if drop_text else target.prompt),
            **self.features.time_ids(target),
            "drop_image": torch.tensor(drop_image),
            "time": torch.tensor(rng.random(), dtype=torch.float64),
            "latent_noise": torch.randn(shape, generator=generator),
            "eps": torch.randn(shape, generator=generator),
        }

    def _latent_shape(self, moments: Tensor) -> tuple[int, ...]:
        return (moments.shape[0] // 2, *moments.shape[1:])


class OnlineGroups(HeldOutGroups):
    """The same samples with pixels where ``HeldOutGroups`` has features of photos: ``references`` and ``moments``.

    What augmentation draws from torch's generator is a function of (seed, epoch, index), too.
    """

    features: Pixels  # type: ignore[assignment]

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """Return one sample; ``references`` are (R, 3, S, S) float32 and ``moments`` (3, H, W) uint8."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stable_hash("augment", self.seed, *key) % 2**63)
            return super().__getitem__(key)

    def _latent_shape(self, moments: Tensor) -> tuple[int, ...]:
        return self.features.latent_shape


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields ``(epoch, index)`` in an order drawn from (seed, epoch); rank r of W takes every W-th.

    So that all ranks have equally many and none twice, up to W - 1 samples of an epoch are left out.

    Args:
        size: samples of an epoch.
        seed: of the orders.
        rank: this process's number.
        world: W.
        start: an epoch, and how many samples of it this rank has had, where training goes on from there.
    """

    def __init__(self, size: int, seed: int, rank: int = 0, world: int = 1, start: tuple[int, int] = (0, 0)) -> None:
        self.size, self.seed, self.rank, self.world, self.start = size, seed, rank, world, start
        self.epoch = start[0]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; Lightning calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size // self.world

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size)
        own = order[self.rank :: self.world][: len(self)]
        for index in own[self.start[1] if self.epoch == self.start[0] else 0 :]:
            yield self.epoch, int(index)


class ShareSampler(Sampler[int]):
    """Yields 0 .. size - 1 in order, rank r of W a run of ceil(size / W) of them.

    Runs, because tasks are sorted by person and a method may work person by person. Where they are too few it counts on
    from size, so that all ranks have equally many; a ``TaskDataset`` repeats its last task for that, and says so.
    """

    def __init__(self, size: int, rank: int = 0, world: int = 1) -> None:
        self.rank, self.count = rank, -(-size // world)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        start = self.rank * self.count
        return iter(range(start, start + self.count))
