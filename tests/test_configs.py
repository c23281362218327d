"""Every shipped config parses under fit and test, and over every other kind in any order."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_multiip.cli import main

ROOT = Path(__file__).parents[1]
METHODS = sorted((ROOT / "configs").glob("*.yaml"))
DATA = sorted((ROOT / "configs" / "data").glob("*.yaml"))
ON = sorted((ROOT / "configs" / "on").glob("*.yaml"))
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
@pytest.mark.parametrize("config", [*METHODS, *DATA, *ON, *OTHERS], ids=name)
def test_every_config_parses(config: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    values = parsed(capsys, command, config)
    if config in METHODS:
        assert values["trainer"]["logger"]["init_args"]["name"] == config.stem
        assert values["trainer"]["max_steps"] > 0 and values["model"]["optimizer"]["init_args"]["lr"] > 0


@pytest.mark.parametrize("overlay", [*DATA, *ON], ids=name)
@pytest.mark.parametrize("method", [METHODS[0], ROOT / "configs" / "self_attn.yaml"], ids=name)
def test_the_order_of_overlays_does_not_matter(method: Path, overlay: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (parsed(capsys, "fit", *order) for order in permutations([method, overlay]))
    assert one == two


def test_a_backbone_data_and_a_method_in_any_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = tmp_path / "on.yaml"
    backbone.write_text("backbone: org/name\nimage_side: 512\ntrainer: {precision: 16-mixed}\n")
    orders = list(
        permutations([ROOT / "configs" / "self_attn.yaml", ROOT / "configs" / "data" / "folder.yaml", backbone])
    )
    results = [parsed(capsys, "fit", *order) for order in orders]
    assert all(result == results[0] for result in results)
    assert results[0]["backbone"] == "org/name" and results[0]["data"]["source"]["class_path"].endswith("Folder")


@pytest.mark.parametrize("config", [*METHODS, *DATA, *OTHERS], ids=name)
def test_a_config_says_first_what_it_is_for(config: Path) -> None:
    lines = config.read_text().splitlines()
    assert lines[0].startswith("# ") and len(lines) <= 30
    assert max(map(len, lines)) <= 130


def test_methods_differ_in_what_distinguishes_them_alone() -> None:
    values = {path.stem: yaml.safe_load(path.read_text()) for path in METHODS}
    shared = []
    for stem, value in values.items():
        assert value["trainer"]["logger"]["init_args"].pop("name") == stem
        value["model"].pop("aggregator")
        shared.append(value)
    assert all(value == shared[0] for value in shared)
