"""`report`: from a folder of tests to Markdown, LaTeX rows, PNG figures and one self-contained page."""

from __future__ import annotations

import re
from pathlib import Path

from lit_multiip.comparison import tables as findings
from lit_multiip.comparison.figures import figure6, forest_png, panels
from lit_multiip.comparison.page import page
from lit_multiip.comparison.tables import Cell, Table
from lit_multiip.comparison.tests import Comparison, load_comparison
from lit_multiip.evaluation.results import markdown

LATEX = {
    "\\": r"\textbackslash{}",
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
}


def report(folder: str) -> Path:
    """Write <folder>/report/ of the tests that the folder's plan names: report.md, table.tex, figures and index.html.

    Args:
        folder: what `compare` wrote, such as runs/compare/mini.

    Returns:
        Where the page is.
    """
    comparison = load_comparison(Path(folder))
    out = Path(folder) / "report"
    out.mkdir(exist_ok=True)
    for old in out.glob("*.png"):
        old.unlink()
    figures = []
    picture = figure6(comparison)
    if picture is not None:
        picture.save(out / "figure6.png")
        figures.append(("figure6.png", "Methods x people: the same prompts, references and held-out photos"))
    for name in comparison.extractors:
        found = panels(comparison, name)
        if found:
            forest_png(found).save(out / f"differences_{name}.png")
            title = comparison.row(comparison.reference).title
            figures.append((f"differences_{name}.png", f"{title} minus each row by {name}, with 95% intervals"))
    (out / "report.md").write_text(as_markdown(comparison, figures), encoding="utf-8")
    (out / "table.tex").write_text(as_latex(comparison), encoding="utf-8")
    (out / "index.html").write_text(page(comparison), encoding="utf-8")
    for i, name in enumerate(comparison.extractors):
        print(_markdown_table(findings.table1(comparison, name, costs=i == 0)) + "\n")
    print(f"Report: {out / 'index.html'}", flush=True)
    return out / "index.html"


def as_markdown(comparison: Comparison, figures: list[tuple[str, str]]) -> str:
    """The whole report in Markdown; figures as (file, text)."""
    tables: list[Table | None] = []
    for i, name in enumerate(comparison.extractors):
        first = findings.table1(comparison, name, costs=i == 0)
        tables += [first, findings.spreads(first), findings.differences(comparison, name)]
        tables += [findings.attribution(comparison, name), findings.anchors(comparison, name)]
    tables += [findings.paper(comparison), findings.wall_times(comparison), findings.audits(comparison)]
    parts = [
        f"# {comparison.title}",
        findings.summary(comparison),
        findings.attributed(comparison),
        _bullets(comparison.notes()),
    ]
    parts += [f"![{text}]({file})" for file, text in figures]
    parts += [_markdown_table(table) for table in tables if table is not None]
    parts += ["## How it was measured", _bullets([f"{name}: {value}" for name, value in findings.facts(comparison)])]
    parts += ["## Limitations", _bullets(findings.limitations(comparison))]
    return "\n\n".join(filter(None, parts)) + "\n"


def _bullets(items: list[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _markdown_table(table: Table) -> str:
    def shown(cell: Cell) -> str:
        return f"**{cell.value}** {cell.interval}".strip() if cell.best else str(cell)

    body = [[line.title, *map(shown, line.cells)] for line in table.lines]
    notes = f"\n\n{_bullets(table.notes)}" if table.notes else ""
    return f"## {table.title}\n\n{markdown([['', *table.columns], *body])}{notes}"


def as_latex(comparison: Comparison) -> str:
    """Table 1 as a booktabs tabular an extractor, and the paper's own figures beside ours."""
    parts = ["% Needs \\usepackage{booktabs} and \\usepackage{graphicx}."]
    tables: list[Table | None] = [
        findings.table1(comparison, name, i == 0) for i, name in enumerate(comparison.extractors)
    ]
    for table in filter(None, [*tables, findings.paper(comparison)]):
        lines: list[str] = []
        for i, line in enumerate(table.lines):
            if i and line.group != table.lines[i - 1].group:
                lines.append(r"\midrule")
            lines.append(" & ".join([latex(line.title), *map(_latex_cell, line.cells)]) + r" \\")
        head = " & ".join(["", *map(latex, table.columns)]) + r" \\"
        begin = r"\resizebox{\textwidth}{!}{\begin{tabular}{l" + "r" * len(table.columns) + "}"
        rules = [begin, r"\toprule", head, r"\midrule", *lines, r"\bottomrule", r"\end{tabular}}"]
        parts.append("\n".join([f"% {table.title}", *(f"% {note}" for note in table.notes), *rules]))
    return "\n\n".join(parts) + "\n"


def latex(text: str) -> str:
    """Text with everything escaped that LaTeX takes for a command."""
    return "".join(LATEX.get(character, character) for character in text)


def _latex_cell(cell: Cell) -> str:
    value = cell.value
    if re.fullmatch(r"[+-]?[\d.]+", value):
        value = rf"$\mathbf{{{value}}}$" if cell.best else f"${value}$"
    else:
        value = latex(value)
    return value + (rf" {{\scriptsize ${cell.interval}$}}" if cell.interval else "")
