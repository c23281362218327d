"""Several methods' tests in one folder, read and checked.

The folder has a plan.json, which names the rows, and each row's tests in `<key>/<version>/test/`, one a training seed,
as `ScoreTest` writes them. Rows of other people, photos, prompts, seeds, sizes or extractors than the first's are
refused.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from lit_multiip.comparison.plan import Contrast
from lit_multiip.comparison.rows import ComparedRow, Comparison, ComparisonError, TestResult
from lit_multiip.comparison.steps import read_stamp
from lit_multiip.evaluation.results import read_features
from lit_multiip.evaluation.summaries import ImageSet

PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"


def load_comparison(folder: Path) -> Comparison:
    """Read a folder with a plan.json and the tests that it names.

    Raises:
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
        rows.append(ComparedRow(**own, paper=entry.get("paper"), tests=tests, missing=missing))
    rows.sort(key=lambda row: row.group != "paper")
    contrasts = [Contrast(c["title"], (c["minus"][0], c["minus"][1]), c.get("text", "")) for c in plan["contrasts"]]
    comparison = Comparison(folder, plan["title"], plan["reference"], rows, contrasts)
    if not problems and not comparison.present:
        raise FileNotFoundError(f"no row of '{folder / 'plan.json'}' was tested yet: run its tests first")
    if not problems:
        problems = _find_mismatches(comparison)
    if problems:
        raise ComparisonError("; ".join(problems))
    return comparison


def _read_plan(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"'{path.parent}' has no plan.json: give a folder that `compare` wrote")
    try:
        plan: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        keys = [row["key"] for row in plan["rows"]]
        for row in plan["rows"]:
            if lacking := sorted({"title", "group", "trained", "versions"} - row.keys()):
                raise KeyError(f"{', '.join(lacking)} of {row['key']}")
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


def _read_test(folder: Path) -> TestResult:
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
    trained_by = read_stamp(folder.parent / "fit.json").get("commit")
    return TestResult(folder, metrics, lines, images, held_out, trained_by)


def _find_mismatches(comparison: Comparison) -> list[str]:
    """Say in what tests are not like the first, a message each."""
    first = comparison.first
    problems = []
    for test in (test for row in comparison.present for test in row.tests[0 if row.tests[0] is not first else 1 :]):
        names = f"'{first.folder}' and '{test.folder}'"
        facts: list[tuple[str, Callable[[TestResult], Any], str]] = [
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
                if not _are_close(first.held_out[name], test.held_out[name]):
                    problems.append(
                        f"{names} have different features of the same held-out photos by extractor {name!r}: its "
                        "weights are not the same; test both with one"
                    )
    return problems


def _extractor_facts(test: TestResult) -> dict[str, dict[str, Any]]:
    """Return facts of a test's extractors; a folder of weights counts by its name, its content by the features."""
    return {
        name: {key: Path(value).name if key == "source" and value else value for key, value in facts.items()}
        for name, facts in test.metrics["extractors"].items()
    }


def _are_close(a: ImageSet, b: ImageSet) -> bool:
    if a.features is None or b.features is None:
        return a.features is b.features
    x, y = np.asarray(a.features, dtype=np.float64), np.asarray(b.features, dtype=np.float64)
    return x.shape == y.shape and bool(np.linalg.norm(x - y) <= 0.01 * np.linalg.norm(x))
