"""Figures of a comparison, each drawn once by matplotlib and saved as PNG, SVG and PDF.

Methods x people as the paper's Figure 6, paired differences with their intervals, and identity against prompt agreement
or against seconds.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image

from lit_multiip.comparison.rows import Comparison, ComparisonError, judge_difference
from lit_multiip.comparison.tables import format_score, title_of
from lit_multiip.evaluation.intervals import Score

FORMATS = ("png", "svg", "pdf")
PEOPLE = 6  # in Figure 6, at most
CELL = (128, 256)  # px of an image in Figure 6, least and most
LEGEND = "Filled: the 95% interval is clear of zero, for better (blue) or for worse (orange). Hollow: it is not."
PANELS = ("identity_held_out", "fid", "prompt")
INK, RULE = "#1f2328", "#d0d7de"
COLOURS = {"better": "#0b5fd0", "worse": "#b23b0a", "unclear": "#59636e"}
# Okabe and Ito's palette, which the colour-blind can tell apart too; without yellow and black
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a caption may hold a `$`
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "image.composite_image": False,  # every picture stays one of its own in SVG and PDF
    "svg.hashsalt": "lit_multiip",  # the same figure is the same file
}


def save(figure: Figure, stem: Path) -> None:
    """Write a figure as `<stem>.png`, `.svg` and `.pdf`."""
    with matplotlib.rc_context(STYLE):
        for kind in FORMATS:
            undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
            figure.savefig(f"{stem}.{kind}", metadata=undated)


# ---- Figure 6 -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PicturedPerson:
    """A column of Figure 6."""

    prompt: str
    references: list[Path]
    held_out: Path
    image: str  # of the task, by the same name in every test


def pictured_people(comparison: Comparison) -> list[PicturedPerson]:
    """Return the first task of each of the first people whose photos the tests wrote; looks do not decide."""
    test = next((test for row in comparison.present for test in row.tests if test.metrics.get("photos")), None)
    if test is None:
        return []
    photos = test.metrics["photos"]
    people: dict[str, PicturedPerson] = {}
    for line in test.lines:
        own = photos.get(line["person"])
        if own is not None and line["held_out"] in own["held_out"] and len(people) < PEOPLE:
            references = [test.folder / file for file in own["references"]]
            held_out = test.folder / own["held_out"][line["held_out"]]
            people.setdefault(line["person"], PicturedPerson(line["prompt"], references, held_out, line["image"]))
    return list(people.values())


def read_picture(path: Path) -> Image.Image:
    """Read a picture to its end.

    Raises:
        ComparisonError: it is missing or cut off.
    """
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except OSError as error:
        raise ComparisonError(f"'{path}' is missing or cut off ({error}): run its test again") from error


def figure6(comparison: Comparison) -> Figure | None:
    """Draw references, held-out photo and what each row's first training made of them, a column a person.

    Returns:
        None where no test wrote photos.
    """
    people = pictured_people(comparison)
    if not people:
        return None
    rows = [("references", [person.references for person in people])]
    rows.append(("held-out photo", [[person.held_out] for person in people]))
    for row in comparison.present:
        rows.append((row.title, [[row.tests[0].folder / person.image] for person in people]))

    # a cell is its pictures' own size, or a whole multiple of it
    side, (least, most) = read_picture(people[0].held_out).width, CELL
    cell = min(side * math.ceil(least / side), most)
    font, gap = cell / 11, max(4, cell // 32)  # px
    heads = [textwrap.fill(person.prompt[:200], 18) for person in people]
    top = round((max(head.count("\n") for head in heads) + 2) * 1.3 * font)
    left = round(1.6 * cell)
    width, height = left + len(people) * (cell + gap), top + len(rows) * (cell + gap)
    figure, axes = _blank(width, height)

    def write(x: float, y: float, text: str, ha: Literal["left", "center"], va: Literal["center", "bottom"]) -> None:
        axes.text(x, y, text, fontsize=font * 72 / figure.dpi, linespacing=1.2, ha=ha, va=va)

    for column, head in enumerate(heads):
        write(left + column * (cell + gap) + cell / 2, top - gap, head, "center", "bottom")
    for number, (title, pictures) in enumerate(rows):
        y = top + number * (cell + gap)
        write(gap, y + cell / 2, textwrap.fill(title, 28, break_on_hyphens=False), "left", "center")
        for column, paths in enumerate(pictures):
            _tile(axes, paths, left + column * (cell + gap), y, cell)
    return figure


def _blank(width: int, height: int, dpi: int = 100) -> tuple[Figure, Axes]:
    """Return a figure of `width` x `height` px, and axes over all of it that count these px from the top left."""
    with matplotlib.rc_context(STYLE):
        figure = Figure((width / dpi, height / dpi), dpi=dpi)
        axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    return figure, axes


def _tile(axes: Axes, paths: Sequence[Path], x: int, y: int, side: int) -> None:
    """Draw pictures in a square of `side` px, row by row."""
    columns = math.ceil(math.sqrt(len(paths)))
    gap = 1 if columns > 1 else 0
    part = (side + gap) // columns - gap
    for i, path in enumerate(paths):
        row, column = divmod(i, columns)
        left, top = x + column * (part + gap), y + row * (part + gap)
        picture = read_picture(path)
        way = "hanning" if part % picture.width else "nearest"  # pixels stay as they are where that is possible
        axes.imshow(picture, extent=(left, left + part, top + part, top), aspect="auto", interpolation=way)


# ---- paired differences ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """Differences of one score against the reference row, a line a row: title, difference, better or worse."""

    key: str
    title: str
    lines: list[tuple[str, Score, str]]


def panels(comparison: Comparison, extractor: str) -> list[Panel]:
    """Return a panel for identity, FID and prompt agreement, as far as the tests have them."""
    reference = comparison.row(comparison.reference)
    found = []
    for name in PANELS:
        key, title = f"{name}/{extractor}", title_of(name)
        lines = []
        for row in comparison.present if reference.tests else []:
            score = comparison.difference(reference.key, row.key).get(key) if row is not reference else None
            if score is not None:
                lines.append((row.title, score, judge_difference(score, title)))
        if lines:
            found.append(Panel(key, title, lines))
    return found


def forest(found: Sequence[Panel]) -> Figure:
    """Draw panels side by side: a dot and its 95% interval a row, filled where the interval does not hold zero."""
    titles = list(dict.fromkeys(title for panel in found for title, _, _ in panel.lines))
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            (3 + 3 * len(found), 1.2 + 0.42 * len(titles)), dpi=150, layout=ConstrainedLayoutEngine(wspace=0.06)
        )
        grid = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
        for axes, panel in zip(grid, found, strict=True):
            axes.axvline(0, color=RULE, zorder=0)
            for title, score, kind in panel.lines:
                _interval(axes, titles.index(title), score, COLOURS[kind], filled=kind != "unclear")
            better = {"↑": "higher is better", "↓": "lower is better"}[panel.title[-1]]
            axes.set_title(f"{panel.title[:-2]}, {better}", loc="left", fontweight="bold", fontsize=10)
            axes.set_xlim(*_limits(panel))
            axes.locator_params(axis="x", nbins=5)
            axes.spines["left"].set_visible(False)
            axes.tick_params(axis="y", length=0)
        grid[0].set_yticks(range(len(titles)), [textwrap.fill(title, 40, break_on_hyphens=False) for title in titles])
        grid[0].set_ylim(len(titles) - 0.5, -0.75)
        figure.supxlabel(LEGEND, fontsize=8, color=COLOURS["unclear"])
    return figure


def _interval(axes: Axes, y: float, score: Score, colour: str, filled: bool) -> None:
    if score.low is not None and score.high is not None:
        axes.plot([score.low, score.high], [y, y], color=colour, linewidth=2, solid_capstyle="butt")
    axes.plot(score.value, y, "o", color=colour, markerfacecolor=colour if filled else "white", markersize=6)
    text, right = str(format_score(score, signed=True)), axes.get_yaxis_transform()
    axes.text(1, y - 0.22, text, color=colour, ha="right", va="bottom", fontsize=7.5, transform=right)


def _limits(panel: Panel) -> tuple[float, float]:
    """Return limits that hold zero and every interval, and that are not mere rounding apart."""
    bounds = [bound for _, s, _ in panel.lines for bound in (s.value, s.low, s.high, 0.0) if bound is not None]
    low, high = min(bounds), max(bounds)
    margin = max(0.06 * (high - low), 1e-3)
    return low - margin, high + margin


# ---- the plane ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """The points of one row in the plane of two scores.

    Args:
        title: in the legend.
        points: (x, y) each.
        front: indices of the Pareto front.
        chosen: index of the point that was chosen; None for none.
    """

    title: str
    points: Sequence[tuple[float, float]]
    front: Sequence[int] = ()
    chosen: int | None = None


def plane(series: Sequence[Series], x_title: str, y_title: str, title: str) -> Figure:
    """Draw each row in a colour: its points, filled and joined where on its Pareto front, the chosen one in a ring."""
    with matplotlib.rc_context(STYLE):
        figure = Figure((6.4, 4.8 + 0.22 * len(series)), dpi=200, layout="constrained")
        axes = figure.subplots()
        axes.grid(color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        for number, one in enumerate(series):
            repeats, place = divmod(number, len(PALETTE))
            colour, marker = PALETTE[place], "os^Dv"[repeats % 5]
            front = sorted(one.points[i] for i in one.front)
            axes.plot([], [], marker, color=colour, label=one.title)
            axes.plot(*zip(*one.points, strict=True), marker, color=colour, markerfacecolor="white")
            if front:
                axes.plot(*zip(*front, strict=True), f"{marker}-", color=colour)
            if one.chosen is not None:
                axes.plot(*one.points[one.chosen], "o", color=colour, markerfacecolor="none", markersize=13)
        axes.set(xlabel=x_title, ylabel=y_title)
        axes.set_title(title, fontsize=10)
        figure.legend(loc="outside lower left", frameon=False)
    return figure


def identity_by_seconds(comparison: Comparison, extractor: str) -> Figure | None:
    """Draw each row's identity, with its 95% interval, against the seconds that it takes to learn a person.

    Returns:
        None where fewer than two rows have both.
    """
    key, found = f"identity_held_out/{extractor}", []
    for row in comparison.present:
        seconds, score = comparison.costs(row)["personalise"], comparison.scores[row.key].get(key)
        if seconds and score is not None:
            found.append((row.title, seconds, score))
    if len(found) < 2:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure((6.4, 3.6 + 0.22 * len(found)), dpi=200, layout="constrained")
        axes = figure.subplots()
        axes.grid(color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        for number, (title, seconds, score) in enumerate(found):
            repeats, place = divmod(number, len(PALETTE))
            ends = [abs(score.value - bound) for bound in (score.low, score.high) if bound is not None]
            bars = [[end] for end in ends] if len(ends) == 2 else None
            style: dict[str, Any] = {"fmt": "os^Dv"[repeats % 5], "color": PALETTE[place], "label": title, "capsize": 2}
            axes.errorbar([seconds], [score.value], yerr=bars, **style)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")  # its own writes powers as formulas
        axes.set(xlabel="seconds to personalise, a person", ylabel=f"identity by {extractor} (higher is better)")
        figure.legend(loc="outside lower left", frameon=False)
    return figure
