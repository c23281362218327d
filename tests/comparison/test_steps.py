"""Steps of a comparison carried out: what is skipped, waits and fails; the commands themselves are stubs here."""

import json
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lit_multiip.comparison import steps as module
from lit_multiip.comparison.steps import Step, StepError, run_steps


def step(folder: Path, row: str, command: Any, arguments: list[str] | None = None) -> Step:
    return Step(row, 0, command, folder / row, arguments or [], f"{row} {command}")


def trained(folder: Path, row: str) -> list[Step]:
    """A fit, and the test of its run."""
    return [step(folder, row, "fit"), step(folder, row, "test", ["--run", str(folder / row)])]


@pytest.fixture(autouse=True)
def no_git(monkeypatch):
    """`subprocess.run` is the steps' alone here."""
    monkeypatch.setattr(module, "commit", lambda: "c" * 40)


@pytest.fixture
def commands(monkeypatch):
    """What was run, in order: command, first argument and the options of its process."""
    done = []

    def run(command, **options):
        done.append((command[3], "".join(command[4:6]), options))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    return done


def replace_run(monkeypatch: pytest.MonkeyPatch, act: Callable[..., int]) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, **o: SimpleNamespace(returncode=act(command, **o)))


def test_one_process_at_a_time_does_the_steps_in_their_order_and_prints_through(tmp_path, commands):
    run_steps([*trained(tmp_path, "a"), step(tmp_path, "b", "test")])
    assert [command for command, _, _ in commands] == ["fit", "test", "test"]
    assert all(options.keys() == {"check"} for _, _, options in commands)
    assert json.loads((tmp_path / "a" / "fit.json").read_text())["commit"] == "c" * 40
    assert not list(tmp_path.rglob("*.log"))


def test_two_processes_share_the_steps_and_a_test_waits_for_its_fit(tmp_path, monkeypatch):
    together = threading.Barrier(2, timeout=30)  # two fits at once, or this breaks

    def act(command, **_):
        if command[3] == "fit":
            together.wait()
        else:
            assert (Path(command[5]) / "fit.json").exists()
        return 0

    replace_run(monkeypatch, act)
    run_steps([*trained(tmp_path, "a"), *trained(tmp_path, "b")], processes=2)
    assert len(list(tmp_path.glob("*/test.json"))) == 2


@pytest.mark.parametrize(("cores", "processes", "expected"), [(8, 2, "4"), (2, 2, "1"), (2, 3, "1")])
def test_processes_share_the_cores_unless_the_user_says_otherwise(
    cores, processes, expected, tmp_path, commands, monkeypatch
):
    monkeypatch.setattr(module, "count_cores", lambda: cores)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    run_steps([step(tmp_path, "a", "test")], processes)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    run_steps([step(tmp_path, "b", "test")], processes)
    assert [options["env"]["OMP_NUM_THREADS"] for _, _, options in commands] == [expected, "7"]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_failed_step_is_named_with_its_last_words_and_nothing_more_is_begun(processes, tmp_path, monkeypatch):
    begun = []
    together = threading.Barrier(processes, timeout=30)

    def act(command, stdout=None, **_):
        begun.append(command[3])
        together.wait()
        if command[3] == "fit":
            if stdout is not None:
                stdout.write(b"a bar 10%\r a bar 20%\nerror: the disk is full\n")
            return 3
        time.sleep(0.2)  # as long as it takes to see that the other one failed
        return 0

    replace_run(monkeypatch, act)
    rows = [*trained(tmp_path, "a"), *(step(tmp_path, row, "test") for row in "bcdef")]
    message = "fit of row 'a', training seed 0, ended with exit code 3.*python -m lit_multiip fit"
    with pytest.raises(StepError, match=f"(?s){message}") as error:
        run_steps(rows, processes)
    assert sorted(begun) == ["fit", "test"][:processes]
    assert ("error: the disk is full" in str(error.value)) == (processes > 1)
    assert not (tmp_path / "a" / "fit.json").exists() and not rows[0].is_done()
    assert (tmp_path / "b" / "test.json").exists() == (processes > 1)  # what ran is waited for, and kept
