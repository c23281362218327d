"""MultiIPAdapter: a frozen diffusion UNet that learns to restore a photo of a person from other photos of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from lit_multiip.aggregators import Aggregator, SelfAttention
from lit_multiip.backbone import (
    find_ip_adapter,
    fingerprint,
    install_ip_adapter,
    ip_adapter_from_text,
    ip_adapter_parameters,
    load_component,
    load_embed_dim,
    load_vae_facts,
    read_ip_adapter,
)
from lit_multiip.evaluation.sampling import Sampler, Sampling

Batch = dict[str, Tensor]
References = Literal["right", "other", "zero"]

VALIDATION_TIMES = (0.125, 0.375, 0.625, 0.875)  # t / T, the centres of four bins


class CheckpointError(ValueError):
    """A checkpoint of another method or backbone; the message names both."""


class NonFiniteLoss(ArithmeticError):
    """The loss became NaN or infinite; the last checkpoint holds the last good state."""


class MultiIPAdapter(L.LightningModule):
    """Trains the aggregator, Linear, LayerNorm, K' and V'; everything else is frozen (eq. 1/17, section 3.5).

    Args:
        backbone: folder, hub id or ``mini``.
        aggregator: G; gets the embedding width.
        optimizer: over the trained parameters.
        lr_schedule: a schedule of ``diffusers.optimization.get_scheduler``, stepped every optimiser step.
        lr_warmup_steps: of the schedule.
        ip_adapter: ``auto`` (the backbone's ip_adapter/, else ``text``), ``text`` (from the text K and V), or a file.
        trained: ``adapter``, or ``aggregator`` alone.
        sampling: how images are drawn.
        image_side: of the images in px; None takes the backbone's own.
        frozen_dtype: of the UNet's frozen weights; trained ones are float32.
        gradient_checkpointing: trade 35 % more arithmetic for a fifth of the activations.
    """

    def __init__(
        self,
        backbone: str = "mini",
        aggregator: Callable[[int], Aggregator] = SelfAttention,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=1e-2),
        lr_schedule: str = "constant_with_warmup",
        lr_warmup_steps: int = 20,
        ip_adapter: str = "auto",
        trained: Literal["adapter", "aggregator"] = "adapter",
        sampling: Sampling | None = None,
        image_side: int | None = None,
        frozen_dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.strict_loading = False  # a checkpoint holds only what was trained; on_load_checkpoint compares the keys
        self.backbone = backbone
        self.make_aggregator, self.make_optimizer = aggregator, optimizer
        self.lr_schedule, self.lr_warmup_steps = lr_schedule, lr_warmup_steps
        self.ip_adapter, self.trained = ip_adapter, trained
        self.sampling, self._image_side = sampling or Sampling(), image_side
        self.frozen_dtype, self.gradient_checkpointing = frozen_dtype, gradient_checkpointing
        self.unet: Any = None
        self.aggregator: Any = None
        self._sampler: Sampler | None = None

    # ---- building -----------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load the UNet and install the adapter; after the DataModule's encoders are gone."""
        if self.unet is not None:
            return
        self.unet = load_component(self.backbone, "unet", getattr(torch, self.frozen_dtype))
        width = load_embed_dim(self.backbone)
        path = find_ip_adapter(self.backbone) if self.ip_adapter == "auto" else self.ip_adapter
        if path is None or path == "text":
            state: Any = ip_adapter_from_text(self.unet, width)
        else:
            state = read_ip_adapter(path)
        install_ip_adapter(self.unet, state, width)
        self.aggregator = self.make_aggregator(width)
        if "aggregator" in state:
            self.aggregator.load_state_dict(state["aggregator"])
        if self.trained == "aggregator":
            for parameter in ip_adapter_parameters(self.unet).values():
                parameter.requires_grad_(False)
        if self.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        scheduler = load_component(self.backbone, "scheduler")
        self.noise = DDPMScheduler.from_config(scheduler.config)
        self.vae_scale, self.scaling_factor = load_vae_facts(self.backbone)

    @property
    def image_side(self) -> int:
        """Side of the images in px."""
        return self._image_side or int(self.unet.config.sample_size) * self.vae_scale

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Everything that the optimiser moves, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def configure_optimizers(self) -> Any:
        """AdamW (or what the config says) over what is trained, and its schedule by the step."""
        trained = self.trained_parameters()
        if not trained:
            raise ValueError(
                f"{self.method()} with trained='{self.trained}' has nothing to train: set model.trained to 'adapter'"
            )
        optimizer = self.make_optimizer(list(trained.values()))
        schedule = get_scheduler(
            self.lr_schedule,
            optimizer,
            num_warmup_steps=self.lr_warmup_steps,
            num_training_steps=int(self.trainer.estimated_stepping_batches),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # ---- training -----------------------------------------------------------------------------------------------

    def condition(self, references: Tensor) -> Tensor:
        """Aggregate one set of embeddings a sample, (B, R, D) -> (B, M, D)."""
        return self.aggregator(references)

    def denoising_loss(self, x: Tensor, eps: Tensor, t: Tensor, prompt_embeds: Tensor, image_embeds: Tensor) -> Tensor:
        """Squared error of the UNet's prediction at step t, a value a sample (eq. 1/17).

        Args:
            x: scaled latents of the target, (B, C, h, w).
            eps: the noise, (B, C, h, w).
            t: timesteps, (B,) int64.
            prompt_embeds: text states, (B, L, E).
            image_embeds: aggregated embeddings, (B, M, D).

        Returns:
            (B,) float32.
        """
        noised = self.noise.add_noise(x, eps, t)  # eq. (8)
        predicted = self.unet(
            noised.to(self.unet.dtype),
            t,
            encoder_hidden_states=prompt_embeds.to(self.unet.dtype),
            added_cond_kwargs={"image_embeds": [image_embeds]},
        ).sample
        v_prediction = self.noise.config.prediction_type == "v_prediction"
        target = self.noise.get_velocity(x, eps, t) if v_prediction else eps
        return F.mse_loss(predicted.float(), target, reduction="none").mean(dim=(1, 2, 3))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Restore the held-out photos of a batch of ``HeldOutGroups`` items."""
        mean, logvar = batch["moments"].chunk(2, dim=1)  # (B, C, h, w) each
        x = (mean + (0.5 * logvar).exp() * batch["latent_noise"]) * self.scaling_factor
        embeds = self.condition(batch["references"])  # (B, M, D)
        embeds = embeds * ~batch["drop_image"][:, None, None]  # zeros AFTER aggregation
        t = (batch["time"] * self.noise.config.num_train_timesteps).long()  # (B,)
        loss = self.denoising_loss(x, batch["eps"], t, batch["prompt_embeds"], embeds).mean()
        self._require_finite(loss.detach(), "loss")
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss at fixed noise a timestep bin, and the reference gap: what shuffling or dropping the photos costs."""
        mean, _ = batch["moments"].chunk(2, dim=1)
        x, count = mean * self.scaling_factor, len(mean)
        right = self.condition(batch["references"])
        variants = {"right": right, "shuffled": self.condition(batch["other_references"]), "dropped": 0 * right}
        sums = dict.fromkeys(variants, torch.zeros((), device=x.device))
        for number, time in enumerate(VALIDATION_TIMES):
            generators = [torch.Generator().manual_seed(int(seed) + number) for seed in batch["seed"]]
            eps = torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators]).to(x)
            t = torch.full((count,), int(time * self.noise.config.num_train_timesteps), device=x.device)
            for name, embeds in variants.items():
                loss = self.denoising_loss(x, eps, t, batch["prompt_embeds"], embeds).mean()
                sums[name] = sums[name] + loss / len(VALIDATION_TIMES)
                if name == "right":
                    self.log(f"val/loss_t{int(t[0])}", loss, batch_size=count, sync_dist=True)
        self._require_finite(sums["right"], "validation loss")  # before a checkpoint is written
        self.log("val/loss", sums["right"], batch_size=count, sync_dist=True, prog_bar=True)
        for name in ("shuffled", "dropped"):
            self.log(f"val/gap_{name}", sums[name] - sums["right"], batch_size=count, sync_dist=True, prog_bar=True)

    def _require_finite(self, loss: Tensor | float, name: str) -> None:
        if not math.isfinite(loss):
            raise NonFiniteLoss(
                f"the {name} is {float(loss)} at step {self.global_step}: lower the learning rate; "
                "the checkpoints hold the last good state"
            )

    # ---- drawing ------------------------------------------------------------------------------------------------

    def generate(self, batch: Batch, references: References = "right", ip_scale: float | None = None) -> Tensor:
        """Draw the images of a batch of tasks: RGB, (B, 3, H, W) uint8.

        Args:
            batch: of ``TaskDataset`` items.
            references: the task's own, another person's, or zeros in place of the aggregated embedding.
            ip_scale: overrides ``sampling.ip_scale``.
        """
        source = "other_references" if references == "other" else "references"
        embeds = self.condition(batch[source])
        if references == "zero":
            embeds = torch.zeros_like(embeds)
        return self.sampler(
            batch["prompt_embeds"],
            batch["negative_prompt_embeds"],
            embeds,
            [int(seed) for seed in batch["seed"]],
            self.image_side,
            ip_scale,
        )

    def decode(self, latents: Tensor) -> Tensor:
        """Decode unscaled latents (B, C, h, w) to RGB, (B, 3, H, W) uint8."""
        return self.sampler.decode(latents)

    @property
    def sampler(self) -> Sampler:
        """The pipeline around this UNet; its VAE is no part of the module, nor of its checkpoints."""
        if self._sampler is None:
            self._sampler = Sampler(self.backbone, self.unet, self.sampling)
        return self._sampler

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Draw the tasks of a batch."""
        return self.generate(batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Draw the requests of a batch."""
        return self.generate(batch)

    def on_fit_end(self) -> None:
        """Let go of the VAE."""
        self._sampler = None

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def method(self) -> str:
        """Name of the method: the aggregator's."""
        return type(self.aggregator).__name__

    def provenance(self) -> dict[str, str]:
        """What a checkpoint must agree on with the model that loads it."""
        return {
            "method": f"{self.method()}({self.aggregator.extra_repr()})",
            "backbone": self.backbone,
            "unet": fingerprint(self.backbone, "unet"),
            "trained": self.trained,
        }

    def describe(self) -> dict[str, Any]:
        """Method, backbone, sampling and numbers of parameters, for a results file."""
        counts = {"trained_parameters": sum(p.numel() for p in self.trained_parameters().values())}
        return {**self.provenance(), "method": self.method(), "aggregator": self.provenance()["method"], **counts} | {
            "sampling": self.sampling.describe(),
            "ip_adapter": self.ip_adapter if self.ip_adapter in ("auto", "text") else "file",
            "image_side": self.image_side,
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what was trained, and what it was trained on."""
        trained = self.trained_parameters()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint["lit_multiip"] = self.provenance()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another method or backbone."""
        found, own = checkpoint.get("lit_multiip"), self.provenance()
        if found is None:
            raise CheckpointError("this checkpoint was not written by lit_multiip: give one from a run's checkpoints/")
        for key, remedy in (
            ("method", "use the config that the run was trained with"),
            ("unet", "set backbone to the one it was trained on"),
            ("trained", "set model.trained likewise"),
        ):
            if found[key] != own[key]:
                what = "backbone" if key == "unet" else key
                raise CheckpointError(
                    f"the checkpoint is of another {what}: {found[what]} (this model: {own[what]}); {remedy}"
                )
        missing = set(self.trained_parameters()) ^ set(checkpoint["state_dict"])
        if missing:
            raise CheckpointError(f"the checkpoint and the model differ in weights such as '{min(missing)}'")
