"""Figures of a comparison: methods x people as the paper's Figure 6, and paired differences with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lit_multiip.comparison.tables import scored, titled
from lit_multiip.comparison.tests import Comparison, ComparisonError, Test, verdict
from lit_multiip.evaluation.intervals import Score
from lit_multiip.evaluation.pictures import labelled_grid

PEOPLE = 6  # pictured, at most
PANELS = ("identity_held_out", "fid", "prompt")
WIDTH, LINE, TOP, BOTTOM, EDGE = 370, 40, 34, 34, 10  # of a panel, px
COLOURS = {"better": "#1f6feb", "worse": "#c2410c", "unclear": "#6b7280", "ink": "#1f2328", "rule": "#d0d7de"}


@dataclass(frozen=True)
class Person:
    """A column of Figure 6."""

    prompt: str
    references: list[Path]
    held_out: Path
    image: str  # of the task, by the same name in every test


def pictured(comparison: Comparison) -> list[Person]:
    """The first task of the first people whose photos the tests wrote; chosen by nothing else."""
    test = next((test for row in comparison.present for test in row.tests if test.metrics.get("photos")), None)
    if test is None:
        return []
    photos = test.metrics["photos"]
    people: dict[str, Person] = {}
    for line in test.lines:
        own = photos.get(line["person"])
        if own is not None and line["held_out"] in own["held_out"] and len(people) < PEOPLE:
            references = [test.folder / file for file in own["references"]]
            held_out = test.folder / own["held_out"][line["held_out"]]
            people.setdefault(line["person"], Person(line["prompt"], references, held_out, line["image"]))
    return list(people.values())


def opened(path: Path) -> Image.Image:
    """A picture, read to its end.

    Raises:
        ComparisonError: it is missing or cut off.
    """
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except OSError as error:
        raise ComparisonError(f"'{path}' is missing or cut off ({error}): run its test again") from error


def mosaic(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size in a square, row by row, with thin gaps."""
    columns = int(np.ceil(np.sqrt(len(pictures))))
    side, gap = pictures[0].width, max(1, pictures[0].width // 32)
    full = columns * (side + gap) - gap
    square = Image.new("RGB", (full, full), "white")
    for i, picture in enumerate(pictures):
        row, column = divmod(i, columns)
        square.paste(picture.resize((side, side)), (column * (side + gap), row * (side + gap)))
    return square


def figure6_rows(comparison: Comparison) -> list[tuple[str, list[Image.Image | None]]]:
    """References, held-out photo and what each row's first training made of them, a cell a person; None: not there."""
    people = pictured(comparison)
    if not people:
        return []
    rows: list[tuple[str, list[Image.Image | None]]] = [
        ("references", [mosaic([opened(path) for path in person.references]) for person in people]),
        ("held-out photo", [opened(person.held_out) for person in people]),
    ]
    for row in comparison.rows:
        first: Test | None = row.tests[0] if row.tests else None
        cells = [None if first is None else opened(first.folder / person.image) for person in people]
        rows.append((row.title, cells))
    return rows


def figure6(comparison: Comparison) -> Image.Image | None:
    """Figure 6 as one picture; None where no test wrote photos."""
    rows = [(title, cells) for title, cells in figure6_rows(comparison) if any(cells)]
    if not rows:
        return None
    held_out = rows[1][1][0]
    assert held_out is not None
    titles, cells = [title for title, _ in rows], [cells for _, cells in rows]
    prompts = [person.prompt for person in pictured(comparison)]
    return labelled_grid(cells, titles, prompts, max(held_out.width, 128))


# ---- paired differences ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """Differences of one score against the reference row, a line a row."""

    key: str
    title: str
    lines: list[tuple[str, Score, str]]


@dataclass(frozen=True)
class Mark:
    """A line, a dot or a text of a panel."""

    kind: Literal["line", "dot", "hollow", "start", "middle", "end"]
    x: float
    y: float
    colour: str
    x2: float = 0.0
    y2: float = 0.0
    width: float = 1.0
    text: str = ""
    bold: bool = False


def panels(comparison: Comparison, extractor: str) -> list[Panel]:
    """A panel for identity, FID and prompt agreement, as far as the tests have them."""
    reference = comparison.row(comparison.reference)
    found = []
    for name in PANELS:
        key, title = f"{name}/{extractor}", titled(name)
        lines = []
        for row in comparison.present if reference.tests else []:
            score = comparison.difference(reference.key, row.key).get(key) if row is not reference else None
            if score is not None:
                lines.append((row.title, score, verdict(score, title)))
        if lines:
            better = {"↑": ", higher is better", "↓": ", lower is better"}  # fonts of pictures have no arrows
            found.append(Panel(key, title.rstrip(" ↑↓") + better.get(title[-1], ""), lines))
    return found


def marks(panel: Panel) -> tuple[list[Mark], int]:
    """What to draw of a panel, in px, and its height."""
    bounds = [bound for _, s, _ in panel.lines for bound in (s.value, s.low, s.high, 0.0) if bound is not None]
    low, high = min(bounds), max(bounds)
    span = (high - low) or 1.0
    height = TOP + LINE * len(panel.lines) + BOTTOM

    def x(value: float) -> float:
        return EDGE + (value - low) / span * (WIDTH - 2 * EDGE)

    drawn = [Mark("start", EDGE, 16, "ink", text=panel.title, bold=True)]
    floor = height - BOTTOM
    for i, (title, score, better) in enumerate(panel.lines):
        y = TOP + LINE * i
        short = title if len(title) <= 32 else title[:31] + "…"
        values = str(scored(score, signed=True))
        drawn.append(Mark("line", x(0), y + 17, "rule", x(0), y + 31, 1.5))
        if score.low is not None and score.high is not None:
            drawn.append(Mark("line", x(score.low), y + 24, better, x(score.high), y + 24, 2.5))
        drawn.append(Mark("start", EDGE, y + 10, "ink", text=short))
        drawn.append(Mark("end", WIDTH - EDGE, y + 10, better, text=values))
        drawn.append(Mark("hollow" if better == "unclear" else "dot", x(score.value), y + 24, better))
    drawn.append(Mark("line", EDGE, floor + 4, "rule", WIDTH - EDGE, floor + 4))
    step = tick_step(span)
    ticks = [n * step for n in range(int(np.ceil(low / step - 1e-9)), int(np.floor(high / step + 1e-9)) + 1)]
    for tick in ticks:
        drawn.append(Mark("line", x(tick), floor + 4, "rule", x(tick), floor + 8))
        at = min(max(x(tick), EDGE + 12), WIDTH - EDGE - 12)
        drawn.append(Mark("middle", at, floor + 22, "unclear", text="0" if tick == 0 else f"{tick:+.3g}"))
    return drawn, height


def tick_step(span: float) -> float:
    """Distance of ticks, 1, 2 or 5 times a power of ten, for two to six of them in a span."""
    power = 10.0 ** np.floor(np.log10(span))
    return next(float(n * power) for n in (0.1, 0.2, 0.5, 1, 2) if span / (n * power) <= 5)


def forest_png(found: Sequence[Panel], scale: int = 2) -> Image.Image:
    """Panels side by side, on white."""
    drawings = [marks(panel) for panel in found]
    step = WIDTH + 2 * EDGE
    picture = Image.new("RGB", (step * len(found) * scale, max(h for _, h in drawings) * scale), "white")
    draw = ImageDraw.Draw(picture)
    for number, (drawn, _) in enumerate(drawings):
        left = EDGE + number * step
        for mark in drawn:
            x, y, colour = (left + mark.x) * scale, mark.y * scale, COLOURS[mark.colour]
            if mark.kind == "line":
                width = max(1, round(mark.width * scale))
                draw.line((x, y, (left + mark.x2) * scale, mark.y2 * scale), colour, width)
            elif mark.kind in ("dot", "hollow"):
                r = 4.5 * scale
                fill = colour if mark.kind == "dot" else "white"
                draw.ellipse((x - r, y - r, x + r, y + r), fill, colour, 2 * scale)
            else:
                font = ImageFont.load_default((15 if mark.bold else 12) * scale)
                anchor = {"start": "ls", "middle": "ms", "end": "rs"}[mark.kind]
                draw.text((x, y), mark.text, colour, font, anchor=anchor)
    return picture


def forest_svg(panel: Panel) -> str:
    """A panel for a page, coloured by its style sheet's classes of the names of `COLOURS`."""
    drawn, height = marks(panel)
    parts = []
    for mark in drawn:
        x, y = f"{mark.x:.1f}", f"{mark.y:.1f}"
        if mark.kind == "line":
            ends = f'x1="{x}" y1="{y}" x2="{mark.x2:.1f}" y2="{mark.y2:.1f}"'
            parts.append(f'<line class="{mark.colour}" {ends} stroke-width="{mark.width}"/>')
        elif mark.kind in ("dot", "hollow"):
            parts.append(f'<circle class="{mark.colour} {mark.kind}" cx="{x}" cy="{y}" r="4.5" stroke-width="2"/>')
        else:
            bold = " bold" if mark.bold else ""
            text = f'x="{x}" y="{y}" text-anchor="{mark.kind}">{escape(mark.text)}</text>'
            parts.append(f'<text class="{mark.colour}{bold}" {text}')
    label = escape(f"Paired differences in {panel.title}", quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
