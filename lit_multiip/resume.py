"""Stopping at any moment and going on as if nothing had happened: checkpoints that say exactly where training is.

All draws are functions of (seed, epoch, index), so the number of optimiser steps taken says all: which epoch, which
batch of it, and every counter of the loops. A checkpoint is therefore of a whole step; batches that were accumulated
after it are drawn again.

Lightning also saves and restores a DataLoader that has `state_dict` and `load_state_dict`. That would replace only the
start of `EpochSampler`, by a state that is the same function of the steps, because workers read ahead of training. The
counters of Lightning's loops, which differ inside an accumulation and between two saves of one step, would still have
to be set by `loops_at`, so nothing here would become shorter.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_multiip.datasets import Position
from lit_multiip.files import write_durably
from lit_multiip.runs import LAST, read_checkpoint

logger = logging.getLogger(__name__)


class DurableCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are on the disk before they replace older ones, and of which nothing is unpickled.

    Lightning's own are staged in $TMPDIR, and torn where that lies on another file system.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write it whole or not at all."""
        write_durably(Path(path), lambda file: torch.save(checkpoint, file))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read tensors and plain values; a URL is refused, as is what cannot be read."""
        return read_checkpoint(Path(path), verify=True)


class ExactResume(L.Callback):
    """Lets `fit` go on from any of its checkpoints as if it had not stopped.

    On SIGTERM and on Ctrl-C (SIGINT) it saves one after the step, and stops; a second Ctrl-C ends it at once.
    """

    def __init__(self) -> None:
        self.stopped_by = 0  # the signal
        self.interrupted_at = 0.0  # seconds

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write down where the loops are, and flush what was logged until there."""
        for log in trainer.loggers:
            log.save()
        checkpoint["loops"]["fit_loop"].update(loops_at(Position.of(trainer), trainer, pl_module))
        checkpoint["epoch"] = Position.of(trainer).epoch

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Void what was logged after the checkpoint; wait for signals."""
        if trainer.is_global_zero and trainer.global_step > 0:
            for log in trainer.loggers:
                _purge(log, trainer.global_step)
        if threading.current_thread() is threading.main_thread():
            # Lightning's own handler makes the ranks speak to one another from within, whatever they are saying; the
            # trainer puts back what was there before it
            signal.signal(signal.SIGTERM, self._stop)
            if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as a shell's background jobs do
                signal.signal(signal.SIGINT, self._stop)

    def _stop(self, number: int, _: Any = None) -> None:
        if number == signal.SIGINT and self.stopped_by == signal.SIGINT:
            if time.monotonic() - self.interrupted_at > 1:  # before, it is a launcher's copy of the terminal's
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                signal.raise_signal(signal.SIGINT)
            return
        self.stopped_by, self.interrupted_at = number, time.monotonic()
        if number == signal.SIGINT:  # from within a handler nothing that buffers may be used
            os.write(2, b"\nCtrl-C: saving after this step; press it again to end at once\n")

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Stop between two batches; the ranks do so together."""
        # the loop counts steps for the loggers, and its count is one short where validation was done before the save
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
        if not trainer.strategy.reduce_boolean_decision(bool(self.stopped_by), all=False):
            return
        path, number = _last_of(trainer), self.stopped_by or signal.SIGTERM
        trainer.save_checkpoint(path, False)  # not the weights alone; left out, Lightning announces it
        if trainer.is_global_zero:
            name = signal.Signals(number).name
            what = "%s: stopped after step %d, saved in %s; fit --ckpt_path last goes on from there"
            logger.warning(what, name, trainer.global_step, path)
        raise SIGTERMException(128 + number)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the last step, where no validation has: there was none, or a fit was stopped between its two saves."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path = _last_of(trainer)
        behind = not path.exists() or read_checkpoint(path)["global_step"] < trainer.global_step
        if trainer.strategy.broadcast(behind):
            trainer.save_checkpoint(path, False)


def loops_at(position: Position, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
    """State of Lightning's fit loop in the middle of ``position.epoch``, as functions of the position alone."""
    step, batch = trainer.global_step, position.batch
    total = batch if position.batches is None else position.epoch * position.batches + batch
    automatic = step if pl_module.automatic_optimization else 0

    def count(whole: int, current: int, *names: str) -> dict[str, Any]:
        return {
            key: dict.fromkeys(("ready", "completed", *names), value)
            for key, value in {"total": whole, "current": current}.items()
        }

    def done(whole: int, current: int) -> dict[str, Any]:
        return count(whole, current, "started", "processed")

    begun = position.epoch + 1
    epoch = {"ready": begun, "started": begun, "processed": begun - 1, "completed": begun - 1}
    within = position.steps if pl_module.automatic_optimization else 0
    schedules = sum(c.interval == "step" for c in trainer.lr_scheduler_configs) if automatic else 0
    state = {
        "epoch_progress": {"total": epoch, "current": dict(epoch)},
        "epoch_loop.state_dict": {"_batches_that_stepped": step},
        "epoch_loop.batch_progress": {**done(total, batch), "is_last_batch": False},
        "epoch_loop.scheduler_progress": count(automatic * schedules, within * schedules),
        "epoch_loop.automatic_optimization.optim_progress": {
            "optimizer": {"step": count(automatic, within), "zero_grad": count(automatic, within, "started")}
        },
    }
    if batch == 0:  # a new epoch counts its validations anew
        state["epoch_loop.val_loop.batch_progress"] = {**done(0, 0), "is_last_batch": False}
    return state


def _last_of(trainer: L.Trainer) -> Path:
    """Where the last checkpoint of a fit is kept."""
    callbacks: list[Any] = [
        callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)
    ]
    return Path(next(callback.dirpath for callback in callbacks if callback.filename == Path(LAST).stem)) / LAST


def _purge(log: Any, step: int) -> None:
    """Tell TensorBoard that rows of ``step`` and later, in older files, are void."""
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    if isinstance(log, TensorBoardLogger):
        writer = log.experiment.file_writer
        writer.add_event(Event(step=step, file_version="brain.Event:2"))
        writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
