"""Commands run in this process: the config that one prints, and the line that one is refused with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_multiip.__main__ import main


def config_args(*configs: str | Path) -> list[str]:
    """Return `--config a --config b`."""
    return [part for config in configs for part in ("--config", str(config))]


def refusal(capsys: pytest.CaptureFixture[str], *args: str, code: int | None = 1) -> str:
    """Run a command that is refused, with this exit code or any (None); return the last line that it prints."""
    with pytest.raises(SystemExit) as exit_:
        main(list(args))
    error = capsys.readouterr().err
    assert exit_.value.code in ((1, 2) if code is None else (code,)) and "Traceback" not in error, error
    return error.strip().splitlines()[-1]


def printed_config(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    """Return the config of a command, as `--print_config` shows it."""
    with pytest.raises(SystemExit) as exit_:
        main([*args, "--print_config"])
    output = capsys.readouterr()
    assert exit_.value.code == 0, output.err
    return yaml.safe_load(output.out)
