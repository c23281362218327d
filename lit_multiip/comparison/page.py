"""A comparison as one HTML page that needs nothing else: pictures and style are in it, and there are no scripts."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from io import BytesIO
from itertools import groupby

from PIL import Image

from lit_multiip.comparison import tables as findings
from lit_multiip.comparison.figures import figure6_rows, forest_svg, panels, pictured
from lit_multiip.comparison.tables import Cell, Line, Table
from lit_multiip.comparison.tests import Comparison

SIDE = 256  # px, of a picture in the page at most
STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --rule: #d8dee4; --paper: #fff; --band: #f6f8fa;
  --better: #0b5fd0; --worse: #b23b0a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa4af; --rule: #343b44; --paper: #0f1318;
  --band: #171c22; --better: #6cb0ff; --worse: #ff9d66; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 1320px; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0 .75rem; }
h2 { font-size: 1.25rem; line-height: 1.25; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p, li, dd { max-width: 46rem; overflow-wrap: anywhere; }
.lead { font-size: 1.05rem; }
.small, .small li { color: var(--soft); font-size: .875rem; }
ul { padding-left: 1.2rem; margin: .5rem 0; }
nav { font-size: .9rem; margin: 0 0 1rem; }
nav a { color: var(--better); display: inline-block; margin-right: 1rem; padding: .35rem 0; }
.scroll { overflow-x: auto; border: 1px solid var(--rule); border-radius: 8px; }
.scroll:focus-visible, a:focus-visible { outline: 2px solid var(--better); outline-offset: 2px; }
table { border-collapse: separate; border-spacing: 0; font-size: .875rem; font-variant-numeric: tabular-nums;
  width: 100%; }
th, td { border-bottom: 1px solid var(--rule); padding: .45rem .55rem; text-align: right; vertical-align: top; }
td { white-space: nowrap; } td.words, td.text { white-space: normal; }
tbody:last-child tr:last-child > * { border-bottom: 0; }
thead th { background: var(--band); color: var(--soft); font-weight: 600; vertical-align: bottom; }
th:first-child { background: var(--paper); left: 0; max-width: 16rem; min-width: 11.5rem;
  overflow-wrap: break-word; position: sticky;
  text-align: left; font-weight: 600; z-index: 1; }
thead th:first-child, th.block { background: var(--band); }
th.block { color: var(--soft); font-size: .8rem; }
td span { display: block; white-space: nowrap; }
td .i { color: var(--soft); font-size: .8em; }
td .s { color: var(--soft); font-size: .75em; font-style: italic; }
td.words { color: var(--soft); font-style: italic; text-align: left; }
td.text { text-align: left; }
td.best > span:first-child { font-weight: 700; color: var(--better); }
td.clear > span:first-child { color: var(--ink); } td.worse > span:first-child { color: var(--worse); }
.pictures td.words, td.words { text-align: left; }
.pictures td, .pictures thead th { text-align: center; padding: .25rem; }
.pictures thead th { font-weight: 400; font-size: .75rem; min-width: 104px; }
.pictures tbody th { vertical-align: middle; }
.pictures img { display: block; height: 104px; image-rendering: auto; margin: 0 auto; width: 104px;
  border-radius: 4px; }
.panels { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; }
.panels figure { border: 1px solid var(--rule); border-radius: 8px; flex: 1 1 300px; max-width: 460px; padding: .5rem; }
svg { display: block; height: auto; width: 100%; font: 12px system-ui, sans-serif; }
svg .bold { font-size: 14px; font-weight: 700; }
svg text.ink { fill: var(--ink); } svg text.unclear { fill: var(--soft); }
svg text.better { fill: var(--better); } svg text.worse { fill: var(--worse); }
svg .better { stroke: var(--better); fill: var(--better); } svg .worse { stroke: var(--worse); fill: var(--worse); }
svg .unclear { stroke: var(--soft); fill: var(--soft); } svg .rule { stroke: var(--rule); }
svg text { stroke: none !important; } svg .hollow { fill: var(--paper); }
dl { display: grid; gap: .25rem 1rem; grid-template-columns: max-content 1fr; font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; }
@media (max-width: 600px) {
  body { padding: .75rem; } h1 { font-size: 1.4rem; }
  th:first-child { max-width: 8rem; min-width: 7rem; overflow-wrap: break-word; } th, td { padding: .4rem .55rem; }
  .pictures thead th:first-child { min-width: 6rem; } .pictures tbody th { font-size: .78rem; max-width: 6rem; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; }
}
@media print { .scroll { overflow: visible; border: 0; } nav { display: none; } }
"""


def page(comparison: Comparison) -> str:
    """The whole page."""
    names = list(comparison.extractors)
    sections = [("table", "Table 1", _table1s(comparison))]
    sections.append(("differences", "Paired differences", _differences(comparison)))
    sections.append(("gain", "Where the gain comes from", _attribution(comparison)))
    sections.append(("figure", "Figure 6: the same people and prompts", _figure6(comparison)))
    sections.append(
        ("anchors", "Anchors: what a score is worth", _tables([findings.anchors(comparison, n) for n in names]))
    )
    sections.append(("paper", "The paper's own figures", _tables([findings.paper(comparison)])))
    sections.append(("audit", "Audit", _tables([findings.audits(comparison)])))
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in findings.facts(comparison))
    sections.append(("measured", "How it was measured", f"<dl>{facts}</dl>" + _table(findings.wall_times(comparison))))
    sections.append(("limits", "Limitations", _bullets(findings.limitations(comparison))))
    sections = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{name}">{escape(title.partition(":")[0])}</a>' for name, title, _ in sections)
    notes = comparison.notes()
    body = "".join(
        f'<section id="{name}"><h2>{escape(title)}</h2>{content}</section>' for name, title, content in sections
    )
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(comparison.title)}</title><style>{STYLE}</style></head><body>"
        f"<header><h1>{escape(comparison.title)}</h1></header><main>"
        f'<p class="lead">{escape(findings.summary(comparison))}</p>'
        + (f"<h2>To know before reading</h2>{_bullets(notes)}" if notes else "")
        + f'<nav aria-label="Sections">{links}</nav>{body}</main></body></html>\n'
    )


def _table1s(comparison: Comparison) -> str:
    return _tables([findings.table1(comparison, name, i == 0) for i, name in enumerate(comparison.extractors)])


def _differences(comparison: Comparison) -> str:
    parts = []
    for name in comparison.extractors:
        drawn = "".join(f"<figure>{forest_svg(panel)}</figure>" for panel in panels(comparison, name))
        parts.append(_table(findings.differences(comparison, name)))
        if drawn:
            legend = (
                "Filled dots: the 95% interval is clear of zero, for better (blue) or worse (orange). Hollow, grey: "
                "not clear."
            )
            parts.append(f'<p class="small">{legend}</p><div class="panels">{drawn}</div>')
    return "".join(parts)


def _attribution(comparison: Comparison) -> str:
    said = findings.attributed(comparison)
    tables = _tables([findings.attribution(comparison, name) for name in comparison.extractors])
    return (f"<p>{escape(said)}</p>" if said else "") + tables


def _figure6(comparison: Comparison) -> str:
    people = pictured(comparison)
    if not people:
        return ""
    head = "".join(f'<th scope="col">{escape(person.prompt)}</th>' for person in people)
    body = []
    for title, cells in figure6_rows(comparison):
        if not any(cells):
            rest = f'<td class="words" colspan="{len(people)}">{findings.NOT_RUN}</td>'
            body.append(f'<tr><th scope="row">{escape(title)}</th>{rest}</tr>')
            continue
        row = []
        for person, picture in zip(people, cells, strict=True):
            text = escape(f"{title}: {person.prompt}", quote=True)
            image = "" if picture is None else f'<img src="{data_uri(picture)}" alt="{text}" width="104" height="104">'
            row.append(f"<td>{image}</td>")
        body.append(f'<tr><th scope="row">{escape(title)}</th>{"".join(row)}</tr>')
    note = (
        "The first held-out photo of each of the first test people, not chosen by how the images look: the nine "
        "references, the held-out photo, and what each row's first training draws from its prompt."
    )
    table = f'<thead><tr><th scope="col">prompt</th>{head}</tr></thead><tbody>{"".join(body)}</tbody>'
    return f'<p class="small">{note}</p>' + _scroll("Figure 6", f'<table class="pictures">{table}</table>')


def data_uri(picture: Image.Image) -> str:
    """A picture inside of the page: small ones as they are, large ones at 256 px as JPEG."""
    buffer = BytesIO()
    if max(picture.size) <= SIDE:
        picture.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        small = picture.copy()
        small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        small.save(buffer, "JPEG", quality=88)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _tables(tables: Sequence[Table | None]) -> str:
    return "".join(_table(table) for table in tables if table is not None)


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(_kept(column))}</th>' for column in ["", *table.columns])
    bodies = []
    groups = len({line.group for line in table.lines}) > 1
    for group, lines in groupby(table.lines, key=lambda line: line.group):
        block = ""
        if groups:
            title = escape(findings.GROUPS.get(group, group))
            rest = f'<td colspan="{len(table.columns)}"></td>' if table.columns else ""
            block = f'<tr><th class="block" scope="rowgroup">{title}</th>{rest}</tr>'
        bodies.append(f"<tbody>{block}{''.join(map(_line, lines))}</tbody>")
    content = f"<table><thead><tr>{head}</tr></thead>{''.join(bodies)}</table>"
    return f"<h3>{escape(table.title)}</h3>{_scroll(table.title, content)}" + _bullets(table.notes, "small")


def _line(line: Line) -> str:
    first, *rest = line.cells
    cells = "".join(map(_cell, line.cells))
    if first.value.endswith(findings.NOT_RUN) and not any(cell.value for cell in rest):
        cells = f'<td class="words" colspan="{len(line.cells)}">{escape(first.value)}</td>'
    return f'<tr><th scope="row">{escape(line.title)}</th>{cells}</tr>'


def _cell(cell: Cell) -> str:
    words = cell.value.endswith(findings.NOT_RUN) or cell.value in ("left out", "not measured", "unknown")
    kinds = {f"best {cell.verdict}".strip(): cell.best, "words": words, "text": len(cell.value) > 24}
    name = next((name for name, holds in kinds.items() if holds), "")
    style = f' class="{name}"' if name else ""
    value = escape(cell.value)
    said = [value if len(cell.value) > 24 else f"<span>{value}</span>"] if value else []
    said += [
        f'<span class="{kind}">{escape(text)}</span>'
        for kind, text in (("i", cell.interval), ("s", cell.spread))
        if text
    ]
    return f"<td{style}>{''.join(said)}</td>"


def _kept(title: str) -> str:
    """A title whose arrow stays beside its last word."""
    return title.replace(" ↑", "\u00a0↑").replace(" ↓", "\u00a0↓")


def _scroll(label: str, content: str) -> str:
    """Wide content that scrolls by itself, by keyboard too."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label, quote=True)}">{content}</div>'


def _bullets(items: Sequence[str], kind: str = "") -> str:
    if not items:
        return ""
    return f'<ul class="{kind}">{"".join(f"<li>{escape(item)}</li>" for item in items)}</ul>'
