"""Images from embeddings, by the backbone's own diffusers pipeline and a diffusers scheduler."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from lit_multiip.backbone.components import BackboneError
from lit_multiip.backbone.ip_adapter import Scale, check_ip_scale, set_ip_scale
from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.files import LitMultiIPError
from lit_multiip.pixels import to_pixels, to_signal

SLICED = 512**2  # a batch of more pixels is decoded an image at a time: small ones take 50 % longer so, on a CPU


@dataclass
class Sampling:
    """How images are drawn.

    Args:
        steps: denoising steps.
        guidance_scale: w of eq. (11)/(18); 1 and below draw without guidance.
        ip_scale: lambda of eq. (3)/(19), the weight of the photos: a number, or numbers by block as diffusers'
            `set_ip_adapter_scale` takes them, such as `{up: {block_0: [0, 1, 0]}}`; 0 in blocks that are not named.
        scheduler: a diffusers scheduler class; it takes the backbone's noise schedule.
        ip_start: share of the steps after which the photos begin to act.
        ip_end: share of the steps after which they no longer act. Equal shares leave the photos out.
    """

    steps: int = 15
    guidance_scale: float = 3.0
    ip_scale: Scale = 1.0
    scheduler: str = "DPMSolverMultistepScheduler"
    ip_start: float = 0.0
    ip_end: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.guidance_scale):
            raise LitMultiIPError(
                f"sampling.guidance_scale={self.guidance_scale} is not finite: give a number such as 1.0"
            )
        check_ip_scale(self.ip_scale)
        if not 0 <= self.ip_start <= self.ip_end <= 1:
            raise LitMultiIPError(
                f"sampling.ip_start={self.ip_start} and ip_end={self.ip_end}: give shares of the steps, 0 to 1, the "
                "start first; step k of n is k / n"
            )
        if self.steps < 1:
            raise LitMultiIPError(f"sampling.steps={self.steps}: give at least 1")
        if not hasattr(diffusers, self.scheduler):
            raise LitMultiIPError(
                f"sampling.scheduler='{self.scheduler}' is not a diffusers class: give one, such as DDIMScheduler"
            )

    def require_guidance(self) -> None:
        """Raise `BackboneError` if negative photos would do nothing."""
        if self.guidance_scale <= 1:
            raise BackboneError(
                f"negative photos act through guidance, and sampling.guidance_scale={self.guidance_scale} has none: "
                "give more than 1, or leave them out"
            )

    def acts_always(self) -> bool:
        """Tell whether the photos act in every step."""
        return (self.ip_start, self.ip_end) == (0, 1)

    def acts_in(self, steps: int) -> list[bool]:
        """Tell for each of `steps` whether the photos act in it, by the rule of diffusers' `control_guidance_start`."""
        return [i / steps >= self.ip_start and (i + 1) / steps <= self.ip_end for i in range(steps)]

    def describe(self) -> dict[str, Any]:
        """Return the settings for a results file."""
        return asdict(self)


class Sampler:
    """A diffusers pipeline around a UNet, fed with embeddings only; the VAE is loaded when first needed.

    Args:
        backbone: whose pipeline, VAE and noise schedule draw.
        unet: with or without an IP-Adapter installed.
        sampling: scheduler and steps.
    """

    def __init__(self, backbone: Backbone, unet: nn.Module, sampling: Sampling) -> None:
        self.sampling, self.unet = sampling, unet
        scheduler = backbone.load("scheduler")
        cls = getattr(diffusers, sampling.scheduler)
        noise = cls.from_config(scheduler.config)
        self.pipe = backbone.pipeline(unet=unet, vae=backbone.load("vae"), scheduler=noise)
        # The pipeline repeats the embeddings as often as the batch has images, as if all showed one person; attention
        # would then mix them across the batch. Ours are one set an image, and taken as they are.
        self.pipe.prepare_ip_adapter_image_embeds = lambda image, embeds, *_: embeds
        self.pipe.set_progress_bar_config(disable=True)
        self._taken = inspect.signature(self.pipe.__call__).parameters

    def __call__(
        self,
        text: Mapping[str, Tensor],
        negative_text: Mapping[str, Tensor],
        image_embeds: Tensor | None,
        seeds: list[int],
        side: int,
        ip_scale: Scale | None = None,
        negative_embeds: Tensor | None = None,
        masks: Tensor | None = None,
    ) -> Tensor:
        """Draw a batch; the seed of an image decides its noise, its place in the batch does not.

        Args:
            text: `prompt_embeds`, text states (B, L, E), and of SDXL `pooled_prompt_embeds` (B, P). What it holds
                besides, such as sizes of a photo, is the pipeline's own matter: it draws a whole picture of this side.
            negative_text: likewise of ""; not used where the pipeline takes zeros for these, as SDXL's.
            image_embeds: aggregated image embeddings, (B, M, D), or what else the adapter takes. None for a UNet
                without IP-Adapter.
            seeds: one an image.
            side: of the image in px.
            ip_scale: overrides `sampling.ip_scale`.
            negative_embeds: those that guidance leads away from, in the shape of `image_embeds`; None takes zeros.
            masks: how much each embedding acts where in the image, (M, side, side). Each is then attended to on its
                own, and the results are added.

        Returns:
            RGB, (B, 3, side, side) uint8.
        """
        guided = self.sampling.guidance_scale > 1
        texts = {name: value for name, value in text.items() if name in self._taken}
        if guided and not getattr(self.pipe.config, "force_zeros_for_empty_prompt", False):
            texts |= {f"negative_{name}": negative_text[name] for name in texts}
        self.pipe.vae.to(text["prompt_embeds"].device)
        slices = len(seeds) * side**2 > SLICED
        (self.pipe.vae.enable_slicing if slices else self.pipe.vae.disable_slicing)()
        if negative_embeds is not None:
            self.sampling.require_guidance()
        scale = self.sampling.ip_scale if ip_scale is None else ip_scale
        with self._image_attention(scale, image_embeds) as options:
            if masks is not None:
                options["cross_attention_kwargs"] = {"ip_adapter_masks": [masks[None]]}  # (1, M, H, W)
            images = self.pipe(
                height=side,
                width=side,
                num_inference_steps=self.sampling.steps,
                guidance_scale=self.sampling.guidance_scale,
                **texts,
                ip_adapter_image_embeds=_with_negatives(image_embeds, negative_embeds, guided),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="pt",
                **options,
            ).images
        return (images.float() * 255).round().clamp(0, 255).to(torch.uint8).contiguous()

    @contextmanager
    def _image_attention(self, scale: Scale, image_embeds: Tensor | None) -> Iterator[dict[str, Any]]:
        """Weigh the photos by `scale` meanwhile; afterwards the UNet is at 1 again, as it was trained.

        Yields:
            Arguments of the pipeline, which change the weight between steps where photos do not act in all of them.
        """
        if image_embeds is None or (scale == 1 and self.sampling.acts_always()):
            yield {}
            return
        scheduler = self.pipe.scheduler
        scheduler.set_timesteps(self.sampling.steps)
        acts = self.sampling.acts_in(len(scheduler.timesteps))

        def prepare(step: int) -> None:
            if step < len(acts):
                set_ip_scale(self.unet, scale if acts[step] else 0.0)  # type: ignore[arg-type]

        def at_step_end(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            prepare(step + 1)
            return tensors

        try:
            prepare(0)
            yield {} if self.sampling.acts_always() else {"callback_on_step_end": at_step_end}
        finally:
            set_ip_scale(self.unet, 1.0)  # type: ignore[arg-type]

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode RGB (B, 3, H, W) uint8 to the VAE's posterior mean and logvar, (B, 2C, h, w)."""
        vae = self.pipe.vae.to(pixels.device)
        posterior = vae.encode(to_signal(pixels)).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1).contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """Decode unscaled latents (B, C, h, w) to RGB, (B, 3, H, W) uint8."""
        return to_pixels(self.decode_signal(latents))

    def decode_signal(self, latents: Tensor) -> Tensor:
        """Decode unscaled latents (B, C, h, w) to RGB in about [-1, 1], (B, 3, H, W), with a gradient."""
        vae = self.pipe.vae.to(latents.device)
        decoded: Tensor = vae.decode(latents).sample
        return decoded


def _with_negatives(image_embeds: Tensor | None, negative: Tensor | None, guided: bool) -> list[Tensor] | None:
    """Return embeddings as the pipeline takes them: under guidance the negative ones come first, by default zeros."""
    if image_embeds is None:
        return None
    negative = torch.zeros_like(image_embeds) if negative is None else negative
    return [torch.cat([negative, image_embeds]) if guided else image_embeds]
