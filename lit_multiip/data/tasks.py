"""The test protocol: which photos are references, which are held out, and from what noise each image starts.

All methods are scored on the same tasks. Every draw is a function of (seed, person's name) alone, so that adding or
removing people changes nothing for the others.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

import numpy as np
from tqdm import tqdm

from lit_multiip.data.names import natural_key
from lit_multiip.data.people import Person
from lit_multiip.data.photos import DataError, Photo, distinct_photos
from lit_multiip.files import hash_text


@dataclass(frozen=True, slots=True)
class Task:
    """One image to make: this person, known from the references, as the held-out photo's prompt says."""

    person: str
    references: tuple[Photo, ...]  # R, in the order of their draw: the first is what single-photo methods see
    held_out: Photo
    prompt: str
    seed: int  # of the initial noise, in [0, 2^32); the same for every method


def make_tasks(
    people: Sequence[Person],
    references: int = 9,
    held_out: int = 4,
    seeds: Sequence[int] | int = 1,
    seed: int = 0,
) -> list[Task]:
    """Draw one reference set a person, and held-out photos disjoint from it by content.

    Photos of equal content are one photo, so that no copy of a held-out photo is a reference. Of a person's n distinct
    photos max(1, min(held_out, n - references)) are held out and up to `references` of the rest are references, topped
    up by draws with replacement where they are fewer.

    Args:
        people: whom to test.
        references: R, the number of references of a task.
        held_out: the most held-out photos of a person.
        seeds: images per held-out photo: how many, or the numbers k that, with `seed`, the person and the photo,
            determine each image's noise. A count n stands for 0 .. n - 1.
        seed: of all draws.

    Returns:
        The tasks by person, held-out photo (both in natural order) and k.

    Raises:
        DataError: a person has a single distinct photo, or a number is out of range.
    """
    ks = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    for name, count in (("references", references), ("held_out", held_out), ("seeds", len(ks))):
        if count < 1:
            raise DataError(f"{name} is {count}: a test takes at least 1")
    if len(set(ks)) < len(ks):
        raise DataError(f"seeds are {ks}: name each once, or the same image is scored twice")
    tasks = []
    for person in tqdm(sorted(people, key=lambda person: natural_key(person.name)), "drawing test tasks", delay=3):
        chosen, targets = _draw(person, references, held_out, seed)
        tasks += [
            Task(person.name, chosen, photo, photo.prompt, _noise_seed(seed, photo, k)) for photo in targets for k in ks
        ]
    return tasks


def _draw(person: Person, references: int, held_out: int, seed: int) -> tuple[tuple[Photo, ...], list[Photo]]:
    """Return the person's references, R of them, and their held-out photos."""
    distinct = distinct_photos(person.photos)
    n = len(distinct)
    if n < 2:
        raise DataError(
            f"person {person.name!r} has {len(person.photos)} photos and {n} distinct, and a test needs 2, one to hold "
            "out and one as its reference: add photos, or leave the person out (data.min_photos)"
        )
    rng = np.random.default_rng(_hash(seed, person.name))
    shuffled = [distinct[i] for i in rng.permutation(n)]
    n_held_out = max(1, min(held_out, n - references))
    chosen = shuffled[: min(references, n - n_held_out)]
    targets = shuffled[len(chosen) :][:n_held_out]
    extra = rng.integers(len(chosen), size=references - len(chosen))
    return (*chosen, *(chosen[i] for i in extra)), sorted(targets, key=lambda photo: natural_key(photo.name))


def add_intruders(tasks: Sequence[Task], count: int, seed: int = 0) -> list[Task]:
    """Replace references by photos of other people of the same tasks, as in an album that was mixed up.

    Args:
        tasks: of two people or more, where `count` is not 0.
        count: how many references of every person are replaced, at drawn places; the same ones in all of a person's
            tasks.
        seed: of all draws, which are a function of (seed, person's name) and of who is tested.

    Raises:
        DataError: there is nobody else, or `count` is out of range.
    """
    if count == 0:
        return list(tasks)
    sets = {task.person: task.references for task in tasks}
    most = min(map(len, sets.values()))
    if not 0 <= count <= most:
        raise DataError(f"data.intruders is {count}: give 0 to {most}, the number of references")
    if len(sets) < 2:
        raise DataError(f"data.intruders is {count}, and there is one person only: test two or more")
    mixed = {}
    for person, own in sets.items():
        rng = np.random.default_rng(_hash(seed, person, "intruders"))
        others, references = [other for other in sets if other != person], list(own)
        for place in rng.permutation(len(own))[:count]:
            photos = sets[others[rng.integers(len(others))]]
            references[place] = photos[rng.integers(len(photos))]
        mixed[person] = tuple(references)
    return [replace(task, references=mixed[task.person]) for task in tasks]


def _noise_seed(seed: int, photo: Photo, k: int) -> int:
    return _hash(seed, photo.person, photo.name, k) % 2**32


def _hash(*parts: str | int) -> int:
    """Hash to an integer, the same on every machine and in every process, unlike Python's own."""
    return int(hash_text(json.dumps(parts)), 16)


def protocol(tasks: Sequence[Task]) -> dict[str, Any]:
    """Return what is tested: counts, and a fingerprint that differs between different protocols.

    Returns:
        JSON-able: `people`, `tasks`, `held_out` (photos, of all people), `references` (photos of a task), `seeds`
        (images of a held-out photo) and `sha256`, over each task's person, contents of its photos, prompt and seed.
        Two lists of the same tasks in another order are one protocol.
    """
    if not tasks:
        raise DataError("there are no tasks: give at least one person to test")
    keys: dict[Photo, str] = {}
    for task in tasks:
        for photo in (*task.references, task.held_out):
            if photo not in keys:
                keys[photo] = photo.content_key()
    rows = sorted([t.person, [keys[p] for p in t.references], keys[t.held_out], t.prompt, t.seed] for t in tasks)
    images = Counter((task.person, task.held_out) for task in tasks)
    return {
        "people": len({task.person for task in tasks}),
        "tasks": len(tasks),
        "held_out": len(images),
        "references": max(len(task.references) for task in tasks),
        "seeds": max(images.values()),
        "sha256": hash_text(json.dumps(rows)),
    }


def image_files(tasks: Sequence[Task]) -> list[str]:
    """Return a file name for each task's image, `<person>/<held-out photo's stem>_s<k>.png`, k counting its seeds.

    Photos of one person that differ in their suffix alone (`1.jpg`, `1.png`) keep it.
    """
    photos = {(task.person, task.held_out.name) for task in tasks}
    stems = Counter((person, PurePath(name).stem) for person, name in photos)
    count: Counter[tuple[str, str]] = Counter()
    files = []
    for task in tasks:
        name, stem = task.held_out.name, PurePath(task.held_out.name).stem
        unique = stem if stems[task.person, stem] == 1 else name
        files.append(f"{task.person}/{unique}_s{count[task.person, name]}.png")
        count[task.person, name] += 1
    return files
