"""Several methods' tests in one folder, read and checked, and their scores side by side with paired differences.

The folder has a plan.json, which names the rows, and each row's tests in `<key>/<version>/test/`, one a training seed,
as `ScoreTest` writes them. Rows of other people, photos, prompts, seeds, sizes or extractors than the first's are
refused.
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from lit_multiip.evaluation.intervals import Score
from lit_multiip.evaluation.results import TITLES, read_features
from lit_multiip.evaluation.scores import ImageSet, summarise, summarise_difference, values_of_each
from lit_multiip.files import LitMultiIPError

logger = logging.getLogger(__name__)

OF_A_METHOD = ("no_references", "zero_embedding", "other_person")  # anchors that are drawn by the method itself
PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
Scores = dict[str, Score]


class ComparisonError(LitMultiIPError):
    """Tests that cannot stand in one table, or a file that cannot be read; the message names it and the remedy."""


@dataclass(frozen=True)
class Test:
    """What `test` wrote of one training of a row."""

    folder: Path
    metrics: dict[str, Any]
    lines: list[dict[str, str]]  # of scores.csv, the method's own, a task each
    images: dict[str, ImageSet]  # by extractor
    held_out: dict[str, ImageSet]  # real photos, by extractor

    @property
    def tasks(self) -> list[tuple[str, str, str]]:
        """Person, held-out photo and noise seed of each image."""
        return [(line["person"], line["held_out"], line["seed"]) for line in self.lines]


@dataclass(frozen=True)
class Row:
    """A line of the table: a method, trained once or with several seeds, or not at all."""

    key: str
    title: str
    group: str  # `paper` or `control`
    trained: bool  # by `fit`, or tuned a person
    paper: dict[str, float] | None  # the paper's own figures, `is` and `fid`
    tests: list[Test]
    missing: list[str]  # versions that are planned and not there


@dataclass(frozen=True)
class Contrast:
    """Two rows whose difference is one cause: the first minus the second."""

    title: str
    minus: tuple[str, str]
    text: str


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
    rows: list[Row]
    contrasts: list[Contrast]
    left_out: dict[str, dict[str, str]] = field(default_factory=dict)  # reasons, by row and score

    @cached_property
    def present(self) -> list[Row]:
        """Rows of which at least one test is there."""
        return [row for row in self.rows if row.tests]

    @property
    def first(self) -> Test:
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

    def row(self, key: str) -> Row:
        """The row of a key."""
        return next(row for row in self.rows if row.key == key)

    def sets(self, row: Row, extractor: str) -> list[ImageSet]:
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
            scores: Scores = {}
            for name, real in self.first.held_out.items():
                sets = self.sets(self.row(a), name), self.sets(self.row(b), name)
                scores |= summarise_difference(name, *sets, real, left_out={})
            self._differences[a, b] = scores
        return self._differences[a, b]

    @cached_property
    def _differences(self) -> dict[tuple[str, str], Scores]:
        return {}

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
        """Scores that any row has by an extractor, without its name: those of TITLES first, in that order."""
        everyone: list[Iterable[str]] = [*self.scores.values(), *self.left_out.values()]
        present = {
            key.removesuffix(f"/{extractor}") for row in everyone for key in row if key.endswith(f"/{extractor}")
        }
        return [name for name in TITLES if name in present] + sorted(present - TITLES.keys())

    def costs(self, row: Row) -> dict[str, float | None]:
        """Seconds to personalise (a person) and per image, and numbers of parameters that were trained; None: unknown.

        `seconds.personalise` of a test is of all its people, and not part of `seconds.method`.
        """
        if not row.tests:
            return dict.fromkeys(("personalise", "image", "parameters"))
        seconds = [test.metrics["seconds"] for test in row.tests]
        tuning = [float(s["personalise"]) for s in seconds if s.get("personalise") is not None]
        facts = row.tests[0].metrics["describe"]
        described, tuned = facts.get("trained_parameters"), row.trained or facts.get("per_person", False)
        return {
            "personalise": float(np.mean(tuning)) / self.protocol["people"] if tuning else None,
            "image": float(np.mean([s["method"] for s in seconds])) / self.protocol["tasks"],
            "parameters": (described if described is None else float(described)) if tuned else 0.0,
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
                why = "face not found in" if key.startswith(("identity", "nearest_reference")) else "undefined for"
                if missing < images:
                    alike.setdefault(f"{why} {missing} of {images} images, which are not in the mean", []).append(key)
            notes += [f"{row.title}: {', '.join(keys)}: {what}." for what, keys in alike.items()]
        for what, values in self._differing().items():
            notes.append(f"Rows differ in their {what}: {'; '.join(values)}.")
        for name, facts in self.extractors.items():
            width = facts.get("num_features")
            if width and self.protocol["tasks"] <= width:
                notes.append(
                    f"FID by {name}: {self.protocol['tasks']} images in {width} dimensions, so that most of it is the "
                    "bias of few images; it ranks rows at this N at best, and KID says more."
                )
        return notes

    def _differing(self) -> dict[str, list[str]]:
        """Facts in which rows differ and need not, as `value (rows)`."""
        facts: dict[str, Callable[[Test], Any]] = {
            "backbone": lambda test: Path(str(test.metrics["describe"].get("backbone"))).name,
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
                    if isinstance(value, Mapping):
                        value = ", ".join(f"{k} {v}" for k, v in value.items())
                    of = titles.setdefault(str(value), [])
                    of += [row.title] if row.title not in of else []
            if len(titles) > 1:
                differing[what] = [f"{value} ({', '.join(of)})" for value, of in titles.items()]
        return differing


def load_comparison(folder: Path) -> Comparison:
    """Read a folder with a plan.json and the tests that it names.

    Raises:
        FileNotFoundError: there is no plan, or no test of it is there yet.
        ComparisonError: the plan or a test cannot be read, or tests are not alike; every such file is named.
    """
    plan = _read_plan(folder / "plan.json")
    problems: list[str] = []
    rows = []
    for entry in plan["rows"]:
        tests, missing = [], []
        for version in entry["versions"]:
            place = folder / entry["key"] / version / "test"
            if not (place / "metrics.json").exists():  # it is written last
                missing.append(version)
                continue
            try:
                tests.append(_read_test(place))
            except ComparisonError as error:
                problems.append(str(error))
        own = {name: entry[name] for name in ("key", "title", "group", "trained")}
        rows.append(Row(**own, paper=entry.get("paper"), tests=tests, missing=missing))
    rows.sort(key=lambda row: row.group != "paper")
    contrasts = [Contrast(c["title"], (c["minus"][0], c["minus"][1]), c.get("text", "")) for c in plan["contrasts"]]
    comparison = Comparison(folder, plan["title"], plan["reference"], rows, contrasts)
    if not problems and not comparison.present:
        raise FileNotFoundError(f"no row of '{folder / 'plan.json'}' was tested yet: run its tests first")
    if not problems:
        problems = _unlike(comparison)
    if problems:
        raise ComparisonError("; ".join(problems))
    return comparison


def _read_plan(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"'{path.parent}' has no plan.json: give a folder that `compare` wrote")
    try:
        plan: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        plan.setdefault("contrasts", [])
        keys = [row["key"] for row in plan["rows"]]
        for row in plan["rows"]:
            row.setdefault("group", "paper")
            row.setdefault("trained", False)
            if not {"title", "versions"} <= row.keys():
                raise KeyError("title or versions of " + row["key"])
        named = {plan["reference"]} | {key for contrast in plan["contrasts"] for key in contrast["minus"]}
        plan["title"], [contrast["title"] for contrast in plan["contrasts"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ComparisonError(f"'{path}' is cut off or no plan ({error!r}): run `compare` again") from error
    if len(set(keys)) < len(keys) or not named <= set(keys):
        unknown = sorted(named - set(keys)) or sorted({key for key in keys if keys.count(key) > 1})
        raise ComparisonError(
            f"'{path}' names rows that are not in it, or twice: {', '.join(unknown)}; rows are {keys}"
        )
    return plan


def _read_test(folder: Path) -> Test:
    """Read one test, every file to its end.

    Raises:
        ComparisonError: a file is missing or cut off.
    """
    again = f"delete '{folder}' and run this test again"

    def cut_off(name: str, reason: object) -> ComparisonError:
        return ComparisonError(f"'{folder / name}' is missing or cut off ({reason}): {again}")

    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        method, tasks = metrics["describe"]["method"], metrics["protocol"]["tasks"]
        extractors = list(metrics["extractors"])
        metrics["protocol"]["sha256"], metrics["rows"][method], metrics["seconds"]["method"]
    except (ValueError, KeyError, TypeError) as error:
        raise cut_off("metrics.json", repr(error)) from error
    try:
        text = (folder / "scores.csv").read_text(encoding="utf-8")
        lines = [line for line in csv.DictReader(text.splitlines()) if line.get("row") == method]
        whole = text.endswith("\n") and not any(None in line.values() for line in lines)
    except (OSError, ValueError, csv.Error) as error:
        raise cut_off("scores.csv", error) from error
    if not whole or len(lines) != tasks or not {"person", "held_out", "seed", "image"} <= lines[0].keys():
        raise cut_off("scores.csv", f"{len(lines)} whole lines of {method} for {tasks} tasks")
    images, held_out = {}, {}
    for name in extractors:
        file = f"features_{name}.safetensors"
        try:
            images[name], held_out[name] = read_features(folder / file)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise cut_off(file, error) from error
        if len(images[name].people) != tasks:
            raise cut_off(file, f"{len(images[name].people)} images for {tasks} tasks")
    for line in lines:
        try:
            with (folder / line["image"]).open("rb") as file_:
                file_.seek(-len(PNG_END), 2)
                if file_.read() != PNG_END:
                    raise OSError("a PNG without its end")
        except OSError as error:
            raise cut_off(line["image"], error) from error
    return Test(folder, metrics, lines, images, held_out)


def _unlike(comparison: Comparison) -> list[str]:
    """In what tests are not like the first, a message each."""
    first = comparison.first
    problems = []
    for test in (test for row in comparison.present for test in row.tests[0 if row.tests[0] is not first else 1 :]):
        names = f"'{first.folder}' and '{test.folder}'"
        facts: list[tuple[str, Callable[[Test], Any], str]] = [
            ("protocols", lambda t: t.metrics["protocol"], "the same people, photos, prompts and seeds"),
            ("image sizes", lambda t: t.metrics["describe"].get("image_side"), "one image_side"),
            ("extractors", _extractor_facts, "the same extractors (score.extractors)"),
            ("orders of tasks", lambda t: t.tasks, "this version of the program"),
        ]
        for what, fact, remedy in facts:
            if (a := fact(first)) != (b := fact(test)):
                values = "" if what == "orders of tasks" else f", {a} and {b}"
                problems.append(f"{names} are of different {what}{values}: test both with {remedy}")
                break
        else:
            for name in first.images:
                if not _close(first.held_out[name], test.held_out[name]):
                    problems.append(
                        f"{names} have different features of the same held-out photos by extractor {name!r}: its "
                        "weights are not the same; test both with one"
                    )
    return problems


def short_commit(commit: str | None) -> str:
    """The first 12 digits of a commit, with `-dirty` where files differ from it."""
    return "unknown" if not commit else commit[:12] + ("-dirty" if commit.endswith("-dirty") else "")


def _extractor_facts(test: Test) -> dict[str, dict[str, Any]]:
    """Facts of a test's extractors; a folder of weights counts by its name, their content is compared by features."""
    return {
        name: {key: Path(value).name if key == "source" and value else value for key, value in facts.items()}
        for name, facts in test.metrics["extractors"].items()
    }


def _close(a: ImageSet, b: ImageSet) -> bool:
    if a.features is None or b.features is None:
        return a.features is b.features
    x, y = np.asarray(a.features, dtype=np.float64), np.asarray(b.features, dtype=np.float64)
    return x.shape == y.shape and bool(np.linalg.norm(x - y) <= 0.01 * np.linalg.norm(x))


def leader(comparison: Comparison, key: str, rows: Sequence[Row]) -> tuple[Row, Row | None, Score | None] | None:
    """Who leads a score among some rows, by point estimate, the runner-up, and their paired difference.

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


def clear(score: Score | None) -> bool:
    """Whether an interval does not hold zero."""
    return score is not None and score.low is not None and score.high is not None and score.low * score.high > 0


def verdict(score: Score, title: str) -> str:
    """Whether a difference is `clear` of zero, for `better` or `worse` by the arrow of its title, or is `unclear`."""
    if not clear(score):
        return "unclear"
    if title[-1:] not in ("↑", "↓"):
        return "clear"
    return "better" if (score.value > 0) == title.endswith("↑") else "worse"


def best(comparison: Comparison, extractor: str) -> set[tuple[str, str]]:
    """Which cells are marked as best, (row, score).

    The best of a group (the paper's methods; the controls) by point estimate, and only where the 95% interval of its
    paired difference to the runner-up is clear of zero.
    """
    marked = set()
    for group in dict.fromkeys(row.group for row in comparison.rows):
        rows = [row for row in comparison.rows if row.group == group]
        for column in comparison.columns(extractor):
            found = leader(comparison, f"{column}/{extractor}", rows)
            if found is not None and clear(found[2]):
                marked.add((found[0].key, f"{column}/{extractor}"))
    return marked
