"""Rows of a comparison that were tested alike: their scores side by side, paired differences, and who leads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lit_multiip.comparison.plan import Contrast
from lit_multiip.evaluation.intervals import Score
from lit_multiip.evaluation.results import TITLES, order_scores
from lit_multiip.evaluation.summaries import ImageSet, summarise, summarise_difference, values_of_each
from lit_multiip.files import LitMultiIPError

OF_A_METHOD = ("no_references", "zero_embedding", "other_person")  # anchors that are drawn by the method itself
Scores = dict[str, Score]


class ComparisonError(LitMultiIPError):
    """Tests that cannot stand in one table, or a file that cannot be read; the message names it and the remedy."""


@dataclass(frozen=True)
class TestResult:
    """What `test` wrote of one training of a row."""

    folder: Path
    metrics: dict[str, Any]
    lines: list[dict[str, str]]  # of scores.csv, the method's own, a task each
    images: dict[str, ImageSet]  # by extractor
    held_out: dict[str, ImageSet]  # real photos, by extractor
    fit_commit: str | None = None  # by which `compare` trained what is tested

    @property
    def tasks(self) -> list[tuple[str, str, str]]:
        """Person, held-out photo and noise seed of each image."""
        return [(line["person"], line["held_out"], line["seed"]) for line in self.lines]


@dataclass(frozen=True)
class ComparedRow:
    """A line of the table: a method, trained once or with several seeds, or not at all."""

    key: str
    title: str
    group: str  # `paper` or `control`
    trained: bool  # by `fit`, or tuned a person
    paper: dict[str, float] | None  # the paper's own figures, `is` and `fid`
    tests: list[TestResult]  # one a training
    missing: list[str]  # versions that are planned and not there

    @property
    def drawn_elsewhere(self) -> bool:
        """Whether another program drew its images."""
        return any("images" in test.metrics["describe"] for test in self.tests)


@dataclass(frozen=True)
class Anchor:
    """A row by which scores can be read."""

    title: str
    scores: Scores


@dataclass
class Comparison:
    """Rows that were tested alike. Scores are made of the stored features, and remembered."""

    folder: Path
    title: str
    reference: str
    rows: list[ComparedRow]
    contrasts: list[Contrast]
    left_out: dict[str, dict[str, str]] = field(default_factory=dict)  # reasons, by row and score
    _differences: dict[tuple[str, str], Scores] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def present(self) -> list[ComparedRow]:
        """Rows of which at least one test is there."""
        return [row for row in self.rows if row.tests]

    @property
    def first(self) -> TestResult:
        """The test to which all others are alike."""
        return self.present[0].tests[0]

    @property
    def protocol(self) -> dict[str, Any]:
        """Counts and fingerprint that all tests share."""
        return dict(self.first.metrics["protocol"])

    @property
    def extractors(self) -> dict[str, dict[str, Any]]:
        """Facts of the extractors that all tests share, by name."""
        return dict(self.first.metrics["extractors"])

    def row(self, key: str) -> ComparedRow:
        """The row of a key."""
        return next(row for row in self.rows if row.key == key)

    def sets(self, row: ComparedRow, extractor: str) -> list[ImageSet]:
        """A row's images, a set a training."""
        return [test.images[extractor] for test in row.tests]

    @cached_property
    def scores(self) -> dict[str, Scores]:
        """Each present row's scores, means over its trainings, with intervals by person; `left_out` says what lacks."""
        found: dict[str, Scores] = {}
        for row in self.present:
            reasons = self.left_out.setdefault(row.key, {})
            found[row.key] = {}
            for name in self.extractors:
                sets, real = self.sets(row, name), self.first.held_out[name]
                found[row.key] |= summarise(name, sets, real, left_out=reasons)
        for key in {key for scores in found.values() for key in scores}:
            for row in self.present:
                if key not in found[row.key]:
                    self.left_out[row.key].setdefault(key, "its test did not write it")
        return found

    @cached_property
    def of_each(self) -> dict[str, dict[str, list[float]]]:
        """Each present row's scores, of every training alone."""
        return {
            row.key: {
                key: values
                for name in self.extractors
                for key, values in values_of_each(name, self.sets(row, name), self.first.held_out[name]).items()
            }
            for row in self.present
        }

    def difference(self, a: str, b: str) -> Scores:
        """Paired differences of two present rows, a - b, means over the trainings of each."""
        if (a, b) not in self._differences:
            scores = self._differences[a, b] = {}
            for name, real in self.first.held_out.items():
                sets = self.sets(self.row(a), name), self.sets(self.row(b), name)
                scores |= summarise_difference(name, *sets, real)
        return self._differences[a, b]

    @cached_property
    def undefined(self) -> dict[str, dict[str, tuple[int, int]]]:
        """How many of how many images have no score, by row and score: such as a face that was not found."""
        found: dict[str, dict[str, tuple[int, int]]] = {}
        for row in self.present:
            counts: dict[str, tuple[int, int]] = {}
            for name in self.extractors:
                sets = self.sets(row, name)
                for score in dict.fromkeys(score for images in sets for score in images.per_image):
                    values = np.concatenate([s.per_image[score] for s in sets if score in s.per_image])
                    if np.isnan(values).any():
                        counts[f"{score}/{name}"] = (int(np.isnan(values).sum()), len(values))
            found[row.key] = counts
        return found

    @cached_property
    def anchors(self) -> list[Anchor]:
        """Anchor rows of the reference row's first test that has any, else of the first row's that has."""
        rows = sorted(self.present, key=lambda row: row.key != self.reference)
        for title, test in [(row.title, test) for row in rows for test in row.tests]:
            method = test.metrics["describe"]["method"]
            others = {name: scores for name, scores in test.metrics["rows"].items() if name != method}
            if others:
                return [
                    Anchor(
                        name.replace("_", " ").replace("vae", "VAE") + (f" ({title})" if name in OF_A_METHOD else ""),
                        {key: Score(**score) for key, score in scores.items() if score["value"] is not None},
                    )
                    for name, scores in others.items()
                ]
        return []

    def columns(self, extractor: str) -> list[str]:
        """Scores that any row has, or lacks for a reason, by an extractor; see `order_scores`."""
        return order_scores([*self.scores.values(), *self.left_out.values()], extractor)

    def costs(self, row: ComparedRow) -> dict[str, float | None]:
        """Seconds to personalise (a person) and per image, and numbers of parameters that were trained; None: unknown.

        `seconds.personalise` of a test is of all its people, and not part of `seconds.method`.
        """
        if not row.tests:
            return dict.fromkeys(("personalise", "image", "parameters"))
        seconds = [test.metrics["seconds"] for test in row.tests]
        tuning = [float(s["personalise"]) for s in seconds if s.get("personalise") is not None]
        drawing = [float(s["method"]) for s in seconds if s["method"] is not None]
        facts = row.tests[0].metrics["describe"]
        described, tuned = facts.get("trained_parameters"), row.trained or facts.get("per_person", False)
        return {
            "personalise": float(np.mean(tuning)) / self.protocol["people"] if tuning else None,
            "image": float(np.mean(drawing)) / self.protocol["tasks"] if drawing else None,
            "parameters": None if described is None else float(described) if tuned else 0.0,
        }

    def notes(self) -> list[str]:
        """What a reader must know of these rows: what is not there, what was left out, in what they differ."""
        assert self.scores  # they say what was left out
        notes = []
        for row in self.rows:
            if not row.tests:
                notes.append(f"{row.title}: not run yet.")
            elif row.missing:
                done = f"{len(row.tests)} of {len(row.tests) + len(row.missing)} planned trainings"
                notes.append(f"{row.title}: {done}; not run yet: {', '.join(row.missing)}.")
        for row in self.present:
            for key, reason in self.left_out.get(row.key, {}).items():
                notes.append(f"{row.title}: {key} is left out: {reason}.")
            alike: dict[str, list[str]] = {}
            for key, (missing, images) in self.undefined[row.key].items():
                of_faces = key.startswith(("identity", "nearest_reference", "copy_paste"))
                why = "face not found in" if of_faces else "undefined for"
                if missing < images:
                    alike.setdefault(f"{why} {missing} of {images} images, which are not in the mean", []).append(key)
            notes += [f"{row.title}: {', '.join(keys)}: {what}." for what, keys in alike.items()]
            if row.drawn_elsewhere:
                notes.append(f"{row.title}: drawn by another program; how, and what it was trained on, is not known.")
            trained = dict.fromkeys((test.fit_commit, test.metrics.get("commit")) for test in row.tests)
            for fitted, tested in trained:
                if fitted is not None and fitted != tested:
                    by = f"trained by commit {short_commit(fitted)} and tested by {short_commit(tested)}"
                    notes.append(f"{row.title}: {by} of this package.")
        for what, values in self._varying_facts().items():
            notes.append(f"Rows differ in their {what}: {'; '.join(values)}.")
        for name, facts in self.extractors.items():
            width = facts.get("num_features")
            if width and self.protocol["tasks"] <= width:
                notes.append(
                    f"FID by {name}: {self.protocol['tasks']} images in {width} dimensions, so that most of it is the "
                    "bias of few images; it ranks rows at this N at best, and KID says more."
                )
        return notes

    def _varying_facts(self) -> dict[str, list[str]]:
        """Facts in which rows differ and need not, as `value (rows)`."""
        facts: dict[str, Callable[[TestResult], Any]] = {
            "backbone": lambda test: _name_of(test.metrics["describe"].get("backbone")),
            "sampling": lambda test: test.metrics["describe"].get("sampling"),
            "commit": lambda test: short_commit(test.metrics.get("commit")),
            "package versions": lambda test: test.metrics.get("versions"),
        }
        differing = {}
        for what, fact in facts.items():
            titles: dict[str, list[str]] = {}
            for row in self.present:
                for test in row.tests:
                    value = fact(test)
                    if value is None and row.drawn_elsewhere:
                        continue
                    if isinstance(value, Mapping):
                        value = ", ".join(f"{k} {v}" for k, v in value.items())
                    of = titles.setdefault(str(value), [])
                    of += [row.title] if row.title not in of else []
            if len(titles) > 1:
                differing[what] = [f"{value} ({', '.join(of)})" for value, of in titles.items()]
        return differing


def _name_of(path: str | None) -> str | None:
    return None if path is None else Path(path).name


def short_commit(commit: str | None) -> str:
    """Return the first 12 digits of a commit, with `-dirty` where files differ from it."""
    return "unknown" if not commit else commit[:12] + ("-dirty" if commit.endswith("-dirty") else "")


def find_leader(
    comparison: Comparison, key: str, rows: Sequence[ComparedRow]
) -> tuple[ComparedRow, ComparedRow | None, Score | None] | None:
    """Return who leads a score among some rows by point estimate, the runner-up, and their paired difference.

    Returns:
        None where the score has no better side, or no row has it.
    """
    title = TITLES.get(key.rpartition("/")[0], "")
    have = [row for row in rows if row.tests and key in comparison.scores[row.key]]
    if not have or title[-1:] not in ("↑", "↓"):
        return None
    ranked = sorted(have, key=lambda row: comparison.scores[row.key][key].value, reverse=title.endswith("↑"))
    if len(ranked) < 2:
        return ranked[0], None, None
    return ranked[0], ranked[1], comparison.difference(ranked[0].key, ranked[1].key).get(key)


def is_clear(score: Score | None) -> bool:
    """Return whether an interval does not hold zero."""
    return score is not None and score.low is not None and score.high is not None and score.low * score.high > 0


def judge_difference(score: Score, title: str) -> str:
    """Return `better` or `worse`, by the arrow of its title, for a difference that is clear of zero, else `unclear`."""
    if not is_clear(score):
        return "unclear"
    return "better" if (score.value > 0) == title.endswith("↑") else "worse"


def best_cells(comparison: Comparison, extractor: str) -> set[tuple[str, str]]:
    """Return the cells that are marked as best, (row, score).

    That is the best of a group (the paper's methods; the controls) by point estimate, where the 95% interval of its
    paired difference to the runner-up is clear of zero.
    """
    marked = set()
    for group in dict.fromkeys(row.group for row in comparison.rows):
        rows = [row for row in comparison.rows if row.group == group]
        for column in comparison.columns(extractor):
            found = find_leader(comparison, f"{column}/{extractor}", rows)
            if found is not None and is_clear(found[2]):
                marked.add((found[0].key, f"{column}/{extractor}"))
    return marked
