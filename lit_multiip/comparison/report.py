"""`report`: from a folder of tests to Markdown, LaTeX tables, figures, and one page that needs nothing else.

The Markdown is the source: the page is that text in HTML, with the figures inside it.
"""

from __future__ import annotations

import base64
import re
from functools import partial
from html import unescape
from io import BytesIO
from pathlib import Path

from PIL import Image

from lit_multiip.comparison import figures, tables
from lit_multiip.comparison.rows import Comparison
from lit_multiip.comparison.tables import Cell, Table
from lit_multiip.comparison.tests import load_comparison
from lit_multiip.evaluation.results import markdown
from lit_multiip.files import package_file

LATEX = {
    "\\": r"\textbackslash{}",
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
}
LARGEST_PNG = 2 << 20  # bytes, in the page; larger ones become JPEG there
# what python-markdown makes of names that strangers chose, and a report has no use for
NOT_MARKDOWN = ("html", "link", "reference", "short_reference", "image_reference", "short_image_ref", "autolink")


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
    for old in (file for kind in figures.FORMATS for file in out.glob(f"*.{kind}")):
        old.unlink()
    text = as_markdown(comparison, draw_figures(comparison, out))
    (out / "report.md").write_text(text, encoding="utf-8")
    (out / "table.tex").write_text(as_latex(comparison), encoding="utf-8")
    (out / "index.html").write_text(as_page(text, out), encoding="utf-8")
    for i, name in enumerate(comparison.extractors):
        print(_markdown_table(tables.table1(comparison, name, costs=i == 0)) + "\n")
    print(f"Report: {out / 'index.html'}", flush=True)
    return out / "index.html"


def draw_figures(comparison: Comparison, out: Path) -> list[tuple[str, str]]:
    """Draw what there is to draw into `out`.

    Returns:
        Each figure's PNG file and caption.
    """
    drawn = []
    picture = figures.figure6(comparison)
    if picture is not None:
        figures.save(picture, out / "figure6")
        drawn.append(("figure6.png", "Methods x people: the same prompts, references and held-out photos"))
    for name in comparison.extractors:
        found = figures.panels(comparison, name)
        if found:
            figures.save(figures.forest(found), out / f"differences_{name}")
            title = comparison.row(comparison.reference).title
            drawn.append((f"differences_{name}.png", f"{title} minus each row by {name}, with 95% intervals"))
        costs = figures.identity_by_seconds(comparison, name)
        if costs is not None:
            figures.save(costs, out / f"seconds_{name}")
            drawn.append((f"seconds_{name}.png", f"Identity by {name} against seconds to personalise a person"))
    return drawn


def as_markdown(comparison: Comparison, drawn: list[tuple[str, str]]) -> str:
    """Return the whole report in Markdown; figures as (file, caption)."""
    parts = [f"# {comparison.title}", tables.summarise(comparison), tables.summarise_contrasts(comparison)]
    parts += [_bullets(comparison.notes())]
    parts += [f"![{caption}]({file})" for file, caption in drawn]
    parts += map(_markdown_table, tables.all_tables(comparison))
    parts += ["## How it was measured", _bullets([f"{name}: {value}" for name, value in tables.list_facts(comparison)])]
    parts += ["## Limitations", _bullets(tables.list_limitations(comparison))]
    return "\n\n".join(filter(None, parts)) + "\n"


def _bullets(items: list[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _markdown_table(table: Table) -> str:
    def shown(cell: Cell) -> str:
        return f"**{cell.value}** {cell.interval}".strip() if cell.best else str(cell)

    body = [[line.title, *map(shown, line.cells)] for line in table.lines]
    notes = f"\n\n{_bullets(table.notes)}" if table.notes else ""
    return f"## {table.title}\n\n{markdown([['', *table.columns], *body])}{notes}"


# ---- the page -------------------------------------------------------------------------------------------------------


def as_page(text: str, folder: Path) -> str:
    """Make one HTML page of a report in Markdown; what lies in `folder` and the text shows is put into the page."""
    from jinja2 import Environment
    from markdown import Markdown
    from markupsafe import Markup

    reader = Markdown(extensions=["tables", "toc"], output_format="html")
    reader.preprocessors.deregister("html_block")
    for name in NOT_MARKDOWN:
        reader.inlinePatterns.deregister(name)
    body = reader.convert(text)
    body = re.sub(r'<p>(<img alt="([^"]*)" src=)"([\w.-]+)\.png"[^>]*></p>', partial(_figure, folder), body)
    # wide tables scroll by themselves, by keyboard too; intervals stand under their values
    body = body.replace("<table>", '<div class="scroll" role="region" aria-label="table" tabindex="0"><table>')
    body = body.replace("</table>", "</table></div>")
    body = re.sub(r"(?<=[\d>]) (\[[^]<]+\])(?=</td>)", r" <small>\1</small>", body)
    [title] = reader.toc_tokens
    sections = [(section["id"], unescape(section["name"])) for section in title["children"]]
    template = Environment(autoescape=True).from_string(package_file("comparison/page.html.jinja").read_text("utf-8"))
    return template.render(title=unescape(title["name"]), sections=sections, body=Markup(body))


def _figure(folder: Path, match: re.Match[str]) -> str:
    """Return a figure with its caption, as pixels where it shows photos, else as SVG."""
    image, caption, name = match.groups()
    kind = "png" if name == "figure6" else "svg+xml"
    content = (folder / f"{name}.{kind[:3]}").read_bytes()
    if kind == "png" and len(content) > LARGEST_PNG:
        kind, buffer = "jpeg", BytesIO()
        Image.open(BytesIO(content)).convert("RGB").save(buffer, "JPEG", quality=88)
        content = buffer.getvalue()
    data = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return f'<figure>{image}"{data}"><figcaption>{caption}</figcaption></figure>'


# ---- LaTeX ----------------------------------------------------------------------------------------------------------


def as_latex(comparison: Comparison) -> str:
    """Return Table 1 as a booktabs tabular an extractor, and the paper's own figures beside ours."""
    parts = ["% Needs \\usepackage{booktabs} and \\usepackage{graphicx}."]
    first = [tables.table1(comparison, name, i == 0) for i, name in enumerate(comparison.extractors)]
    for table in filter(None, [*first, tables.paper_table(comparison)]):
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
    """Escape everything in a text that LaTeX takes for a command."""
    return "".join(LATEX.get(character, character) for character in text)


def _latex_cell(cell: Cell) -> str:
    value = cell.value
    if re.fullmatch(r"[+-]?[\d.]+", value):
        value = rf"$\mathbf{{{value}}}$" if cell.best else f"${value}$"
    else:
        value = latex(value)
    return value + (rf" {{\scriptsize ${cell.interval}$}}" if cell.interval else "")
