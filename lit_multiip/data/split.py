"""Who takes part, and who trains, validates and is tested."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lit_multiip.data.captions import read_text
from lit_multiip.data.names import natural_key, normalise_name
from lit_multiip.data.people import Person, check_names_differ
from lit_multiip.data.photos import DataError
from lit_multiip.files import shorten

logger = logging.getLogger(__name__)

SIDES = ("train", "validation", "test")


def select_people(
    people: Sequence[Person], min_photos: int = 10, max_people: int | None = None, seed: int = 0
) -> list[Person]:
    """Keep the people who have at least `min_photos` photos, and of them a seeded `max_people`.

    A smaller `max_people` keeps a subset of what a larger one keeps. The order is that of `people`.

    Raises:
        DataError: nobody is left, `min_photos` is below 2 or `max_people` below 1.
    """
    if min_photos < 2:
        raise DataError(f"min_photos is {min_photos}: a target and one reference make at least 2")
    if max_people is not None and max_people < 1:
        raise DataError(f"max_people is {max_people}: it must be 1 or more, or null for everyone")
    kept = [person for person in people if len(person.photos) >= min_photos]
    if not kept:
        richest = max(people, key=lambda person: len(person.photos), default=None)
        most = f"{richest.name} has the most, {len(richest.photos)}" if richest else "there is nobody at all"
        raise DataError(
            f"none of {len(people)} people has min_photos = {min_photos} photos ({most}): lower it, or add photos"
        )
    if len(kept) < len(people):
        logger.info("left out %d of %d people: fewer than %d photos", len(people) - len(kept), len(people), min_photos)
    if max_people is not None and max_people < len(kept):
        logger.info("kept max_people = %d of %d people by seed %d", max_people, len(kept), seed)
        chosen = np.random.default_rng(seed).permutation(len(kept))[:max_people]
        kept = [kept[i] for i in sorted(chosen)]
    return kept


@dataclass(slots=True)
class Split:
    """Three groups of people; nobody is in two of them and none is empty, or `DataError` is raised.

    Attributes:
        test_alone: whether there are test people alone, and nobody to train on.
    """

    train: list[Person]
    validation: list[Person]
    test: list[Person]
    test_alone: bool = False

    def __post_init__(self) -> None:
        """Check that the sides are disjoint and that none is empty."""
        for side in SIDES[2:] if self.test_alone else SIDES:
            if not getattr(self, side):
                sizes = ", ".join(f"{len(getattr(self, other))} {other}" for other in SIDES)
                raise DataError(
                    f"the split leaves no {side} people ({sizes}): add people, raise max_people, lower min_photos, "
                    "or change the fractions or lists of names"
                )
        check_names_differ([*self.train, *self.validation, *self.test])

    def people_of(self, side: str) -> list[Person]:
        """Return the people of a side, whom something needs; refuse where `test_fraction` = 1 left none there."""
        people: list[Person] = getattr(self, side)
        if not people:
            remedy = "lower it, or set data.tested to test"
            raise DataError(f"data.test_fraction=1 makes test people of everyone, no {side} people: {remedy}")
        return people


def split_people(
    people: Sequence[Person],
    seed: int = 0,
    test_fraction: float = 1 / 3,
    validation_fraction: float = 0.1,
    train_names: str | None = None,
    test_names: str | None = None,
    validation_names: str | None = None,
) -> Split:
    """Split by person: as the source fixes it, else by lists of names, else by seed.

    A list of names decides its side; whoever is on no list goes to the side (train or test) that has no list, and is
    left out where both have one. Without a list, `test_fraction` of the people are drawn for test, and
    `validation_fraction` of the train side for validation. The order of `people` does not matter.

    A `test_fraction` of 1 makes test people of everyone, whatever the source or lists say: people whom a finished run
    is scored on.

    Args:
        people: whom to split; see `select_people`.
        seed: of the draws.
        test_fraction: share of the people that is for test, in (0, 1); the paper's 2:1 is 1/3. Or 1, for everyone.
        validation_fraction: share of the train side that is for validation, in (0, 1).
        train_names: file with one name a line, or one of LFW's own (`peopleDevTrain.txt`), as are the next two.
        test_names: the same for test, such as LFW's `peopleDevTest.txt`.
        validation_names: the same for validation.

    Raises:
        DataError: a side is empty, a name is on two lists or unknown, a fraction is out of range, or there are lists
            for a source that fixes its own split.
    """
    for name, fraction in (("test_fraction", test_fraction), ("validation_fraction", validation_fraction)):
        if not 0 < fraction < 1 and (name, fraction) != ("test_fraction", 1):
            also = "; 1 makes test people of everyone" if name == "test_fraction" else ""
            raise DataError(f"{name} is {fraction}: it must lie between 0 and 1, both excluded{also}")
    people = sorted(people, key=lambda person: natural_key(person.name))
    check_names_differ(people)
    if test_fraction == 1:
        return Split([], [], people, test_alone=True)
    given = {"train": train_names, "validation": validation_names, "test": test_names}
    lists = {side: path for side, path in given.items() if path is not None}
    if any(person.split for person in people):
        return _split_by_source(people, lists)

    sides = _split_by_lists(people, lists)
    placed = {person.name for side in sides.values() for person in side}
    rest = [person for person in people if person.name not in placed]
    if "train" in sides and "test" in sides:
        if rest:
            logger.info("left out %d people who are on no list: %s", len(rest), shorten(p.name for p in rest))
    elif "train" in sides:
        sides["test"] = rest
    elif "test" in sides:
        sides["train"] = rest
    else:
        sides["train"], sides["test"] = _draw_share(rest, "test_fraction", test_fraction, seed)
    if "validation" not in sides and sides["train"]:
        drawn = _draw_share(sides["train"], "validation_fraction", validation_fraction, seed)
        sides["train"], sides["validation"] = drawn
    return Split(sides["train"], sides.get("validation", []), sides["test"])


def _split_by_source(people: Sequence[Person], lists: Mapping[str, str]) -> Split:
    if lists:
        raise DataError(f"the source fixes its own split: remove {', '.join(f'{side}_names' for side in lists)}")
    if unknown := [f"{person.name}: {person.split}" for person in people if person.split not in SIDES]:
        raise DataError(
            f"the source fixes the split of some people only ({shorten(unknown)}): give everyone one of "
            f"{', '.join(SIDES)}, or nobody"
        )
    train, validation, test = ([person for person in people if person.split == side] for side in SIDES)
    return Split(train, validation, test)


def _split_by_lists(people: Sequence[Person], lists: Mapping[str, str]) -> dict[str, list[Person]]:
    """Find the people whom each side's list names."""
    known = {normalise_name(person.name) for person in people}
    sides: dict[str, list[Person]] = {}
    list_of: dict[str, str] = {}  # by name
    for side, path in lists.items():
        names, whole_data_set = read_names(Path(path).expanduser())
        absent = sorted(names - known)
        if whole_data_set:  # LFW's lists name everyone, and most have too few photos to take part
            logger.info("%s: %d of %d names are not among the %d people", path, len(absent), len(names), len(people))
        elif absent:
            raise DataError(
                f"{path} names {shorten(absent)}, not among the {len(people)} people: correct the name, or, "
                "if min_photos or max_people left the person out, change that or delete the line"
            )
        for name in sorted(names):
            if name in list_of:
                raise DataError(f"{name} is in both {list_of[name]} and {path}: delete one of the two lines")
            list_of[name] = path
        sides[side] = [person for person in people if normalise_name(person.name) in names]
    return sides


def _draw_share(people: list[Person], name: str, fraction: float, seed: int) -> tuple[list[Person], list[Person]]:
    """Draw a `fraction` of people by seed; return those who stay and those who were drawn."""
    from sklearn.model_selection import train_test_split

    if len(people) < 2:
        raise DataError(
            f"{len(people)} people cannot be divided by {name} = {fraction:.3g}: add people, raise max_people, or "
            "lower min_photos"
        )
    try:
        stay, drawn = train_test_split(range(len(people)), test_size=fraction, random_state=seed)
    except ValueError as error:
        raise DataError(f"{name} = {fraction:.3g} of {len(people)} people leaves a side empty: lower it") from error
    return [people[i] for i in sorted(stay)], [people[i] for i in sorted(drawn)]


def read_names(path: Path) -> tuple[set[str], bool]:
    """Return the names in a list, and whether it is one of LFW's, which name the whole data set.

    LFW's begin with the number of rows, each `name<TAB>number of photos`.
    """
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not lines:
        raise DataError(f"list of names {path} is empty: write one name a line")
    if not (lines[0].isdecimal() and len(lines) > 1 and "\t" in lines[1]):
        return {normalise_name(line) for line in lines}, False
    if int(lines[0]) != len(lines) - 1:
        raise DataError(f"list of names {path} announces {lines[0]} people and has {len(lines) - 1}: fetch it again")
    return {normalise_name(line.split("\t")[0].strip()) for line in lines[1:]}, True
