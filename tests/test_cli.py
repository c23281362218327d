from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from lit_multiip.backbone.faces import FaceEncoder
from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.cli import COMMANDS, UsageError, expand, main, make_cli


def write_run(root: Path, name: str, scores: dict[str, float] | None = None, last: bool = True, age: int = 0) -> Path:
    """A run with best-<k>.ckpt of the given validation losses and last.ckpt, `age` seconds old."""
    run = root / "runs" / name
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("backbone: {path: mini}\n")
    best = min(scores, key=lambda stem: scores[stem]) if scores else None
    state = {"monitor": "val/loss", "dirpath": "checkpoints", "best_model_path": f"checkpoints/{best}.ckpt"}
    for stem in scores or {}:
        content = {"callbacks": {"ModelCheckpoint{}": state}, "state_dict": {}}
        torch.save(content, run / "checkpoints" / f"{stem}.ckpt")
    if last:
        torch.save({"callbacks": {}, "state_dict": {}}, run / "checkpoints" / "last.ckpt")
    for path in (run / "checkpoints").iterdir():
        os.utime(path, (1e9 - age, 1e9 - age))
    return run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def failing(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[str, int]:
    """The last line on stderr, and the exit code."""
    with pytest.raises(SystemExit) as exit_:
        main(list(args))
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.strip().splitlines()[-1], int(exit_.value.code or 0)


# Which run


def test_bare_test_is_the_newest_run_and_says_which(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_run(here, "a/version_0", {"best-step=10": 0.3})
    caplog.set_level("INFO")
    chosen = [
        "--config",
        "runs/a/version_0/config.yaml",
        "--ckpt_path",
        "runs/a/version_0/checkpoints/best-step=10.ckpt",
    ]
    for command in ("test", "predict"):
        assert expand([command, "--data.held_out", "2"]) == [command, *chosen, "--data.held_out", "2"]
        assert f"{command} of run runs/a/version_0, checkpoint best-step=10.ckpt" in caplog.text


def test_run_chooses_another_run_and_takes_more_configs(here: Path) -> None:
    write_run(here, "new/version_0")
    write_run(here, "old/version_3", age=9)
    expanded = expand(["test", "--run", "runs/old/version_3", "--config", "more.yaml"])
    run = Path("runs/old/version_3")
    assert expanded[1:5] == [
        "--config",
        str(run / "config.yaml"),
        "--ckpt_path",
        str(run / "checkpoints" / "last.ckpt"),
    ]
    assert expanded[5:] == ["--config", "more.yaml"]


@pytest.mark.parametrize("option", ["--config=x.yaml", "-c", "--ckpt_path", "--help"])
def test_a_given_config_or_checkpoint_is_left_alone(here: Path, option: str) -> None:
    assert expand(["test", option]) == ["test", option]


def test_without_a_run_it_is_said_what_to_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("test", "predict"):
        message, code = failing(capsys, command)
        assert code == 2
        assert message.endswith("first python -m lit_multiip fit --config configs/self_attn.yaml")
    message, code = failing(capsys, "test", "--run", "nowhere")
    assert code == 2 and "'nowhere' is not a run" in message


# Short forms


def test_short_forms_of_predict(here: Path) -> None:
    args = ["predict", "--config", "c.yaml", "--photos", "dir", "--prompts", "a,b", "c:", "--seeds", "3", "4"]
    args += ["--ip_scale", "0.5", "--prompt", "d", "--steps", "7"]
    assert set(expand(args)) == {
        *("predict", "--config", "c.yaml", "--model.sampling.ip_scale=0.5", "--model.sampling.steps=7"),
        *("--data.predict.photos=dir", '--data.predict.prompts=["a,b", "c:", "d"]', "--data.predict.seeds=[3, 4]"),
    }
    assert expand(["test", "--config", "c", "--guidance_scale", "2"])[-1] == "--model.sampling.guidance_scale=2.0"
    assert expand(["fit", "--ip_scale", "1"]) == ["fit", "--ip_scale", "1"]


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_scales_must_be_finite(value: str) -> None:
    for option in ("--ip_scale", "--guidance_scale"):
        with pytest.raises(UsageError, match=f"{option} {value} is not finite"):
            expand(["test", "--config", "c.yaml", option, value])


# What a user gets wrong is one line


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["fit", "--model.aggregator", "Median"], "Median"),
        (["fit", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["fit", "--no_such_option", "1"], "--no_such_option"),
        (["fit", "--data.batch_size", "many"], "data.batch_size"),
        (["fly"], "fly"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], args: list[str], expected: str
) -> None:
    message, code = failing(capsys, *args)
    assert code == 2 and message.startswith("error: ") and expected in message


def test_an_unknown_aggregator_is_told_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    message, _ = failing(capsys, "fit", "--model.aggregator", "Median")
    assert "First, MaxPool, AvgPool, Concat, SelfAttention" in message


def test_an_unknown_method_or_option_of_a_method_is_told_without_jsonargparses_types(
    capsys: pytest.CaptureFixture[str],
) -> None:
    message, _ = failing(capsys, "fit", "--model", "Median")
    assert "methods are MultiIPAdapter, DreamBooth" in message
    message, _ = failing(capsys, "fit", "--model", "DreamBooth", "--model.aggregator", "MaxPool")
    assert "Option 'aggregator' is not accepted" in message
    message, _ = failing(capsys, "fit", "--model.no_such_option", "1")
    assert "Option 'no_such_option' is not accepted" in message and "NoneType" not in message


def test_wrong_values_are_one_line(here: Path, tiny_backbone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit = ["fit", "--backbone.path", str(tiny_backbone)]
    message, code = failing(capsys, *fit, "--data.references", "0")
    assert code == 1 and "at least 1" in message
    message, code = failing(capsys, *fit, "--model.sampling.guidance_scale", ".nan")
    assert code in (1, 2) and "guidance_scale=nan is not finite" in message
    message, code = failing(capsys, "fit", "--backbone.path", "no/such/backbone")
    assert code == 1 and "no/such/backbone" in message
    message, code = failing(capsys, *fit, "--data.source", "Folder", "--data.source.path", "no/photos")
    assert code == 1 and "no/photos" in message
    (here / "taken").write_text("a file")
    message, code = failing(capsys, *fit, "--trainer.logger.save_dir", "taken")
    assert code == 1 and "taken" in message
    message, code = failing(capsys, "test", *fit[1:], "--ckpt_path", "no.ckpt")
    assert code == 1 and "no checkpoint 'no.ckpt'" in message
    (here / "torn.ckpt").write_bytes(b"PK torn")
    message, code = failing(capsys, "test", *fit[1:], "--ckpt_path", "torn.ckpt")
    assert code == 1 and "checkpoint 'torn.ckpt' cannot be read" in message


@pytest.mark.parametrize(
    "given",
    [
        ["--model.backbone.path", "mini"],
        ["--model.init_args.backbone.path=mini"],
        ["--model.backbone=/nowhere"],
        ["--model.image_encoder=/nowhere"],
        ["--data.backbone=/nowhere"],
        ["--data.backbone.path=mini"],
        ["--backbone=mini"],
        "model: {init_args: {backbone: {path: mini}}}",
        "model: {init_args: {published_adapter: file}}",
        "data: {backbone: {path: mini}}",
        "data: {image_side: 64}",
    ],
)
def test_a_backbone_that_model_and_data_would_not_share_is_refused(
    here: Path, given: list[str] | str, capsys: pytest.CaptureFixture[str]
) -> None:
    if isinstance(given, str):
        (here / "own.yaml").write_text(given)
        given = ["--config", "own.yaml"]
    message, code = failing(capsys, "fit", *given, "--trainer.max_steps", "0")
    assert code == 2 and re.search("backbone|image_encoder|published_adapter|image_side", message)


class HalfBackbone(Backbone):
    """Another family: its images are half as large."""

    @property
    def image_side(self) -> int:
        """Half of the miniature's."""
        return super().image_side // 2


def test_one_backbone_is_given_to_model_and_data_and_comes_back_from_the_saved_config(here: Path) -> None:
    (here / "on.yaml").write_text("backbone: {path: mini, image_encoder: encoder}")
    (here / "side.yaml").write_text("backbone: {image_side: 32}")
    configs = ["--config", "side.yaml", "--config", "on.yaml", "--backbone.face_encoder.path", "faces.onnx"]
    cli = make_cli([*configs, "--config", "side.yaml"], execute=False)
    backbone = cli.model.backbone
    assert backbone is cli.datamodule.backbone and backbone.path == "mini" and backbone.image_encoder == "encoder"
    assert backbone.face_encoder == FaceEncoder("faces.onnx") and backbone.image_side == 32
    saved = cli.parser.dump(cli.config, skip_none=False)
    (here / "saved.yaml").write_text(saved)
    again = make_cli(["--config", "saved.yaml", "--backbone.image_encoder", "null"], execute=False)
    assert again.model.backbone.face_encoder == backbone.face_encoder and again.model.backbone.image_encoder is None
    other = make_cli(["--backbone.class_path", f"{__name__}.HalfBackbone"], execute=False)
    assert type(other.model.backbone).__name__ == "HalfBackbone" and other.model.backbone.image_side == 32


def test_the_traceback_can_be_asked_for(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIT_MULTIIP_DEBUG", "1")
    with pytest.raises(SystemExit):
        main(["test"])
    assert "Traceback" in capsys.readouterr().err


# Own commands


def test_help_names_the_projects_own_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split()).replace("- ", "-")  # lines are wrapped at hyphens, too
    assert all(name in text for name in (*COMMANDS, "fit", "test", "predict", "--photos", "--run"))


def test_help_loads_no_model_code() -> None:
    """What diffusers' and transformers' models need takes longer to load than all else beyond Lightning."""
    code = """
import sys
sys.argv = ["lit_multiip", "fit", "--help"]
from lit_multiip.cli import main
try:
    main()
except SystemExit:
    pass
heavy = ("diffusers.models", "diffusers.pipelines", "peft", "sklearn", "matplotlib", "onnxruntime", "cv2")
print([name for name in heavy if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "usage:" in done.stdout
    generation = Path(transformers.__file__).with_name("generation") / "candidate_generator.py"
    imports = "\n    from sklearn" in generation.read_text("utf-8")  # of older versions, as they are imported
    own = {"sklearn"} if imports else set()
    assert set(ast.literal_eval(done.stderr.strip().splitlines()[-1])) <= own


@pytest.mark.parametrize("name", COMMANDS)
def test_own_commands_have_their_own_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([name, "--help"])
    assert exit_.value.code == 0
    assert name in capsys.readouterr().out
    assert sys.argv == ["pytest"]
