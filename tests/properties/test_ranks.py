"""Two ranks say what one says, write what one writes, and end together."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from resuming import METHOD, ROOT, Command, logged, run, run_of, score_by, state_of, write_config

CONFIGS = ROOT / "configs"


@pytest.fixture(scope="module")
def config(tiny_backbone, random_critic, tmp_path_factory):
    """Five test people with one task each: uneven for two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    faces = {"train": 3, "validation": 3, "test": 5, "photos": 11}
    return write_config(
        folder / "tiny.yaml",
        tiny_backbone,
        folder / "features",
        data={
            "source": {"class_path": "lit_multiip.data.MiniFaces", "init_args": faces},
            "held_out": 1,
            "eval_batch_size": 1,  # with more, a task has other neighbours on two ranks, and rounds otherwise
        },
        score=score_by(random_critic, anchors=True, resamples=20),
        trainer={"max_steps": 4},
    )


@pytest.mark.parametrize("method", ["avg_pool", "dreambooth"])
def test_two_ranks_score_an_uneven_number_of_tasks_as_one_does_to_the_last_digit(method, config, tmp_path):
    args = ["test", "--config", str(CONFIGS / f"{method}.yaml"), "--config", str(config)]
    if method == "dreambooth":
        args += ["--model.steps=2", "--model.class_images=2", f"--model.class_folder={config.parent / 'class'}"]
    results, tables = [], []
    for ranks in (1, 2):
        command = run(tmp_path / str(ranks), *args, ranks=ranks)
        assert command.code == 0, command.said()
        folder = command.folder / "runs" / method / "version_0" / "test"
        results.append(json.loads((folder / "metrics.json").read_text()))
        tables.append((folder / "scores.csv").read_text())
        assert results[-1]["protocol"]["tasks"] == 5
    assert results[0]["protocol"] == results[1]["protocol"]
    assert results[0]["rows"] == results[1]["rows"]  # the largest difference of any metric is 0
    assert tables[0] == tables[1]


def test_every_file_has_one_writer_and_validation_counts_every_task_once(config, tmp_path):
    args = ["fit", "--config", str(METHOD), "--config", str(config)]
    fresh = ["--data.cache_dir", str(tmp_path / "features"), "--grid.people=2"]
    two = run(tmp_path / "two", *args, *fresh, "--data.batch_size=2", ranks=2, watched=True)
    assert two.code == 0, two.said()
    written = [set((two.folder / f"written_{rank}.txt").read_text().split("\n")) for rank in range(2)]
    files = [{file for file in one if str(tmp_path) in file and "said_" not in file} for one in written]
    files = [
        {file for file in one if not Path(file).is_dir()} for one in files
    ]  # a file without a name is its opener's
    assert files[0] & files[1] == set()
    run_folder = str(run_of(two.folder))
    assert any(file.startswith(run_folder) for file in files[0])
    assert not any(file.startswith(run_folder) for file in files[1])
    assert Counter("features" in file for file in files[1])[True] >= 3  # it encodes its share
    one = run(tmp_path / "one", *args, "--data.batch_size=4")
    assert one.code == 0, one.said()
    # 3 validation tasks: the second rank has one of them twice
    for tag, values in logged(run_of(one.folder)).items():
        if tag.startswith("val/"):
            assert logged(run_of(two.folder))[tag] == [(step, pytest.approx(value, abs=1e-5)) for step, value in values]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_ends_the_run_with_a_clear_error(rank, config, tmp_path):
    args = ["fit", "--config", str(METHOD), "--config", str(config)]
    command = Command(tmp_path, *args, "--trainer.val_check_interval=1", stop="batch:3", ranks=2, stopped_rank=rank)
    command.wait(60)
    codes = [process.exitcode for process in command.processes]
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 1
    message = command.said(1 - rank).strip().splitlines()[-1]
    assert message.startswith("error: another rank has died or cannot be reached")
    assert state_of(run_of(tmp_path))["global_step"] == 2  # what was kept is whole


@pytest.mark.slow
def test_ranks_that_lightning_starts_end_with_the_one_that_dies(config, tmp_path):
    """The same with ``--trainer.devices 2``, as it is typed."""
    args = ["fit", "--config", str(METHOD), "--config", str(config), "--trainer.devices=2", "--trainer.strategy=ddp"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PL_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "lit_multiip", *args, "--trainer.max_steps=100000", "--trainer.val_check_interval=2"],
        cwd=tmp_path,
        env={**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(tmp_path.glob("runs/*/*/checkpoints/last.ckpt")) and process.poll() is None:
        pass
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "another rank has died or cannot be reached" in said or "Child process with PID" in said
    assert state_of(run_of(tmp_path))["global_step"] >= 2
