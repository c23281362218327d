"""Every shipped config parses under fit and test, and over every other kind in any order."""

from __future__ import annotations

import inspect
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_multiip.__main__ import main
from lit_multiip.methods.adapter import MultiIPAdapter
from lit_multiip.methods.dreambooth import DreamBooth
from lit_multiip.methods.method import Method

ROOT = Path(__file__).parents[1]
METHODS = sorted((ROOT / "configs").glob("*.yaml"))
CHOSEN = ("avg_pool", "dreambooth", "self_attn")
ADAPTERS = [path for path in METHODS if path.stem != "dreambooth"]
CLASSES = [MultiIPAdapter, DreamBooth]
DATA = sorted((ROOT / "configs" / "data").glob("*.yaml"))
ON = sorted((ROOT / "configs" / "on").glob("*.yaml"))
SCORE = sorted((ROOT / "configs" / "score").glob("*.yaml"))
WITH = sorted((ROOT / "configs" / "with").glob("*.yaml"))
OTHERS = [ROOT / "lit_multiip" / "mini" / "ip_adapter.yaml"]


def parsed(capsys: pytest.CaptureFixture[str], command: str, *configs: Path) -> dict[str, Any]:
    args = [part for config in configs for part in ("--config", str(config))]
    with pytest.raises(SystemExit) as exit_:
        main([command, *args, "--print_config"])
    output = capsys.readouterr()
    assert exit_.value.code == 0, output.err
    return yaml.safe_load(output.out)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("command", ["fit", "test"])
@pytest.mark.parametrize("config", [*METHODS, *DATA, *ON, *SCORE, *WITH, *OTHERS], ids=name)
def test_every_config_parses(config: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    values = parsed(capsys, command, config)
    if config in METHODS:
        assert values["trainer"]["logger"]["init_args"]["name"] == config.stem
        args = values["model"]["init_args"]
        assert (
            max(values["trainer"]["max_steps"], args.get("steps", 0)) > 0 and args["optimizer"]["init_args"]["lr"] > 0
        )


@pytest.mark.parametrize("overlay", [*DATA, *ON, *SCORE, *WITH], ids=name)
@pytest.mark.parametrize("method", [ROOT / "configs" / f"{stem}.yaml" for stem in CHOSEN], ids=name)
def test_the_order_of_overlays_does_not_matter(method: Path, overlay: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (parsed(capsys, "fit", *order) for order in permutations([method, overlay]))
    assert one == two


@pytest.mark.parametrize("stem", CHOSEN)
def test_a_backbone_data_and_a_method_in_any_order(
    stem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = tmp_path / "on.yaml"
    backbone.write_text(
        "backbone: org/name\nimage_side: 512\ntrainer: {precision: 16-mixed}\n"
        "model: {init_args: {frozen_dtype: bfloat16, gradient_checkpointing: true, sampling: {steps: 30}}}\n"
    )
    method = ROOT / "configs" / f"{stem}.yaml"
    orders = list(permutations([method, ROOT / "configs" / "data" / "folder.yaml", backbone]))
    results = [parsed(capsys, "fit", *order) for order in orders]
    assert all(result == results[0] for result in results)
    assert results[0]["backbone"] == "org/name" and results[0]["data"]["source"]["class_path"].endswith("Folder")
    # no class is named there: whichever method it is takes them
    model, own = results[0]["model"], yaml.safe_load(method.read_text())["model"]
    assert model["class_path"] == own["class_path"]
    assert model["init_args"]["frozen_dtype"] == "bfloat16" and model["init_args"]["gradient_checkpointing"]
    assert model["init_args"]["sampling"]["steps"] == 30
    for key, value in own["init_args"].items():
        assert isinstance(value, dict) or model["init_args"][key] == value


def test_arguments_that_methods_share_have_one_default() -> None:
    # or a config that names another class would silently keep the values of the default one
    shared = {
        name: {str(inspect.signature(cls).parameters[name]) for cls in CLASSES}
        for name in set.intersection(*(set(inspect.signature(cls).parameters) for cls in [Method, *CLASSES]))
    }
    assert len(shared) == 10
    assert all(len(defaults) == 1 for name, defaults in shared.items() if name != "optimizer"), shared
    weights = [torch.nn.Parameter(torch.zeros(1))]
    makers = [inspect.signature(cls).parameters["optimizer"].default for cls in CLASSES]
    assert len({str(make(weights)) for make in makers}) == 1


def test_a_method_without_its_config_has_its_own_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["test", "--model", "DreamBooth", "--model.steps", "7", "--model.sampling.steps", "3", "--print_config"])
    args = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    assert args["steps"] == 7 and args["sampling"]["steps"] == 3 and args["prior_weight"] == 1.0
    assert "aggregator" not in args


@pytest.mark.parametrize("config", [*METHODS, *DATA, *ON, *WITH, *OTHERS], ids=name)
def test_a_config_says_first_what_it_is_for(config: Path) -> None:
    lines = config.read_text().splitlines()
    assert lines[0].startswith("# ") and len(lines) <= 35
    assert max(map(len, lines)) <= 130


def test_methods_differ_in_what_distinguishes_them_alone() -> None:
    values = {path.stem: yaml.safe_load(path.read_text()) for path in ADAPTERS}
    shared = []
    for stem, value in values.items():
        assert value["trainer"]["logger"]["init_args"].pop("name") == stem
        value["model"]["init_args"].pop("aggregator")
        shared.append(value)
    assert all(value == shared[0] for value in shared)
