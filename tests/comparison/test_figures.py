"""Figures: what they show, and that it lies inside of them."""

import json
from pathlib import Path

import numpy as np
import pytest
from comparing import write_comparison
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from lit_multiip.comparison.figures import (
    CELL,
    PALETTE,
    Panel,
    Series,
    figure6,
    forest,
    identity_by_seconds,
    panels,
    plane,
    save,
)
from lit_multiip.comparison.tests import load_comparison
from lit_multiip.evaluation.intervals import Score


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_comparison(write_comparison(tmp_path_factory.mktemp("figures") / "mini"))


def saved(figure: Figure | None, folder: Path) -> np.ndarray:
    """Pixels of a figure's PNG, (H, W, 3)."""
    assert figure is not None
    save(figure, folder / "figure")
    return np.asarray(Image.open(folder / "figure.png").convert("RGB"))


def written_outside(figure: Figure) -> list[str]:
    """Texts that are cut off at the figure's edge."""
    figure.draw_without_rendering()
    box = figure.bbox
    texts = [text for text in figure.findobj(lambda artist: hasattr(artist, "get_text")) if text.get_text()]
    extents = {text.get_text(): text.get_window_extent() for text in texts if text.get_visible()}
    return [
        text
        for text, e in extents.items()
        if e.x0 < box.x0 - 1 or e.x1 > box.x1 + 1 or e.y0 < box.y0 - 1 or e.y1 > box.y1 + 1
    ]


def test_figure_6_shows_the_very_images(loaded, tmp_path):
    pixels = saved(figure6(loaded), tmp_path)
    image = Image.open(loaded.folder / "avg_pool_trained" / "version_0" / "test" / "images" / "p0" / "photo_0_s0.png")
    expected = np.asarray(image).repeat(16, 0).repeat(16, 1)  # 8 px at 128
    left = round(1.6 * CELL[0])
    cell = pixels[-4 - 128 : -4, left : left + 128]  # the last row's first person
    assert (cell == expected).all()


def test_every_format_is_written_and_the_same_twice(loaded, tmp_path):
    contents = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        saved(forest(panels(loaded, "critic")), tmp_path / name)
        contents.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert contents[0].keys() == {"figure.png", "figure.svg", "figure.pdf"} and contents[0] == contents[1]


def test_differences_lie_in_their_panels_with_zero(loaded):
    found = panels(loaded, "critic")
    assert [title for title, *_ in found[0].lines] == ["IP-Adapter", "Average Pooling", "Control avg_pool_trained"]
    assert {kind for *_, kind in found[0].lines} == {"better"}
    for axes, panel in zip(forest(found).axes, found, strict=True):
        low, high = axes.get_xlim()
        bounds = [bound for _, score, _ in panel.lines for bound in score[:3] if bound is not None]
        assert low < min([0.0, *bounds]) and max([0.0, *bounds]) < high


def test_long_titles_and_captions_are_not_cut_off_and_a_dollar_is_no_formula(tmp_path):
    folder = write_comparison(tmp_path / "mini")
    plan = (folder / "plan.json").read_text()
    title = "A method whose title is as long as a sentence of $20 and $30, and goes on"
    (folder / "plan.json").write_text(plan.replace("Average Pooling", title))
    comparison = load_comparison(folder)
    picture = figure6(comparison)
    assert picture is not None
    for figure in (picture, forest(panels(comparison, "critic"))):
        assert written_outside(figure) == []
        texts = [text.get_text().replace("\n", " ") for text in figure.findobj(lambda a: hasattr(a, "get_text"))]
        assert title in texts


def test_differences_of_mere_rounding_do_not_fill_a_panel():
    panel = Panel("prompt/critic", "prompt ↑", [("A", Score(1e-17, -1e-17, 2e-17, 9, 3), "unclear")])
    low, high = forest([panel]).axes[0].get_xlim()
    assert low <= -1e-3 and high >= 1e-3


def test_every_row_has_a_colour_its_front_is_joined_and_its_choice_ringed(tmp_path):
    def colours(pixels):
        return [int((abs(pixels / 255 - to_rgb(colour)) < 0.01).all(-1).sum()) for colour in PALETTE[:3]]

    apart = [Series("one", [(0.0, 1.0), (1.0, 0.0)]), Series("two", [(0.2, 0.4)], chosen=0)]
    joined = [Series("one", [(0.0, 1.0), (1.0, 0.0)], front=[0, 1]), Series("two", [(0.2, 0.4)])]
    counts = [colours(saved(plane(series, "x", "y", "title"), tmp_path)) for series in (apart, joined)]
    assert all(count[0] > 100 and count[1] > 100 and count[2] == 0 for count in counts)
    assert counts[1][0] > counts[0][0] + 1000  # the line between the two points
    assert counts[0][1] > counts[1][1]  # the ring


def test_one_point_can_be_drawn():
    figure = plane([Series("one", [(0.5, 0.5), (0.5, 0.5)], front=[0, 1], chosen=1)], "x", "y", "title")
    assert written_outside(figure) == []


def test_identity_stands_against_the_seconds_a_person_takes(loaded, tmp_path):
    assert identity_by_seconds(loaded, "critic") is None  # no test says what a person took
    folder = write_comparison(tmp_path / "mini")
    for row, seconds in (("ip_adapter", 0.6), ("avg_pool", 600.0)):
        file = folder / row / "version_0" / "test" / "metrics.json"
        metrics = json.loads(file.read_text())
        metrics["seconds"]["personalise"] = seconds
        file.write_text(json.dumps(metrics))
    comparison = load_comparison(folder)
    figure = identity_by_seconds(comparison, "critic")
    assert figure is not None
    saved(figure, tmp_path)
    [axes] = figure.axes
    points = [container.lines[0].get_xydata()[0] for container in axes.containers]
    people = comparison.protocol["people"]
    expected = [comparison.scores[row]["identity_held_out/critic"].value for row in ("ip_adapter", "avg_pool")]
    assert np.allclose(points, [(0.6 / people, expected[0]), (600 / people, expected[1])])
    assert axes.get_xscale() == "log" and "100" in [label.get_text() for label in axes.get_xticklabels()]
    score = comparison.scores["avg_pool"]["identity_held_out/critic"]
    [bar] = axes.containers[1].lines[2][0].get_segments()
    assert np.allclose(bar[:, 1], (score.low, score.high))
