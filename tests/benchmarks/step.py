"""Steps of a real ``fit``, each followed by its floor: the bare UNet, forward and backward, on the same batch."""

from __future__ import annotations

import time
from typing import Any, ClassVar

import lightning as L
import torch
import torch.nn.functional as F


def synchronised() -> float:
    """Wall seconds, when all that was asked of a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Floor(L.Callback):
    """Measures steps of a fit: all between two visits of this callback, loader, optimiser and logs included.

    Args:
        warmup: steps that are not measured.
    """

    steps: ClassVar[list[float]] = []  # seconds
    floors: ClassVar[list[float]] = []

    def __init__(self, warmup: int = 3) -> None:
        self.warmup, self.left = warmup, 0.0
        self.steps.clear()
        self.floors.clear()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Take the time, and the floor's on the same batch."""
        arrived = synchronised()
        with torch.no_grad():
            x = module.latents(batch["moments"], batch["latent_noise"])
            t = (batch["time"] * module.noise.config.num_train_timesteps).long()
            noised = module.noise.add_noise(x, batch["eps"], t).to(module.unet.dtype)
            embeds = module.condition(batch["references"])
        start = synchronised()
        with trainer.precision_plugin.forward_context():
            predicted = module.unet(
                noised, t, batch["prompt_embeds"].to(module.unet.dtype), added_cond_kwargs={"image_embeds": [embeds]}
            ).sample
            loss = F.mse_loss(predicted.float(), batch["eps"])
        loss.backward()
        end = synchronised()
        module.zero_grad()
        if self.warmup <= batch_idx:
            self.steps.append(arrived - self.left)
            self.floors.append(end - start)
        self.left = synchronised()
