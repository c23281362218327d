"""One training of a small backbone's network, which goes on from its last checkpoint as if it had never stopped."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, Dataset, Sampler

from lit_multiip.files import LitMultiIPError, shorten
from lit_multiip.finite import RequireFinite
from lit_multiip.mini.recipe import Training
from lit_multiip.resume import DurableCheckpointIO
from lit_multiip.runs import read_checkpoint

logger = logging.getLogger(__name__)

SAVE_EVERY = 100  # steps


class RecipeError(LitMultiIPError):
    """A recipe, or a stage of it, that cannot be carried out; the message names it and the remedy."""


class ShuffledBatches(Sampler[list[int]]):
    """Batches of indices, each epoch in an order of its own; what is left of an epoch is dropped.

    Args:
        length: number of indices.
        batch_size: of a batch.
        steps: number of batches, over all epochs.
    """

    def __init__(self, length: int, batch_size: int, steps: int) -> None:
        if batch_size > length:
            raise RecipeError(f"batch_size={batch_size} is more than the {length} pictures: lower it, or give more")
        self.length, self.batch_size, self.steps = length, batch_size, steps
        self.seed: int | None = None  # of the orders; drawn by the global state at the start of training
        self.start = 0  # batches that an earlier process had

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        if self.seed is None:
            self.seed = int(torch.empty((), dtype=torch.int64).random_())
        yield from islice(self._batches(self.seed), self.start, self.steps)

    def _batches(self, seed: int) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(self.length, generator=generator).tolist()
            for first in range(0, self.length - self.batch_size + 1, self.batch_size):
                yield order[first : first + self.batch_size]


class KeepDraws(L.Callback):
    """Keeps in the checkpoint what the next draws depend on, what the training is of, and the time that it took.

    Args:
        batches: of the training.
        facts: what the training is of, JSON-able.
    """

    def __init__(self, batches: ShuffledBatches, facts: Mapping[str, Any]) -> None:
        self.batches, self.facts = batches, dict(facts)
        self.done: dict[str, float] = {"steps": 0, "seconds": 0.0}  # and what was logged last
        self._restored: dict[str, Any] | None = None  # draws of a checkpoint, until training goes on
        self._since = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the random state, the seed of the orders, the facts, and what is done."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        draws = {"cpu": torch.get_rng_state(), "cuda": cuda, "order": self.batches.seed}
        return {"draws": draws, "facts": self.facts, "done": self.done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the draws up where they were."""
        self._restored, self.done = state_dict["draws"], state_dict["done"]
        self.batches.seed = state_dict["draws"]["order"]

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Begin after the batches that were taken."""
        self.batches.start = checkpoint["global_step"]

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Restore the random state, once."""
        self._since = time.monotonic()
        if self._restored is not None:
            restore_draws(self._restored)
            self._restored = None

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Count steps and time."""
        seconds = self.done["seconds"] + time.monotonic() - self._since
        self.done = {"steps": trainer.global_step, "seconds": seconds}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note what was logged last."""
        self.done |= {name: float(value) for name, value in trainer.callback_metrics.items()}


def restore_draws(draws: Mapping[str, Any]) -> None:
    """Set the global random states to those of a checkpoint."""
    torch.set_rng_state(draws["cpu"])
    if draws["cuda"] and len(draws["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(draws["cuda"])


def train(
    module: L.LightningModule,
    data: Dataset[Any],
    length: int,
    settings: Training,
    file: Path,
    facts: Mapping[str, Any],
    precision: str,
) -> dict[str, float]:
    """Train `module`; an interrupted training goes on, and one that is done is read.

    Args:
        module: the stage.
        data: `length` items.
        length: of the data.
        settings: steps, batch size and average of the weights.
        file: the checkpoint; the loss goes to `metrics.csv` in folders beside it, one of each start.
        facts: what the training is of; a checkpoint of other facts is refused.
        precision: of Lightning's Trainer.

    Returns:
        `steps`, `seconds`, and what was logged last.
    """
    batches = ShuffledBatches(length, settings.batch_size, settings.steps)
    keep = KeepDraws(batches, facts)
    if file.exists():
        found = read_checkpoint(file)
        state = found["callbacks"]["KeepDraws"]
        check_same(file, state["facts"], keep.facts)
        if found["global_step"] >= settings.steps:
            module.load_state_dict(found["state_dict"])  # averaged, where weights are
            restore_draws(state["draws"])
            return state["done"]
        logger.info("%s: goes on after step %d of %d", file.stem, found["global_step"], settings.steps)
    every = ModelCheckpoint(file.parent, file.stem, every_n_train_steps=SAVE_EVERY, enable_version_counter=False)
    callbacks: list[L.Callback] = [RequireFinite(), keep, every]
    if settings.ema is not None:
        callbacks.append(EMAWeightAveraging(decay=settings.ema))
    trainer = L.Trainer(
        accelerator="auto",
        devices=1,
        precision=precision,  # type: ignore[arg-type]  # a plain str, as Lightning's own command line takes it
        max_steps=settings.steps,
        logger=CSVLogger(file.parent, file.stem),
        callbacks=callbacks,
        enable_model_summary=False,
        log_every_n_steps=25,
        gradient_clip_val=1.0,
    )
    trainer.strategy.checkpoint_io = DurableCheckpointIO()
    loader = DataLoader(data, batch_sampler=batches)
    trainer.fit(module, loader, ckpt_path=str(file) if file.exists() else None, weights_only=True)
    trainer.save_checkpoint(file, False)  # not the weights alone; left out, Lightning announces it
    return keep.done


def check_same(file: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with a training of other facts; name those that differ."""
    old, new = _flat(then), _flat(now)
    changed = [f"{key} {old.get(key)} => {new.get(key)}" for key in {**old, **new} if old.get(key) != new.get(key)]
    if changed:
        raise RecipeError(
            f"'{file}' is of a training with other settings ({shorten(changed)}): give them again, delete the file to "
            "begin anew, or give another --work"
        )


def _flat(facts: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return nested facts by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in facts.items():
        flat |= _flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return flat
