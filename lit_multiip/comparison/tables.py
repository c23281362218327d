"""What a comparison found, as tables of cells and as sentences; `report` only typesets them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_multiip.comparison.rows import (
    ComparedRow,
    Comparison,
    Scores,
    best_cells,
    find_leader,
    is_clear,
    short_commit,
)
from lit_multiip.evaluation.intervals import Score
from lit_multiip.evaluation.results import TITLES, cell

COSTS = {"personalise": "s to personalise", "image": "s per image", "parameters": "trained parameters"}
NOT_RUN = "not run yet"
PAPER_SCALE = "LFW, Inception: another scale and extractor, not comparable"
HEADLINES = {"identity_held_out": "identity to the held-out photo", "fid": "FID"}


@dataclass(frozen=True)
class Cell:
    """A value and what stands under it in small print."""

    value: str
    interval: str = ""
    spread: str = ""  # over trainings
    best: bool = False  # of its block; or, of a difference, clear of zero

    def __str__(self) -> str:
        return f"{self.value} {self.interval}".strip()


@dataclass(frozen=True)
class Line:
    """A line of a table."""

    title: str
    cells: list[Cell]
    group: str = ""


@dataclass(frozen=True)
class Table:
    """A table whose first column names its lines."""

    title: str
    columns: list[str]
    lines: list[Line]
    notes: list[str] = field(default_factory=list)


def title_of(name: str) -> str:
    """Return a score's title in tables."""
    return TITLES.get(name, name.replace("_", " "))


def format_score(score: Score | None, signed: bool = False) -> Cell:
    """Write a score as text, with its interval if there is one; `signed` puts a plus before what is above zero."""
    value, _, interval = cell(score and score._asdict()).partition(" ")
    return Cell(f"+{value}" if signed and score is not None and score.value > 0 else value, interval)


def all_tables(comparison: Comparison) -> list[Table]:
    """Return every table that this comparison has, in the order of the report; costs stand in the first."""
    found: list[Table | None] = []
    for number, name in enumerate(comparison.extractors):
        first = table1(comparison, name, costs=number == 0)
        found += [first, spread_table(first), difference_table(comparison, name)]
        found += [contrast_table(comparison, name), anchor_table(comparison, name)]
    found += [paper_table(comparison), wall_time_table(comparison), audit_table(comparison)]
    return [table for table in found if table is not None]


def table1(comparison: Comparison, extractor: str, costs: bool) -> Table:
    """Return all rows' scores by one extractor, and what they cost."""
    names = comparison.columns(extractor)
    marked = best_cells(comparison, extractor)
    header = [*map(title_of, names), *(COSTS.values() if costs else ()), "trainings"]
    lines = []
    for row in comparison.rows:
        if not row.tests:
            lines.append(Line(row.title, [Cell(NOT_RUN), *[Cell("")] * (len(header) - 1)], row.group))
            continue
        cells = []
        for name in names:
            key = f"{name}/{extractor}"
            score = comparison.scores[row.key].get(key)
            if score is None:
                cells.append(Cell("left out"))
                continue
            shown = format_score(score)
            each = comparison.of_each[row.key][key]
            ends = [_round_like(value, shown.value) for value in (min(each), max(each))]
            spread = " to ".join(ends) if len(each) > 1 else ""
            cells.append(Cell(shown.value, shown.interval, spread, (row.key, key) in marked))
        if costs:
            cells += [Cell(_format_cost(name, value)) for name, value in comparison.costs(row).items()]
        cells.append(Cell(_count_trainings(row)))
        lines.append(Line(row.title, cells, row.group))
    classes = comparison.extractors[extractor].get("num_classes")
    counts = comparison.protocol
    notes = [
        f"{counts['tasks']} images of {counts['people']} people a row ({counts['held_out']} held-out photos x "
        f"{count_nouns(counts['seeds'], 'noise seed')}, {counts['references']} references). 95% intervals by person"
        + (f"; IS over K = {classes} classes." if classes else "."),
        "Bold is the best of its block, where the paired difference to the runner-up is clear of zero.",
    ]
    if any(len(row.tests) > 1 for row in comparison.present):
        notes.append(
            "Of several trainings each score is the mean, its interval is over people, and the lowest and highest "
            "training stand apart (from .. to ..)."
        )
    return Table(f"Table 1, by {extractor}", header, lines, notes)


def spread_table(table: Table) -> Table | None:
    """Return the lowest and highest training of each score of a `table1`; None where no row has several."""
    lines = [
        Line(line.title, [Cell(c.spread) for c in line.cells], line.group)
        for line in table.lines
        if any(c.spread for c in line.cells)
    ]
    if not lines:
        return None
    used = [i for i in range(len(table.columns)) if any(line.cells[i].value for line in lines)]
    return Table(
        "Spread between trainings, lowest to highest",
        [table.columns[i] for i in used],
        [Line(line.title, [line.cells[i] for i in used], line.group) for line in lines],
    )


def difference_table(comparison: Comparison, extractor: str) -> Table:
    """Return the reference row minus each other row."""
    reference = comparison.row(comparison.reference)
    names = comparison.columns(extractor)
    lines = []
    for row in comparison.rows:
        if row is not reference:
            lines.append(_difference_line(comparison, extractor, names, reference, row, row.title, row.group))
    notes = [
        f"{reference.title} minus the row, paired over the same people, photos, prompts and noise. Bold is what is "
        "clear of zero: the 95% interval does not hold it."
    ]
    return Table(f"{reference.title} minus each row, by {extractor}", [*map(title_of, names)], lines, notes)


def contrast_table(comparison: Comparison, extractor: str) -> Table | None:
    """Return what each contrast of the plan adds, such as more photos or attention."""
    if not comparison.contrasts:
        return None
    names = comparison.columns(extractor)
    lines, notes = [], []
    for contrast in comparison.contrasts:
        a, b = (comparison.row(key) for key in contrast.minus)
        lines.append(_difference_line(comparison, extractor, names, a, b, contrast.title))
        text = f" {contrast.text}" if contrast.text else ""
        notes.append(f"{contrast.title}: {a.title} minus {b.title}.{text}")
    return Table(f"Where the gain comes from, by {extractor}", [*map(title_of, names)], lines, notes)


def summarise_contrasts(comparison: Comparison) -> str:
    """Say what each contrast adds to identity and FID, by the first extractor."""
    extractor = next(iter(comparison.extractors))
    said = []
    for name, words in HEADLINES.items():
        parts = []
        for contrast in comparison.contrasts:
            a, b = (comparison.row(key) for key in contrast.minus)
            if a.tests and b.tests:
                score = comparison.difference(a.key, b.key).get(f"{name}/{extractor}")
                parts += [f"{contrast.title} {format_difference(score)}"] if score is not None else []
        if parts:
            better = "higher" if title_of(name).endswith("↑") else "lower"
            said.append(f"To {words} ({better} is better), by {extractor}, each cause adds: {'; '.join(parts)}.")
    return " ".join(said)


def _difference_line(
    comparison: Comparison,
    extractor: str,
    names: list[str],
    a: ComparedRow,
    b: ComparedRow,
    title: str,
    group: str = "",
) -> Line:
    if not (a.tests and b.tests):
        return Line(title, [Cell(NOT_RUN), *[Cell("")] * (len(names) - 1)], group)
    found = comparison.difference(a.key, b.key)
    scores = [found.get(f"{name}/{extractor}") for name in names]
    shown = [format_score(score, signed=True) for score in scores]
    cells = [Cell(c.value, c.interval, best=is_clear(score)) for c, score in zip(shown, scores, strict=True)]
    return Line(title, cells, group)


def anchor_table(comparison: Comparison, extractor: str) -> Table | None:
    """Return the rows that say what a score is worth."""
    found = comparison.anchors
    names = [n for n in comparison.columns(extractor) if any(f"{n}/{extractor}" in anchor.scores for anchor in found)]
    if not names:
        return None
    lines = [Line(a.title, [format_score(a.scores.get(f"{name}/{extractor}")) for name in names]) for a in found]
    return Table(f"Anchors, by {extractor}", [*map(title_of, names)], lines)


def paper_table(comparison: Comparison) -> Table | None:
    """Return the paper's own figures beside ours."""
    rows = [row for row in comparison.rows if row.paper]
    if not rows:
        return None
    extractor = next(iter(comparison.extractors))
    header, lines = [], []
    for name in ("is", "fid"):
        header += [f"{title_of(name)} of the paper", f"{title_of(name)} here, {extractor}"]
    for row in rows:
        scores: Scores = comparison.scores.get(row.key, {})
        cells = []
        for name in ("is", "fid"):
            own = (row.paper or {}).get(name)
            ours = format_score(scores.get(f"{name}/{extractor}")) if row.tests else Cell(NOT_RUN)
            cells += [Cell("" if own is None else f"{own:.2f}"), ours]
        lines.append(Line(row.title, cells))
    return Table("The paper's own figures beside ours", header, lines, [f"The paper's: {PAPER_SCALE}."])


def wall_time_table(comparison: Comparison) -> Table:
    """Return the seconds of each part of each row's tests, the mean over trainings."""
    parts = list(dict.fromkeys(part for row in comparison.present for t in row.tests for part in t.metrics["seconds"]))
    lines = []
    for row in comparison.present:
        seconds = [test.metrics["seconds"] for test in row.tests]
        known = {part: [float(s[part]) for s in seconds if s.get(part) is not None] for part in parts}
        lines.append(Line(row.title, [Cell(f"{sum(v) / len(v):.0f}" if v else "") for v in known.values()], row.group))
    return Table("Wall time of the tests, seconds", ["sampling" if p == "method" else p for p in parts], lines)


def audit_table(comparison: Comparison) -> Table | None:
    """Return what the audits of the tests found, a column for each distinct set of findings."""
    found: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for row in comparison.present:
        for test in row.tests:
            if audit := test.metrics.get("audit"):
                titles = found.setdefault(tuple(_flatten(audit)), [])
                titles += [row.title] if row.title not in titles else []
    if not found:
        return None
    names = list(dict.fromkeys(name for findings in found for name, _ in findings))
    lines = [Line(name, [Cell(dict(findings).get(name, "")) for findings in found]) for name in names]
    return Table("What the audits found", [", ".join(titles) for titles in found.values()], lines)


def _flatten(value: Any, name: str = "") -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        return [
            pair for key, item in value.items() for pair in _flatten(item, f"{name} {key}".strip().replace("_", " "))
        ]
    if isinstance(value, list):
        if any(isinstance(item, Mapping) for item in value):
            return [(name, f"{len(value)} listed")]
        shown = [str(item) for item in value[:5]]
        return [(name, ", ".join(shown) + (f" and {len(value) - 5} more" if len(value) > 5 else "") or "none")]
    if value is None or isinstance(value, bool):
        return [(name, {True: "yes", False: "no", None: "none"}[value])]
    return [(name, f"{value:.4g}" if isinstance(value, float) else str(value))]


def list_facts(comparison: Comparison) -> list[tuple[str, str]]:
    """Return protocol, extractors, versions and commit, each with its name."""
    counts, test = comparison.protocol, comparison.first
    describe, versions = test.metrics["describe"], test.metrics.get("versions") or {}
    names = {name: Path(str(f["source"])).name for name, f in comparison.extractors.items() if f.get("source")}
    said = [f"{name}" + (f" (weights {names[name]})" if names.get(name, name) != name else "") for name in test.images]
    backbone = describe.get("backbone")
    return [
        ("Protocol", f"{counts['sha256'][:12]}: the same people, photos, prompts and noise seeds in every row"),
        ("N", f"{counts['tasks']} images of {counts['people']} people a row and training"),
        ("Held out", f"{counts['held_out']} photos, {count_nouns(counts['seeds'], 'noise seed')} each"),
        ("References", f"{counts['references']} a person, one fixed set"),
        ("Trainings", "; ".join(f"{row.title}: {_count_trainings(row)}" for row in comparison.rows)),
        ("Backbone", "unknown" if backbone is None else Path(str(backbone)).name),
        ("Image side", f"{describe['image_side']} px" if describe.get("image_side") else "unknown"),
        ("Sampling", ", ".join(f"{k} {v}" for k, v in (describe.get("sampling") or {}).items()) or "unknown"),
        ("Extractors", ", ".join(said)),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version) or "unknown"),
        ("Commit", short_commit(test.metrics.get("commit"))),
    ]


def list_limitations(comparison: Comparison) -> list[str]:
    """Return what the numbers cannot say."""
    said = [
        "FID, KID and IS depend on N and on the extractor: compare them within a table only, never with other tables.",
        "Intervals are over people. They say nothing of another training; the spread between trainings does, where "
        "there are several.",
        "Each interval is for one comparison; none is corrected for there being many.",
        "A method that copies a reference scores high in identity to the references: read both identities together.",
    ]
    if any(row.trained and len(row.tests) < 2 for row in comparison.present):
        said.append(
            "Some trained rows were trained with one seed only: how much another seed would change is not known."
        )
    if str(comparison.first.metrics["describe"].get("backbone")) == "mini":
        said.append(
            "The backbone is a miniature that was trained on drawn portraits, as were its critics: what holds here "
            "need not hold for photographs and large models."
        )
    return said


def summarise(comparison: Comparison) -> str:
    """Say who leads in identity and FID, by how much, and whether that is clear of zero."""
    first, *others = comparison.extractors
    said = [_name_leaders(comparison, first), *(_name_leaders_briefly(comparison, name) for name in others)]
    lacking = [row.title for row in comparison.rows if not row.tests]
    if lacking:
        said.append(f"{len(lacking)} of {len(comparison.rows)} rows are not run yet, and may lead.")
    return " ".join(filter(None, said)) or "No row has identity or FID."


def _name_leaders_briefly(comparison: Comparison, extractor: str) -> str:
    said, (methods, whose, _) = [], _split_rows(comparison)
    for name, words in HEADLINES.items():
        found = find_leader(comparison, f"{name}/{extractor}", methods)
        if found is not None:
            how = "" if found[1] is None else f", {'clear' if is_clear(found[2]) else 'not clear'} of {found[1].title}"
            said.append(f"{found[0].title} in {words}{how}")
    return f"By {extractor} the best of {whose} is {'; '.join(said)}." if said else ""


def _split_rows(comparison: Comparison) -> tuple[list[ComparedRow], str, list[ComparedRow]]:
    """Return the paper's methods, what to call them, and the controls; without the paper's, all rows are alike."""
    methods = [row for row in comparison.rows if row.group == "paper"]
    if not methods:
        return list(comparison.rows), "the rows", []
    return methods, "the paper's methods", [row for row in comparison.rows if row.group != "paper"]


def _name_leaders(comparison: Comparison, extractor: str) -> str:
    said, (methods, whose, controls) = [], _split_rows(comparison)
    for name, words in HEADLINES.items():
        key = f"{name}/{extractor}"
        found = find_leader(comparison, key, methods)
        if found is None:
            continue
        first, second, difference = found
        text = f"{first.title} has the best {words} of {whose} by {extractor}"
        text += f", {format_score(comparison.scores[first.key][key])}"
        if second is not None:
            text += f"; to the runner-up, {second.title}, the difference is {format_difference(difference)}"
        said.append(text + ".")
        reference = comparison.row(comparison.reference)
        if first is not reference and second is not reference and reference.tests:
            to = comparison.difference(reference.key, first.key).get(key)
            said.append(f"{reference.title} minus {first.title}: {format_difference(to)}.")
        control = find_leader(comparison, key, [first, *controls])
        if control is not None and control[0] is not first:
            to = comparison.difference(control[0].key, first.key).get(key)
            by = f"{control[0].title} minus {first.title} is {format_difference(to)}"
            said.append(f"A control has a better point estimate: {by}.")
    return " ".join(said)


def format_difference(score: Score | None) -> str:
    """Write a difference as text, and whether it is clear of zero."""
    if score is None or score.low is None:
        return "without an interval"
    return f"{format_score(score, signed=True)}, {'clear' if is_clear(score) else 'not clear'} of zero"


def _count_trainings(row: ComparedRow) -> str:
    planned = len(row.tests) + len(row.missing)
    if row.missing:
        return f"{len(row.tests)} of {planned}"
    if row.drawn_elsewhere:
        return "elsewhere"
    per_person = any(test.metrics["describe"].get("per_person", False) for test in row.tests)
    return str(planned) if row.trained or per_person or planned > 1 else "none"


def count_nouns(number: int, noun: str) -> str:
    """Write a number and a noun, such as `2 seeds`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _round_like(value: float, like: str) -> str:
    return f"{value:.{len(like.partition('.')[2])}f}"


def _format_cost(name: str, value: float | None) -> str:
    if value is None:
        return "not measured" if name == "personalise" else "unknown"
    if name != "parameters":
        return f"{value:.2g}" if value < 10 else f"{value:.0f}"
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"
