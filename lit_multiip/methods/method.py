"""Method: what every way to personalise shares: the frozen backbone, the denoising loss, drawing, and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import diffusers
import lightning as L
import torch
import torch.nn.functional as F
from diffusers.optimization import get_scheduler
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lit_multiip.backbone.components import BackboneError
from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.backbone.sampler import Sampler, Sampling
from lit_multiip.data.drawing import Drawing
from lit_multiip.data.record import Record
from lit_multiip.files import LitMultiIPError
from lit_multiip.runs import CheckpointError

VALIDATION_TIMES = (0.125, 0.375, 0.625, 0.875)  # t / T, the centres of four bins
Batch = dict[str, Any]
References = Literal["right", "none", "other", "zero"]
Dtype = Literal["float32", "bfloat16", "float16"]
WEIGHTS = {"state_dict", "current_model_state"}  # parts of a checkpoint; of an averaged method the first is the average


class Watch:
    """Receives the losses and gradients of a method; this one ignores them."""

    def loss(self, value: Tensor, name: str, step: int, batch: Batch) -> None:
        """Take a loss, (B,) or (); `photo` or `person` of the batch names its samples."""

    def gradients(self, module: Method, step: int, names: Sequence[str]) -> None:
        """Take a module before its optimiser steps, from a training loop of its own; `names` are of its samples."""

    def look(self) -> None:
        """Look at everything taken since the last look."""


class Method(L.LightningModule):
    """Personalises the UNet of a backbone.

    A subclass makes `unet` in `build`, trains, and draws in `generate`. What requires grad after `build` is trained,
    and is all that a checkpoint holds. A config that changes the class keeps the values of equally named arguments,
    defaults too: the config of a method with other defaults must state them.

    Args:
        backbone: frozen; shared with the data.
        optimizer: over the trained parameters.
        lr_schedule: a schedule of `diffusers.optimization.get_scheduler`, stepped every optimiser step.
        lr_warmup_steps: of the schedule.
        snr_gamma: weigh a sample's loss by its timestep, `loss_weights` (the field's name; 5 is usual); None weighs all
            alike, eq. (1).
        sampling: how images are drawn.
        frozen_dtype: of frozen weights; trained ones are float32.
        gradient_checkpointing: trade 35 % more arithmetic for a fifth of the activations.
        channels_last: of the UNet's convolutions; for GPUs, as a CPU is 15 % slower with it.
        compile_unet: by torch.compile; the first step, and each new size of a batch, then takes a minute or more.
    """

    # Whether fit learns one person (data.person) and test each in turn, rather than all from held-out groups.
    per_person: ClassVar[bool] = False
    # What `generate` can be conditioned on: the task's own references, none, another person's, a zero embedding.
    conditions: ClassVar[tuple[References, ...]] = ("right", "none")
    # What a checkpoint's provenance must agree on with the model that loads it, and what to do otherwise.
    must_agree: ClassVar[dict[str, str]] = {
        "method": "use the run's config.yaml, or give load_from_checkpoint the arguments in it",
        "unet": "set backbone.path to the one it was trained on",
    }

    noise: Any  # the training schedule, a DDPMScheduler

    def __init__(
        self,
        backbone: Backbone | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=1e-2),
        lr_schedule: str = "cosine",
        lr_warmup_steps: int = 20,
        snr_gamma: float | None = None,
        sampling: Sampling | None = None,
        frozen_dtype: Dtype = "float32",
        gradient_checkpointing: bool = False,
        channels_last: bool = False,
        compile_unet: bool = False,
    ) -> None:
        super().__init__()
        if snr_gamma is not None and not 0 < snr_gamma < math.inf:
            raise LitMultiIPError(f"model.snr_gamma={snr_gamma} must be above 0: 5 is usual, null is eq. (1)")
        self.snr_gamma = snr_gamma
        self.strict_loading = False  # a checkpoint holds only what was trained; on_load_checkpoint compares the keys
        self.backbone, self.sampling = backbone or Backbone(), sampling or Sampling()
        self.make_optimizer, self.lr_schedule, self.lr_warmup_steps = optimizer, lr_schedule, lr_warmup_steps
        self.frozen_dtype, self.gradient_checkpointing = getattr(torch, frozen_dtype), gradient_checkpointing
        self.channels_last, self.compile_unet = channels_last, compile_unet
        self.watch = Watch()  # a callback may put itself in its place
        # Wall seconds of this process's test besides drawing: "personalise", for all people, and others by name.
        self.spent: dict[str, float] = {"personalise": 0.0}
        self.trained_on: Record | None = None  # the record of the weights that it starts from
        self.identity_networks: dict[str, str] = {}  # whose loss has trained the weights: names by `digest_weights`
        self.unet: Any = None
        self._sampler: Sampler | None = None

    # ---- what a subclass gives --------------------------------------------------------------------------------------

    def build(self) -> None:
        """Load `self.unet` and all else; what is trained requires grad and is float32."""
        raise NotImplementedError

    def generate(self, batch: Batch, references: References = "right") -> Tensor:
        """Draw the images of a batch of tasks: RGB, (B, 3, H, W) uint8.

        Args:
            batch: of `TaskDataset` items.
            references: one of `conditions`.
        """
        raise NotImplementedError

    def check_untrained(self) -> None:
        """Refuse a method that must be trained before it draws; nothing is built yet."""

    def check_sampling(self, sampling: Sampling) -> None:
        """Refuse options of drawing that the method cannot follow."""

    def check_drawing(self, drawing: Drawing) -> None:
        """Refuse what the built method cannot draw by."""

    def method(self) -> str:
        """Return the name of the method, as in tables."""
        raise NotImplementedError

    def settings(self) -> str:
        """Return the name of the method and the options that decide its weights' shapes."""
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
        self.noise = diffusers.DDPMScheduler.from_config(self.backbone.load("scheduler").config)
        kind = self.noise.config.prediction_type
        if kind not in ("epsilon", "v_prediction"):
            raise BackboneError(
                f"backbone '{self.backbone.path}' predicts '{kind}': give one that predicts epsilon or v_prediction"
            )

    @property
    def image_side(self) -> int:
        """Side of the images in px."""
        return self.backbone.image_side

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are trained, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def build_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimiser of what is trained."""
        return self.make_optimizer(list(self.trained_parameters().values()))

    def optimizer_and_schedule(self, steps: int) -> tuple[torch.optim.Optimizer, Any]:
        """Return the optimiser of what is trained, and its schedule over `steps`."""
        optimizer = self.build_optimizer()
        schedule = get_scheduler(
            self.lr_schedule, optimizer, num_warmup_steps=self.lr_warmup_steps, num_training_steps=steps
        )
        return optimizer, schedule

    def configure_callbacks(self) -> list[Any]:
        """Check the Trainer here, as this hook runs before any data is prepared."""
        self.check_trainer(self.trainer.state.fn == TrainerFn.FITTING or self.per_person)
        return []

    def check_trainer(self, trains: bool) -> None:
        """Refuse a strategy or precision that would train nothing or fail late.

        Args:
            trains: whether weights will be trained.
        """
        strategy, precision = self.trainer.strategy, str(self.trainer.precision)
        if isinstance(
            strategy, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)
        ):  # checkpoints hold whole weights
            raise LitMultiIPError(
                f"trainer.strategy is {type(strategy).__name__}, which shards weights: use ddp, and to save memory "
                "model.gradient_checkpointing, model.frozen_dtype bfloat16 and model.lora_rank"
            )
        if trains and precision in ("bf16-true", "16-true"):
            raise LitMultiIPError(
                f"trainer.precision={precision} rounds optimiser steps to zero, so nothing is trained: use "
                "bf16-mixed, and model.frozen_dtype bfloat16 to save memory"
            )
        if precision.startswith(("32", "64")) and self.frozen_dtype != torch.float32:
            raise LitMultiIPError(
                f"trainer.precision={precision} does not go with model.frozen_dtype="
                f"{str(self.frozen_dtype).removeprefix('torch.')}: use bf16-mixed, or model.frozen_dtype float32"
            )

    # ---- training ---------------------------------------------------------------------------------------------------

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Sample scaled latents (B, C, h, w) from the VAE's posterior (B, 2C, h, w), by standard normal noise."""
        mean, logvar = moments.chunk(2, dim=1)
        return (mean + (0.5 * logvar).exp() * noise) * self.backbone.scaling_factor

    def denoising_loss(
        self, x: Tensor, eps: Tensor, t: Tensor, text: Mapping[str, Tensor], image_embeds: Tensor | None = None
    ) -> Tensor:
        """Squared error of the UNet's prediction at step t, a value a sample (eq. 1/17).

        Args:
            x: scaled latents of the target, (B, C, h, w).
            eps: the noise, (B, C, h, w).
            t: timesteps, (B,) int64.
            text: what the UNet takes besides: `prompt_embeds`, text states (B, L, E), and of SDXL
                `pooled_prompt_embeds` (B, P) and `time_ids` (B, 6), sizes and crop of the target.
            image_embeds: aggregated embeddings, (B, M, D), where an IP-Adapter is installed.

        Returns:
            (B,) float32.
        """
        return self.prediction_error(self.denoise(x, eps, t, text, image_embeds), x, eps, t)

    def denoise(
        self, x: Tensor, eps: Tensor, t: Tensor, text: Mapping[str, Tensor], image_embeds: Tensor | None = None
    ) -> Tensor:
        """Return the UNet's prediction at step t, of the noise or of the velocity, (B, C, h, w) float32.

        The arguments are those of `denoising_loss`.
        """
        noised = self.noise.add_noise(x, eps, t)  # eq. (8)
        return self.backbone.predict(self.unet, noised, t, text, image_embeds).float()

    @property
    def predicts_velocity(self) -> bool:
        """Whether the UNet predicts v = alpha eps - sigma x_0 in place of eps."""
        return bool(self.noise.config.prediction_type == "v_prediction")

    def prediction_error(
        self, predicted: Tensor, x: Tensor, eps: Tensor, t: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """Return the mean squared error of a prediction of `denoise`, (B,) float32.

        Args:
            predicted: (B, C, h, w).
            x: scaled latents of the target, (B, C, h, w).
            eps: the noise, (B, C, h, w).
            t: timesteps, (B,) int64.
            weights: of places in the picture, (B, h, w) of mean 1; None weighs all alike.
        """
        target = self.noise.get_velocity(x, eps, t) if self.predicts_velocity else eps
        error = F.mse_loss(predicted, target, reduction="none")
        if weights is not None:
            error = error * weights[:, None]
        return error.mean(dim=(1, 2, 3))

    def predicted_x0(self, predicted: Tensor, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return x_0 by a prediction of `denoise`, scaled latents (B, C, h, w); the arguments are as there."""
        alpha_bar = self.noise.alphas_cumprod.to(x.device)[t][:, None, None, None]
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        noised = self.noise.add_noise(x, eps, t)
        x0: Tensor = (
            alpha * noised - sigma * predicted if self.predicts_velocity else (noised - sigma * predicted) / alpha
        )
        return x0

    def fixed_draws(self, x: Tensor, seeds: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield timesteps (B,) and noise (B, C, h, w) of each bin of timesteps, functions of a seed a sample alone.

        Args:
            x: scaled latents, (B, C, h, w).
            seeds: B of them.
        """
        for number, time in enumerate(VALIDATION_TIMES):
            generators = [torch.Generator().manual_seed(seed + number) for seed in seeds]
            eps = torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators]).to(x)
            yield torch.full((len(x),), int(time * self.noise.config.num_train_timesteps), device=x.device), eps

    def loss_weights(self, t: Tensor) -> Tensor:
        """Return the weight of a sample's loss at its timestep, Min-SNR of arXiv 2303.09556 with gamma = `snr_gamma`.

        It is min(SNR, gamma) / SNR where the UNet predicts epsilon and min(SNR, gamma) / (SNR + 1) where it predicts
        velocity, which is the same loss of x_0. Without `snr_gamma` it is 1.

        Args:
            t: timesteps, (B,) int64.

        Returns:
            (B,) float32.
        """
        if self.snr_gamma is None:
            return torch.ones(len(t), device=t.device)
        from diffusers.training_utils import compute_snr  # it loads models' code, which --help needs not

        snr: Tensor = compute_snr(self.noise, t)  # type: ignore[no-untyped-call]  # (B,)
        if self.predicts_velocity:
            return snr.clamp(max=self.snr_gamma) / (snr + 1)
        return (self.snr_gamma / snr).clamp(max=1)

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
        """Free the VAE."""
        self._sampler = None

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def provenance(self) -> dict[str, Any]:
        """Return the facts of a checkpoint, some of which (`must_agree`) a model that loads it must share."""
        return {
            "method": self.settings(),
            "backbone": self.backbone.path,
            "unet": self.backbone.fingerprint("unet"),
            "identity_networks": self.identity_networks,
        }

    def describe(self) -> dict[str, Any]:
        """Return method, backbone, sampling and number of trained parameters, for a results file."""
        return self.provenance() | {
            "method": self.method(),
            "settings": self.settings(),
            "per_person": self.per_person,
            "snr_gamma": self.snr_gamma,
            "trained_parameters": sum(p.numel() for p in self.trained_parameters().values()),
            "sampling": self.sampling.describe(),
            "image_side": self.image_side,
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what was trained, and what it was trained on."""
        trained = self.trained_parameters()
        for part in WEIGHTS & checkpoint.keys():
            checkpoint[part] = {name: value for name, value in checkpoint[part].items() if name in trained}
        checkpoint["lit_multiip"] = self.provenance()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights; frozen ones, which no checkpoint holds, do not count as missing."""
        keys, trained = super().load_state_dict(state_dict, strict, assign), self.trained_parameters()
        return keys._replace(missing_keys=[key for key in keys.missing_keys if key in trained])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another method or backbone."""
        self.refuse_other(checkpoint, self.must_agree)
        self.identity_networks |= checkpoint["lit_multiip"].get("identity_networks", {})
        missing = set(self.trained_parameters()) ^ set(checkpoint["state_dict"])
        if missing:
            raise CheckpointError(f"the checkpoint and the model differ in weights such as '{min(missing)}'")
        if checkpoint.keys() >= WEIGHTS:  # WeightAveraging wants the frozen ones too
            for part in WEIGHTS:
                checkpoint[part] = self.state_dict() | checkpoint[part]

    def refuse_other(self, checkpoint: Mapping[str, Any], facts: Iterable[str]) -> None:
        """Refuse a checkpoint whose provenance differs from this model's in one of these facts of `must_agree`."""
        found, own = checkpoint.get("lit_multiip"), self.provenance()
        if found is None:
            raise CheckpointError("this checkpoint was not written by lit_multiip: give one from a run's checkpoints/")
        for key, remedy in ((key, self.must_agree[key]) for key in facts):
            if found[key] != own[key]:
                what = {"unet": "backbone", "image_encoder_content": "image_encoder"}.get(key, key)
                theirs, ours = found.get(what), own[what]
                if theirs == ours:  # by name, and not by content
                    theirs, ours = f"{theirs} with content {found[key]}", own[key]
                raise CheckpointError(f"the checkpoint is of another {what}: {theirs} (this model: {ours}); {remedy}")
