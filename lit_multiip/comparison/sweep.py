"""`python -m lit_multiip sweep`: how the rows of a comparison depend on what they are drawn with and trained on.

A sweep changes rows of a comparison's plan and gives them grids. Every combination is scored on VALIDATION people,
except where a part says otherwise; a combination that two parts have is scored once. Of the part `settings` identity
against prompt agreement is a plane, and the settings that no other one beats in both are a row's Pareto front. Then
every row is tested on the TEST people with the setting that suits it best on validation people, all by one rule
(`best_setting`): a comparison of its own, with its report.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse.typing import PositiveInt
from matplotlib.figure import Figure

from lit_multiip.comparison import figures
from lit_multiip.comparison.compare import Inputs, compare, make_steps, print_steps
from lit_multiip.comparison.plan import CompareError, Plan, Row, describe_setting, expand_grid, read_plan
from lit_multiip.comparison.steps import Step, run_steps
from lit_multiip.evaluation.results import TITLES, cell, markdown, write_csv

IDENTITY, PROMPT = "identity_held_out", "prompt"
SHOWN = (IDENTITY, PROMPT, "fid", "diversity")
SETTINGS = "settings"  # the part that the best settings are chosen from


class Point(NamedTuple):
    """One test of the sweep.

    Args:
        part: of the report.
        row: of the plan.
        setting: the options of the row's grid.
        side: whose photos are scored, validation or train.
        folder: that `test` writes.
    """

    part: str
    row: str
    setting: dict[str, Any]
    side: str
    folder: Path


def sweep(
    plan: str,
    parts: dict[str, dict[str, dict[str, Any]]],
    tested_people: int = 25,
    prompt_tolerance: float = 0.01,
    output: str = "runs/sweep/mini",
    processes: PositiveInt = 1,
    dry_run: bool = False,
) -> None:
    """Score rows of a comparison over grids of their options, and test the best settings on test people.

    Args:
        plan: config of the comparison that the rows are from; `compare` must have trained those that it trains.
        parts: by part of the report and row of the plan, what is changed of the row, its grid above all. The part
            `settings` is what the best settings are chosen from.
        tested_people: of the validation people (or training people) each point scores at most so many.
        prompt_tolerance: of `best_setting`.
        output: the folder to write; finished tests in it are kept.
        processes: steps at a time, each with its share of the CPU cores and a log in its run's folder.
        dry_run: print the commands, and run none.
    """
    folder, whole = Path(output), read_trained_plan(plan)
    points, steps = make_points(whole, parts, tested_people, folder)
    if dry_run:
        print_steps(steps)
        return
    run_steps(steps, processes)
    records = [read_record(point) for point in points]
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "sweep.csv", [_as_csv_row(record) for record in records])
    settings = {
        row: [r for r in records if (r["part"], r["row"]) == (SETTINGS, row)] for row in parts.get(SETTINGS, {})
    }
    best = {row: best_setting(own, prompt_tolerance) for row, own in settings.items()}
    text = render(records, best, prompt_tolerance)
    (folder / "sweep.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\n{folder}", flush=True)
    if best:
        figures.save(draw_plane(whole, settings, best), folder / "plane")
        rows = {row: replace(whole.rows[row], options=whole.rows[row].options | best[row]) for row in best}
        compare(
            rows,
            reference=whole.reference if whole.reference in rows else next(iter(rows)),
            title=f"{whole.title}, each at the setting that suits it best on validation people",
            configs=list(whole.configs),
            options=dict(whole.options),
            seeds=list(whole.seeds[:1]),
            variables=dict(whole.variables),
            output=str(folder / "best"),
            processes=processes,
        )


def read_trained_plan(path: str) -> Plan:
    """Read a comparison's config; rows that it trains are the runs that `compare` left for the first seed."""
    plan = read_plan(path)
    plan.check()
    for key, row in plan.rows.items():
        if row.fit and row.run is None:
            plan.rows[key] = replace(row, run=str(Path(plan.output) / key / f"version_{plan.seeds[0]}"))
    return plan


def make_points(
    plan: Plan, parts: Mapping[str, Mapping[str, Mapping[str, Any]]], tested_people: int, folder: Path
) -> tuple[list[Point], list[Step]]:
    """Return the tests of a sweep, and the steps that make them: one where several tests are alike."""
    rows: dict[str, Row] = {}
    origin: dict[str, tuple[str, str, dict[str, Any], str]] = {}
    for part, changed in parts.items():
        for name, changes in changed.items():
            if name not in plan.rows:
                raise CompareError(f"there is no row '{name}', which {part} names: the plan has {', '.join(plan.rows)}")
            if plan.rows[name].images is not None:
                raise CompareError(
                    f"no setting changes the images of row '{name}', drawn elsewhere: leave it out of {part}"
                )
            try:
                row = replace(plan.rows[name], **changes)
            except TypeError as error:
                raise CompareError(
                    f"row '{name}' of {part} cannot be changed so ({error}): see a row of a plan"
                ) from error
            for key, single in expand_grid(f"{part}/{name}", row).items():
                setting = {option: single.options[option] for option in row.grid}
                rows[key] = single
                origin[key] = part, name, setting, row.test_options.get("data.tested", "validation")
    tested = {"data.tested": "validation", "data.tested_people": tested_people, "score.anchors": False}
    whole = replace(
        plan, rows=rows, seeds=plan.seeds[:1], test_options={**plan.test_options, **tested}, output=str(folder)
    )
    steps = make_steps(whole, Inputs())
    unique: dict[str, Step] = {}
    for step in steps:
        unique.setdefault(step.key, step)
    points = [Point(*origin[s.row], unique[s.key].run / "test") for s in steps if s.command == "test"]
    return points, list(unique.values())


def best_setting(records: Sequence[Mapping[str, Any]], prompt_tolerance: float) -> dict[str, Any]:
    """Choose the setting of highest identity whose prompt agreement is at most the tolerance below the default's.

    Args:
        records: of one row; the first is that of its default setting.
        prompt_tolerance: in units of prompt agreement.
    """
    least = records[0]["scores"][PROMPT]["value"] - prompt_tolerance
    allowed = [record for record in records if record["scores"][PROMPT]["value"] >= least]
    return dict(max(allowed, key=lambda record: record["scores"][IDENTITY]["value"])["setting"])


def find_pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points that no other one equals or beats in both coordinates and beats in one."""

    def is_beaten(a: tuple[float, float]) -> bool:
        return any(b[0] >= a[0] and b[1] >= a[1] and b != a for b in points)

    return [i for i, point in enumerate(points) if not is_beaten(point)]


def draw_plane(
    plan: Plan, settings: Mapping[str, Sequence[Mapping[str, Any]]], best: Mapping[str, Mapping[str, Any]]
) -> Figure:
    """Draw the plane of identity and prompt agreement: each row's settings, its Pareto front and its chosen setting."""
    series = []
    for row, records in settings.items():
        points = [(r["scores"][PROMPT]["value"], r["scores"][IDENTITY]["value"]) for r in records]
        chosen = [record["setting"] for record in records].index(dict(best[row]))
        series.append(figures.Series(plan.rows[row].title, points, find_pareto_front(points), chosen))
    return figures.plane(
        series,
        "prompt agreement, higher is better",
        "identity to the held-out photo, higher is better",
        "Validation people: filled, on the row's Pareto front; ringed, chosen",
    )


def render(records: Sequence[Mapping[str, Any]], best: Mapping[str, Mapping[str, Any]], tolerance: float) -> str:
    """Write all points in Markdown, a table a part and row; `*` marks the Pareto front, `best` the chosen setting."""
    parts = ["Scored on validation people except where said. 95% intervals by person."]
    for (part, row), found in itertools.groupby(records, key=lambda record: (record["part"], record["row"])):
        group = list(found)
        columns = [score for score in SHOWN if all(score in record["scores"] for record in group)]
        places = [(r["scores"][IDENTITY]["value"], r["scores"][PROMPT]["value"]) for r in group]
        front = find_pareto_front(places) if part == SETTINGS else []
        body = []
        for i, record in enumerate(group):
            marks = ["*"] if i in front else []
            if part == SETTINGS and record["setting"] == best.get(row):
                marks.append("best")
            side = "" if record["side"] == "validation" else f", scored on {record['side']} people"
            scores = [cell(record["scores"][score]) for score in columns]
            body.append([describe_setting(record["setting"]) + side, " ".join(marks), *scores])
        header = [part, "", *(TITLES.get(score, score) for score in columns)]
        parts.append(f"### {row}: {part}\n\n{markdown([header, *body])}")
    parts.append(
        "`*`: on the Pareto front of identity and prompt agreement. `best`: the highest identity among the settings "
        f"whose prompt agreement is at most {tolerance} below that of the row's default, which stands first."
    )
    return "\n\n".join(parts) + "\n"


def read_record(point: Point) -> dict[str, Any]:
    """Read the scores of a point by its first extractor."""
    path = point.folder / "metrics.json"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        extractor = next(iter(metrics["extractors"]))
        scores = metrics["rows"][metrics["describe"]["method"]]
    except (OSError, ValueError, KeyError, StopIteration) as error:
        raise CompareError(f"'{path}' cannot be read ({error}): delete it and run sweep again") from error
    own = {key.removesuffix(f"/{extractor}"): v for key, v in scores.items() if key.endswith(f"/{extractor}")}
    return {"part": point.part, "row": point.row, "setting": point.setting, "side": point.side, "scores": own}


def _as_csv_row(record: Mapping[str, Any]) -> dict[str, Any]:
    line = {key: record[key] for key in ("part", "row", "side")} | record["setting"]
    for name, score in record["scores"].items():
        line |= {name: score["value"], f"{name} low": score["low"], f"{name} high": score["high"]}
    return line
