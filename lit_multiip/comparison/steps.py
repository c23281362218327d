"""Commands of a comparison or sweep, carried out: each in a process of its own, finished ones skipped.

What a step costs and leaves in memory does not touch the next one. A finished step leaves a stamp in its run's folder;
a step whose stamp still holds is skipped, and an interrupted fit goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any, Literal, NamedTuple

from lit_multiip.evaluation.results import commit, write_json
from lit_multiip.files import LitMultiIPError
from lit_multiip.runs import best_checkpoint, newest_checkpoint

LINES_SHOWN = 20  # of the log of a step that failed


class StepError(LitMultiIPError):
    """A step that failed; the message names it, its command and the remedy."""


class Step(NamedTuple):
    """One command: `fit`, `test` or `score` of a row and training seed."""

    row: str
    seed: int
    command: Literal["fit", "test", "score"]
    run: Path
    arguments: list[str]
    key: str  # of all that its result depends on

    @property
    def stamp(self) -> Path:
        """The file that says what the step was done for."""
        return self.run / f"{self.command}.json"

    @property
    def trained(self) -> Path:
        """The run that it trains or tests."""
        return Path(self.arguments[1]) if self.arguments[:1] == ["--run"] else self.run

    def is_done(self) -> bool:
        """Whether its result is there, and for this very key."""
        if self.command != "fit" and not (self.run / "test" / "metrics.json").is_file():
            return False
        if self.command == "fit" and best_checkpoint(self.run) is None:
            return False
        return read_stamp(self.stamp).get("key") == self.key


def run_steps(steps: Sequence[Step], processes: int = 1) -> None:
    """Carry out what is not done yet, tests after the fit of the run that they test.

    Args:
        steps: in the order in which they are begun.
        processes: steps at a time. With more than one, each has its share of the CPU cores, and what a step prints is
            in `fit.log` or `test.log` of its run's folder.
    """
    started, stopped = time.perf_counter(), Event()

    def carry_out(chain: list[tuple[int, Step]]) -> None:
        for number, step in chain:
            if stopped.is_set():
                return
            name = f"[{number}/{len(steps)}] {step.command} {step.run}"
            if step.is_done():
                print(f"{name}: done before", flush=True)
                continue
            print(f"{name}, {(time.perf_counter() - started) / 60:.0f} min so far", flush=True)
            try:
                _run(step, processes)
            except BaseException:
                stopped.set()
                raise

    chains: dict[Path, list[tuple[int, Step]]] = {}  # what must be done one after the other
    fitted = {step.run for step in steps if step.command == "fit"}
    for number, step in enumerate(steps, 1):
        chains.setdefault(step.trained if step.trained in fitted else step.run, []).append((number, step))
    with ThreadPoolExecutor(processes) as pool:
        try:
            for _ in pool.map(carry_out, chains.values()):
                pass
        finally:
            stopped.set()  # interrupted here, nothing more is begun either
    print(f"all {len(steps)} steps done, {(time.perf_counter() - started) / 60:.1f} min", flush=True)


def _run(step: Step, processes: int) -> None:
    started, arguments = time.perf_counter(), list(step.arguments)
    began = step.run / f"{step.command}.began.json"
    if step.command == "fit":
        if read_stamp(began).get("key") == step.key and newest_checkpoint(step.run) is not None:
            arguments += ["--ckpt_path", "last"]
        else:
            _clear_run(step.run)
    step.run.mkdir(parents=True, exist_ok=True)
    write_json(began, {"key": step.key})
    command = [sys.executable, "-m", "lit_multiip", step.command, *arguments]
    where, end = "see above", ""
    if processes == 1:
        code = subprocess.run(command, check=False).returncode
    else:
        log = step.run / f"{step.command}.log"
        threads = {"OMP_NUM_THREADS": str(max(1, count_cores() // processes))}  # the user's own number goes first
        with log.open("wb") as file:
            code = subprocess.run(
                command, check=False, stdout=file, stderr=subprocess.STDOUT, env=threads | os.environ
            ).returncode
        where, end = f"see '{log}'", f". It ends in\n{_last_lines(log)}" if code else ""
    if code:
        raise StepError(
            f"{step.command} of row '{step.row}', training seed {step.seed}, ended with exit code {code}: {where}, "
            "mend it and run this again; finished steps are kept. "
            f"The command: python -m lit_multiip {shlex.join(command[3:])}{end}"
        )
    done = {"key": step.key, "seconds": time.perf_counter() - started, "command": command[3:], "commit": commit()}
    write_json(step.stamp, done)
    began.unlink()


def read_stamp(path: Path) -> dict[str, Any]:
    """Read what a step left; empty where there is nothing that can be read."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def count_cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _last_lines(log: Path) -> str:
    """The last lines of a log, progress bars as they last stood."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([line for line in lines if line.strip()][-LINES_SHOWN:])


def _clear_run(run: Path) -> None:
    """Remove what an earlier fit left, so that its checkpoints are not taken for the new one's."""
    for path in [*run.glob("checkpoints/*.ckpt"), *run.glob("events.out.tfevents.*"), run / "fit.json"]:
        path.unlink(missing_ok=True)
