"""A fit that is stopped at any moment and gone on with ends as one that was not."""

import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from resuming import METHOD, STEPS, Command, differences, logged, run, run_of, state_of, write_config

from lit_multiip import files
from lit_multiip.__main__ import main
from lit_multiip.datasets import Position
from lit_multiip.methods.adapter import MultiIPAdapter
from lit_multiip.resume import DurableCheckpointIO, ExactResume
from lit_multiip.runs import CheckpointError, newest_checkpoint, run_to_continue

AVERAGE = "lightning.pytorch.callbacks.EMAWeightAveraging"
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "workers": {"data": {"num_workers": 2}},
    "accumulated": {"trainer": {"accumulate_grad_batches": 3, "max_steps": 7}},
    "ranks": {"data": {"batch_size": 2}},  # each of 2
    "averaged": {"trainer": {"callbacks": [{"class_path": AVERAGE, "init_args": {"decay": 0.9}}]}},
}


class Fits:
    """Runs of variants of one short fit; the uninterrupted ones are made once."""

    def __init__(self, folder: Path, backbone: Path) -> None:
        self.folder, self.backbone, self.number = folder, backbone, 0
        self.whole: dict[str, Path] = {}

    def new(self) -> Path:
        self.number += 1
        return self.folder / f"work_{self.number}"

    def run(self, folder: Path, variant: str, *args: str, stop: str | None = None) -> Command:
        return run(folder, *self.args(variant), *args, stop=stop, ranks=2 if variant == "ranks" else 1)

    def args(self, variant: str) -> list[str]:
        path = self.folder / f"{variant}.yaml"
        if not path.exists():
            options = {key: dict(value) for key, value in VARIANTS[variant].items()}
            write_config(path, self.backbone, self.folder / "features", **options)
        return ["fit", "--config", str(METHOD), "--config", str(path)]

    def uninterrupted(self, variant: str) -> Path:
        if variant not in self.whole:
            command = self.run(self.new(), variant)
            assert command.code == 0, command.said()
            self.whole[variant] = command.folder
        return self.whole[variant]

    def check(self, folder: Path, variant: str) -> None:
        """Assert that what was gone on with in ``folder`` is what was not interrupted."""
        expected, found = run_of(self.uninterrupted(variant)), run_of(folder)
        assert [path.name for path in found.parent.iterdir()] == ["version_0"]
        assert differences(state_of(expected), state_of(found)) == []
        losses = logged(found)
        assert losses == logged(expected)
        steps = [step for step, _ in losses["train/loss"]]
        assert steps == list(range(state_of(found)["global_step"]))


@pytest.fixture(scope="module")
def fits(tiny_backbone, tmp_path_factory):
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
def test_the_number_of_steps_says_where_training_is(step, batches, accumulate, expected):
    assert Position.after(step, batches, accumulate) == expected


@pytest.mark.parametrize(
    ("variant", "stop"),
    [
        ("plain", "batch:6"),  # mid-epoch; gone on with from step 3
        # the first of an epoch; from step 6, over the end of the epoch
        pytest.param("plain", "batch:8", marks=pytest.mark.slow),
        pytest.param("plain", "validation:5", marks=pytest.mark.slow),  # the sanity check's is the first one
        ("plain", "writing:5"),  # of best and last, in turn
        ("plain", "writing:10"),  # the very last of all, after which there is nothing more to train
        pytest.param("plain", "renaming:9", marks=pytest.mark.slow),
        pytest.param("plain", "renamed:4", marks=pytest.mark.slow),
        ("plain", "batch:9:TERM"),
        ("plain", "batch:7:TERM"),  # the last batch of an epoch
        ("workers", "batch:5:INT"),
        ("workers", "batch:8"),
        pytest.param("accumulated", "batch:8", marks=pytest.mark.slow),
        ("accumulated", "batch:5:TERM"),  # inside an accumulation
        pytest.param("accumulated", "batch:8:TERM", marks=pytest.mark.slow),
        ("ranks", "batch:8"),
        ("ranks", "batch:5:TERM"),
        ("averaged", "batch:8:TERM"),  # in a later epoch, and of frozen weights that an average would have changed
    ],
)
def test_a_fit_that_was_stopped_goes_on_as_if_it_had_not_been(fits, variant, stop):
    folder = fits.new()
    code = fits.run(folder, variant, stop=stop).code
    assert code == {"TERM": 128 + signal.SIGTERM, "INT": 128 + signal.SIGINT}.get(stop.split(":")[-1], -signal.SIGKILL)
    command = fits.run(folder, variant, "--ckpt_path", "last")
    assert command.code == 0, command.said()
    fits.check(folder, variant)


def test_a_fit_that_was_killed_between_features_and_training_is_not_begun_anew_in_silence(fits):
    folder = fits.new()
    assert fits.run(folder, "plain", stop="features").code == -signal.SIGKILL
    command = fits.run(folder, "plain", "--ckpt_path", "last")
    assert command.code == 1
    assert (
        "the newest, has no checkpoint to go on from: start anew without ckpt_path" in command.said().splitlines()[-1]
    )
    assert fits.run(folder, "plain").code == 0  # a new run, for which nothing is encoded again
    assert "encoding" not in fits.run(folder, "plain", "--trainer.max_steps", "1").said()


def test_sigterm_on_the_first_rank_stops_both_at_one_step(fits):
    folder = fits.new()
    command = Command(folder, *fits.args("ranks"), ranks=2)
    events = run_of(folder) / "checkpoints" / "last.ckpt"
    while not events.exists() and command.processes[0].exitcode is None:
        time.sleep(0.02)
    os.kill(command.processes[0].pid or 0, signal.SIGTERM)
    command.wait(120)
    codes = [process.exitcode for process in command.processes]
    if codes != [0, 0]:  # it was not over yet
        assert codes == [128 + signal.SIGTERM] * 2
        assert "SIGTERM: stopped after step" in command.said(0)
        assert fits.run(folder, "ranks", "--ckpt_path", "last").code == 0
    fits.check(folder, "ranks")


def test_a_second_ctrl_c_ends_it_at_once_and_a_launchers_copy_of_the_first_does_not():
    if (child := os.fork()) == 0:
        signal.signal(signal.SIGINT, ExactResume()._stop)
        for pause in (0.0, 0.1, 1.1):
            time.sleep(pause)
            signal.raise_signal(signal.SIGINT)
            if pause == 0.1:
                os.write(2, b"still here")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGINT


def test_a_checkpoint_of_averaged_weights_holds_what_is_trained_alone_and_test_draws_with_the_average(
    fits, tmp_path, monkeypatch
):
    shutil.copytree(fits.uninterrupted("averaged"), tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    path = run_of(Path.cwd()) / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    average, current = checkpoint["state_dict"], checkpoint["current_model_state"]
    plain = run_of(fits.uninterrupted("plain")) / "checkpoints" / "last.ckpt"
    assert average.keys() == current.keys() == state_of(plain.parents[1])["state_dict"].keys()
    assert path.stat().st_size < 1.5 * plain.stat().st_size
    # the weights that were trained on are those of a fit without an average
    assert differences(current, state_of(plain.parents[1])["state_dict"]) == []
    assert all(not torch.equal(average[name], current[name]) for name in average)

    drawn_with = []

    def watched(self, batch, *_, **__):
        drawn_with.append({name: p.detach().clone() for name, p in self.trained_parameters().items()})
        raise KeyboardInterrupt

    monkeypatch.setattr(MultiIPAdapter, "generate", watched)
    with pytest.raises(SystemExit):
        main(["test"])
    assert differences(drawn_with[0], dict(average)) == []


def test_dreambooth_goes_on_after_sigterm_as_if_it_had_not_been_stopped(fits):
    args = ["fit", "--config", str(METHOD.with_name("dreambooth.yaml")), *fits.args("plain")[3:]]
    args += ["--data.person=test_000000", "--model.steps=4", "--model.class_images=2", "--trainer.max_steps=-1"]
    args += [f"--model.class_folder={fits.folder / 'class'}"]
    states = []
    for stop in (None, "tuning:2:TERM"):
        folder = fits.new()
        command = run(folder, *args, stop=stop)
        if stop is not None:
            assert command.code == 128 + signal.SIGTERM, command.said()
            command = run(folder, *args, "--ckpt_path", "last")
        assert command.code == 0, command.said()
        states.append(state_of(folder / "runs" / "dreambooth" / "version_0"))
    assert states[0]["global_step"] == 4
    assert differences(*states) == []


# ---- which checkpoint -----------------------------------------------------------------------------------------------


def work(fits: Fits, tmp_path: Path) -> Path:
    """A copy of a finished run, in a working folder of its own."""
    shutil.copytree(fits.uninterrupted("plain"), tmp_path / "work")
    return tmp_path / "work"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 16
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [cut, flip, lambda path: path.write_bytes(b"")])
def test_a_torn_checkpoint_is_named_and_passed_over(fits, tmp_path, damage, caplog):
    run = run_of(work(fits, tmp_path))
    older = run / "checkpoints" / "best-step=9.ckpt"
    for path in (run / "checkpoints").glob("best-*.ckpt"):
        path.unlink()
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    torch.save({**checkpoint, "global_step": 9}, older)
    assert newest_checkpoint(run) == run / "checkpoints" / "last.ckpt"
    damage(run / "checkpoints" / "last.ckpt")
    assert newest_checkpoint(run) == older
    assert f"passed over: checkpoint '{run / 'checkpoints' / 'last.ckpt'}' cannot be read" in caplog.text
    damage(older)
    with pytest.raises(CheckpointError, match="has no checkpoint to go on from"):
        run_to_continue(run.parent.parent, "*/*")


def test_ckpt_path_last_alone_takes_the_newest_run_and_its_config(fits, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(work(fits, tmp_path))
    caplog.set_level("INFO")
    run, typed = run_of(Path.cwd()), (run_of(Path.cwd()) / "config.yaml").read_text()
    main(["fit", "--ckpt_path", "last", "--trainer.max_steps", str(STEPS + 2)])
    assert f"fit of run {run.relative_to(Path.cwd())}, checkpoint last.ckpt" in caplog.text
    assert state_of(run)["global_step"] == STEPS + 2
    assert [path.name for path in run.parent.iterdir()] == ["version_0"]
    assert (run / "config.yaml").read_text() == typed.replace(f"max_steps: {STEPS}\n", f"max_steps: {STEPS + 2}\n")


def test_without_a_run_ckpt_path_last_is_an_error(fits, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for args in (["fit"], fits.args("plain")):
        with pytest.raises(SystemExit) as exit_:
            main([*args, "--ckpt_path", "last"])
        assert exit_.value.code == 1
        assert "error: there is no run to go on with in 'runs/" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "runs").exists()


def test_other_batches_are_told_of_when_a_fit_is_gone_on_with(fits, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(work(fits, tmp_path))
    main(["fit", "--ckpt_path", "last", "--data.batch_size", "3", "--trainer.max_steps", str(STEPS + 1)])
    assert "the checkpoint was trained with other data or batches (batch_size 4 => 3)" in caplog.text


# ---- saving ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_staged_beside_its_place_whatever_tmpdir_is(tmp_path, monkeypatch):
    staged = []
    monkeypatch.setattr(files.os, "replace", lambda a, b: staged.append((Path(a), Path(b))))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    DurableCheckpointIO().save_checkpoint({"state_dict": {}, "global_step": 1}, tmp_path / "a" / "last.ckpt")
    [(part, place)] = staged
    assert part.parent == place.parent == tmp_path / "a"


def test_the_command_line_saves_durably(fits, tmp_path, monkeypatch):
    """What is on the disk before its name is, in this order: content, name, folder."""
    monkeypatch.chdir(tmp_path)
    done = []
    sync, replace = os.fsync, os.replace

    def watched_sync(handle):
        done.append(f"sync {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")
        sync(handle)

    def watched_replace(a, b):
        done.append(f"name {Path(b).name}")
        replace(a, b)

    monkeypatch.setattr(os, "fsync", watched_sync)
    monkeypatch.setattr(os, "replace", watched_replace)
    main([*fits.args("plain"), "--trainer.max_steps", "1"])
    at = done.index("name last.ckpt")
    assert done[at - 1 : at + 2] == ["sync .last.ckpt.part", "name last.ckpt", "sync checkpoints"]


# ---- many -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "kills"), [("plain", 36), ("workers", 8), ("accumulated", 8), ("ranks", 8)])
def test_no_kill_at_a_random_moment_loses_or_changes_anything(fits, variant, kills):
    rng = random.Random(variant)
    fits.uninterrupted(variant)
    begun = time.monotonic()
    assert fits.run(fits.new(), variant).code == 0
    whole = time.monotonic() - begun  # seconds
    killed = continued = 0
    while killed < kills:
        folder, args = fits.new(), []
        while True:
            command = Command(folder, *fits.args(variant), *args, ranks=2 if variant == "ranks" else 1)
            command.processes[0].join(rng.uniform(0.1, 1) * whole)
            if command.processes[0].exitcode is not None:
                assert command.code == 0, command.said()
                break
            command.kill()
            killed += 1
            # before its first checkpoint there is nothing to lose
            if list(folder.glob("runs/*/*/checkpoints/*.ckpt")):
                args = ["--ckpt_path", "last"]
                continued += 1
            else:
                shutil.rmtree(folder)
        fits.check(folder, variant)
    print(f"{variant}: {killed} kills, {continued} after a checkpoint, 0 lost, 0 differing")
