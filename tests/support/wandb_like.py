"""A logger that behaves as Weights & Biases' does, without it: an id for a version, and no folder of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only


class Experiment:
    """A run of the service: what it was sent is appended to a file, a JSON line each."""

    def __init__(self, folder: Path, id: str) -> None:
        self.id, self.file = id, folder / "wandb" / f"run-{id}.jsonl"
        self.file.parent.mkdir(parents=True, exist_ok=True)

    def send(self, **message: Any) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(message, default=str) + "\n")


class WandbLike(Logger):
    """Has WandbLogger's arguments, and its `name` (the project), `version` (an id), `save_dir` and `log_image`."""

    def __init__(
        self, name: str | None = None, save_dir: str = ".", version: str | None = None, project: str = "lightning_logs"
    ) -> None:
        super().__init__()
        self._project, self._save_dir, self._id = project, save_dir, version
        self._experiment: Experiment | None = None

    @property
    @rank_zero_experiment
    def experiment(self) -> Experiment:
        if self._experiment is None:
            self._experiment = Experiment(Path(self._save_dir), self._id or "k3x9")
        return self._experiment

    @property
    def name(self) -> str:
        return self._project

    @property
    def version(self) -> str | None:
        return self._experiment.id if self._experiment else self._id

    @property
    def save_dir(self) -> str:
        return self._save_dir

    @rank_zero_only
    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        self.experiment.send(config=dict(params))

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.experiment.send(step=step, **metrics)

    @rank_zero_only
    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        assert isinstance(images, list)
        self.experiment.send(step=step, image=key, size=images[0].size)
