"""Points, choices and tables of sweep; no point is run here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_multiip.__main__ import main
from lit_multiip.comparison import sweep as module
from lit_multiip.comparison.compare import CompareError, Row
from lit_multiip.comparison.sweep import People, best_setting, pareto_front, read_plan, render, sweep

ROOT = Path(__file__).parents[2]


@pytest.fixture
def plan(tmp_path: Path) -> str:
    (tmp_path / "a.yaml").write_text("trainer: {max_steps: 5}\n")
    rows = {
        "a": {"configs": [str(tmp_path / "a.yaml")], "title": "A"},
        "b": {"configs": [str(tmp_path / "a.yaml")], "title": "B", "fit": True, "seeds": True},
    }
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({"rows": rows, "reference": "b", "output": str(tmp_path / "compared")}))
    return str(path)


def record(identity: float, prompt: float, **setting: Any) -> dict[str, Any]:
    values = {"identity_held_out": identity, "prompt": prompt}
    scores = {key: {"value": value, "low": value - 0.1, "high": value + 0.1} for key, value in values.items()}
    return {"part": "settings", "row": "a", "setting": setting, "side": "validation", "scores": scores}


def test_the_pareto_front_is_what_nothing_beats() -> None:
    assert pareto_front([(1, 5), (2, 4), (2, 3), (3, 1), (0, 0), (3, 1)]) == [0, 1, 3, 5]
    assert pareto_front([(1, 1)]) == [0]


def test_the_best_setting_has_the_highest_identity_that_prompts_allow() -> None:
    records = [record(0.4, 0.80, s=1), record(0.5, 0.795, s=2), record(0.9, 0.70, s=3), record(0.3, 0.9, s=4)]
    assert best_setting(records, 0.01) == {"s": 2}
    assert best_setting(records, 0.001) == {"s": 1}
    assert best_setting(records, 0.2) == {"s": 3}


def test_the_table_marks_front_and_choice() -> None:
    records = [record(0.4, 0.8, ip_scale=1.0), record(0.5, 0.7, ip_scale=2.0), record(0.3, 0.7, ip_scale=3.0)]
    lines = {
        line.split("|")[1].strip(): line
        for line in render(records, {"a": {"ip_scale": 1.0}}, 0.01).splitlines()
        if "|" in line
    }
    assert "* best" in lines["ip_scale 1.0"] and "| *" in lines["ip_scale 2.0"]
    assert "*" not in lines["ip_scale 3.0"] and "0.30 [0.20, 0.40]" in lines["ip_scale 3.0"]


def test_points_are_on_validation_people_and_trained_rows_are_not_trained_again(
    plan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lit_multiip.comparison.compare._checkpoint_hash", lambda run: "0")
    content, rows = read_plan(plan)
    assert rows["a"].run is None and rows["b"].run == str(tmp_path / "compared" / "b" / "version_0")
    grids = {"a": {"ip_scale": [1.0, 0.5], "guidance_scale": [3.0, 5.0]}, "b": {"ip_scale": [1.0]}}
    options = {"data.tested": "validation"}
    points = list(module._setting_points(rows, content, grids, options, tmp_path))
    assert len(points) == 5 and all(len(point.steps) == 1 for point in points)
    assert points[0].setting == {"ip_scale": 1.0, "guidance_scale": 3.0}  # the default
    assert len({point.folder for point in points}) == 5 and len({point.steps[0].key for point in points}) == 5
    for point in points:
        arguments = point.steps[0].arguments
        assert "--data.tested=validation" in arguments and "--score.anchors=false" in arguments
    assert points[-1].steps[0].arguments[:2] == ["--run", rows["b"].run]


def test_a_number_of_training_people_is_fitted_once_and_scored_on_both_sides(plan: str, tmp_path: Path) -> None:
    content, rows = read_plan(plan)
    people = People("b", [10, 20], {"trainer.max_steps": 7})
    points = list(module._people_points(rows, content, people, {"data.tested": "validation"}, tmp_path))
    assert [(point.side, [step.command for step in point.steps]) for point in points] == [
        ("validation", ["fit", "test"]),
        ("train", ["test"]),
    ] * 2
    fit, test, again = (*points[0].steps, *points[1].steps)
    assert "--data.training_people=10" in fit.arguments and "--trainer.max_steps=7" in fit.arguments
    assert again.arguments[:2] == test.arguments[:2] == ["--run", str(fit.run)]
    assert again.arguments[-1] == "--data.tested=train"  # the last one counts
    assert points[0].folder != points[1].folder
    assert f"--score.output={points[1].folder}" in again.arguments


def test_unknown_rows_and_broken_plans_are_refused(plan: str, tmp_path: Path) -> None:
    with pytest.raises(CompareError, match=r"no row 'z' in .*plan.yaml', which has a, b"):
        sweep(plan, {"z": {"ip_scale": [1.0]}}, output=str(tmp_path / "out"))
    with pytest.raises(CompareError, match=r"version_0' has no checkpoint that can be loaded: train it first"):
        sweep(plan, {"b": {"ip_scale": [1.0]}}, output=str(tmp_path / "out"))
    (tmp_path / "broken.yaml").write_text("rows: [1]\n")
    with pytest.raises(CompareError, match=r"broken.yaml' is not the config of a comparison"):
        sweep(str(tmp_path / "broken.yaml"), {})
    assert not (tmp_path / "out").exists()


def test_the_shipped_sweep_names_rows_of_the_shipped_plan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("lit_multiip.comparison.compare._checkpoint_hash", lambda run: "0")
    main(["sweep", "--config", "configs/plans/sweep.yaml", "--dry_run", "true", "--output", str(tmp_path / "never")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 + 4 * 12 + 4 + 4 + 7 + 3 * 5
    assert not (tmp_path / "never").exists()


def test_a_row_of_a_plan_is_a_row(plan: str) -> None:
    _, rows = read_plan(plan)
    assert isinstance(rows["a"], Row) and rows["b"].fit
