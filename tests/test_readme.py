"""What the README says can be typed, and what it points to is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from lit_multiip.cli import COMMANDS, expand, main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
LINES = [part.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines() for part in line.split("&&")]
OWN = sorted({line for line in LINES if line.startswith("python -m lit_multiip")})


def test_two_commands_set_everything_up() -> None:
    first, second = (block.strip() for block in BLOCKS[:2])
    assert first.endswith("python -m lit_multiip test") and second.endswith("pytest")
    assert "\n" not in first and "\n" not in second


@pytest.mark.parametrize("line", OWN)
def test_every_command_of_the_readme_parses(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    command, *options = shlex.split(line)[3:]
    if command in COMMANDS or "--config" in options:
        check = [command, *options, "--print_config"]
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


def test_the_picture_is_there() -> None:
    [picture] = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert (ROOT / picture).stat().st_size > 50_000
