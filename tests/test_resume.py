"""A fit that is stopped at any moment and gone on with ends as one that was not."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from resuming import METHOD, STEPS, Command, differences, logged, run, run_of, state_of, write_config

from lit_multiip.cli import main
from lit_multiip.resume import Position

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "workers": {"data": {"num_workers": 2}},
    "accumulated": {"trainer": {"accumulate_grad_batches": 3, "max_steps": 7}},
    "ranks": {"trainer": {"devices": 2, "strategy": "ddp_fork"}, "data": {"batch_size": 2}},
}


class Fits:
    """Runs of variants of one short fit; the uninterrupted ones are made once."""

    def __init__(self, folder: Path, backbone: Path) -> None:
        self.folder, self.backbone, self.number = folder, backbone, 0
        self.whole: dict[str, Path] = {}

    def args(self, variant: str) -> list[str]:
        path = self.folder / f"{variant}.yaml"
        if not path.exists():
            write_config(path, self.backbone, self.folder / "features", **{k: dict(v) for k, v in VARIANTS[variant].items()})
        return ["fit", "--config", str(METHOD), "--config", str(path)]

    def new(self) -> Path:
        self.number += 1
        return self.folder / f"work_{self.number}"

    def uninterrupted(self, variant: str) -> Path:
        if variant not in self.whole:
            command = run(self.new(), *self.args(variant))
            assert command.process.exitcode == 0, command.said()
            self.whole[variant] = command.folder
        return self.whole[variant]

    def check(self, folder: Path, variant: str) -> None:
        """Assert that what was gone on with in ``folder`` is what was not interrupted."""
        expected, found = run_of(self.uninterrupted(variant)), run_of(folder)
        assert [path.name for path in found.parent.iterdir()] == ["version_0"]
        assert differences(state_of(expected), state_of(found)) == []
        best, best_found = logged(expected), logged(found)
        assert best_found == best
        steps = [step for step, _ in best_found["train/loss"]]
        assert steps == sorted(set(steps))


@pytest.fixture(scope="module")
def fits(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Fits:
    return Fits(tmp_path_factory.mktemp("resume"), tiny_backbone)


@pytest.mark.parametrize(
    ("step", "batches", "accumulate", "expected"),
    [
        (0, 7, 1, Position(0, 0, 7, 0)),
        (7, 7, 1, Position(1, 0, 7, 0)),
        (9, 7, 1, Position(1, 2, 7, 2)),
        (2, 7, 3, Position(0, 6, 7, 2)),
        (3, 7, 3, Position(1, 0, 7, 0)),  # the epoch's last step is of one batch
        (5, float("inf"), 2, Position(0, 10, None, 5)),
    ],
)
def test_the_number_of_steps_says_where_training_is(
    step: int, batches: float, accumulate: int, expected: Position
) -> None:
    assert Position.after(step, batches, accumulate) == expected


@pytest.mark.parametrize(
    ("variant", "stop"),
    [
        ("plain", "batch:6"),  # mid-epoch; gone on with from step 3
        ("plain", "batch:8"),  # the first of an epoch; from step 6, over the end of the epoch
        ("plain", "validation:5"),  # the sanity check's is the first one
        ("plain", "writing:5"),  # of best and last, in turn
        ("plain", "renaming:9"),
        ("plain", "renamed:4"),
        ("plain", "batch:9:TERM"),
        ("plain", "batch:7:TERM"),  # the last batch of an epoch
        ("workers", "batch:8"),
        ("accumulated", "batch:8"),
        ("accumulated", "batch:5:TERM"),  # inside an accumulation
        ("accumulated", "batch:8:TERM"),
        ("ranks", "batch:8"),
    ],
)
def test_a_fit_that_was_stopped_goes_on_as_if_it_had_not_been(fits: Fits, variant: str, stop: str) -> None:
    folder, args = fits.new(), fits.args(variant)
    code = run(folder, *args, stop=stop).process.exitcode
    assert code == (128 + signal.SIGTERM if stop.endswith("TERM") else -signal.SIGKILL)
    command = run(folder, *args, "--ckpt_path", "last")
    assert command.process.exitcode == 0, command.said()
    fits.check(folder, variant)
