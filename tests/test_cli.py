import ast
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from commands import refusal

from lit_multiip.__main__ import PLAIN, main
from lit_multiip.backbone.faces import FaceEncoder
from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.backbone.sampler import Sampling
from lit_multiip.cli import CLI
from lit_multiip.datamodule import PredictArgs
from lit_multiip.defaults import SHORT, choose_precision
from lit_multiip.methods.aggregators import Aggregator
from lit_multiip.runs import choose_run


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
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Which run


COMMANDS = ("fit", "validate", "test", "predict", "inspect", "export", "tasks", "score")


def chosen(*args: str) -> tuple[str, Path, Path] | None:
    return choose_run(args, COMMANDS)


def test_without_config_and_checkpoint_a_command_takes_the_newest_run(here):
    run = write_run(here, "a/version_0", {"best-step=10": 0.3}).relative_to(here)
    for command in COMMANDS[1:]:
        assert chosen(command, "--data.held_out", "2") == (command, run, run / "checkpoints" / "best-step=10.ckpt")
    assert chosen("fit") is chosen("fit", "--data.held_out", "2") is None
    assert chosen("fit", "--ckpt_path", "last") == ("fit", run, run / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize("option", ["--config=x.yaml", "-c", "--ckpt_path", "--help", "--print_config"])
def test_a_given_config_or_checkpoint_is_left_alone(here, option):
    write_run(here, "a/version_0")
    assert chosen("test", option) is None
    assert chosen("fit", "--ckpt_path=last", "--config=x.yaml") is None


def test_run_chooses_another_run_and_takes_more_configs(here):
    write_run(here, "new/version_0")
    write_run(here, "old/version_3", age=9)
    for more in ([], ["--config", "more.yaml"], ["--ckpt_path", "other.ckpt"]):
        run = Path("runs/old/version_3")
        assert chosen("test", "--run", str(run), *more) == ("test", run, run / "checkpoints" / "last.ckpt")


def test_ranks_that_lightning_starts_take_the_run_of_the_process_that_started_them(here, monkeypatch):
    write_run(here, "old/version_3", age=9)
    choice = chosen("test")
    write_run(here, "new/version_0")  # by another fit, meanwhile
    assert chosen("test") != choice
    monkeypatch.setenv("LIT_MULTIIP_RUN", f"{os.getppid()}:runs/old/version_3")
    assert chosen("test") != choice  # which a process of one's own is not
    monkeypatch.setenv("LIT_MULTIIP_RUN", f"{os.getppid()}:runs/old/version_3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert chosen("test") == choice


def test_a_command_that_loads_no_weights_needs_no_run(here):
    assert choose_run(("tasks", "--output", "a"), COMMANDS, ("tasks",)) is None
    run = write_run(here, "a/version_0").relative_to(here)
    assert choose_run(("tasks",), COMMANDS, ("tasks",)) == ("tasks", run, run / "checkpoints" / "last.ckpt")


def test_without_a_run_it_is_said_what_to_run(here, capsys):
    for command in ("test", "predict"):
        message = refusal(capsys, command, code=2)
        assert message.endswith("first python -m lit_multiip fit --config configs/self_attn.yaml")
    assert "'nowhere' is not a run" in refusal(capsys, "test", "--run", "nowhere", code=2)


# Short options


class Stop(Exception):
    """Ends a command before anything is built."""


def settled(monkeypatch: pytest.MonkeyPatch, *args: str) -> Any:
    """The config of a command, as its objects would be built of it."""
    found: list[Any] = []

    def stop(self: CLI) -> None:
        found.append(self.options)
        raise Stop

    monkeypatch.setattr(CLI, "before_instantiate_classes", stop)
    with pytest.raises(Stop):
        main(list(args))
    return found[0]


def test_short_options_set_what_they_stand_for(here, monkeypatch):
    (here / "c.yaml").write_text("model: {init_args: {sampling: {steps: 4, guidance_scale: 2.0}}}\n")
    args = ["predict", "--config", "c.yaml", "--photos", "dir", "--prompts", "a,b", "c:", "--seeds", "3", "4"]
    config = settled(monkeypatch, *args, "--ip_scale", "0.5", "--steps", "7")
    assert config.model.init_args.sampling.as_dict() == asdict(Sampling(7, 2.0, 0.5))
    asked = {"photos": ["dir"], "prompts": ["a,b", "c:"], "seeds": [3, 4]}
    assert config.data.predict.as_dict() == {**asdict(PredictArgs()), **asked}
    config = settled(monkeypatch, "predict", "--config", "c.yaml", "--ip_scale", "{up: {block_0: [0, 1]}, mid: 0.5}")
    assert config.model.init_args.sampling.ip_scale == {"up": {"block_0": [0, 1]}, "mid": 0.5}
    config = settled(
        monkeypatch, "test", "--model.aggregator", "AvgPool", "--config", "c.yaml", "--guidance_scale", "5"
    )
    assert config.model.init_args.sampling.guidance_scale == 5.0 and config.model.init_args.sampling.steps == 4
    assert config.model.init_args.aggregator.class_path.endswith("AvgPool")
    (here / "empty.yaml").write_text("backbone: {path: mini}\n")
    config = settled(monkeypatch, "test", "--config", "empty.yaml", "--ip_scale", "0.5")
    assert config.model.init_args.sampling.as_dict() == {**asdict(Sampling()), "ip_scale": 0.5}
    config = settled(monkeypatch, "test", "--model", "DreamBooth", "--config", "c.yaml", "--steps", "3")
    assert config.model.class_path.endswith("DreamBooth") and config.model.init_args.sampling.steps == 3


def test_the_help_of_a_command_shows_its_short_options(capsys):
    shown, short = {}, [name for _, _, options in SHORT.values() for name in options]
    for command in COMMANDS:
        text = help_of(capsys, command)
        shown[command] = {name for name in ("run", *short) if f"--{name} " in text}
    drawn = {"run", "ip_scale", "guidance_scale", "steps", "ip_start", "ip_end"}
    assert shown == {
        "fit": {"run", "photos"},
        "validate": {"run"},
        "test": drawn,
        "predict": drawn | {"photos", "prompts", "seeds", "weights", "negatives", "masks"},
        "inspect": {"run"},
        "export": {"run", "photos"},
        "tasks": {"run"},
        "score": {"run"},
    }


@pytest.mark.parametrize(
    ("gpu", "capabilities", "precision"),
    [
        (True, {}, "bf16-mixed"),
        (False, {}, "32-true"),
        (None, {"amx_bf16": True}, "bf16-mixed"),
        (None, {"avx512_bf16": True}, "32-true"),
    ],
)
def test_the_default_precision_is_what_the_machine_has_a_unit_for(gpu, capabilities, precision, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu is not None)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: gpu)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities, raising=False)
    assert choose_precision() == precision


@pytest.mark.parametrize("value", ["nan", ".nan", ".inf", "x"])
def test_scales_must_be_finite(value, here, capsys):
    (here / "c.yaml").write_text("backbone: {path: mini}\n")
    for option in ("ip_scale", "guidance_scale"):
        message = refusal(capsys, "test", "--config", "c.yaml", f"--{option}", value, code=None)
        assert option in message and value.strip(".") in message


# What a user gets wrong is one line


OWN = [cls.__name__ for cls in Aggregator.__subclasses__() if cls.__module__.startswith("lit_multiip.")]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["fit", "--model.aggregator", "Median"], f"by name: {', '.join(OWN)};"),
        (["fit", "--model", "Median"], "by name: MultiIPAdapter, DreamBooth"),
        (["fit", "--model", "DreamBooth", "--model.aggregator", "MaxPool"], "Option 'aggregator' is not accepted"),
        (["fit", "--model.no_such_option", "1"], "Option 'no_such_option' is not accepted"),
        (["fit", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["fit", "--no_such_option", "1"], "--no_such_option"),
        (["fit", "--data.batch_size", "many"], "data.batch_size"),
        (["fly"], "fly"),
    ],
)
def test_a_wrong_command_line_is_one_line_without_jsonargparses_types(here, capsys, args, expected):
    message = refusal(capsys, *args, code=2)
    assert message.startswith("error: ") and expected in message and "NoneType" not in message


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["fit", "--data.references", "0"], "at least 1"),
        (["fit", "--model.sampling.guidance_scale", ".nan"], "guidance_scale=nan is not finite"),
        (["fit", "--backbone.path", "no/such/backbone"], "no/such/backbone"),
        (["fit", "--data.source", "Folder", "--data.source.path", "no/photos"], "no/photos"),
        (["fit", "--trainer.logger.save_dir", "taken"], "taken"),
        (["test", "--ckpt_path", "no.ckpt"], "no checkpoint 'no.ckpt'"),
        (["test", "--ckpt_path", "torn.ckpt"], "checkpoint 'torn.ckpt' cannot be read"),
    ],
)
def test_wrong_values_are_one_line(args, expected, here, tiny_backbone, capsys):
    (here / "taken").write_text("a file")
    (here / "torn.ckpt").write_bytes(b"PK torn")
    code = None if "guidance" in expected else 1
    assert expected in refusal(capsys, args[0], "--backbone.path", str(tiny_backbone), *args[1:], code=code)


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
def test_a_backbone_that_model_and_data_would_not_share_is_refused(here, given, capsys):
    if isinstance(given, str):
        (here / "own.yaml").write_text(given)
        given = ["--config", "own.yaml"]
    message = refusal(capsys, "fit", *given, "--trainer.max_steps", "0", code=2)
    assert re.search("backbone|image_encoder|published_adapter|image_side", message)


class HalfBackbone(Backbone):
    """Another family: its images are half as large."""

    @property
    def image_side(self) -> int:
        """Half of the miniature's."""
        return super().image_side // 2


def test_one_backbone_is_given_to_model_and_data_and_comes_back_from_the_saved_config(here):
    (here / "on.yaml").write_text("backbone: {path: mini, image_encoder: encoder}")
    (here / "side.yaml").write_text("backbone: {image_side: 32}")
    configs = ["--config", "side.yaml", "--config", "on.yaml", "--backbone.face_encoder.path", "faces.onnx"]
    cli = CLI([*configs, "--config", "side.yaml"], run=False)
    backbone = cli.model.backbone
    assert backbone is cli.datamodule.backbone and backbone.path == "mini" and backbone.image_encoder == "encoder"
    assert backbone.face_encoder == FaceEncoder("faces.onnx") and backbone.image_side == 32
    saved = cli.parser.dump(cli.config, skip_none=False)
    (here / "saved.yaml").write_text(saved)
    again = CLI(["--config", "saved.yaml", "--backbone.image_encoder", "null"], run=False)
    assert again.model.backbone.face_encoder == backbone.face_encoder and again.model.backbone.image_encoder is None
    other = CLI(["--backbone.class_path", f"{__name__}.HalfBackbone"], run=False)
    assert type(other.model.backbone).__name__ == "HalfBackbone" and other.model.backbone.image_side == 32


def test_the_traceback_can_be_asked_for(here, capsys, monkeypatch):
    monkeypatch.setenv("LIT_MULTIIP_DEBUG", "1")
    with pytest.raises(SystemExit):
        main(["test"])
    assert "Traceback" in capsys.readouterr().err


# Own commands


def help_of(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--help"])
    assert exit_.value.code == 0
    return capsys.readouterr().out


def test_help_names_every_command_with_a_line(capsys):
    lines = [line.split(None, 1) for line in help_of(capsys).splitlines()]
    said = {line[0]: line[1] for line in lines if len(line) == 2}
    assert all(len(said[name].split()) >= 4 for name in (*PLAIN, *COMMANDS))


def test_help_loads_no_model_code():
    """What diffusers' and transformers' models need takes longer to load than all else beyond Lightning."""
    code = """
import sys
sys.argv = ["lit_multiip", "fit", "--help"]
from lit_multiip.__main__ import main
try:
    main()
except SystemExit:
    pass
heavy = ("diffusers.models", "diffusers.pipelines", "peft", "sklearn", "onnxruntime", "cv2")
print([name for name in heavy if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "usage:" in done.stdout
    generation = Path(transformers.__file__).with_name("generation") / "candidate_generator.py"
    imports = "\n    from sklearn" in generation.read_text("utf-8")  # of older versions, as they are imported
    own = {"sklearn"} if imports else set()
    assert set(ast.literal_eval(done.stderr.strip().splitlines()[-1])) <= own


@pytest.mark.parametrize("name", PLAIN)
def test_own_commands_have_their_own_help(name, capsys):
    assert name in help_of(capsys, name)
    assert sys.argv == ["pytest"]
