"""The Trainer with its run folder, and the callbacks of fit and predict: bar, last validation, records, pictures."""

from __future__ import annotations

import json
import logging
import math
import re
import shlex
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ModelSummary, TQDMProgressBar, WeightAveraging
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate
from tqdm import tqdm

from lit_multiip.data.record import RECORD, training_record, unknown_record
from lit_multiip.evaluation.pictures import Cell, draw_tasks, first_tasks, labelled_grid, squares, to_picture
from lit_multiip.files import LitMultiIPError, write_durably

logger = logging.getLogger(__name__)


class Trainer(L.Trainer):
    """Lightning's Trainer with one run folder, whatever its loggers are."""

    run_folder: Path | None = None

    @property
    def log_dir(self) -> str | None:
        """Folder of the run, `runs/<name>/version_k`. A collective call."""
        if self.run_folder is None:
            return super().log_dir
        return self.strategy.broadcast(str(self.run_folder))  # the first rank's: the others may have counted later

    def write_into(self, folder: Path) -> None:
        """Make `folder` the run's: checkpoints go there too, and a CSV logger's earlier file is kept."""
        self.run_folder = folder
        for callback in self.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(folder / "checkpoints")
        earlier = folder / "metrics.csv"
        if self.is_global_zero and earlier.exists():  # CSVLogger would delete it
            number = len(list(folder.glob("metrics-*.csv"))) + 1
            earlier.rename(folder / f"metrics-{number}.csv")


class SaveFitConfig(SaveConfigCallback):
    """Saves the config of `fit` alone, for that is what makes a folder a run."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write it, or refuse a folder that holds another run."""
        path = Path(trainer.log_dir or trainer.default_root_dir) / "config.yaml"  # a collective call
        if stage == "fit" and trainer.strategy.broadcast(path.exists() and not self.overwrite):
            raise FileExistsError(
                f"'{path.parent}' holds another run: go on with it by --ckpt_path last, or write elsewhere by "
                "--trainer.logger.init_args.version"
            )
        if stage == "fit" and trainer.is_global_zero:
            text = self.parser.dump(self.config, skip_none=False)
            write_durably(path, lambda file: file.write(text.encode()))


class ProgressBar(TQDMProgressBar):
    """Lightning's bars; that of training counts optimiser steps, from the first batch on.

    The loss beside it is read once a second, for to read it the processor waits for the GPU.
    """

    def __init__(self) -> None:
        super().__init__(refresh_rate=1)
        self._read_at, self._metrics = -math.inf, dict[str, Any]()

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Return what stands beside the bar."""
        if time.monotonic() - self._read_at > 1:
            self._metrics = dict(super().get_metrics(trainer, pl_module))
            self._metrics.pop("v_num", None)
            self._read_at = time.monotonic()
        return self._metrics

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin at the step of the checkpoint, if there is one."""
        super().on_train_start(trainer, pl_module)
        bar, own = self.train_progress_bar, getattr(pl_module, "steps", math.inf)  # DreamBooth counts for itself
        steps = min(trainer.estimated_stepping_batches, own)
        bar.total = None if math.isinf(steps) else int(steps)
        bar.n = bar.initial = trainer.global_step
        bar.unit = "step"

    def on_train_epoch_start(self, *_: Any) -> None:
        """Go on: it is steps that are counted."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Move."""
        bar = self.train_progress_bar
        bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
        bar.update(trainer.global_step - bar.n)


class ValidateBySteps(L.Callback):
    """Has `trainer.val_check_interval` count optimiser steps, and validates after the last step whatever the interval.

    Lightning counts batches, of which a step has several where gradients are accumulated: it validates after a batch
    whose number `trainer.val_check_batch` divides. With `trainer.check_val_every_n_epoch` Lightning's rule holds, but
    for the last step.
    """

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Remember the step, to see whether the batch completes one."""
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Settle whether a validation follows."""
        step, interval = trainer.global_step, trainer.val_check_interval
        if step == self.step:  # a gradient that is being accumulated
            due = False
        elif step == trainer.max_steps or (trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs):
            due, trainer.check_val_every_n_epoch = True, None
        else:
            due = isinstance(interval, int) and step % interval == 0
        if trainer.check_val_every_n_epoch is None and isinstance(interval, int):
            trainer.val_check_batch = 1 if due else sys.maxsize


class Summary(ModelSummary):
    """Says in one line how much of a model is trained."""

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]], total_parameters: int, trainable_parameters: int, *_: Any, **__: Any
    ) -> None:
        """Log the numbers of parameters."""
        parts = ", ".join(dict(summary_data).get("Type", []))
        logger.info("parameters: %s trained of %s (%s)", f"{trainable_parameters:,}", f"{total_parameters:,}", parts)


class RecordPeople(L.Callback):
    """Puts into every checkpoint whom it has seen, names and photos as digests; `test` audits itself by that."""

    def __init__(self) -> None:
        self.earlier: dict[str, Tensor] | None = None

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the people of the checkpoint that fit goes on from."""
        self.earlier = checkpoint.get(RECORD, unknown_record())

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Record the training people, the validation people, by whom the checkpoint is chosen, and an adapter's own."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        module: Any = pl_module
        people, held_out = data.split.seen
        checkpoint[RECORD] = training_record(people, self.earlier, module.trained_on, held_out=held_out)


class AverageTrained(L.Callback):
    """Has Lightning's `WeightAveraging` callbacks average what is trained alone, and hold what is frozen only once.

    An average of equal numbers differs from them in the last digits, which a frozen UNet must not.
    """

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the averaged model the module's own frozen weights."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            average = callback._average_model if isinstance(callback, WeightAveraging) else None
            if average is None:
                continue
            theirs = chain(average.module.parameters(), average.module.buffers())
            for copy, own in zip(theirs, chain(pl_module.parameters(), pl_module.buffers()), strict=True):
                if not own.requires_grad:
                    copy.data = own.data
            if average.avg_fn is not None:
                average.avg_fn = partial(_average_unless_shared, average.avg_fn)


def _average_unless_shared(average: Any, averaged: Tensor, current: Tensor, number: Any) -> Tensor:
    return averaged if averaged.data_ptr() == current.data_ptr() else average(averaged, current, number)


class DescribeRun(L.Callback):
    """Gives the loggers of a `fit` the method's facts, and ends it by naming the run and the next command."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log `describe()` as hyperparameters."""
        module: Any = pl_module
        for logger in trainer.loggers:
            logger.log_hyperparams(module.describe())

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say where the run lies and what to type next."""
        folder = run_folder(trainer)  # on every rank, or the first one waits for ever
        if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        command = "predict" if getattr(pl_module, "per_person", False) else "test"
        # without --run it is the newest of runs/<name>/
        chosen = "" if folder.parent.parent == Path("runs") else f" --run {shlex.quote(str(folder))}"
        print(f"\nTrained: {folder}. Next: python -m lit_multiip {command}{chosen}", flush=True)


class SampleGrid(L.Callback):
    """Draws some validation people after a validation of `fit`: references | held-out photo | generated.

    The picture goes into the run's `grids/` and to the loggers that take pictures.

    Args:
        people: validation people in the picture, one task each; 0 draws none.
        every: n; after every n-th validation.
    """

    def __init__(self, people: int = 6, every: int = 1) -> None:
        if people < 0 or every < 1:
            raise LitMultiIPError(f"grid.people={people} and grid.every={every}: give at least 0 and at least 1")
        self.people, self.every, self.validations = people, every, 0

    def state_dict(self) -> dict[str, int]:
        """Return how many validations there have been."""
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Count on."""
        self.validations = state_dict["validations"]

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw on rank 0."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or self.people == 0:
            return
        self.validations += 1
        folder = run_folder(trainer) / "grids"  # on every rank, or the first one waits for ever
        if self.validations % self.every or not trainer.is_global_zero:
            return
        picture = self._draw(trainer, pl_module)
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"step_{trainer.global_step:06d}.png")
        # at the step of the validation's scores, the last one that the checkpoint after it has seen
        for logger in trainer.loggers:
            log_picture(logger, "val/samples", picture, trainer.global_step - 1)

    def _draw(self, trainer: L.Trainer, module: Any) -> Image.Image:
        dataset = trainer.val_dataloaders.dataset  # type: ignore[union-attr]
        indices = first_tasks(dataset.tasks, self.people)
        images: list[Tensor] = []
        with torch.no_grad(), trainer.precision_plugin.forward_context():  # hooks lack the autocast that steps have
            for index in tqdm(indices, "drawing validation people", unit="person", delay=1, leave=False):
                batch = trainer.strategy.batch_to_device(default_collate([dataset[index]]))
                images += module.generate(batch)
        tasks, title = [dataset.tasks[index] for index in indices], f"{module.method()}, step {trainer.global_step}"
        return draw_tasks(tasks, {"generated": images}, module.image_side, title)


def log_picture(logger: Logger, key: str, picture: Image.Image, step: int) -> None:
    """Give a picture to a logger that takes pictures, by `log_image` (Weights & Biases) or as TensorBoard does."""
    if hasattr(logger, "log_image"):
        logger.log_image(key, [picture], step=step)
        return
    writer: Any = getattr(logger, "experiment", None)
    if hasattr(writer, "add_image"):  # TensorBoard
        writer.add_image(key, np.asarray(picture), step, dataformats="HWC")  # (H, W, 3) uint8
    elif hasattr(writer, "log_image"):  # Comet
        writer.log_image(picture, name=key, step=step)


class SavePredictions(L.Callback):
    """Writes what `predict` draws into the run's `predict/<person>/`: a PNG an image, a labelled grid, and how.

    The folder is a new one every time: `<person>`, then `<person>-2`, ...
    """

    def __init__(self) -> None:
        self.folder: Path | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make the folder before anything is drawn."""
        if stage != "predict":
            return
        self._writer, self._written = ThreadPoolExecutor(1), list[Future[None]]()
        self._data: Any = trainer.datamodule  # type: ignore[attr-defined]
        run, folder = run_folder(trainer), None
        if trainer.is_global_zero:
            folder = _new_folder(run / "predict" / _slug(self._data.requests[0].person))
        self.folder = trainer.strategy.broadcast(folder)

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write a batch while the next is drawn; an image that two ranks draw is the same."""
        for index, image in zip(batch["task"].tolist(), outputs.cpu(), strict=True):
            self._written.append(self._writer.submit(to_picture(image).save, self._file(index)))

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lay all images out on rank 0: the references, and under them a prompt a row and a seed a column."""
        for written in self._written:
            written.result()
        self._writer.shutdown()
        trainer.strategy.barrier("predictions")
        if not trainer.is_global_zero:
            return
        assert self.folder is not None
        module: Any = pl_module
        requests, side = self._data.requests, module.image_side
        drawing = requests[0].drawing
        shown = {requests[0].person: list(requests[0].references)} | drawing.rows()
        if drawing.weighted:  # each photo once, whatever its weight
            shown = {name: list(dict.fromkeys(photos)) for name, photos in shown.items()}
        most = max(map(len, shown.values()))
        prompts = list(dict.fromkeys(request.prompt for request in requests))
        seeds = list(dict.fromkeys(request.seed for request in requests))
        files = {(request.prompt, request.seed): self._file(index) for index, request in enumerate(requests)}
        rows: list[list[Cell]] = [
            [Image.open(file) if (file := files[prompt, seed]).exists() else None for seed in seeds]
            for prompt in prompts
        ]
        title = f"{requests[0].person}, {module.method()}"
        numbers = [f"reference {number + 1}" for number in range(most)]
        cells: list[list[Cell]] = [
            [*squares(photos, side), *[None] * (most - len(photos))] for photos in shown.values()
        ]
        grids = (
            labelled_grid(cells, list(shown), numbers, side, title),
            labelled_grid(rows, prompts, [f"seed {seed}" for seed in seeds], side),
        )
        _stack(*grids).save(self.folder / "grid.png")
        facts = {
            "person": requests[0].person,
            "references": [photo.name for photo in requests[0].references],
            "beside": {name: [photo.name for photo in photos] for name, photos in drawing.rows().items()},
            "masks": len(drawing.masks),
            "images": [
                {"file": self._file(index).name, "prompt": request.prompt, "seed": request.seed}
                for index, request in enumerate(requests)
            ],
            "model": module.describe(),
        }
        (self.folder / "predict.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        print(f"\n{len(requests)} images and their grid: {self.folder}", flush=True)

    def _file(self, index: int) -> Path:
        assert self.folder is not None
        request = self._data.requests[index]
        return self.folder / f"{index:03d}_{_slug(request.prompt)[:60]}_seed{request.seed}.png"


def run_folder(trainer: L.Trainer) -> Path:
    """Return the run's folder, `runs/<name>/version_k`. A collective call."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def _new_folder(wanted: Path) -> Path:
    """Make a folder of this name, or with the first number behind it that is free."""
    wanted.parent.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        with suppress(FileExistsError):
            folder.mkdir()
            break
    return folder


def _slug(text: str) -> str:
    """Make a file name of `text`; a person's name keeps its underscores."""
    return re.sub(r"[^\w-]+", "-", text).strip("-") or "_"


def _stack(*pictures: Image.Image) -> Image.Image:
    """Lay pictures under one another, on white."""
    whole = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    top = 0
    for picture in pictures:
        whole.paste(picture, (0, top))
        top += picture.height
    return whole
