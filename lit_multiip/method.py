"""Method: what every way to personalise shares: the frozen backbone, the denoising loss, drawing, and checkpoints."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import diffusers
import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from lit_multiip.backbone import fingerprint, load_component, load_vae_facts
from lit_multiip.evaluation.sampling import Sampler, Sampling

Batch = dict[str, Any]
References = Literal["right", "none", "other", "zero"]
Dtype = Literal["float32", "bfloat16", "float16"]
LOOK_EVERY = 10  # steps: how long a loss of NaN may go unseen


class CheckpointError(ValueError):
    """A checkpoint of another method or backbone; the message names both."""


class NonFiniteLoss(ArithmeticError):
    """The loss became NaN or infinite; the last checkpoint holds the last good state."""


class Method(L.LightningModule):
    """Personalises the UNet of a backbone.

    A subclass makes ``unet`` in ``build``, trains, and draws in ``generate``. What requires grad after ``build`` is
    trained, and is all that a checkpoint holds. Arguments that subclasses share have one default, this one's: where a
    config changes the class, the command line keeps the values of equally named arguments.

    Args:
        backbone: folder, hub id or ``mini``.
        optimizer: over the trained parameters.
        lr_schedule: a schedule of ``diffusers.optimization.get_scheduler``, stepped every optimiser step.
        lr_warmup_steps: of the schedule.
        sampling: how images are drawn.
        image_side: of the images in px; None takes the backbone's own.
        frozen_dtype: of frozen weights; trained ones are float32.
        gradient_checkpointing: trade 35 % more arithmetic for a fifth of the activations.
        channels_last: of the UNet's convolutions; for GPUs (CPU: 15 % slower).
        compile_unet: by torch.compile; the first step, and each new size of a batch, then takes a minute or more.
    """

    # Whether fit learns one person (data.person) and test each in turn, rather than all from held-out groups.
    per_person: ClassVar[bool] = False
    # What ``generate`` can be conditioned on: the task's own references, none, another person's, a zero embedding.
    conditions: ClassVar[tuple[References, ...]] = ("right", "none")
    # What a checkpoint's provenance must agree on with the model that loads it, and what to do otherwise.
    must_agree: ClassVar[dict[str, str]] = {
        "method": "use the config that the run was trained with",
        "unet": "set backbone to the one it was trained on",
    }

    noise: Any  # the training schedule, a DDPMScheduler
    vae_scale: int  # px a latent
    scaling_factor: float

    def __init__(
        self,
        backbone: str = "mini",
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=1e-2),
        lr_schedule: str = "constant_with_warmup",
        lr_warmup_steps: int = 20,
        sampling: Sampling | None = None,
        image_side: int | None = None,
        frozen_dtype: Dtype = "float32",
        gradient_checkpointing: bool = False,
        channels_last: bool = False,
        compile_unet: bool = False,
    ) -> None:
        super().__init__()
        self.strict_loading = False  # a checkpoint holds only what was trained; on_load_checkpoint compares the keys
        self.backbone, self.sampling, self._image_side = backbone, sampling or Sampling(), image_side
        self.make_optimizer, self.lr_schedule, self.lr_warmup_steps = optimizer, lr_schedule, lr_warmup_steps
        self.frozen_dtype, self.gradient_checkpointing = getattr(torch, frozen_dtype), gradient_checkpointing
        self.channels_last, self.compile_unet = channels_last, compile_unet
        self._watched: list[tuple[int, str, Tensor]] = []  # losses that nobody has looked at yet
        # Wall seconds of this process's test that are not drawing: "personalise", of all people, and others by name.
        self.spent: dict[str, float] = {"personalise": 0.0}
        self.unet: Any = None
        self._sampler: Sampler | None = None

    # ---- what a subclass gives --------------------------------------------------------------------------------------

    def build(self) -> None:
        """Load ``self.unet`` and all else; what is trained requires grad and is float32."""
        raise NotImplementedError

    def generate(self, batch: Batch, references: References = "right") -> Tensor:
        """Draw the images of a batch of tasks: RGB, (B, 3, H, W) uint8.

        Args:
            batch: of ``TaskDataset`` items.
            references: one of ``conditions``.
        """
        raise NotImplementedError

    def method(self) -> str:
        """Name of the method, as in tables."""
        raise NotImplementedError

    def settings(self) -> str:
        """Name of the method and of what decides its weights' shapes."""
        raise NotImplementedError

    # ---- building ---------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build, once; after the DataModule's encoders are gone."""
        if self.unet is not None:
            return
        self.build()
        assert self.unet is not None
        if self.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        if self.channels_last:
            self.unet.to(memory_format=torch.channels_last)
        if self.compile_unet:
            self.unet.compile()  # in place: the names of the weights stay
        self.noise = diffusers.DDPMScheduler.from_config(load_component(self.backbone, "scheduler").config)
        self.vae_scale, self.scaling_factor = load_vae_facts(self.backbone)

    @property
    def image_side(self) -> int:
        """Side of the images in px."""
        return self._image_side or int(self.unet.config.sample_size) * self.vae_scale

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Everything that the optimiser moves, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def optimizer_and_schedule(self, steps: int) -> tuple[torch.optim.Optimizer, Any]:
        """AdamW (or what the config says) over what is trained, and its schedule over ``steps``."""
        from diffusers.optimization import get_scheduler

        optimizer = self.make_optimizer(list(self.trained_parameters().values()))
        schedule = get_scheduler(
            self.lr_schedule, optimizer, num_warmup_steps=self.lr_warmup_steps, num_training_steps=steps
        )
        return optimizer, schedule

    # ---- training ---------------------------------------------------------------------------------------------------

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Sample scaled latents (B, C, h, w) from the VAE's posterior (B, 2C, h, w), by standard normal noise."""
        mean, logvar = moments.chunk(2, dim=1)
        return (mean + (0.5 * logvar).exp() * noise) * self.scaling_factor

    def denoising_loss(
        self, x: Tensor, eps: Tensor, t: Tensor, prompt_embeds: Tensor, image_embeds: Tensor | None = None
    ) -> Tensor:
        """Squared error of the UNet's prediction at step t, a value a sample (eq. 1/17).

        Args:
            x: scaled latents of the target, (B, C, h, w).
            eps: the noise, (B, C, h, w).
            t: timesteps, (B,) int64.
            prompt_embeds: text states, (B, L, E).
            image_embeds: aggregated embeddings, (B, M, D), where an IP-Adapter is installed.

        Returns:
            (B,) float32.
        """
        noised = self.noise.add_noise(x, eps, t)  # eq. (8)
        predicted = self.unet(
            noised.to(self.unet.dtype),
            t,
            encoder_hidden_states=prompt_embeds.to(self.unet.dtype),
            added_cond_kwargs=None if image_embeds is None else {"image_embeds": [image_embeds]},
        ).sample
        v_prediction = self.noise.config.prediction_type == "v_prediction"
        target = self.noise.get_velocity(x, eps, t) if v_prediction else eps
        return F.mse_loss(predicted.float(), target, reduction="none").mean(dim=(1, 2, 3))

    def require_finite(self, loss: Tensor | float, name: str, step: int) -> None:
        """Stop before a broken state is kept.

        Raises:
            NonFiniteLoss: the loss is NaN or infinite.
        """
        if not math.isfinite(loss):
            raise NonFiniteLoss(
                f"the {name} is {float(loss)} at step {step}: lower the learning rate; "
                "the checkpoints hold the last good state"
            )

    def watch(self, loss: Tensor, name: str, step: int) -> None:
        """Have a loss of training looked at soon, not now: that would make the CPU wait for the device at every step.

        Raises:
            NonFiniteLoss: one of the last losses was NaN or infinite.
        """
        self._watched.append((step, name, loss.detach()))
        if len(self._watched) >= LOOK_EVERY:
            self.look()

    def look(self) -> None:
        """Look at the losses since the last time; before validation, a checkpoint and the end, at the latest.

        Raises:
            NonFiniteLoss: one of them is NaN or infinite.
        """
        watched, self._watched = self._watched, []
        values = torch.stack([loss for _, _, loss in watched]).tolist() if watched else []
        for (step, name, _), value in zip(watched, values, strict=True):
            self.require_finite(value, name, step)

    def on_validation_start(self) -> None:
        """Look at the training losses."""
        self.look()

    def on_train_end(self) -> None:
        """Look at the training losses."""
        self.look()

    # ---- drawing ----------------------------------------------------------------------------------------------------

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

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def provenance(self) -> dict[str, Any]:
        """What a checkpoint says of itself; it must agree on ``must_agree`` with the model that loads it."""
        return {"method": self.settings(), "backbone": self.backbone, "unet": fingerprint(self.backbone, "unet")}

    def describe(self) -> dict[str, Any]:
        """Method, backbone, sampling and numbers of parameters, for a results file."""
        return self.provenance() | {
            "method": self.method(),
            "settings": self.settings(),
            "trained_parameters": sum(p.numel() for p in self.trained_parameters().values()),
            "sampling": self.sampling.describe(),
            "image_side": self.image_side,
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what was trained, and what it was trained on."""
        self.look()
        trained = self.trained_parameters()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint["lit_multiip"] = self.provenance()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another method or backbone."""
        found, own = checkpoint.get("lit_multiip"), self.provenance()
        if found is None:
            raise CheckpointError("this checkpoint was not written by lit_multiip: give one from a run's checkpoints/")
        for key, remedy in self.must_agree.items():
            if found.get(key) != own[key]:
                what = "backbone" if key == "unet" else key
                raise CheckpointError(
                    f"the checkpoint is of another {what}: {found.get(what)} (this model: {own[what]}); {remedy}"
                )
        missing = set(self.trained_parameters()) ^ set(checkpoint["state_dict"])
        if missing:
            raise CheckpointError(f"the checkpoint and the model differ in weights such as '{min(missing)}'")
