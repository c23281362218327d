"""Which folder is a run's, whatever its loggers are, and which checkpoint of it is meant."""

import os
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from jsonargparse import dict_to_namespace
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lit_multiip.runs import best_checkpoint, home_of_runs, newest_run, next_run

# ---- which checkpoint -----------------------------------------------------------------------------------------------


class Scores(L.LightningModule):
    """Logs given validation scores, one an epoch, and learns nothing."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.weight, self.scores = torch.nn.Parameter(torch.zeros(())), scores

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.weight * 0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("score", self.scores[self.current_epoch])


def trained(run: Path, scores: list[float], **options: Any) -> Path:
    """A run of as many epochs as there are scores, with `last.ckpt` and what a `ModelCheckpoint` keeps."""
    where = run / "checkpoints"
    best = ModelCheckpoint(where, **{"monitor": "score", "filename": "best-{epoch}", **options})
    other = {"min": "max", "max": "min"}[best.mode]
    of_user = ModelCheckpoint(where, monitor="score", mode=other, filename="trainer.callbacks-{epoch}")
    last = ModelCheckpoint(where, filename="last", monitor=None, save_top_k=1, enable_version_counter=False)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0, "logger": False}
    trainer = L.Trainer(max_epochs=len(scores), accelerator="cpu", callbacks=[of_user, best, last], **quiet)
    loader = DataLoader([0])
    trainer.fit(Scores(scores), loader, loader)
    (run / "config.yaml").write_text("backbone: {path: mini}\n")
    return run


@pytest.mark.parametrize(
    ("scores", "options", "expected"),
    [
        ([3.0, 1.0, 2.0], {}, "best-epoch=1.ckpt"),
        ([2.0, 3.0, 1.0], {"mode": "max", "save_top_k": 3}, "best-epoch=1.ckpt"),
        ([3.0, 1.0, 2.0], {"save_top_k": -1}, "best-epoch=1.ckpt"),
        ([3.0, 1.0, 2.0], {"filename": "{epoch}-{score:.1f}"}, "epoch=1-score=1.0.ckpt"),
        ([3.0, 1.0, 2.0], {"filename": "of/{epoch}"}, "of/epoch=1.ckpt"),
    ],
)
def test_the_best_checkpoint_is_the_callbacks_own(scores, options, expected, tmp_path):
    run = trained(tmp_path / "a", scores, **options)
    assert best_checkpoint(run) == run / "checkpoints" / expected
    shutil.move(run, tmp_path / "moved")
    assert best_checkpoint(tmp_path / "moved") == tmp_path / "moved" / "checkpoints" / expected


def test_torn_checkpoints_are_passed_over(tmp_path, caplog):
    run = trained(tmp_path / "a", [3.0, 1.0, 2.0])
    best = run / "checkpoints" / "best-epoch=1.ckpt"
    best.write_bytes(best.read_bytes()[:100])
    assert best_checkpoint(run) == run / "checkpoints" / "last.ckpt"
    assert "best-epoch=1.ckpt' cannot be read" in caplog.text
    for path in (run / "checkpoints").iterdir():
        path.write_bytes(b"")
    assert best_checkpoint(run) is None


# ---- which folder ---------------------------------------------------------------------------------------------------


def test_the_newest_run_is_the_one_saved_to_last_that_can_be_loaded(tmp_path):
    for age, name in ((100, "old"), (50, "new"), (1, "torn"), (0, "empty")):
        run = tmp_path / name / "version_0"
        (run / "checkpoints").mkdir(parents=True)
        (run / "config.yaml").write_text("backbone: {path: mini}\n")
        if name != "empty":
            torch.save({"callbacks": {}, "state_dict": {}}, path := run / "checkpoints" / "last.ckpt")
            if name == "torn":
                path.write_bytes(b"torn")
            os.utime(path, (1e9 - age, 1e9 - age))
    (tmp_path / "untrained" / "version_0" / "test").mkdir(parents=True)
    run = tmp_path / "new" / "version_0"
    assert newest_run(tmp_path) == (run, run / "checkpoints" / "last.ckpt")


SELF_ATTENTION = {
    "class_path": "lit_multiip.methods.adapter.MultiIPAdapter",
    "init_args": {"aggregator": {"class_path": "lit_multiip.methods.aggregators.SelfAttention"}},
}
DREAMBOOTH = {"class_path": "lit_multiip.methods.dreambooth.DreamBooth", "init_args": {"steps": 4}}
TENSORBOARD = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "runs", "name": "mine", "version": None}}
WANDB = {"class_path": "WandbLogger", "init_args": {"save_dir": ".", "name": None, "project": "x", "version": None}}
CSV = {"class_path": "CSVLogger", "init_args": {"save_dir": "logs", "name": "b", "version": 3}}


@pytest.mark.parametrize(
    ("logger", "model", "expected"),
    [
        (TENSORBOARD, SELF_ATTENTION, (Path("runs/mine"), None)),
        (CSV, SELF_ATTENTION, (Path("logs/b"), "version_3")),
        ([WANDB, CSV], SELF_ATTENTION, (Path("logs/b"), "version_3")),  # the first that has a name
        (WANDB, SELF_ATTENTION, (Path("runs/self_attention"), None)),
        (False, DREAMBOOTH, (Path("runs/dream_booth"), None)),
    ],
)
def test_a_run_lies_where_its_logger_says_or_below_the_methods_name(logger, model, expected):
    trainer = {"logger": logger, "default_root_dir": None}
    assert home_of_runs(dict_to_namespace(trainer), dict_to_namespace(model)) == expected
    root, expected_root = {**trainer, "default_root_dir": "else"}, expected[0]
    if expected_root.parent == Path("runs") and logger is not TENSORBOARD:
        assert home_of_runs(dict_to_namespace(root), dict_to_namespace(model))[0].parent == Path("else")


def test_a_new_run_has_a_higher_number_than_all_that_are_there(tmp_path):
    assert next_run(tmp_path) == tmp_path / "version_0"
    for name in ("version_2", "version_10", "version_x", "mine"):
        (tmp_path / name).mkdir()
    assert next_run(tmp_path) == tmp_path / "version_11"
