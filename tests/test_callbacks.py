"""A run's folder holds all that is made of it, with every logger; a fit says what it does and what to do next."""

import json
import re
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import TQDMProgressBar
from resuming import METHOD, score_by, write_config
from torch.utils.data import DataLoader

from lit_multiip.__main__ import main
from lit_multiip.callbacks import ProgressBar

WANDB = {"class_path": "wandb_like.WandbLike", "init_args": {"save_dir": "runs", "project": "people"}}
CSV = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs", "name": "mine"}}
TENSORBOARD = {**CSV, "class_path": "lightning.pytorch.loggers.TensorBoardLogger"}
LOGGERS: dict[str, tuple[Any, str, set[str]]] = {  # as in a config, name of the run, files of the logger in its folder
    "wandb": (WANDB, "self_attn", set()),  # whose name is that of the method's config
    "csv, tensorboard": ([CSV, TENSORBOARD], "mine", {"metrics.csv", "events.out.tfevents", "hparams.yaml"}),
    "none": (False, "self_attention", set()),
}


@pytest.fixture(scope="module")
def config(tiny_backbone, random_critic, tmp_path_factory):
    folder = tmp_path_factory.mktemp("callbacks")
    score = score_by(random_critic)
    options = {"trainer": {"max_steps": 4, "val_check_interval": 2}, "score": score, "grid": {"people": 1}}
    return write_config(folder / "tiny.yaml", tiny_backbone, folder / "features", **options)


def files(folder: Path) -> set[str]:
    """What lies in a run's folder, less the digits of an events file."""
    return {"events.out.tfevents" if path.name.startswith("events") else path.name for path in folder.iterdir()}


@pytest.mark.parametrize("kind", LOGGERS)
def test_all_of_a_run_is_in_one_folder_whatever_its_logger(kind, config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    logger, name, of_logger = LOGGERS[kind]
    Path("logger.yaml").write_text(yaml.safe_dump({"trainer": {"logger": logger}}))
    fit = ["fit", "--config", str(METHOD), "--config", str(config), "--config", "logger.yaml"]
    home = Path("runs") / name

    # two fits have a folder each, and say so
    for number in range(2):
        main(fit)
        run = home / f"version_{number}"
        own = {"config.yaml", "checkpoints", "grids", ".lock"}
        assert files(run) == own | of_logger
        assert {path.name for path in (run / "checkpoints").iterdir()} >= {"last.ckpt"}
        assert {path.name for path in (run / "grids").iterdir()} == {"step_000002.png", "step_000004.png"}
        last = capsys.readouterr().out.strip().splitlines()[-1]
        assert last == f"Trained: {run}. Next: python -m lit_multiip test"
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["logger"] is not None

    # `last` goes on in the newest one's
    main([*fit, "--ckpt_path", "last", "--trainer.max_steps", "6"])
    assert sorted(path.name for path in home.iterdir()) == ["version_0", "version_1"]
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 6
    assert (run / "grids" / "step_000006.png").exists()

    # and bare `test` writes into it
    main(["test"])
    assert (run / "test" / "metrics.json").exists()
    assert sorted(path.name for path in home.iterdir()) == ["version_0", "version_1"]
    if "csv" in kind:  # which Lightning's logger would have deleted
        first = (run / "metrics-1.csv").read_text().splitlines()
        assert "train/loss" in first[0] and len(first) >= 5
    assert {path.name for path in tmp_path.iterdir()} == {"logger.yaml", "runs"}
    if kind == "wandb":
        [sent] = Path("runs/wandb").iterdir()
        check_what_a_service_was_sent([json.loads(line) for line in sent.read_text().splitlines()])


def check_what_a_service_was_sent(sent: list[dict[str, Any]]) -> None:
    """Two fits of four steps, and two steps more."""
    described = [message["config"] for message in sent if "config" in message]
    assert len(described) == 3
    assert described[0]["method"] == "SelfAttention" and described[0]["trained_parameters"] > 0
    pictures = [message["step"] for message in sent if message.get("image") == "val/samples"]
    assert pictures == [1, 3, 1, 3, 5]
    assert [message["step"] for message in sent if "train/loss" in message] == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5]


class Slow(L.LightningModule):
    """Learns nothing, a step in an eighth of a second."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        time.sleep(0.125)
        return self.weight * 0


def test_the_bar_moves_from_the_first_step_over_epochs_and_reads_the_loss_once_a_second(monkeypatch, capsys):
    plain, read = TQDMProgressBar.get_metrics, []

    def counted(self, *args):
        read.append(time.monotonic())
        return plain(self, *args)

    monkeypatch.setattr(TQDMProgressBar, "get_metrics", counted)
    quiet = {"enable_model_summary": False, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_steps=12, callbacks=[ProgressBar()], **quiet)
    trainer.fit(Slow(), DataLoader(range(4)))  # four steps an epoch
    shown = re.findall(r"Training: .*?(\d+)/(\d+)", capsys.readouterr().out)
    assert {total for _, total in shown if total != "?"} == {"12"}
    assert [str(step) for step in range(1, 13)] == sorted({step for step, _ in shown if step != "0"}, key=int)
    assert 1 <= len(read) <= 3 and all(later - earlier > 1 for earlier, later in pairwise(read))
