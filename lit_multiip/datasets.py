"""Held-out groups and evaluation tasks on features, and the samplers that serve them."""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Sampler, default_collate

from lit_multiip.backbone.encoders import replace_missing
from lit_multiip.backbone.face_weight import FaceMaps
from lit_multiip.backbone.features import Features
from lit_multiip.data.drawing import NOTHING, Drawing
from lit_multiip.data.groups import Balance, Group, Target, draw_references, held_out_group, stable_hash
from lit_multiip.data.people import Person
from lit_multiip.data.photos import DataError, Photo
from lit_multiip.data.tasks import Task
from lit_multiip.data.variants import Augment, vary

logger = logging.getLogger(__name__)


class HeldOutGroups(Dataset[dict[str, Any]]):
    """Training samples, indexed by `(epoch, index)`; every draw is a function of (seed, epoch, index) alone.

    Args:
        people: with at least two photos each.
        features: of all their photos and prompts.
        seed: of all draws.
        references: N - 1, the number of photos that condition.
        balance: `person`: each person gives N targets an epoch; `photo`: each photo is the target once.
        target: `held_out`, or `reference`, where the one reference is the target (the published IP-Adapter).
        drop: probabilities to drop the image condition, the text, and both (published: 5 % each).
        variants: of a photo, one of which is drawn each time that it is a target or a reference.
        augment: makes variants 1 .. `variants` - 1; variant 0 is the photo itself.
        intruders: 0 to so many of a sample's references are photos of other people; every number is as likely.
        face_maps: of all targets; None makes no `loss_map`.
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
        variants: int = 1,
        augment: Augment | None = None,
        intruders: int = 0,
        face_maps: FaceMaps | None = None,
    ) -> None:
        if not 0 <= intruders <= references or (intruders and len(people) < 2):
            raise DataError(
                f"data.intruders is {intruders}: give 0 to {references} (data.references), and two people or more"
            )
        self.intruders, self.face_maps = intruders, face_maps
        self.variants, self.augment = variants, augment
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
        photos = person.photos
        rng = np.random.default_rng([self.seed, epoch, stable_hash(person.name)])
        if self.balance == "photo":
            others = [i for i in range(len(photos)) if i != number]
            rng = np.random.default_rng([self.seed, epoch, stable_hash(person.name), number])
            group = Group(number, draw_references(others, self.references, rng))
        else:
            group = held_out_group(len(photos), self.references + 1, number, rng)
        chosen = [group.target] if self.target == "reference" else group.references
        references = [photos[i] for i in chosen]
        if self.intruders:
            rng = np.random.default_rng([self.seed, epoch, index, 3])
            for place in rng.permutation(len(references))[: rng.integers(self.intruders + 1)]:
                step = 1 + int(rng.integers(len(self.people) - 1))  # to anybody else
                other = self.people[(person_index + step) % len(self.people)].photos
                references[place] = other[int(rng.integers(len(other)))]
        return photos[group.target], references

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """Return one sample.

        Returns:
            photo: the target, as `person/name`.
            references: image embeddings, (R, D), or what else the adapter takes, see `Features.embeds`.
            blank: what stands for no photo, the shape of a row of `references`, where that is not zeros.
            moments: posterior mean and logvar of the target, (2C, h, w).
            text: what the UNet takes besides: `prompt_embeds` of the target's prompt, or of "" where text is dropped,
                (L, E); of SDXL also `pooled_prompt_embeds` (P,), and the target's `time_ids` (6,).
            drop_image: whether the image condition is dropped, () bool.
            time: t / T in [0, 1), () float64.
            latent_noise, eps: standard normal, (C, h, w); the posterior's and the diffusion's.
            loss_map: with `face_maps`, weights of the places of the loss, (h, w) of mean 1.
        """
        epoch, index = key
        target, references = self.draw(epoch, index)
        if self.variants > 1:
            chance = np.random.default_rng([self.seed, epoch, index, 2])
            target, *references = (
                vary(photo, int(chance.integers(self.variants)), self.augment) for photo in (target, *references)
            )
        rng = np.random.default_rng([self.seed, epoch, index, 1])
        u, (image, text, both) = rng.random(), self.drop
        drop_image = u < image or image + text <= u < image + text + both
        drop_text = image <= u < image + text + both
        moments = self.features.moments(target)
        shape = (moments.shape[0] // 2, *moments.shape[1:])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        return {
            "photo": f"{target.person}/{target.name}",
            **conditions(self.features, references, target.person),
            "moments": moments,
            "text": self.features.text("" if drop_text else target.prompt) | self.features.sizes(target),
            "drop_image": torch.tensor(drop_image),
            "time": torch.tensor(rng.random(), dtype=torch.float64),
            "latent_noise": torch.randn(shape, generator=generator),
            "eps": torch.randn(shape, generator=generator),
        } | ({} if self.face_maps is None else {"loss_map": self.face_maps(target)})


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields `(epoch, index)` in an order drawn from (seed, epoch); rank r of W takes every W-th.

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


def ignore_ctrl_c(worker: int) -> None:
    """Keep a loader's worker alive on Ctrl-C: training finishes the batches at hand before it stops."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class ShareSampler(Sampler[int]):
    """Yields 0 .. size - 1 in order, rank r of W a run of ceil(size / W) of them.

    Runs, because tasks are sorted by person and a method may work person by person. All ranks have equally many: the
    last ones may go beyond size - 1, where `TaskDataset` repeats its last task and marks it as `repeated`.
    """

    def __init__(self, size: int, rank: int = 0, world: int = 1) -> None:
        self.rank, self.count = rank, -(-size // world)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        start = self.rank * self.count
        return iter(range(start, start + self.count))


@dataclass(frozen=True)
class Request:
    """One image to draw: the references, the prompt and the seed, and what else acts on it."""

    person: str
    references: tuple[Photo, ...]
    prompt: str
    seed: int
    drawing: Drawing = NOTHING


def conditions(features: Features, references: Sequence[Photo], person: str) -> dict[str, Tensor]:
    """Return `references` and, where it is not zeros, `blank` of an item; see `HeldOutGroups`."""
    blank = features.blank()
    found = {"references": replace_missing(features.embeds(references), person)}
    return found if blank is None else {**found, "blank": blank}


def reference_set(person: str, references: Sequence[Photo], features: Features) -> dict[str, Any]:
    """Return what a method needs that tunes on one person.

    Returns:
        person: the name.
        reference_set: hash of the person and the photos' contents.
        reference_moments: posterior means and logvars, (R, 2C, h, w).
        reference_sizes: `Features.sizes` of each photo; of SDXL `time_ids` (R, 6).
    """
    return {
        "person": person,
        "reference_set": f"{stable_hash(person, *(photo.content_key() for photo in references)):016x}",
        "reference_moments": torch.stack([features.moments(photo) for photo in references]),
        "reference_sizes": default_collate([features.sizes(photo) for photo in references]),
    }


class TaskDataset(Dataset[dict[str, Any]]):
    """Evaluation tasks (or requests, which have no held-out photo) with their features.

    An item holds `task` (), `repeated` () bool, `prompt`, `text` (what the UNet takes besides, as in `HeldOutGroups`),
    `negative_text` (that of ""), `seed` (), and `moments` (2C, h, w) and `photo` (person/name) of the held-out photo,
    where there is one. Of the references it holds `references` (R, D) and `blank`, as in `HeldOutGroups`, and those of
    the next person, `other_references`; or, `per_person`, a `reference_set`. Where there is only one person, the others
    are `strangers[person]`; without any there are no `other_references`.
    """

    def __init__(
        self,
        tasks: Sequence[Task | Request],
        features: Features,
        per_person: bool = False,
        strangers: Mapping[str, Sequence[Photo]] | None = None,
    ) -> None:
        self.tasks, self.features, self.per_person = tasks, features, per_person
        references = {task.person: task.references for task in tasks}
        people = list(references)
        self.others: Mapping[str, Sequence[Photo]] = strangers or {}
        if len(people) > 1:
            self.others = {name: references[people[(i + 1) % len(people)]] for i, name in enumerate(people)}

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> dict[str, Any]:
        repeated, index = index >= len(self.tasks), min(index, len(self.tasks) - 1)
        task = self.tasks[index]
        item: dict[str, Any] = {
            "task": torch.tensor(index),
            "repeated": torch.tensor(repeated),  # only so that all ranks have equally many
            "prompt": task.prompt,
            "text": self.features.text(task.prompt),
            "negative_text": self.features.text(""),
            "seed": torch.tensor(task.seed),
        }
        if self.per_person:
            item |= reference_set(task.person, task.references, self.features)
        else:
            item |= conditions(self.features, task.references, task.person)
            if others := self.others.get(task.person):
                item["other_references"] = replace_missing(self.features.embeds(others), others[0].person)
        if isinstance(task, Request):
            item |= self._draw_by(task)
        else:
            item["photo"] = f"{task.person}/{task.held_out.name}"
            item["moments"] = self.features.moments(task.held_out)
            item["text"] |= self.features.sizes(task.held_out)
        return item

    def _draw_by(self, request: Request) -> dict[str, Any]:
        """Return what `Drawing` adds: `beside` and `negatives`, (R, D) a person, and `masks` (P, H, W)."""
        drawing, item = request.drawing, dict[str, Any]()
        if drawing.beside:
            item["beside"] = [self._embeds(photos) for photos in drawing.beside]
        if drawing.negatives:  # as many as the photos that they stand against, so that both make as many tokens
            people = (request.references, *drawing.beside)
            item["negatives"] = [self._embeds(list(islice(cycle(drawing.negatives), len(one)))) for one in people]
        if drawing.masks:
            item["masks"] = torch.from_numpy(np.stack(drawing.masks))
        return item

    def _embeds(self, photos: Sequence[Photo]) -> Tensor:
        return replace_missing(self.features.embeds(photos), photos[0].person)


class OnePerson(IterableDataset[dict[str, Any]]):
    """One reference set, repeated without end."""

    def __init__(self, item: dict[str, Any]) -> None:
        self.item = item

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            yield self.item


def warn_of_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Warn where epochs are divided otherwise than those of the checkpoint that training goes on from."""
    changed = [f"{name} {then.get(name)} => {value}" for name, value in now.items() if then.get(name) != value]
    if changed:
        logger.warning(
            "the checkpoint was trained with other data or batches (%s): training goes on from its weights, with "
            "other samples than an uninterrupted run's",
            ", ".join(changed),
        )


@dataclass(frozen=True)
class Position:
    """Where training is: `batch` batches of an epoch of `batches` are done, by `steps` optimiser steps in it."""

    epoch: int
    batch: int
    batches: int | None  # of a rank; None: without end
    steps: int

    @classmethod
    def after(cls, step: int, batches: float, accumulate: int) -> Position:
        """Return where training is after `step` optimiser steps; the last one of an epoch may be of fewer batches."""
        if math.isinf(batches):
            return cls(0, step * accumulate, None, step)
        epoch, steps = divmod(step, math.ceil(batches / accumulate))
        return cls(epoch, steps * accumulate, int(batches), steps)

    @classmethod
    def of(cls, trainer: L.Trainer) -> Position:
        """Return where a trainer that fits is."""
        return cls.after(trainer.global_step, trainer.num_training_batches, trainer.accumulate_grad_batches)
