"""``python -m lit_multiip sweep``: how the rows of a comparison depend on what they are drawn with and trained on.

All is scored on VALIDATION people except where said, and each point is one ``test`` in a process of its own:

- **settings**: every combination of a row's grid, such as lambda x guidance. Identity against prompt agreement is a
  plane, and the settings that no other one beats in both are its Pareto front.
- **references**: the number of photos that condition.
- **people**: the number of training people, scored on validation and on training people, and the gap between them.

Then every row is tested on the TEST people with the setting that suits it best on validation people, all by one rule
(``best_setting``): a comparison of its own, with its report.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse.typing import PositiveInt
from PIL import Image

from lit_multiip.comparison.compare import CompareError, Row, combined_key, compare, make_steps
from lit_multiip.comparison.plane import Series, plane
from lit_multiip.comparison.steps import Step, run_steps
from lit_multiip.evaluation.results import TITLES, cell, markdown, write_csv

IDENTITY, PROMPT = "identity_held_out", "prompt"
SHOWN = (IDENTITY, PROMPT, "fid", "diversity")


@dataclass
class People:
    """The sweep over numbers of training people.

    Args:
        row: the row of the plan that is trained.
        counts: numbers of training people.
        options: of its fits and tests, such as ``trainer.max_steps``, and a source that has enough people.
    """

    row: str
    counts: list[int]
    options: dict[str, Any]


class Point(NamedTuple):
    """One test of the sweep."""

    part: str  # settings, references or people
    row: str
    setting: dict[str, Any]
    side: str  # whose photos are scored: validation or train
    folder: Path  # that ``test`` writes
    steps: list[Step]


def sweep(
    plan: str,
    grids: dict[str, dict[str, list[Any]]],
    references: dict[str, list[int]] | None = None,
    people: People | None = None,
    tested_people: int = 25,
    prompt_tolerance: float = 0.01,
    output: str = "runs/sweep/mini",
    processes: PositiveInt = 1,
    dry_run: bool = False,
) -> None:
    """Score rows of a comparison over settings, numbers of references and numbers of training people.

    Args:
        plan: config of the comparison that the rows are from; ``compare`` must have trained those that it trains.
        grids: by row, the values of every swept option of ``test``, the row's default first.
        references: by row, numbers of reference photos.
        people: numbers of training people.
        tested_people: of the validation people (or training people) each point scores at most so many.
        prompt_tolerance: of ``best_setting``.
        output: the folder to write; finished tests in it are kept.
        processes: steps at a time, each with its share of the CPU cores and a log in its run's folder.
        dry_run: print the points, and run none.
    """
    folder = Path(output)
    content, rows = read_plan(plan)
    _check_rows(rows, [*grids, *(references or {}), *([people.row] if people else [])], plan)
    options = {"data.tested": "validation", "data.tested_people": tested_people}
    points = list(_setting_points(rows, content, grids, options, folder))
    points += _reference_points(rows, content, references or {}, options, folder)
    points += _people_points(rows, content, people, options, folder) if people else []
    steps = [step for point in points for step in point.steps]
    if dry_run:
        for step in steps:
            print(f"{'done' if step.is_done() else 'to do'}: {step.command} {step.run}")
        return
    run_steps(steps, processes)
    records = [_record(point) for point in points]
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "sweep.csv", [_flat(record) for record in records])
    best = {row: best_setting([r for r in records if _is_setting(r, row)], prompt_tolerance) for row in grids}
    text = render(records, best, prompt_tolerance)
    (folder / "sweep.md").write_text(text, encoding="utf-8")
    identity_against_prompt(records, rows, best).save(folder / "plane.png")
    print(f"\n{text}\n{folder}", flush=True)

    at_best = {row: replace(rows[row], options=rows[row].options | setting) for row, setting in best.items()}
    compare(
        at_best,
        reference=content["reference"] if content["reference"] in at_best else next(iter(at_best)),
        title=f"{content.get('title', 'Methods')}, each at the setting that suits it best on validation people",
        configs=content.get("configs"),
        options=content.get("options"),
        seeds=content.get("seeds", [0])[:1],
        output=str(folder / "best"),
        processes=processes,
    )


def read_plan(path: str) -> tuple[dict[str, Any], dict[str, Row]]:
    """Read a comparison's config; its trained rows become the runs that ``compare`` left for the first seed.

    Raises:
        CompareError: it cannot be read.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        rows = {key: Row(**row) for key, row in content["rows"].items()}
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise CompareError(f"plan '{path}' is not the config of a comparison ({error}): see configs/plans") from error
    first = content.get("seeds", [0])[0]
    output = Path(content.get("output", "runs/compare/mini"))
    for key, row in rows.items():
        if row.fit and row.run is None:
            rows[key] = replace(row, run=str(output / key / f"version_{first}"))
    return content, rows


def best_setting(records: Sequence[Mapping[str, Any]], prompt_tolerance: float) -> dict[str, Any]:
    """Choose the setting of highest identity whose prompt agreement is at most the tolerance below the default's.

    Args:
        records: of one row; the first is that of its default setting.
        prompt_tolerance: in units of prompt agreement.
    """
    least = records[0]["scores"][PROMPT]["value"] - prompt_tolerance
    allowed = [record for record in records if record["scores"][PROMPT]["value"] >= least]
    return dict(max(allowed, key=lambda record: record["scores"][IDENTITY]["value"])["setting"])


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other one equals or beats in both coordinates and beats in one."""

    def beaten(a: tuple[float, float]) -> bool:
        return any(b[0] >= a[0] and b[1] >= a[1] and b != a for b in points)

    return [i for i, point in enumerate(points) if not beaten(point)]


def identity_against_prompt(
    records: Sequence[Mapping[str, Any]], rows: Mapping[str, Row], best: Mapping[str, Mapping[str, Any]]
) -> Image.Image:
    """The plane of identity and prompt agreement: all settings, every row's Pareto front and its chosen setting."""
    series = []
    for row, chosen in best.items():
        own = [record for record in records if _is_setting(record, row)]
        points = [(r["scores"][PROMPT]["value"], r["scores"][IDENTITY]["value"]) for r in own]
        number = [record["setting"] for record in own].index(dict(chosen))
        series.append(Series(rows[row].title, points, pareto_front(points), number))
    title = "Validation people: filled, on the row's Pareto front; ringed, chosen"
    return plane(
        series, "prompt agreement, higher is better", "identity to the held-out photo, higher is better", title
    )


def render(records: Sequence[Mapping[str, Any]], best: Mapping[str, Mapping[str, Any]], tolerance: float) -> str:
    """All points in Markdown, a table a part and row; ``*`` marks the Pareto front, ``best`` the chosen setting."""
    parts = ["Scored on validation people except where said. 95% intervals by person."]
    groups = itertools.groupby(records, key=lambda record: (record["part"], record["row"]))
    for (part, row), found in groups:
        group = list(found)
        columns = [score for score in SHOWN if all(score in record["scores"] for record in group)]
        found_at = [(r["scores"][IDENTITY]["value"], r["scores"][PROMPT]["value"]) for r in group]
        front = pareto_front(found_at) if part == "settings" else []
        body = []
        for i, record in enumerate(group):
            marks = ["*"] if i in front else []
            if part == "settings" and record["setting"] == best.get(row):
                marks.append("best")
            setting = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in record["setting"].items())
            name = setting + (f", scored on {record['side']} people" if part == "people" else "")
            cells = [cell(record["scores"][score]) for score in columns]
            body.append([name, " ".join(marks), *cells])
        header = [part, "", *(TITLES.get(score, score) for score in columns)]
        parts.append(f"### {row}: {part}\n\n{markdown([header, *body])}")
    parts.append(
        "`*`: on the Pareto front of identity and prompt agreement. `best`: the highest identity among the settings "
        f"whose prompt agreement is at most {tolerance} below that of the row's default, which stands first."
    )
    return "\n\n".join(parts) + "\n"


def _setting_points(
    rows: Mapping[str, Row],
    content: Mapping[str, Any],
    grids: Mapping[str, Mapping[str, list[Any]]],
    options: Mapping[str, Any],
    folder: Path,
) -> Iterator[Point]:
    for row, grid in grids.items():
        for values in itertools.product(*grid.values()):
            setting = dict(zip(grid, values, strict=True))
            yield _point("settings", row, rows[row], setting, content, options, folder)


def _reference_points(
    rows: Mapping[str, Row],
    content: Mapping[str, Any],
    references: Mapping[str, list[int]],
    options: Mapping[str, Any],
    folder: Path,
) -> Iterator[Point]:
    for row, counts in references.items():
        for count in counts:
            yield _point("references", row, rows[row], {"data.references": count}, content, options, folder)


def _people_points(
    rows: Mapping[str, Row], content: Mapping[str, Any], people: People, options: Mapping[str, Any], folder: Path
) -> Iterator[Point]:
    for count in people.counts:
        setting = {"data.training_people": count}
        row = replace(rows[people.row], run=None, options=rows[people.row].options | people.options | setting)
        point = _point("people", people.row, row, setting, content, options, folder)
        yield point
        fit, test = point.steps
        place = test.run.with_name(f"{test.run.name}_train")
        moved = {f"--score.output={test.run / 'test'}": f"--score.output={place / 'test'}"}
        arguments = [*(moved.get(part, part) for part in test.arguments), "--data.tested=train"]
        again = Step(people.row, test.seed, "test", place, arguments, combined_key(fit.key, arguments))
        yield Point("people", people.row, setting, "train", place / "test", [again])


def _point(
    part: str,
    name: str,
    row: Row,
    setting: dict[str, Any],
    content: Mapping[str, Any],
    options: Mapping[str, Any],
    folder: Path,
) -> Point:
    label = "_".join(f"{key.rpartition('.')[2]}-{value}" for key, value in setting.items()) or "default"
    tested = {**(content.get("test_options") or {}), "score.anchors": False, **options}
    tested |= {} if part == "people" else setting
    seeds = content.get("seeds", [0])[:1]
    configs, shared = content.get("configs") or [], content.get("options") or {}
    steps = list(make_steps({name: row}, "", configs, shared, tested, seeds, folder / part / label))
    return Point(part, name, setting, "validation", steps[-1].run / "test", steps)


def _record(point: Point) -> dict[str, Any]:
    """Scores of a point by its first extractor."""
    path = point.folder / "metrics.json"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        extractor = next(iter(metrics["extractors"]))
        scores = metrics["rows"][metrics["describe"]["method"]]
    except (OSError, ValueError, KeyError, StopIteration) as error:
        raise CompareError(f"'{path}' cannot be read ({error}): delete it and run sweep again") from error
    own = {key.removesuffix(f"/{extractor}"): v for key, v in scores.items() if key.endswith(f"/{extractor}")}
    return {"part": point.part, "row": point.row, "setting": point.setting, "side": point.side, "scores": own}


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    line = {key: record[key] for key in ("part", "row", "side")} | record["setting"]
    for name, score in record["scores"].items():
        line |= {name: score["value"], f"{name} low": score["low"], f"{name} high": score["high"]}
    return line


def _is_setting(record: Mapping[str, Any], row: str) -> bool:
    return record["part"] == "settings" and record["row"] == row


def _check_rows(rows: Mapping[str, Row], named: Sequence[str], plan: str) -> None:
    for key in named:
        if key not in rows:
            raise CompareError(f"there is no row '{key}' in '{plan}', which has {', '.join(rows)}")
