"""Steps of a plan: which there are, and what has them done anew; no command is run here."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from commands import refusal
from onnx_file import write_pooling
from PIL import Image

from lit_multiip.__main__ import main
from lit_multiip.comparison import compare as module
from lit_multiip.comparison.compare import Inputs, make_steps
from lit_multiip.comparison.plan import CompareError, Contrast, Plan, Row
from lit_multiip.comparison.steps import Step, run_steps
from lit_multiip.files import hash_file

ROOT = Path(__file__).parents[2]
PLAN = ROOT / "configs" / "plans" / "compare.yaml"


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "method.yaml"
    path.write_text("trainer: {max_steps: 5}\n")
    return str(path)


def steps_of(rows: dict[str, Row], folder: Path, **changed: Any) -> list[Step]:
    return make_steps(Plan(rows, next(iter(rows)), output=str(folder), **changed).expand(), Inputs())


def leave_results(step: Step) -> None:
    """What the step's command would leave."""
    step.run.mkdir(parents=True, exist_ok=True)
    if step.command != "fit":
        (step.run / "test").mkdir(exist_ok=True)
        (step.run / "test" / "metrics.json").write_text('{"protocol": {"sha256": "0"}}')


def run_all(steps: list[Step], monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Run what is not done yet, and tell which that was."""
    done = []
    for step in steps:
        if not step.is_done():
            leave_results(step)
            monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0))
            monkeypatch.setattr("lit_multiip.comparison.steps.commit", lambda: None)
            run_steps([step])
            done.append((step.row, step.command))
    return done


def test_untrained_rows_are_tested_once_and_trained_ones_per_seed(config, tmp_path):
    rows = {"a": Row([config], "A", fit=True, seeds=True), "b": Row([config], "B"), "c": Row([config], "C", seeds=True)}
    steps = steps_of(rows, tmp_path, seeds=[0, 1, 2])
    assert [(s.row, s.seed, s.command) for s in steps] == [
        *[("a", seed, command) for seed in range(3) for command in ("fit", "test")],
        ("b", 0, "test"),
        *[("c", seed, "test") for seed in range(3)],
    ]
    assert len({s.key for s in steps}) == len(steps)
    anchors = [s for s in steps if "--score.anchors=true" in s.arguments]
    assert [(s.row, s.seed) for s in anchors] == [("a", 0)]  # they cost three tests' time
    assert "--data.training_seed=2" in steps[4].arguments and "--seed_everything=2" in steps[4].arguments
    assert not any("seed" in argument for argument in steps[6].arguments)  # data and tasks stay the same


def test_a_finished_step_is_skipped_until_what_it_depends_on_changes(config, tmp_path, monkeypatch):
    rows = {"a": Row([config], "A"), "b": Row([config], "B")}
    out = tmp_path / "out"
    assert run_all(steps_of(rows, out), monkeypatch) == [("a", "test"), ("b", "test")]
    assert run_all(steps_of(rows, out), monkeypatch) == []
    rows["b"].options = {"data.held_out": 3}
    assert run_all(steps_of(rows, out), monkeypatch) == [("b", "test")]
    Path(config).write_text("# a comment\ntrainer:\n  max_steps: 5\n")
    assert run_all(steps_of(rows, out), monkeypatch) == []
    Path(config).write_text("trainer: {max_steps: 6}\n")
    assert run_all(steps_of(rows, out), monkeypatch) == [("a", "test"), ("b", "test")]
    (out / "a" / "version_0" / "test" / "metrics.json").unlink()
    assert run_all(steps_of(rows, out), monkeypatch) == [("a", "test")]


def test_another_photo_or_caption_makes_everything_anew(config, tmp_path):
    folder = tmp_path / "photos"
    for person in "abc":
        for number in range(3):
            path = folder / person / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (number * 9, ord(person), 0)).save(path)
    overlay = tmp_path / "data.yaml"
    source = {"class_path": "lit_multiip.data.Folder", "init_args": {"path": str(folder)}}
    overlay.write_text(yaml.safe_dump({"data": {"source": source}}))
    keys = []
    for change in ("none", "none", "photo", "caption"):
        if change == "photo":
            Image.new("RGB", (8, 8), (1, 2, 3)).save(folder / "b" / "1.png")
        elif change == "caption":
            (folder / "b" / "1.txt").write_text("a photo of a person in a hat")
        keys.append(steps_of({"a": Row([config], "A")}, tmp_path / "out", configs=[str(overlay)])[0].key)
    assert keys[0] == keys[1] and len(set(keys)) == 3


def test_a_rows_own_photos_count_too(config, tmp_path):
    source = {"data.source": "lit_multiip.data.MiniFaces", "data.source.init_args.seed": 5}
    rows = {"a": Row([config], "A", fit=True), "b": Row([config], "B", fit=True, options=source)}
    keys = [step.key for step in steps_of(rows, tmp_path)]
    assert len(set(keys)) == 4


def test_any_option_whose_value_is_a_file_counts_by_its_content(tmp_path):
    """In a row's config and among its options; a copy of the file elsewhere is the same."""
    for name, text in (("one", "p1"), ("two", "p2"), ("copy", "p1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(text)

    def key(name, option, in_config):
        path, config = str(tmp_path / name / "file"), tmp_path / "method.yaml"
        section, _, last = option.partition(".")
        config.write_text(yaml.safe_dump({section: {last: path}} if in_config else {"seed_everything": 0}))
        options = {} if in_config else {option: path}
        return steps_of({"a": Row([str(config)], "A", fit=True, options=options)}, tmp_path / "out")[0].key

    for option in ("data.train_names", "data.test_names", "model.ip_adapter", "backbone.published_adapter"):
        for in_config in (False, option.startswith("data")):
            one, two, copy = (key(name, option, in_config) for name in ("one", "two", "copy"))
            assert one == copy != two, (option, in_config)


def test_no_source_text_of_the_package_decides_what_is_done(config, tmp_path, monkeypatch):
    """An edited docstring trains nothing anew; an edited module of the user's does."""
    read = []
    monkeypatch.setattr(module, "hash_file", lambda path: read.append(path) or hash_file(path))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_aggregator.py").write_text(
        "from lit_multiip.methods.aggregators import AvgPool\n\n\nclass Mine(AvgPool):\n    pass\n"
    )
    row = Row([config], "A", fit=True, options={"model.aggregator": "my_aggregator.Mine"})
    first = steps_of({"a": row}, tmp_path / "out")
    assert {path.name for path in read if path.suffix == ".py"} == {"my_aggregator.py"}
    with (tmp_path / "my_aggregator.py").open("a") as file:
        file.write("    # another\n")
    again = steps_of({"a": row}, tmp_path / "out")
    assert all(old.key != new.key for old, new in zip(first, again, strict=True))


def test_where_results_are_kept_is_no_reason_to_train_anew(config, tmp_path):
    row = Row([config], "A", fit=True)
    moved = {"data.cache_dir": "elsewhere", "trainer.logger.init_args.save_dir": "x", "checkpoint.dirpath": "y"}
    keys = [[s.key for s in steps_of({"a": row}, tmp_path / name)] for name in ("out", "other")]
    keys.append([s.key for s in steps_of({"a": row}, tmp_path / "out", options=moved)])
    assert keys[0] == keys[1] == keys[2]


def test_rows_that_are_trained_alike_share_a_training(config, tmp_path):
    rows = {
        "a": Row([config], "A", fit=True),
        "b": Row([config], "B", fit=True, test_options={"model.sampling.ip_scale": 0.5}),
    }
    steps = steps_of(rows, tmp_path)
    assert [(s.row, s.command) for s in steps] == [("a", "fit"), ("a", "test"), ("b", "test")]
    assert steps[2].arguments[:2] == ["--run", str(steps[0].run)] and steps[2].run == tmp_path / "b" / "version_0"
    assert steps[1].key != steps[2].key


def test_another_folder_of_people_is_scored_by_the_runs_of_a_finished_comparison(config, tmp_path):
    rows = {
        "one": Row([config], "One", fit=True, seeds=True),
        "alike": Row([config], "Alike", fit=True, seeds=True, test_options={"model.sampling.steps": 3}),
        "published": Row([config], "Published"),
    }
    first, second = tmp_path / "first", tmp_path / "second"
    others = {"test_options": {"data.test_fraction": 1}, "trained": str(first), "seeds": (0, 1)}
    with pytest.raises(CompareError, match=r"is no comparison: give --trained a folder"):
        Plan(rows, "one", output=str(second), **others).check()
    for step in steps_of(rows, first, seeds=(0, 1)):
        step.run.mkdir(parents=True, exist_ok=True)
        if step.command == "fit":
            (step.run / "config.yaml").write_text("trainer: {max_steps: 5}\n")
            (step.run / "checkpoints").mkdir()
            torch.save({"global_step": 5, "callbacks": {}}, step.run / "checkpoints" / "last.ckpt")
        else:
            step.stamp.write_text(json.dumps({"command": ["test", *step.arguments]}))
    (first / "plan.json").write_text("{}")
    steps = steps_of(rows, second, **others)
    assert {step.command for step in steps} == {"test"}
    tested = {(step.row, step.seed): step.arguments[1] for step in steps if step.row != "published"}
    own = {seed: str(first / "one" / f"version_{seed}") for seed in (0, 1)}
    assert tested == {(name, seed): own[seed] for name in ("one", "alike") for seed in (0, 1)}  # they shared one
    assert all("--data.test_fraction=1" in step.arguments for step in steps)
    assert all(step.run.is_relative_to(second) for step in steps)

    shutil.rmtree(first / "one" / "version_1")
    with pytest.raises(CompareError, match=r"version_1' holds no finished run: finish the comparison"):
        steps_of({"one": rows["one"]}, second, **others)
    with pytest.raises(CompareError, match=r"--trained and --output are both"):
        Plan(rows, "one", output=str(first), trained=str(first)).check()


def test_a_grid_is_a_row_for_every_combination_and_its_first_is_the_default(config, tmp_path):
    grid = {"model.sampling.ip_scale": [1.0, 0.5], "model.sampling.guidance_scale": [3.0, 5.0]}
    rows = {"a": Row([config], "A", grid=grid), "b": Row([config], "B")}
    contrasts = [Contrast("scale", ("a", "b"))]
    plan = Plan(rows, "a", contrasts=contrasts, output=str(tmp_path)).expand()
    assert list(plan.rows) == [
        *(f"a_ip_scale-{scale}_guidance_scale-{guidance}" for scale in (1.0, 0.5) for guidance in (3.0, 5.0)),
        "b",
    ]
    assert plan.reference == plan.contrasts[0].minus[0] == "a_ip_scale-1.0_guidance_scale-3.0"
    assert plan.rows["a_ip_scale-0.5_guidance_scale-3.0"].title == "A, ip_scale 0.5, guidance_scale 3.0"
    steps = make_steps(plan, Inputs())
    assert len({step.key for step in steps}) == 5
    assert "--model.sampling.ip_scale=0.5" in steps[2].arguments
    assert list(Plan(rows, "a").expand(only=["b"]).rows) == ["b"]


def test_a_variable_stands_in_options_at_any_depth_and_one_without_a_value_in_rows_left_out(config, tmp_path):
    extractors = [{"class_path": "OnnxFeatures", "init_args": {"path": "$network"}}, {"class_path": "Dlib"}]
    rows = {
        "a": Row([config], "A", options={"data.cache_dir": "$place"}),
        "b": Row([config], "B", options={"data.seed": "$b"}),
    }
    values = {"network": "net.onnx", "place": str(tmp_path), "b": None}
    plan = Plan(rows, "a", test_options={"score.extractors": extractors}, variables=values, output=str(tmp_path))
    assert plan.fill(plan.test_options)["score.extractors"][0]["init_args"] == {"path": "net.onnx"}
    assert plan.fill({"data.augment": "$other", "data.seed": 3}) == {"data.augment": "$other", "data.seed": 3}
    [step] = make_steps(plan.expand(["a"]), Inputs())
    assert f"--data.cache_dir={tmp_path}" in step.arguments
    assert any('"net.onnx"' in argument for argument in step.arguments)
    with pytest.raises(CompareError, match=r"variable 'b' has no value: give --variables\.b <value>"):
        make_steps(plan.expand(), Inputs())
    plan.check()
    with pytest.raises(CompareError, match=r"variable 'plase' stands in no option .* are: network, place, b$"):
        replace(plan, variables={**values, "plase": "mistyped"}).check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": "z"}, r"no row 'z': the plan has a"),
        ({"only": ["q"]}, r"no row 'q'"),
        ({"seeds": [1, 1]}, r"seeds are \[1, 1\]"),
        ({"rows": {"a/b": {"configs": [], "title": "A"}}, "reference": "a/b"}, r"'a/b' cannot be a folder"),
        ({"rows": {"a": {"configs": ["none.yaml"], "title": "A"}}}, r"'none.yaml', which is not a file"),
        ({"rows": {"a": {"configs": [], "title": "A", "grid": {"data.seed": []}}}}, r"no value for 'data.seed'"),
        ({"options": {"data.no_such": 1}}, r"no_such"),
        ({"rows": {"a": {"configs": [], "title": "A", "images": "gone"}}}, r"images in 'gone', which is not a folder"),
        (
            {"rows": {"a": {"configs": [], "title": "A", "images": ".", "fit": True}}},
            r"nothing here draws: leave out fit",
        ),
        ({"options": {"model.ip_adapter": "text"}}, r"the adapter is made at random and was never trained"),
    ],
)
def test_a_plan_that_cannot_work_is_refused_before_anything_runs(change, message, config, tmp_path, capsys):
    plan = {"rows": {"a": {"configs": [config], "title": "A"}}, "reference": "a", "output": str(tmp_path / "out")}
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan | change))
    assert re.search(message, refusal(capsys, "compare", "--config", str(path)))
    assert not (tmp_path / "out").exists()


def test_images_of_another_program_are_a_row_that_is_scored_anew_when_an_image_changes(config, tmp_path, monkeypatch):
    image = tmp_path / "drawn" / "Ann" / "1_s0-00000000.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"a")
    rows = {"a": Row([config], "A"), "b": Row([], "PhotoMaker", images=str(tmp_path / "drawn"))}
    out = tmp_path / "out"
    step = steps_of(rows, out)[1]
    assert step.command == "score" and "--name=PhotoMaker" in step.arguments
    assert {f"--images={tmp_path / 'drawn'}", f"--score.output={out / 'b/version_0/test'}"} <= set(step.arguments)
    assert run_all(steps_of(rows, out), monkeypatch) == [("a", "test"), ("b", "score")]
    assert run_all(steps_of(rows, out), monkeypatch) == []
    image.write_bytes(b"b")
    assert run_all(steps_of(rows, out), monkeypatch) == [("b", "score")]


def test_another_critic_makes_tests_anew_but_no_fit(config, tmp_path, monkeypatch):
    rows = {"a": Row([config], "A", fit=True)}
    fit, test = steps_of(rows, tmp_path)
    (tmp_path / "critic").mkdir()
    (tmp_path / "critic" / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.setattr(module, "shipped_critic", lambda name: tmp_path / name)
    later_fit, later_test = steps_of(rows, tmp_path)
    assert later_fit.key == fit.key and later_test.key != test.key


def test_another_face_network_that_conditions_makes_its_rows_anew(tmp_path):
    """By content, and also where an option names it over the config's own."""
    config = tmp_path / "face.yaml"
    config.write_text("backbone: {face_encoder: {path: nowhere.onnx, detector: null}}\n")
    a, b = (write_pooling(tmp_path / f"{side}.onnx", side=side) for side in (32, 64))
    copied = Path(shutil.copy(a, tmp_path / "copy.onnx"))
    rows = {
        path.stem: Row([str(config)], "A", fit=True, options={"backbone.face_encoder.path": str(path)})
        for path in (a, b, copied)
    }
    fits = [step for step in steps_of(rows, tmp_path / "out") if step.command == "fit"]
    assert [step.row for step in fits] == ["32", "64"]  # the copy has the training of the first


@pytest.mark.slow
def test_a_comparison_made_twice_from_scratch_is_the_same_to_the_last_digit(tmp_path, monkeypatch):
    few = {"train": 12, "validation": 2, "test": 4}
    options = {"data.source": "lit_multiip.data.MiniFaces", "data.held_out": 2, "model.sampling.steps": 3}
    fit = {"trainer.max_steps": 8, "trainer.val_check_interval": 4}
    rows = {
        "dreambooth": {"title": "D", "configs": ["dreambooth.yaml"], "options": {"model.steps": 3}, "seeds": True},
        "max_pool": {"title": "M", "configs": ["max_pool.yaml"]},
        "self_attn": {"title": "S", "configs": ["self_attn.yaml"], "options": fit, "fit": True, "seeds": True},
    }
    for row in rows.values():
        row["configs"] = [str(ROOT / "configs" / row["configs"][0])]
    plan = {
        "title": "Twice", "reference": "self_attn", "rows": rows, "seeds": [0, 1], "output": "out",
        "options": options | {f"data.source.init_args.{side}": count for side, count in few.items()},
    }  # fmt: skip
    found = []
    for name in ("first", "second"):
        folder = tmp_path / name  # with a feature store of its own
        folder.mkdir()
        (folder / "plan.yaml").write_text(yaml.safe_dump(plan))
        monkeypatch.chdir(folder)
        main(["compare", "--config", "plan.yaml"])
        tests = sorted((folder / "out").glob("*/*/test"))
        assert len(tests) == 5
        found.append({})
        for test in tests:
            place = str(test.relative_to(folder))
            found[-1][place] = json.loads((test / "metrics.json").read_text())["rows"]
            for file in (*test.rglob("*.png"), test / "scores.csv"):
                found[-1][str(file.relative_to(folder))] = file.read_bytes()
        assert (folder / "out" / "report" / "index.html").exists()
    assert found[0].keys() == found[1].keys()
    assert [key for key, value in found[0].items() if found[1][key] != value] == []
