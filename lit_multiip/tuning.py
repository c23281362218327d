"""Tuning a method on one person by a Trainer, within a Python program: progress, a stop, and the best weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import lightning as L
import torch
import yaml
from torch import Tensor

from lit_multiip.callbacks import ValidateBySteps
from lit_multiip.data.people import Person
from lit_multiip.data.photos import Photo
from lit_multiip.datamodule import MultiPhotoData
from lit_multiip.evaluation.extractors import Extractor
from lit_multiip.evaluation.person import IDENTITY, ScorePerson
from lit_multiip.files import package_file
from lit_multiip.finite import RequireFinite
from lit_multiip.methods.dreambooth import DreamBooth
from lit_multiip.methods.method import Method

# of an adapter, as `fit --photos` has them
ONE_PERSON = yaml.safe_load(package_file("one_person.yaml").read_text(encoding="utf-8"))
STEPS: int = ONE_PERSON["trainer"]["max_steps"]
VALIDATIONS = STEPS // ONE_PERSON["trainer"]["val_check_interval"]
LEARNING_RATE: float = ONE_PERSON["model"]["init_args"]["optimizer"]["init_args"]["lr"]
BATCH: int = ONE_PERSON["data"]["batch_size"]
SEEDS: int = ONE_PERSON["data"]["seeds"]


class Progress(NamedTuple):
    """Where tuning is, as a callback is told of it after every step."""

    step: int
    steps: int
    scores: Mapping[str, float]  # `train/loss`, and of the last validation `val/identity` and the others


@dataclass(frozen=True, eq=False)
class Tuned:
    """What tuning on one person left: the weights, whom they know, and how it went."""

    weights: Mapping[str, Tensor]
    learnt: tuple[str, str] | None  # of DreamBooth
    photos: Sequence[Photo]  # tuned on
    held_out: Sequence[Photo]
    steps: int
    before: Mapping[str, float]  # scores of held-out prompts, by `val/identity` and others
    after: Mapping[str, float]  # of the weights that were kept


def tune_person(
    model: Method,
    data: MultiPhotoData,
    person: Person,
    device: torch.device,
    precision: str,
    judges: list[Extractor] | None,
    steps: int | None,
    learning_rate: float | None,
    follow: FollowTuning,
) -> Tuned:
    """Tune a built method on a person's photos but the held-out ones; its own options are put back after it.

    Args:
        model: as it is to start.
        data: for its options; a copy of it serves the person.
        person: with all photos.
        device: where the model is.
        precision: of the Trainer.
        judges: networks that score; None keeps the last weights.
        steps: None takes `STEPS`, or DreamBooth's own.
        learning_rate: None takes `LEARNING_RATE`, or DreamBooth's own.
        follow: new.
    """
    data = copy.copy(data)
    data.photos, data.person, data.batch_size, data.seeds = person.name, None, BATCH, SEEDS
    data.split, data.position, data.tuning = data.split_photos(person), None, None
    dreambooth = isinstance(model, DreamBooth)
    follow.steps = steps or (model.steps if isinstance(model, DreamBooth) else STEPS)
    # an adapter starts at the weights that it has
    changed: dict[str, Any] = {"steps": follow.steps} if dreambooth else {"lr_schedule": "constant", "start": None}
    if not dreambooth or learning_rate is not None:
        rate = learning_rate or LEARNING_RATE
        changed["make_optimizer"] = partial(torch.optim.AdamW, lr=rate, weight_decay=1e-2)
    own = {name: getattr(model, name) for name in changed}
    parts = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    silent: dict[str, Any] = dict.fromkeys(parts, False)
    until: dict[str, Any] = {"max_epochs": 1} if dreambooth else {"max_steps": follow.steps}
    trainer = L.Trainer(
        **until,
        **silent,
        accelerator="gpu" if device.type == "cuda" else device.type,
        devices=[device.index or 0] if device.type == "cuda" else 1,
        precision=precision,  # type: ignore[arg-type]
        val_check_interval=-(-follow.steps // VALIDATIONS),
        check_val_every_n_epoch=None,
        use_distributed_sampler=False,
        inference_mode=False,
        num_sanity_val_steps=0,
        callbacks=[RequireFinite(), ValidateBySteps(), *([ScorePerson(judges)] if judges else []), follow],
    )
    try:
        for name, value in changed.items():
            setattr(model, name, value)
        trainer.fit(model, datamodule=data)
    finally:
        for name, value in own.items():
            setattr(model, name, value)
        model.to(device).eval()
    learnt = model.learnt if isinstance(model, DreamBooth) else None
    photos, held_out = data.split.train[0].photos, data.split.validation[0].photos
    return Tuned(follow.weights, learnt, photos, held_out, follow.best_step, follow.before, follow.after)


class FollowTuning(L.Callback):
    """Tells of progress, is told to stop, and keeps the best weights."""

    def __init__(self, progress: Callable[[Progress], None] | None, stop: Callable[[], bool] | None) -> None:
        self.progress, self.stop, self.steps = progress, stop, 0
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}
        self.weights: dict[str, Tensor] = {}
        self.best_step, self._scores = 0, dict[str, float]()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the scores before training."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ScorePerson):
                self.before = self._scores = callback.untrained

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Tell of the step, and ask whether to stop."""
        if self.progress is not None:
            loss = trainer.callback_metrics.get("train/loss")
            scores = {**self._scores, **({} if loss is None else {"train/loss": float(loss)})}
            self.progress(Progress(trainer.global_step, self.steps, scores))
        if self.stop is not None and self.stop():
            trainer.should_stop = True

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the weights if they are the best; without scores, keep the last."""
        self._scores = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        best, found = self.after.get(IDENTITY, -math.inf), self._scores.get(IDENTITY, math.inf)
        if not self.weights or found > best or math.isinf(found):
            module: Any = pl_module
            self.weights, self.after, self.best_step = copy_trained(module), self._scores, trainer.global_step


def copy_trained(model: Method) -> dict[str, Tensor]:
    """Return copies of the trained parameters by name, where they are."""
    return {name: parameter.detach().clone() for name, parameter in model.trained_parameters().items()}
