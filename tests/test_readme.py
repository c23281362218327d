"""What the README says can be typed, and what it points to is there."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch

from lit_multiip.cli import COMMANDS, expand, main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
LINES = [part.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines() for part in line.split("&&")]
OWN = sorted({line for line in LINES if line.startswith("python -m lit_multiip")})


def write_gated(folder: Path) -> None:
    [code] = re.findall(r"```python\n(.*?class Gated.*?)```", README, re.DOTALL)
    (folder / "gated.py").write_text(code)


def test_the_aggregator_of_the_readme_is_average_pooling_until_it_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gated(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    aggregator = importlib.import_module("gated").Gated(8)
    embeds = torch.randn(3, 9, 8, generator=torch.Generator().manual_seed(0))
    out = aggregator(embeds)
    assert out.shape == (3, 1, 8) and torch.allclose(out, embeds.mean(1, keepdim=True), atol=1e-6)
    assert len((tmp_path / "gated.py").read_text().splitlines()) <= 20
    out.square().sum().backward()
    assert aggregator.query.grad.abs().max() > 1e-3


def test_two_commands_set_everything_up() -> None:
    first, second = (block.strip() for block in BLOCKS[:2])
    assert first.endswith("python -m lit_multiip test") and second.endswith("pytest")
    assert "\n" not in first and "\n" not in second


@pytest.mark.parametrize("line", OWN)
def test_every_command_of_the_readme_parses(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    if "gated.Gated" in line:
        write_gated(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
    command, *options = shlex.split(line)[3:]
    if command in COMMANDS or "--config" in options:
        check = [command, *options, "--print_config"]
    elif command == "fit":
        assert options == ["--ckpt_path", "last"]  # which test_resume.py runs
        return
    else:  # takes the newest run; --print_config stands for one
        assert command in ("test", "predict")
        expanded = expand([command, "--config", "run.yaml", *options])
        assert {key.split("=")[0] for key in expanded[3:]} <= {
            "--data.predict.photos",
            "--data.predict.prompts",
            "--data.predict.seeds",
        }
        return
    with pytest.raises(SystemExit) as exit_:
        main(check)
    assert exit_.value.code in (0, None), capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:tests|lit_multiip|configs)/[\w/.]+)`", README))))
def test_every_file_that_the_readme_names_is_there(path: str) -> None:
    assert (ROOT / path).exists()


def test_the_pictures_are_there() -> None:
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert pictures[0].endswith("grid.png")  # what the project makes comes first
    assert all((ROOT / picture).stat().st_size > 50_000 for picture in pictures)
