"""Training stops before NaN or infinity reaches the weights or a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from lit_multiip.files import LitMultiIPError, shorten
from lit_multiip.methods.method import Batch, Method, Watch

LOOK_EVERY = 20  # values on a GPU, two a step; NaN may go unseen so long


class NonFiniteLoss(LitMultiIPError):
    """The loss became NaN or infinite; the last checkpoint holds the last good state."""


class RequireFinite(L.Callback, Watch):
    """Looks at every loss and gradient; on a GPU some steps later, so that the CPU need not wait at every step.

    Raises:
        NonFiniteLoss: one is NaN or infinite; the message names the photos.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, str, int, Batch]] = []  # values not looked at yet
        self._photos: list[str] = []  # targets since the last optimiser step

    # ---- what a method hands over -----------------------------------------------------------------------------------

    def loss(self, value: Tensor, name: str, step: int, batch: Batch) -> None:
        """Look at a loss, (B,) or (); `photo` or `person` of the batch names whom it is of."""
        self._waiting.append((value.detach(), name, step, batch))
        if value.device.type == "cpu" or len(self._waiting) >= LOOK_EVERY:
            self.look()

    def gradients(self, module: Method, step: int, names: Sequence[str]) -> None:
        """Look at the gradients before the optimiser takes them; on a GPU at their norm."""
        gradients = {key: p.grad for key, p in module.trained_parameters().items() if p.grad is not None}
        if not gradients:
            return
        norm = get_total_norm(list(gradients.values()))
        if norm.device.type != "cpu":
            self.loss(norm, "norm of the gradients", step, {"photo": list(names)})
        elif not norm.isfinite():  # a sum of squares may overflow where no gradient does, so it only says where to look
            for key, gradient in gradients.items():
                if not gradient.isfinite().all():
                    raise NonFiniteLoss(
                        f"the gradient of '{key}' is not finite at step {step}, in a batch of {shorten(names)}: lower "
                        "the learning rate, or look at these photos; the checkpoints hold the last good state"
                    )

    def look(self) -> None:
        """Look at all values that were not looked at yet."""
        waiting, self._waiting = self._waiting, []
        finite = torch.stack([value.isfinite().all() for value, *_ in waiting]).tolist() if waiting else []
        for fine, (value, name, step, batch) in zip(finite, waiting, strict=True):
            if not fine:
                raise NonFiniteLoss(_explain(value, name, step, batch))

    # ---- when -------------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Become the module's watch."""
        if isinstance(pl_module, Method):
            pl_module.watch = self

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember whose gradients the next step takes."""
        self._photos += batch.get("photo", [])

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Look at the gradients, unless a scaler of float16 gradients or the method's own loop does."""
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if isinstance(pl_module, Method) and pl_module.automatic_optimization and not scaled:
            self.gradients(pl_module, trainer.global_step, self._photos)
        self._photos = []

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look at the training losses."""
        self.look()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look at the validation losses, before one chooses a checkpoint."""
        self.look()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look at the last losses."""
        self.look()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Look, so that no checkpoint holds a broken state."""
        self.look()


def _explain(loss: Tensor, name: str, step: int, batch: Batch) -> str:
    """Name the samples whose loss is not finite, or their stored features where these are at fault."""
    finite = loss.isfinite()
    names: list[str] = batch.get("photo") or batch.get("person") or [f"sample {i}" for i in range(finite.numel())]
    bad = [i for i, fine in enumerate(finite.expand(len(names)).tolist()) if not fine]
    value = float(loss[~finite].flatten()[0])
    stored = {key: batch[key] for key in ("references", "moments") if key in batch} | batch.get("text", {})
    for key, rows in stored.items():
        if broken := [names[i] for i in bad if not rows[i].isfinite().all()]:
            return (
                f"the {name} is {value} at step {step}: the stored {key} of {shorten(broken)} are not finite: delete "
                "data.cache_dir, or leave the photo out; the checkpoints hold the last good state"
            )
    return (
        f"the {name} is {value} at step {step}, of {shorten([names[i] for i in bad])}: lower the learning rate, or "
        "look at these photos; the checkpoints hold the last good state"
    )
