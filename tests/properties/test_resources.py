"""Full disks, folders that cannot be written, two runs in one, a cache that goes: what was there stays whole."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from resuming import METHOD, Command, differences, run, run_of, score_by, state_of, write_config

from lit_multiip import files
from lit_multiip.files import only_writer, write_durably
from lit_multiip.runs import read_checkpoint


@pytest.fixture(scope="module")
def config(tiny_backbone, random_critic, tmp_path_factory):
    folder = tmp_path_factory.mktemp("resources")
    score = score_by(random_critic)
    trainer = {"max_steps": 6}
    return write_config(folder / "tiny.yaml", tiny_backbone, folder / "features", score=score, trainer=trainer)


@pytest.fixture(scope="module")
def fitted(config):
    """A working folder with a run that was tested."""
    folder = config.parent / "fitted"
    for args in (fit(config), ["test"]):
        assert run(folder, *args).code == 0
    return folder


def fit(config: Path) -> list[str]:
    return ["fit", "--config", str(METHOD), "--config", str(config)]


def hashes(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != ".lock")
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@contextmanager
def tmpfs(folder: Path, options: str) -> Iterator[None]:
    """A small file system, where this process may mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("this process may not mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


# ---- full disk ------------------------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_what_was_there_and_no_litter(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def full(file):
        file.write(b"new")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"file' cannot be written .No space left on device.: free space"):
        write_durably(path, full)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("size", "what"), [(20_000, "features"), pytest.param(120_000, "checkpoints", marks=pytest.mark.slow)]
)
def test_a_full_disk_ends_a_fit_in_one_line_and_space_lets_it_go_on(size, what, config, tmp_path):
    args = [*fit(config), "--data.cache_dir", str(tmp_path / "features")]
    command = run(tmp_path, *args, largest_file=size)
    assert command.code == 1
    message = command.said().strip().splitlines()[-1]
    assert message.startswith("error: ") and f"{what}" in message and "free space" in message
    assert not list(tmp_path.rglob("*.part"))
    assert run(tmp_path, *args, "--trainer.logger.init_args.version=again").code == 0


def test_a_full_disk_keeps_the_last_good_checkpoint_and_the_fit_goes_on_from_it_exactly(config, fitted, tmp_path):
    short = ["--trainer.val_check_interval=2"]
    assert run(tmp_path / "whole", *fit(config), *short).code == 0
    assert run(tmp_path, *fit(config), *short, stop="batch:4").code == -signal.SIGKILL
    before = (run_of(tmp_path) / "checkpoints" / "last.ckpt").read_bytes()
    command = run(tmp_path, *fit(config), *short, "--ckpt_path", "last", largest_file=120_000)
    assert command.code == 1 and "cannot be written" in command.said()
    assert (run_of(tmp_path) / "checkpoints" / "last.ckpt").read_bytes() == before
    assert run(tmp_path, *fit(config), *short, "--ckpt_path", "last").code == 0
    assert differences(state_of(run_of(tmp_path / "whole")), state_of(run_of(tmp_path))) == []


@pytest.mark.slow
def test_a_full_disk_during_test_keeps_the_earlier_results(fitted, tmp_path):
    shutil.copytree(fitted, tmp_path / "work")
    before = hashes(run_of(tmp_path / "work"))
    command = run(tmp_path / "work", "test", "--data.held_out=2", largest_file=3000)
    assert command.code == 1, command.said()
    left = hashes(run_of(tmp_path / "work"))
    assert {name: value for name, value in left.items() if "unfinished" not in name and "events" not in name} == {
        name: value for name, value in before.items() if "events" not in name
    }


def test_a_small_file_system_that_fills_up_is_told(config, tmp_path):
    """The same with a real one: room for features, and for no second checkpoint."""
    with tmpfs(tmp_path / "work", "size=300k"):
        command = run(tmp_path / "work", *fit(config))
        assert command.code == 1
        assert "No space left on device" in command.said().strip().splitlines()[-1]
        for path in (run_of(tmp_path / "work") / "checkpoints").iterdir():
            assert read_checkpoint(path, verify=True)["global_step"] > 0


# ---- folders --------------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_is_told_in_one_line(config, tmp_path):
    (tmp_path / "runs").write_text("a file where a folder should be")
    command = run(tmp_path, *fit(config))
    assert command.code == 1 and "runs" in command.said().strip().splitlines()[-1]
    assert command.said().strip().splitlines()[-1].startswith("error: ")


def test_a_read_only_folder_is_told_in_one_line(config, tmp_path):
    with tmpfs(tmp_path / "work" / "runs", "size=1m,ro"):
        command = run(tmp_path / "work", *fit(config))
        message = command.said().strip().splitlines()[-1]
        assert command.code == 1 and message.startswith("error: ") and "Read-only file system" in message


def test_a_folder_has_one_writer(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    with only_writer(tmp_path), pytest.raises(OSError, match="another process is writing into"), only_writer(tmp_path):
        pass
    with only_writer(tmp_path):
        pass


def test_a_second_fit_into_the_same_folder_is_refused_and_the_first_is_not_disturbed(config, tmp_path):
    args = [*fit(config), "--trainer.logger.init_args.version=one"]
    first = Command(tmp_path, *args, "--trainer.max_steps=40")
    folder = tmp_path / "runs" / "self_attn" / "one"
    while not (folder / "config.yaml").exists() and first.processes[0].exitcode is None:
        time.sleep(0.01)
    os.kill(first.processes[0].pid or 0, signal.SIGSTOP)  # it does not end in the meantime
    events = sorted(folder.glob("events*"))
    second = run(tmp_path / "other", *args, "--trainer.logger.init_args.save_dir", str(tmp_path / "runs"))
    assert second.code == 1
    assert f"another process is writing into '{folder}'" in second.said().strip().splitlines()[-1]
    assert sorted(folder.glob("events*")) == events
    os.kill(first.processes[0].pid or 0, signal.SIGCONT)
    assert first.code == 0
    third = run(tmp_path, *args)  # it is over: nor is it written over
    assert third.code == 1 and "holds another run: go on with it by --ckpt_path last" in third.said()
    assert state_of(folder)["global_step"] == 40


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_cache_that_is_deleted_under_a_running_fit_does_not_disturb_it(workers, config, fitted, tmp_path):
    args = [*fit(config), "--data.cache_dir", str(tmp_path / "features"), f"--data.num_workers={workers}"]
    command = Command(tmp_path, *args, "--trainer.val_check_interval=1")
    while not list(tmp_path.glob("runs/*/*/checkpoints/*")) and command.processes[0].exitcode is None:
        time.sleep(0.01)
    shutil.rmtree(tmp_path / "features", ignore_errors=True)
    assert command.code == 0, command.said()
    assert differences(state_of(run_of(fitted))["state_dict"], state_of(run_of(tmp_path))["state_dict"]) == []
    assert run(tmp_path, "test").code == 0  # which makes it again


OTHER_STOPS = ("drawing:2:INT", "drawing:1:KILL", "scores:1:KILL")

# ---- interrupted ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stop", ["scores:1:INT", *(pytest.param(stop, marks=pytest.mark.slow) for stop in OTHER_STOPS)]
)
def test_an_interrupted_test_keeps_the_earlier_results(stop, fitted, tmp_path):
    shutil.copytree(fitted, tmp_path / "work")
    results = run_of(tmp_path / "work") / "test"
    before = hashes(results)
    command = run(tmp_path / "work", "test", "--model.sampling.steps=3", "--data.eval_batch_size=1", stop=stop)
    assert command.code != 0
    assert {name: value for name, value in hashes(results).items() if "unfinished" not in name} == before
    assert run(tmp_path / "work", "test", "--model.sampling.steps=3").code == 0  # nothing is locked
    after = hashes(results)
    assert set(after) == set(before) and after["metrics.json"] != before["metrics.json"]
    assert json.loads((results / "metrics.json").read_text())["describe"]["sampling"]["steps"] == 3
