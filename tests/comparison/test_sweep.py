"""Points, choices and tables of sweep; no point is run here."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_multiip.comparison import sweep as module
from lit_multiip.comparison.compare import Inputs
from lit_multiip.comparison.plan import CompareError
from lit_multiip.comparison.steps import Step
from lit_multiip.comparison.sweep import (
    Point,
    best_setting,
    find_pareto_front,
    make_points,
    read_trained_plan,
    render,
    sweep,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "a.yaml").write_text("trainer: {max_steps: 5}\n")
    rows = {
        "a": {"configs": [str(tmp_path / "a.yaml")], "title": "A"},
        "b": {"configs": [str(tmp_path / "a.yaml")], "title": "B", "fit": True, "seeds": True},
    }
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({"rows": rows, "reference": "b", "output": str(tmp_path / "compared")}))
    return str(path)


@pytest.fixture
def trained_run(tmp_path):
    """What `compare` would leave of row `b`."""
    run = tmp_path / "compared" / "b" / "version_0"
    (run / "checkpoints").mkdir(parents=True)
    torch.save({"state_dict": {}}, run / "checkpoints" / "last.ckpt")
    (run / "config.yaml").write_text("trainer: {max_steps: 5}\nckpt_path: null\n")
    return str(run)


def record(identity: float, prompt: float, **setting: Any) -> dict[str, Any]:
    values = {"identity_held_out": identity, "prompt": prompt}
    scores = {key: {"value": value, "low": value - 0.1, "high": value + 0.1} for key, value in values.items()}
    return {"part": "settings", "row": "a", "setting": setting, "side": "validation", "scores": scores}


def test_the_pareto_front_is_what_nothing_beats():
    assert find_pareto_front([(1, 5), (2, 4), (2, 3), (3, 1), (0, 0), (3, 1)]) == [0, 1, 3, 5]
    assert find_pareto_front([(1, 1)]) == [0]


def test_the_best_setting_has_the_highest_identity_that_prompts_allow():
    records = [record(0.4, 0.80, s=1), record(0.5, 0.795, s=2), record(0.9, 0.70, s=3), record(0.3, 0.9, s=4)]
    assert best_setting(records, 0.01) == {"s": 2}
    assert best_setting(records, 0.001) == {"s": 1}
    assert best_setting(records, 0.2) == {"s": 3}


def test_the_table_marks_front_and_choice():
    records = [record(0.4, 0.8, ip_scale=1.0), record(0.5, 0.7, ip_scale=2.0), record(0.3, 0.7, ip_scale=3.0)]
    lines = {
        line.split("|")[1].strip(): line
        for line in render(records, {"a": {"ip_scale": 1.0}}, 0.01).splitlines()
        if "|" in line
    }
    assert "* best" in lines["ip_scale 1.0"] and "| *" in lines["ip_scale 2.0"]
    assert "*" not in lines["ip_scale 3.0"] and "0.30 [0.20, 0.40]" in lines["ip_scale 3.0"]


def points_of(plan: str, parts: dict[str, Any], folder: Path) -> tuple[list[Point], list[Step]]:
    return make_points(read_trained_plan(plan), parts, 25, folder)


def test_points_are_on_validation_people_and_trained_rows_are_not_trained_again(plan, tmp_path, trained_run):
    scales = {"model.sampling.ip_scale": [1.0, 0.5], "model.sampling.guidance_scale": [3.0, 5.0]}
    parts = {"settings": {"a": {"grid": scales}, "b": {"grid": {"model.sampling.ip_scale": [1.0]}}}}
    points, steps = points_of(plan, parts, tmp_path)
    assert len(points) == len(steps) == 5 and {step.command for step in steps} == {"test"}
    assert points[0].setting == {"model.sampling.ip_scale": 1.0, "model.sampling.guidance_scale": 3.0}  # the default
    assert len({point.folder for point in points}) == 5
    for step in steps:
        assert {"--data.tested=validation", "--data.tested_people=25", "--score.anchors=false"} <= set(step.arguments)
    assert steps[-1].arguments[:2] == ["--run", trained_run]


def test_what_two_parts_have_is_tested_once(plan, tmp_path):
    """The default setting, and the default number of references."""
    parts = {
        "settings": {"a": {"grid": {"model.sampling.ip_scale": [0.5, 1.0]}}},
        "references": {"a": {"grid": {"data.references": [3, 9]}}},
    }
    points, steps = points_of(plan, parts, tmp_path)
    assert len(points) == 4 and len(steps) == 3
    assert points[1].folder == points[3].folder and points[1].part != points[3].part


def test_a_number_of_training_people_is_fitted_once_and_scored_on_both_sides(plan, tmp_path):
    people = {"run": None, "grid": {"data.training_people": [10, 20]}, "options": {"trainer.max_steps": 7}}
    parts = {"people": {"b": people}, "people_on_train": {"b": people | {"test_options": {"data.tested": "train"}}}}
    points, steps = points_of(plan, parts, tmp_path)
    assert [point.side for point in points] == ["validation", "validation", "train", "train"]
    assert [step.command for step in steps] == ["fit", "test", "fit", "test", "test", "test"]
    fit, test, again = steps[0], steps[1], steps[4]
    assert "--data.training_people=10" in fit.arguments and "--trainer.max_steps=7" in fit.arguments
    assert again.arguments[:2] == test.arguments[:2] == ["--run", str(fit.run)]
    assert "--data.tested=train" in again.arguments and "--data.tested=validation" not in again.arguments
    assert f"--score.output={points[2].folder}" in again.arguments and points[0].folder != points[2].folder


def test_unknown_rows_and_broken_plans_are_refused(plan, tmp_path):
    grid = {"grid": {"model.sampling.ip_scale": [1.0]}}
    with pytest.raises(CompareError, match=r"no row 'z', which settings names: the plan has a, b"):
        sweep(plan, {"settings": {"z": grid}}, output=str(tmp_path / "out"))
    with pytest.raises(CompareError, match=r"row 'a' of settings cannot be changed .*no_such"):
        sweep(plan, {"settings": {"a": {"no_such": 1}}}, output=str(tmp_path / "out"))
    with pytest.raises(CompareError, match=r"version_0' has no checkpoint that can be loaded: train it first"):
        sweep(plan, {"settings": {"b": grid}}, output=str(tmp_path / "out"))
    (tmp_path / "broken.yaml").write_text("rows: [1]\n")
    with pytest.raises(CompareError, match=r"broken.yaml' is not the config of a comparison"):
        sweep(str(tmp_path / "broken.yaml"), {})
    assert not (tmp_path / "out").exists()


def test_a_sweep_writes_its_tables_and_plane_and_tests_the_best_settings(plan, tmp_path, monkeypatch):
    """Of two settings the second has the higher identity, at a prompt agreement within the tolerance."""

    def leave_results(steps, processes):
        for number, step in enumerate(steps):
            values = {"identity_held_out": 0.4 + 0.1 * number, "prompt": 0.8 - 0.001 * number}
            scores = {f"{key}/critic": {"value": v, "low": v - 0.1, "high": v + 0.1} for key, v in values.items()}
            content = {"extractors": {"critic": {}}, "describe": {"method": "A"}, "rows": {"A": scores}}
            (step.run / "test").mkdir(parents=True)
            (step.run / "test" / "metrics.json").write_text(json.dumps(content))

    compared = []
    monkeypatch.setattr(module, "run_steps", leave_results)
    monkeypatch.setattr(module, "compare", lambda rows, **options: compared.append((rows, options)))
    out = tmp_path / "out"
    sweep(plan, {"settings": {"a": {"grid": {"model.sampling.ip_scale": [1.0, 0.5]}}}}, output=str(out))
    plane = {f"plane.{kind}" for kind in ("png", "svg", "pdf")}
    assert {path.name for path in out.iterdir()} == {"settings", "sweep.md", "sweep.csv"} | plane
    assert "| ip_scale 0.5 | * best |" in (out / "sweep.md").read_text()
    [(rows, options)] = compared
    assert rows["a"].options == {"model.sampling.ip_scale": 0.5} and options["reference"] == "a"
    assert options["output"] == str(out / "best") and "test_options" not in options


def test_the_shipped_sweep_has_the_points_that_it_says(tmp_path, monkeypatch):
    """Settings, then what references and people add; the configs are not parsed here, for it takes seconds."""
    monkeypatch.chdir(ROOT)

    class Named(Inputs):
        def key(self, command, arguments, depends="", untrained=False):
            return " ".join([command, *arguments, depends])

        def read_run(self, run):
            return [], run

    monkeypatch.setattr(module, "Inputs", Named)
    content = yaml.safe_load(Path("configs/plans/sweep.yaml").read_text())
    points, steps = points_of(content["plan"], content["parts"], tmp_path / "never")
    assert len(points) == 3 + 4 * 12 + 4 + 4 + 7 + 2 * 5
    assert sum(step.command == "fit" for step in steps) == 5 and len(steps) == len(points) + 5
    assert not (tmp_path / "never").exists()
