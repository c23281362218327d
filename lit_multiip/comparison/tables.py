"""What a comparison found, as tables of cells and as sentences; Markdown, LaTeX and the page only typeset them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_multiip.comparison.tests import Comparison, Row, Scores, best, clear, leader, short_commit, verdict
from lit_multiip.evaluation.intervals import Score
from lit_multiip.evaluation.results import TITLES, cell

GROUPS = {"paper": "The paper's methods", "control": "Controls"}
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
    best: bool = False  # or, of a difference, clear of zero
    verdict: str = ""  # of a difference: better, worse or unclear

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


def titled(name: str) -> str:
    """A score's title in tables."""
    return TITLES.get(name, name.replace("_", " "))


def scored(score: Score | None, signed: bool = False) -> Cell:
    """A score with its interval, if there is one."""
    value, _, interval = cell(score and score._asdict()).partition(" ")
    return Cell(f"+{value}" if signed and score is not None and score.value > 0 else value, interval)


def table1(comparison: Comparison, extractor: str, costs: bool) -> Table:
    """All rows' scores by one extractor, and what they cost."""
    names = comparison.columns(extractor)
    marked = best(comparison, extractor)
    header = [*map(titled, names), *(COSTS.values() if costs else ()), "trainings"]
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
            shown = scored(score)
            each = comparison.of_each[row.key][key]
            spread = (
                f"{_rounded(min(each), shown.value)} to {_rounded(max(each), shown.value)}" if len(each) > 1 else ""
            )
            cells.append(Cell(shown.value, shown.interval, spread, (row.key, key) in marked))
        if costs:
            cells += [Cell(_cost(name, value)) for name, value in comparison.costs(row).items()]
        cells.append(Cell(_trainings(row)))
        lines.append(Line(row.title, cells, row.group))
    classes = comparison.extractors[extractor].get("num_classes")
    counts = comparison.protocol
    notes = [
        f"{counts['tasks']} images of {counts['people']} people a row ({counts['held_out']} held-out photos x "
        f"{_counted(counts['seeds'], 'noise seed')}, {counts['references']} references). 95% intervals by person"
        + (f"; IS over K = {classes} classes." if classes else "."),
        "Bold is the best of its block, where the paired difference to the runner-up is clear of zero.",
    ]
    if any(len(row.tests) > 1 for row in comparison.present):
        notes.append(
            "Of several trainings each score is the mean, its interval is over people, and the lowest and highest "
            "training stand apart (from .. to ..)."
        )
    return Table(f"Table 1, by {extractor}", header, lines, notes)


def spreads(table: Table) -> Table | None:
    """Lowest and highest training of each score of a `table1`, for where they do not fit into its cells."""
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


def differences(comparison: Comparison, extractor: str) -> Table:
    """The reference row minus each other row."""
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
    return Table(f"{reference.title} minus each row, by {extractor}", [*map(titled, names)], lines, notes)


def attribution(comparison: Comparison, extractor: str) -> Table | None:
    """What each cause adds: more photos, hold-out training, more tokens, attention."""
    if not comparison.contrasts:
        return None
    names = comparison.columns(extractor)
    lines, notes = [], []
    for contrast in comparison.contrasts:
        a, b = (comparison.row(key) for key in contrast.minus)
        lines.append(_difference_line(comparison, extractor, names, a, b, contrast.title))
        text = f" {contrast.text}" if contrast.text else ""
        notes.append(f"{contrast.title}: {a.title} minus {b.title}.{text}")
    return Table(f"Where the gain comes from, by {extractor}", [*map(titled, names)], lines, notes)


def attributed(comparison: Comparison) -> str:
    """What each cause adds to identity and FID by the first extractor, in words."""
    extractor = next(iter(comparison.extractors))
    said = []
    for name, words in HEADLINES.items():
        parts = []
        for contrast in comparison.contrasts:
            a, b = (comparison.row(key) for key in contrast.minus)
            if a.tests and b.tests:
                score = comparison.difference(a.key, b.key).get(f"{name}/{extractor}")
                parts += [f"{contrast.title} {_weighed(score)}"] if score is not None else []
        if parts:
            better = "higher" if titled(name).endswith("↑") else "lower"
            said.append(f"To {words} ({better} is better), by {extractor}, each cause adds: {'; '.join(parts)}.")
    return " ".join(said)


def _difference_line(
    comparison: Comparison, extractor: str, names: list[str], a: Row, b: Row, title: str, group: str = ""
) -> Line:
    if not (a.tests and b.tests):
        return Line(title, [Cell(NOT_RUN), *[Cell("")] * (len(names) - 1)], group)
    found = comparison.difference(a.key, b.key)
    scores = [found.get(f"{name}/{extractor}") for name in names]
    cells = []
    for name, score in zip(names, scores, strict=True):
        shown = scored(score, signed=True)
        weighed = verdict(score, titled(name)) if score is not None else ""
        cells.append(Cell(shown.value, shown.interval, best=clear(score), verdict=weighed))
    return Line(title, cells, group)


def anchors(comparison: Comparison, extractor: str) -> Table | None:
    """Rows that say what a score is worth."""
    found = comparison.anchors
    names = [n for n in comparison.columns(extractor) if any(f"{n}/{extractor}" in anchor.scores for anchor in found)]
    if not names:
        return None
    lines = [Line(a.title, [scored(a.scores.get(f"{name}/{extractor}")) for name in names]) for a in found]
    return Table(f"Anchors, by {extractor}", [*map(titled, names)], lines)


def paper(comparison: Comparison) -> Table | None:
    """The paper's own figures beside ours."""
    rows = [row for row in comparison.rows if row.paper]
    if not rows:
        return None
    extractor = next(iter(comparison.extractors))
    header, lines = [], []
    for name in ("is", "fid"):
        header += [f"{titled(name)} of the paper", f"{titled(name)} here, {extractor}"]
    for row in rows:
        scores: Scores = comparison.scores.get(row.key, {})
        cells = []
        for name in ("is", "fid"):
            own = (row.paper or {}).get(name)
            ours = scored(scores.get(f"{name}/{extractor}")) if row.tests else Cell(NOT_RUN)
            cells += [Cell("" if own is None else f"{own:.2f}"), ours]
        lines.append(Line(row.title, cells))
    return Table("The paper's own figures beside ours", header, lines, [f"The paper's: {PAPER_SCALE}."])


def wall_times(comparison: Comparison) -> Table:
    """Seconds of each part of each row's tests, the mean over trainings."""
    parts = list(dict.fromkeys(part for row in comparison.present for t in row.tests for part in t.metrics["seconds"]))
    lines = []
    for row in comparison.present:
        seconds = [test.metrics["seconds"] for test in row.tests]
        known = {part: [float(s[part]) for s in seconds if s.get(part) is not None] for part in parts}
        lines.append(Line(row.title, [Cell(f"{sum(v) / len(v):.0f}" if v else "") for v in known.values()], row.group))
    return Table("Wall time of the tests, seconds", ["sampling" if p == "method" else p for p in parts], lines)


def audits(comparison: Comparison) -> Table | None:
    """What the audits of the tests found, a column for each distinct set of findings."""
    found: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for row in comparison.present:
        for test in row.tests:
            if audit := test.metrics.get("audit"):
                titles = found.setdefault(tuple(_flat(audit)), [])
                titles += [row.title] if row.title not in titles else []
    if not found:
        return None
    names = list(dict.fromkeys(name for findings in found for name, _ in findings))
    lines = [Line(name, [Cell(dict(findings).get(name, "")) for findings in found]) for name in names]
    return Table("What the audits found", [", ".join(titles) for titles in found.values()], lines)


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        return [pair for key, item in value.items() for pair in _flat(item, f"{name} {key}".strip().replace("_", " "))]
    if isinstance(value, list):
        if any(isinstance(item, Mapping) for item in value):
            return [(name, f"{len(value)} listed")]
        shown = [str(item) for item in value[:5]]
        return [(name, ", ".join(shown) + (f" and {len(value) - 5} more" if len(value) > 5 else "") or "none")]
    text = {True: "yes", False: "no", None: "none"}.get(value) if value is None or isinstance(value, bool) else None
    return [(name, text or (f"{value:.4g}" if isinstance(value, float) else str(value)))]


def facts(comparison: Comparison) -> list[tuple[str, str]]:
    """Protocol, extractors, versions and commit, by name."""
    counts, test = comparison.protocol, comparison.first
    describe, versions = test.metrics["describe"], test.metrics.get("versions") or {}
    names = {name: Path(str(f["source"])).name for name, f in comparison.extractors.items() if f.get("source")}
    said = [f"{name}" + (f" (weights {names[name]})" if names.get(name, name) != name else "") for name in test.images]
    backbone = describe.get("backbone")
    return [
        ("Protocol", f"{counts['sha256'][:12]}: the same people, photos, prompts and noise seeds in every row"),
        ("N", f"{counts['tasks']} images of {counts['people']} people a row and training"),
        ("Held out", f"{counts['held_out']} photos, {_counted(counts['seeds'], 'noise seed')} each"),
        ("References", f"{counts['references']} a person, one fixed set"),
        ("Trainings", "; ".join(f"{row.title}: {_trainings(row)}" for row in comparison.rows)),
        ("Backbone", "unknown" if backbone is None else Path(str(backbone)).name),
        ("Image side", f"{describe['image_side']} px" if describe.get("image_side") else "unknown"),
        ("Sampling", ", ".join(f"{k} {v}" for k, v in (describe.get("sampling") or {}).items()) or "unknown"),
        ("Extractors", ", ".join(said)),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version) or "unknown"),
        ("Commit", short_commit(test.metrics.get("commit"))),
    ]


def limitations(comparison: Comparison) -> list[str]:
    """What the numbers cannot say."""
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


def summary(comparison: Comparison) -> str:
    """One paragraph: who leads in identity and FID, by how much, and whether that is clear of zero."""
    first, *others = comparison.extractors
    said = [_headline(comparison, first), *(_second_opinion(comparison, name) for name in others)]
    lacking = [row.title for row in comparison.rows if not row.tests]
    if lacking:
        said.append(f"{len(lacking)} of {len(comparison.rows)} rows are not run yet, and may lead.")
    return " ".join(filter(None, said)) or "No row has identity or FID."


def _second_opinion(comparison: Comparison, extractor: str) -> str:
    said, (methods, whose, _) = [], _contestants(comparison)
    for name, words in HEADLINES.items():
        found = leader(comparison, f"{name}/{extractor}", methods)
        if found is not None:
            how = "" if found[1] is None else f", {'clear' if clear(found[2]) else 'not clear'} of {found[1].title}"
            said.append(f"{found[0].title} in {words}{how}")
    return f"By {extractor} the best of {whose} is {'; '.join(said)}." if said else ""


def _contestants(comparison: Comparison) -> tuple[list[Row], str, list[Row]]:
    """The paper's methods, what to call them, and the controls; in a table without the paper's, all are alike."""
    methods = [row for row in comparison.rows if row.group == "paper"]
    if not methods:
        return list(comparison.rows), "the rows", []
    return methods, "the paper's methods", [row for row in comparison.rows if row.group != "paper"]


def _headline(comparison: Comparison, extractor: str) -> str:
    said, (methods, whose, controls) = [], _contestants(comparison)
    for name, words in HEADLINES.items():
        key = f"{name}/{extractor}"
        found = leader(comparison, key, methods)
        if found is None:
            continue
        first, second, difference = found
        text = f"{first.title} has the best {words} of {whose} by {extractor}"
        text += f", {scored(comparison.scores[first.key][key])}"
        if second is not None:
            text += f"; to the runner-up, {second.title}, the difference is {_weighed(difference)}"
        said.append(text + ".")
        reference = comparison.row(comparison.reference)
        if first is not reference and second is not reference and reference.tests:
            to = comparison.difference(reference.key, first.key).get(key)
            said.append(f"{reference.title} minus {first.title}: {_weighed(to)}.")
        control = leader(comparison, key, [first, *controls])
        if control is not None and control[0] is not first:
            to = comparison.difference(control[0].key, first.key).get(key)
            said.append(
                f"A control has a better point estimate: {control[0].title} minus {first.title} is {_weighed(to)}."
            )
    return " ".join(said)


def _weighed(score: Score | None) -> str:
    if score is None or score.low is None:
        return "without an interval"
    return f"{scored(score, signed=True)}, {'clear' if clear(score) else 'not clear'} of zero"


def _trainings(row: Row) -> str:
    planned = len(row.tests) + len(row.missing)
    if row.missing:
        return f"{len(row.tests)} of {planned}"
    per_person = any(test.metrics["describe"].get("per_person", False) for test in row.tests)
    return str(planned) if row.trained or per_person or planned > 1 else "none"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _rounded(value: float, like: str) -> str:
    return f"{value:.{len(like.partition('.')[2])}f}"


def _cost(name: str, value: float | None) -> str:
    if value is None:
        return "not measured" if name == "personalise" else "unknown"
    if name != "parameters":
        return f"{value:.2g}" if value < 10 else f"{value:.0f}"
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"
