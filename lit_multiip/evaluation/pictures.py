"""Labelled pictures of many images, for reports and TensorBoard."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

MIN_CELL = 96  # px; below it faces and labels cannot be read
GAP = 4  # px
Cell = Image.Image | None


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
        rows: Images by row; None leaves a cell empty. All rows as long as `column_labels`.
        row_labels: One a row, wrapped to fit.
        column_labels: One a column, wrapped to fit.
        side: Side of a cell, px.
        title: Over the whole picture.

    Raises:
        ValueError: Numbers of labels, rows and cells do not fit, or there is no cell.
    """
    n_columns = len(column_labels)
    if not rows or not n_columns or side < 1:
        raise ValueError(f"{len(rows)} rows of {n_columns} columns at {side} px: a grid has at least one cell of 1 px")
    if len(rows) != len(row_labels) or any(len(row) != n_columns for row in rows):
        cells = f"{len(rows)} rows of {sorted({len(row) for row in rows})} cells"
        raise ValueError(f"{cells} for {len(row_labels)} row and {n_columns} column labels: give one label for each")
    cell = side * -(-MIN_CELL // side)  # the least multiple of the side that is MIN_CELL or more
    step, left = cell + GAP, 3 * cell // 2
    size = max(12, cell // 9)
    font, title_font = ImageFont.load_default(size), ImageFont.load_default(size * 1.3)
    heads = [_wrapped(label, font, cell) for label in column_labels]
    head = max(text.count("\n") + 1 for text in heads) * round(1.5 * size)  # px
    heading = _wrapped(title, title_font, left + n_columns * step - 2 * GAP) if title else ""
    top = (heading.count("\n") + 1) * 2 * size if title else 0
    picture = Image.new("RGB", (left + n_columns * step, top + head + len(rows) * step), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((GAP, GAP), heading, "black", title_font)
    for column, text in enumerate(heads):
        draw.text((left + column * step + cell / 2, top), text, "black", font, anchor="ma", align="center")
    for number, (row, label) in enumerate(zip(rows, row_labels, strict=True)):
        y = top + head + number * step
        lines = _wrapped(label, font, left - 3 * GAP).split("\n")[: max(1, int(cell / (1.4 * size)))]
        draw.text((GAP, y + cell / 2), "\n".join(lines), "black", font, anchor="lm")
        for column, image in enumerate(row):
            if image is not None:
                picture.paste(_fitted(image, cell), (left + column * step, y))
    return picture


def references_held_out_generated(
    references: Sequence[Sequence[Image.Image]],
    held_out: Sequence[Image.Image],
    generated: Sequence[Image.Image],
    row_labels: Sequence[str],
    side: int,
    title: str | None = None,
) -> Image.Image:
    """The picture that shows whether a method works: references | held-out photo | generated, a task a row.

    Args:
        references: Of each task, any number; shorter rows are left empty on the right.
        held_out: One a task.
        generated: One a task.
        row_labels: One a task, such as its person and prompt.
        side: Side of a cell, px.
        title: Over the whole picture.

    Raises:
        ValueError: Their numbers differ, or there are none.
    """
    most = max((len(photos) for photos in references), default=0)
    rows: list[list[Cell]] = [
        [*photos, *[None] * (most - len(photos)), target, image]
        for photos, target, image in zip(references, held_out, generated, strict=True)
    ]
    columns = [*(f"reference {i + 1}" for i in range(most)), "held-out photo", "generated"]
    return labelled_grid(rows, row_labels, columns, side, title)


def _fitted(image: Image.Image, cell: int) -> Image.Image:
    method = Image.Resampling.NEAREST if max(image.size) <= cell else Image.Resampling.LANCZOS
    return ImageOps.pad(image.convert("RGB"), (cell, cell), method, color="white")


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """Break text at spaces, and words that are too long within, so that no line is wider than `width` px."""
    # names of files may hold bytes that are no text, which cannot be drawn
    text = text.encode("utf-8", "replace").decode()
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
