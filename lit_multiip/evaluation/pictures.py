"""Labelled pictures of many images, for reports and TensorBoard."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from lit_multiip.data.photos import Photo
from lit_multiip.data.tasks import Task
from lit_multiip.files import LitMultiIPError
from lit_multiip.pixels import square

MIN_CELL = 96  # px; below it faces and labels cannot be read
GAP = 4  # px
LONGEST_LABEL = 400  # letters; a caption may be of any length
Cell = Image.Image | None


def to_picture(image: Tensor) -> Image.Image:
    """(3, H, W) uint8 => a picture."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def squares(photos: Iterable[Photo], side: int) -> list[Image.Image]:
    """Read photos, cut square and scaled to `side` px."""
    return [square(photo.image(), side) for photo in photos]


def first_tasks(tasks: Sequence[Task], people: int) -> list[int]:
    """Return the indices of the first task of each of the first people; of one person, of each held-out photo."""
    alone = len({task.person for task in tasks}) == 1
    keys = [task.held_out if alone else task.person for task in tasks]
    first: dict[Photo | str, int] = {key: index for index, key in reversed(list(enumerate(keys)))}
    return sorted(first.values())[:people]


def labelled_grid(
    rows: Sequence[Sequence[Cell]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    side: int,
    title: str | None = None,
) -> Image.Image:
    """Lay images out in rows and columns with their labels.

    Cells below 96 px are enlarged by a whole factor, pixel by pixel (64 px are shown at 128); images that are not
    square are padded with white, never cut.

    Args:
        rows: images by row; None leaves a cell empty. All rows as long as `column_labels`.
        row_labels: one a row, wrapped to fit.
        column_labels: one a column, wrapped to fit.
        side: side of a cell, px.
        title: over the whole picture.

    """
    n_columns = len(column_labels)
    if not n_columns or {len(row) for row in rows} != {n_columns} or len(rows) != len(row_labels):
        cells = f"{len(rows)} rows of {sorted({len(row) for row in rows})} cells"
        raise LitMultiIPError(
            f"{cells} for {len(row_labels)} row and {n_columns} column labels: give one label for each"
        )
    cell, step, left, size = _layout(side)
    font, title_font = ImageFont.load_default(size), ImageFont.load_default(size * 1.3)
    heads = [_wrap_text(label, font, cell) for label in column_labels]
    head = max(text.count("\n") + 1 for text in heads) * round(1.5 * size)  # px
    heading = _wrap_text(title, title_font, left + n_columns * step - 2 * GAP) if title else ""
    top = (heading.count("\n") + 1) * 2 * size if title else 0
    picture = Image.new("RGB", (left + n_columns * step, top + head + len(rows) * step), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((GAP, GAP), heading, "black", title_font)
    for column, text in enumerate(heads):
        draw.text((left + column * step + cell / 2, top), text, "black", font, anchor="ma", align="center")
    for number, (row, label) in enumerate(zip(rows, row_labels, strict=True)):
        y = top + head + number * step
        lines = _wrap_text(label, font, left - 3 * GAP).split("\n")[: max(1, int(cell / (1.4 * size)))]
        draw.text((GAP, y + cell / 2), "\n".join(lines), "black", font, anchor="lm")
        for column, image in enumerate(row):
            if image is not None:
                picture.paste(_fit_cell(image, cell), (left + column * step, y))
    return picture


def draw_tasks(
    tasks: Sequence[Task],
    rows: Mapping[str, Iterable[Tensor]],
    side: int,
    title: str,
    most_references: int | None = None,
) -> Image.Image:
    """Draw references | held-out photo | generated, a task a row: the picture that shows whether a method works.

    Args:
        tasks: at least one.
        rows: images of the tasks, (3, H, W) uint8 each, by the title of their column.
        side: side of a cell, px.
        title: over the whole picture.
        most_references: that are shown of each task; None shows all.
    """
    cells = [
        [*squares([*task.references[:most_references], task.held_out], side), *map(to_picture, images)]
        for task, *images in zip(tasks, *rows.values(), strict=True)
    ]
    references = (f"reference {number + 1}" for number in range(len(tasks[0].references[:most_references])))
    labels = [f"{task.person}\n{task.prompt}" for task in tasks]
    return labelled_grid(cells, labels, [*references, "held-out photo", *rows], side, title)


class Bars(NamedTuple):
    """A strip of bars under photos, one a photo."""

    label: str
    values: Sequence[float]
    texts: Sequence[str]  # the values as they are written
    even: float | None = None  # drawn as a line: the value if all photos were alike


def photos_with_bars(
    photos: Sequence[Image.Image],
    bars: Sequence[Bars],
    beside: Mapping[str, Image.Image],
    side: int,
    title: str,
) -> Image.Image:
    """Photos in a row, strips of bars under them (below zero in orange), and other images to the right.

    Args:
        photos: of one person, N.
        bars: strips with N values each, from top to bottom; each has its own scale.
        beside: images to the right, by label.
        side: side of a cell, px.
        title: over the whole picture.
    """
    labels = [*(f"reference {i + 1}" for i in range(len(photos))), *beside]
    top = labelled_grid([[*photos, *beside.values()]], ["references"], labels, side, title)
    cell, step, left, size = _layout(side)
    height, line = cell // 2, round(1.5 * size)  # px that bars and a text take
    strip_height = height + 2 * line
    font = ImageFont.load_default(size)
    picture = Image.new("RGB", (top.width, top.height + len(bars) * strip_height + GAP), "white")
    picture.paste(top)
    draw = ImageDraw.Draw(picture)
    for number, strip in enumerate(bars):
        y = top.height + number * strip_height
        draw.line((left, y, left + len(photos) * step - GAP, y), "lightgrey")
        label = _wrap_text(strip.label, font, left - 3 * GAP)
        draw.text((GAP, y + strip_height / 2), label, "black", font, anchor="lm")
        finite = [value for value in strip.values if math.isfinite(value)]
        high, low = max([0.0, strip.even or 0.0, *finite]), min([0.0, *finite])
        scale = height / (high - low) if high > low else 0.0  # px a unit
        zero, right = y + line + high * scale, left + len(photos) * step - GAP
        if strip.even is not None:
            draw.line((left, zero - strip.even * scale, right, zero - strip.even * scale), "lightgrey")
        for column, (value, text) in enumerate(zip(strip.values, strip.texts, strict=True)):
            middle, end = left + column * step + cell / 2, zero - (value if math.isfinite(value) else 0) * scale
            box = (middle - cell / 5, min(end, zero), middle + cell / 5, max(end, zero))
            colour, away, anchor = ("steelblue", -1, "md") if value >= 0 else ("darkorange", 1, "ma")
            draw.rectangle(box, colour)
            draw.text((middle, end + away * GAP / 2), text, "black", font, anchor=anchor)
        draw.line((left, zero, right, zero), "black")
    return picture


def _layout(side: int) -> tuple[int, int, int, int]:
    """Return a cell's side, from one cell to the next, the width of the row labels, and the size of text, px."""
    cell = side * -(-MIN_CELL // side)  # the least multiple of the side that is MIN_CELL or more
    return cell, cell + GAP, 3 * cell // 2, max(12, cell // 9)


def _fit_cell(image: Image.Image, cell: int) -> Image.Image:
    method = Image.Resampling.NEAREST if max(image.size) <= cell else Image.Resampling.LANCZOS
    return ImageOps.pad(image.convert("RGB"), (cell, cell), method, color="white")


def _wrap_text(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """Break text at spaces, and words that are too long within, so that no line is wider than `width` px."""
    # names of files may hold bytes that are no text, which cannot be drawn
    text = text.encode("utf-8", "replace").decode()
    text = text if len(text) <= LONGEST_LABEL else f"{text[:LONGEST_LABEL]}…"
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.replace("_", "_\u200b").split(" "):
            for n, part in enumerate(word.split("\u200b")):
                joined = f"{line}{' ' if line and n == 0 else ''}{part}"
                if line and font.getlength(joined) > width:
                    lines.append(line)
                    joined = part
                while len(joined) > 1 and font.getlength(joined) > width:
                    fits = max(1, bisect_right(range(len(joined)), width, key=lambda n: font.getlength(joined[:n])) - 1)
                    lines.append(joined[:fits])
                    joined = joined[fits:]
                line = joined
        lines.append(line)
    return "\n".join(lines)
