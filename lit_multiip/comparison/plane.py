"""A plane of two scores: each row's points in one colour, its Pareto front joined, its chosen point ringed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lit_multiip.comparison.figures import tick_step

# Okabe and Ito's palette, told apart also by the colour-blind; yellow and black left out
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
SCALE = 2  # px of the picture a px of this layout
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 480, 70, 20, 46, 60
INK, RULE = "#1f2328", "#d0d7de"


@dataclass(frozen=True)
class Series:
    """The points of one row.

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


def plane(series: Sequence[Series], x_title: str, y_title: str, title: str) -> Image.Image:
    """Draw the plane; up and right is better.

    Raises:
        ValueError: there is no point.
    """
    values = np.array([point for one in series for point in one.points], dtype=float)
    if not len(values):
        raise ValueError("there is no point to draw: give at least one")
    low, high = values.min(0), values.max(0)
    margin = np.where(high > low, 0.06 * (high - low), 0.5)
    low, high = low - margin, high + margin
    legend = 22 * len(series)
    picture = Image.new("RGB", (WIDTH * SCALE, (HEIGHT + legend) * SCALE), "white")
    draw = ImageDraw.Draw(picture)

    def at(point: Sequence[float]) -> tuple[float, float]:
        x, y = (np.asarray(point) - low) / (high - low)
        return (LEFT + x * (WIDTH - LEFT - RIGHT)) * SCALE, (HEIGHT - BOTTOM - y * (HEIGHT - TOP - BOTTOM)) * SCALE

    def text(x: float, y: float, words: str, size: int = 13, anchor: str = "ls") -> None:
        draw.text((x * SCALE, y * SCALE), words, INK, ImageFont.load_default(size * SCALE), anchor=anchor)

    for axis in (0, 1):
        step = tick_step(float(high[axis] - low[axis]))
        for tick in np.arange(np.ceil(low[axis] / step), np.floor(high[axis] / step) + 1) * step:
            ends = [(tick, low[1]), (tick, high[1])] if axis == 0 else [(low[0], tick), (high[0], tick)]
            draw.line([at(end) for end in ends], RULE, SCALE)
            x, y = (value / SCALE for value in at(ends[0]))
            text(*((x, y + 18) if axis == 0 else (x - 6, y + 4)), f"{tick:.3g}", 12, "ms" if axis == 0 else "rs")
    text(WIDTH / 2, 22, title, 15, "ms")
    text(WIDTH - RIGHT, HEIGHT - 20, x_title, 13, "rs")
    text(LEFT, TOP - 6, y_title)
    for number, one in enumerate(series):
        colour, r = PALETTE[number % len(PALETTE)], 4.5 * SCALE
        line = [at(one.points[i]) for i in sorted(one.front, key=lambda i: one.points[i])]
        if len(line) > 1:
            draw.line(line, colour, 2 * SCALE)
        for i, point in enumerate(one.points):
            x, y = at(point)
            draw.ellipse((x - r, y - r, x + r, y + r), colour if i in one.front else "white", colour, 2 * SCALE)
            if i == one.chosen:
                draw.ellipse((x - 2 * r, y - 2 * r, x + 2 * r, y + 2 * r), None, colour, 2 * SCALE)
        y = HEIGHT + 22 * number
        box = (LEFT * SCALE, (y - 10) * SCALE, (LEFT + 12) * SCALE, (y + 2) * SCALE)
        draw.ellipse(box, colour)
        text(LEFT + 20, y, one.title)
    return picture
