import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from commands import refusal
from comparing import write_comparison, write_plan, write_test

from lit_multiip.__main__ import main
from lit_multiip.comparison.report import as_page, latex, report
from lit_multiip.comparison.tables import summarise
from lit_multiip.comparison.tests import load_comparison

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Tags that balance, and what they say."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_comparison(tmp_path_factory.mktemp("report") / "mini", extractors=("critic", "critic_b"))
    shutil.rmtree(folder / "avg_pool_trained")
    return folder


@pytest.fixture(scope="module")
def html(folder):
    return report(str(folder)).read_text("utf-8")


def test_the_command_writes_everything_and_prints_the_table(folder, capsys):
    main(["report", "--folder", str(folder)])
    out = capsys.readouterr().out
    assert "## Table 1, by critic_b" in out and "report/index.html" in out
    figures = ("figure6", "differences_critic", "differences_critic_b")
    names = {
        "report.md",
        "table.tex",
        "index.html",
        *(f"{name}.{kind}" for name in figures for kind in ("png", "svg", "pdf")),
    }
    assert {path.name for path in (folder / "report").iterdir()} == names


def test_a_broken_folder_ends_the_command_in_one_line(tmp_path, capsys):
    assert "has no plan.json" in refusal(capsys, "report", "--folder", str(tmp_path))


def test_the_page_is_whole_and_needs_no_network(html):
    page = Page(html)
    rest = re.sub(r"data:image/(png|svg\+xml);base64,[\w+/=]+", "", html)
    assert not re.search(r"https?:|//|@import|url\(|<script|<link", rest)
    assert len(html) < 10_000_000
    kinds = [image["src"].partition(";")[0] for image in page.all("img")]
    assert kinds == ["data:image/png", "data:image/svg+xml", "data:image/svg+xml"]
    assert all(image["alt"] for image in page.all("img")) and len(page.all("figcaption")) == 3
    headings = {attrs["id"] for attrs in page.all("h2")}
    assert {link["href"].removeprefix("#") for link in page.all("a")} == headings and len(headings) == 14
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert "default-src 'none'" in html


def test_the_page_is_the_markdown(folder, html):
    """Every table's every cell, and every sentence."""
    text = re.sub(r"\s+", " ", " ".join(Page(html).text))
    for line in (folder / "report" / "report.md").read_text("utf-8").splitlines():
        if line.startswith(("![", "| ---")):
            continue
        for part in line.split(" | "):
            words = re.sub(r"^[#\-|]+ | \|$|\*\*", "", part).strip()
            assert words in text, words


@pytest.mark.parametrize(
    "name",
    ["<script>alert(1)</script>", "[a](javascript:alert(1))", "<img src=x onerror=y>", "<http://x.org>", "&lt;b&gt;"],
)
def test_names_that_strangers_chose_are_shown_as_they_are(name, tmp_path):
    html = as_page(f"# {name}\n\n## {name}\n\n- {name}\n\n| | b |\n| --- | --- |\n| {name} | 1 [0, 2] |\n", tmp_path)
    page = Page(html)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert [link["href"][0] for link in page.all("a")] == ["#"]
    shown = " ".join(page.text)
    assert shown.count(name if name != "&lt;b&gt;" else "<b>") == 6  # title, link, two headings, bullet and cell
    assert "<td>1 <small>[0, 2]</small></td>" in html


def test_the_page_names_every_row_and_says_what_is_missing(html):
    text = " ".join(Page(html).text)
    for title in ("IP-Adapter", "Average Pooling", "Self-Attention", "Control avg_pool_trained"):
        assert title in text
    assert "Five methods & their controls" in text
    assert "Control avg_pool_trained: not run yet." in text and "1 of 4 rows are not run yet" in text
    assert "LFW, Inception: another scale and extractor, not comparable" in text
    assert re.search(
        r"To identity to the held-out photo \(higher is better\), by critic, each cause adds: more photos \+0\.10", text
    )
    assert "more photos: Average Pooling minus IP-Adapter. Nine against one." in text


def test_every_format_has_the_same_numbers(folder, html):
    score = load_comparison(folder).scores["self_attn"]["identity_held_out/critic"]
    shown = [f"{value:.3f}".rstrip("0") for value in (score.value, score.low)]
    for name in ("report.md", "table.tex", "index.html"):
        text = (folder / "report" / name).read_text("utf-8")
        assert all(number[:4] in text for number in shown), name


def test_latex_escapes_what_it_takes_for_commands(folder, html):
    assert latex("50% of a_b & c #1 {x} ~^\\ $ FID ↓") == (
        r"50\% of a\_b \& c \#1 \{x\} \textasciitilde{}\textasciicircum{}\textbackslash{} \$ FID $\downarrow$"
    )
    tex = (folder / "report" / "table.tex").read_text("utf-8")
    body = [line for line in tex.splitlines() if not line.startswith("%")]
    assert not re.search(r"(?<!\\)[_%#]", "\n".join(body))
    columns = {}
    for line in body:
        if line.startswith(r"\resizebox"):
            columns = {len(line.split("{")[-1].rstrip("}"))}
        if line.endswith(r"\\"):
            assert {len(re.findall(r"(?<!\\)&", line)) + 1} == columns
    assert r"Control avg\_pool\_trained & not run yet &" in tex


def test_a_table_without_the_papers_methods_has_a_leader_of_all_rows(folder, tmp_path):
    own = Path(shutil.copytree(folder, tmp_path / "own"))
    plan = json.loads((own / "plan.json").read_text())
    for row in plan["rows"]:
        row["group"] = "control"
    (own / "plan.json").write_text(json.dumps(plan))
    text = summarise(load_comparison(own))
    assert text.startswith("Self-Attention has the best identity to the held-out photo of the rows by critic,")
    assert "paper" not in text and "A control" not in text


def test_a_comparison_without_photos_or_reference_has_a_report_still(tmp_path, capsys):
    write_plan(tmp_path, {"self_attn": ["version_0"], "ip_adapter": ["version_0"]}, contrasts=[])
    write_test(
        tmp_path / "ip_adapter/version_0/test",
        "First",
        photos={},
        audit={"passed": True, "copies": [], "pairs": [{"a": 1}]},
    )
    html = report(str(tmp_path)).read_text("utf-8")
    assert not (tmp_path / "report" / "figure6.png").exists()
    text = re.sub(r"\s+", " ", " ".join(Page(html).text))
    assert "Methods x people" not in html
    assert "Self-Attention not run yet" in text
    assert "What the audits found IP-Adapter passed yes copies none pairs 1 listed" in text


def test_a_row_that_another_program_drew_stands_in_the_tables_and_what_is_not_known_is_said(tmp_path):
    folder = tmp_path / "mini"
    write_plan(folder, {"self_attn": ["version_0"], "avg_pool": ["version_0"], "ip_adapter": ["version_0"]})
    write_test(folder / "self_attn/version_0/test", "SelfAttention", 0.4, anchors=True)
    write_test(folder / "avg_pool/version_0/test", "AvgPool", 0.2)
    drawn = {"method": "PhotoMaker", "image_side": 8, "images": "drawn"}
    write_test(folder / "ip_adapter/version_0/test", "PhotoMaker", 0.1, describe=drawn, seconds={"method": None})
    comparison = load_comparison(folder)
    row = comparison.row("ip_adapter")
    assert row.drawn_elsewhere and not comparison.row("avg_pool").drawn_elsewhere
    assert comparison.costs(row) == dict.fromkeys(("personalise", "image", "parameters"))
    assert comparison.difference("self_attn", "ip_adapter")["identity_held_out/critic"].value > 0.2
    report(str(folder))
    text = (folder / "report" / "report.md").read_text("utf-8")
    assert "IP-Adapter: drawn by another program; how, and what it was trained on, is not known." in text
    assert "IP-Adapter: elsewhere" in text and "Rows differ in their backbone" not in text
