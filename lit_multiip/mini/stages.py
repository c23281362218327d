"""How each network of a small backbone learns: one LightningModule a network, one schedule for all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from diffusers.training_utils import compute_snr
from torch import Tensor, nn
from torchvision.transforms.functional import normalize
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

from lit_multiip.evaluation.critic import HEADS, Critic
from lit_multiip.mini.photos import Pictures
from lit_multiip.mini.portraits import HIDDEN
from lit_multiip.pixels import to_signal

Batch = dict[str, Tensor]
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # CLIP's own
SNR_GAMMA = 5  # of min-SNR weights
PHOTO_DROP = 0.05, 0.5  # share of the embeddings that are zeroed beside a caption, and beside none: as published


class Stage(L.LightningModule):
    """AdamW with a short warm-up, then a cosine to zero at the end of training."""

    def __init__(self, learning_rate: float, weight_decay: float = 1e-2) -> None:
        super().__init__()
        self.learning_rate, self.weight_decay = learning_rate, weight_decay

    def configure_optimizers(self) -> Any:
        """Return AdamW and its schedule, stepped every optimiser step."""
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, self.learning_rate, weight_decay=self.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        warm_up = max(
            min(0.1, 300 / steps), 1.5 / steps
        )  # a share of the steps; OneCycleLR divides by that less one step
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.learning_rate, steps, pct_start=warm_up, cycle_momentum=False
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class CriticStage(Stage):
    """Cross-entropy over K people, and over every visible scene attribute and trait."""

    def __init__(self, architecture: str, people: int, photos: int, learning_rate: float = 2e-3) -> None:
        super().__init__(learning_rate)
        self.critic = Critic(architecture, people)
        self.photos = photos

    def training_step(self, batch: Batch) -> Tensor:
        """Classify a batch of portraits."""
        _, people, heads = self.critic(_jitter(batch["image"]))
        loss = F.cross_entropy(people.float(), batch["index"] // self.photos)
        self.log("people", loss, prog_bar=True)
        for column, name in enumerate(HEADS):
            labels = batch["labels"][:, column]
            if (labels != HIDDEN).any():
                loss = loss + 0.2 * F.cross_entropy(heads[name].float(), labels, ignore_index=HIDDEN)
        self.log("loss", loss, prog_bar=True)
        return loss


def _jitter(images: Tensor) -> Tensor:
    """Blur and add noise, both by a random amount, so that a critic does not rely on details that a VAE loses."""
    pixels = images.float()
    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share = torch.rand(len(pixels), 1, 1, 1, device=pixels.device)
    noise = torch.randn_like(pixels) * torch.rand(len(pixels), 1, 1, 1, device=pixels.device) * 16
    return (pixels + share * (blurred - pixels) + noise).round().clamp(0, 255).to(torch.uint8)


def _pixel_loss(restored: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return L1 + 2 x squared error + 0.5 x L1 of the differences between neighbours, and the PSNR in dB."""
    error = restored - x
    square = error.square().mean()
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + 2 * square + 0.5 * edges, 10 * torch.log10(4 / square.detach())


class VAEStage(Stage):
    """L1 + squared error + L1 of the differences between neighbours (edges: eyes, brows, stubble) + a tiny KL term.

    A KL weight of 1e-4 left one of the four latent channels unused: 34.5 dB.
    """

    def __init__(self, vae: Any, learning_rate: float = 1e-3, kl_weight: float = 1e-6) -> None:
        super().__init__(learning_rate, weight_decay=0.0)
        self.vae, self.kl_weight = vae, kl_weight

    def training_step(self, batch: Batch) -> Tensor:
        """Restore a batch of pictures."""
        x = to_signal(batch["image"])  # (B, 3, 64, 64)
        posterior = self.vae.encode(x).latent_dist
        restored = self.vae.decode(posterior.sample()).sample.float()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        pixel_loss, psnr = _pixel_loss(restored, x)
        loss = pixel_loss + self.kl_weight * kl
        self.log_dict({"loss": loss, "psnr_db": psnr, "kl": kl}, prog_bar=True)
        return loss


class VAEDecoderStage(VAEStage):
    """Trains the decoder alone further, so that latents stay, with a perceptual loss like LPIPS.

    The loss is the squared distance of the image encoder's layer-normed hidden states. It does not use the critics,
    which measure what the autoencoder loses.
    """

    def __init__(self, vae: Any, vision: CLIPVisionModelWithProjection, learning_rate: float = 5e-4) -> None:
        super().__init__(vae, learning_rate)
        vae.requires_grad_(False)
        vae.decoder.requires_grad_(True)
        vae.post_quant_conv.requires_grad_(True)
        self.frozen = [vision.eval().requires_grad_(False)]  # in a list: not a child, not in checkpoints

    def training_step(self, batch: Batch) -> Tensor:
        """Restore a batch of pictures from latents that are not trained."""
        x = to_signal(batch["image"])  # (B, 3, 64, 64)
        with torch.no_grad():
            latents = self.vae.encode(x).latent_dist.sample()
            seen = self._look(x)
        restored = self.vae.decode(latents).sample.float()
        perceptual = torch.stack([F.mse_loss(a, b) for a, b in zip(self._look(restored), seen, strict=True)]).mean()
        pixel_loss, psnr = _pixel_loss(restored, x)
        loss = pixel_loss + 3 * perceptual
        self.log_dict({"loss": loss, "psnr_db": psnr, "perceptual": perceptual}, prog_bar=True)
        return loss

    def _look(self, x: Tensor) -> list[Tensor]:
        """Layer-normed hidden states of every layer of the image encoder, (B, T, W) each."""
        pixels = normalize((x + 1) / 2, MEAN, STD)
        states = self.frozen[0](pixel_values=pixels, output_hidden_states=True).hidden_states
        return [F.layer_norm(state.float(), state.shape[-1:]) for state in states]


def vary(images: Tensor) -> Tensor:
    """Scale, shift, brighten and sharpen each of (B, 3, S, S) uint8 pictures a little, by amounts of its own."""
    scale, shift_x, shift_y, light, contrast = torch.rand(5, len(images), device=images.device) * 2 - 1  # (B,) each
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 + 0.1 * scale
    theta[:, 0, 2], theta[:, 1, 2] = 0.1 * shift_x, 0.1 * shift_y
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)
    light, contrast = (30 * light).view(-1, 1, 1, 1), (1 + 0.3 * contrast).view(-1, 1, 1, 1)
    return ((moved - 127.5) * contrast + 127.5 + light).round().clamp(0, 255).to(torch.uint8)


class CLIPStage(Stage):
    """The symmetric contrastive loss of CLIP (Radford et al. 2021, figure 3) on pictures and captions.

    Beside it the image embedding learns who someone is, which contrast alone does not teach from this few pictures
    (drawn portraits: rank-1 from nine photos 9 %). Of drawn portraits linear heads read every visible trait from it;
    they are not kept. Of real photos it learns to equal a face network's embedding, by 1 - cosine.

    Args:
        vision: the image tower.
        text: the text tower.
        tokenizer: of the captions.
        pictures: whose indices and images the batches hold.
        captions: probabilities of their kinds.
        learning_rate: the highest.
        faces: a face network's embeddings of all pictures, (P, D), NaN where there is none; None teaches no faces.
        face_weight: of their loss.
        skip_equal: do not hold pictures apart whose captions are equal.
        varied: vary the pictures; see `vary`.
    """

    def __init__(
        self,
        vision: CLIPVisionModelWithProjection,
        text: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        pictures: Pictures,
        captions: Mapping[str, float],
        learning_rate: float = 1e-3,
        faces: Tensor | None = None,
        face_weight: float = 4.0,
        skip_equal: bool = False,
        varied: bool = False,
    ) -> None:
        super().__init__(learning_rate, weight_decay=0.05)
        self.vision, self.text, self.tokenizer, self.pictures = vision, text, tokenizer, pictures
        self.captions, self.skip_equal, self.varied = captions, skip_equal, varied
        self.faces, self.face_weight = faces, face_weight
        self.scale = nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32))
        width = int(vision.config.projection_dim)
        self.heads = nn.ModuleDict({name: nn.Linear(width, classes) for name, classes in pictures.traits.items()})

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Match a batch of pictures with a caption each."""
        rng = np.random.default_rng([3, self.global_step])
        captions = [self.pictures.caption(int(i), rng, self.captions) for i in batch["index"]]
        tokens = self.tokenizer(captions, padding=True, truncation=True, return_tensors="pt").to(self.device)
        images = vary(batch["image"]) if self.varied else batch["image"]
        pixels = normalize(images.float() / 255, MEAN, STD)
        image = F.normalize(self.vision(pixel_values=pixels).image_embeds.float(), dim=-1)  # (B, D)
        text = F.normalize(self.text(**tokens).text_embeds.float(), dim=-1)  # (B, D)
        logits = self.scale.clamp(max=np.log(100)).exp() * image @ text.T  # (B, B)
        if self.skip_equal:
            numbers = torch.tensor([captions.index(caption) for caption in captions], device=self.device)
            equal = (numbers[:, None] == numbers).fill_diagonal_(False)
            logits = logits.masked_fill(equal, -torch.inf)
        target = torch.arange(len(logits), device=self.device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        accuracy = (logits.argmax(1) == target).float().mean()
        self.log_dict({"loss": loss, "accuracy": accuracy}, prog_bar=True)
        return loss + self._trait_loss(image, batch) + self._face_loss(image, batch["index"])

    def _trait_loss(self, image: Tensor, batch: Batch) -> Tensor | float:
        """Half the cross-entropy of every trait, read from unit embeddings (B, D)."""
        if not len(self.heads):
            return 0.0
        traits = torch.zeros((), device=self.device)
        for labels, head in zip(batch["labels"].T[-len(self.heads) :], self.heads.values(), strict=True):
            traits = traits + F.cross_entropy(head(16 * image).float(), labels, ignore_index=HIDDEN)
        self.log("traits", traits / len(self.heads), prog_bar=True)
        return 0.5 * traits

    def _face_loss(self, image: Tensor, index: Tensor) -> Tensor | float:
        """Weighted 1 - cosine of unit embeddings (B, D) and the face network's, over pictures that have one."""
        if self.faces is None:
            return 0.0
        target = self.faces[index.cpu()].to(self.device)  # (B, D)
        there = target.isfinite().all(1)
        cosine = (image * F.normalize(target, dim=-1))[there].sum(-1)
        distance = (1 - cosine).sum() / max(len(cosine), 1)
        self.log("face_distance", distance, prog_bar=True)
        return self.face_weight * distance


class CLIPImageStage(CLIPStage):
    """Trains the image tower of a trained pair further, its text tower locked (Zhai et al. 2022)."""

    def __init__(self, pair: CLIPStage) -> None:
        super().__init__(
            pair.vision,
            pair.text,
            pair.tokenizer,
            pair.pictures,
            pair.captions,
            pair.learning_rate,
            pair.faces,
            pair.face_weight,
            pair.skip_equal,
            pair.varied,
        )
        self.heads, self.scale = pair.heads, pair.scale
        self.text.requires_grad_(False)


class UNetStage(Stage):
    """The epsilon MSE of a latent text-to-image model (eq. 1 without reference photos), weighted by min(SNR, 5) / SNR.

    The weight (Hang et al. 2023) spares a short training the timesteps at which nearly clean latents are polished.
    Latents' mean and logvar and text states are computed before; a latent is drawn anew each time.

    Args:
        unet: the network; one with an IP-Adapter learns it too, from the photo's own embedding.
        scheduler: diffusers' DDPM scheduler.
        moments: latents' mean and logvar of all pictures, (P, 2C, h, w).
        scaling_factor: brings latents to unit variance.
        text: the text encoder, frozen.
        tokenizer: of the captions.
        pictures: whose captions are drawn.
        captions: probabilities of their kinds.
        learning_rate: the highest.
        embeds: image embeddings of all pictures, (P, D), where the UNet has an IP-Adapter.
    """

    def __init__(
        self,
        unet: Any,
        scheduler: Any,
        moments: Tensor,
        scaling_factor: float,
        text: nn.Module,
        tokenizer: CLIPTokenizer,
        pictures: Pictures,
        captions: Mapping[str, float],
        learning_rate: float = 6e-4,
        embeds: Tensor | None = None,
    ) -> None:
        super().__init__(learning_rate)
        # channels_last would be slower on CPU: its bf16 group norm takes five times as long
        self.unet, self.scheduler = unet, scheduler
        self.frozen = [text.eval().requires_grad_(False)]  # in a list: not a child, not in checkpoints
        self.moments, self.scaling_factor, self.embeds = moments, scaling_factor, embeds
        self.tokenizer, self.pictures, self.captions = tokenizer, pictures, captions

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Denoise the latents of a batch of pictures, given by their `index` (B,)."""
        rng, index = np.random.default_rng([4, self.global_step]), batch["index"]
        captions = [self.pictures.caption(int(i), rng, self.captions) for i in index]
        loss = self.denoise(captions, self.moments[index.cpu()].to(self.device), index)
        self.log("loss", loss, prog_bar=True, batch_size=len(index))
        return loss

    def denoise(self, captions: list[str], moments: Tensor, index: Tensor) -> Tensor:
        """Return the loss of B captions and latents (B, 2C, h, w), at noise and timesteps of the global state."""
        tokens = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").to(self.device)
        with torch.no_grad():
            states = self.frozen[0].to(self.device)(tokens.input_ids).last_hidden_state  # (B, T, E)
        mean, logvar = moments.float().chunk(2, dim=1)  # (B, C, h, w) each
        x = (mean + (0.5 * logvar).exp() * torch.randn_like(mean)) * self.scaling_factor
        eps = torch.randn_like(x)
        t = torch.randint(self.scheduler.config.num_train_timesteps, (len(x),), device=self.device)
        noised = self.scheduler.add_noise(x, eps, t)  # eq. (8)
        added = {} if self.embeds is None else {"added_cond_kwargs": {"image_embeds": [self._drop(index, captions)]}}
        snr = compute_snr(self.scheduler, t)
        weight = (snr.clamp(max=SNR_GAMMA) / snr).view(-1, 1, 1, 1)
        return (weight * (self.unet(noised, t, states, **added).sample.float() - eps).square()).mean()

    def _drop(self, index: Tensor, captions: list[str]) -> Tensor:
        """Return the embeddings of some pictures, (B, 1, D), some of them zeroed."""
        assert self.embeds is not None
        embeds = self.embeds[index.cpu()].to(self.device)  # (B, D)
        share = torch.tensor([PHOTO_DROP[not caption] for caption in captions], device=self.device)
        kept = torch.rand(len(embeds), device=self.device) >= share
        return (embeds * kept[:, None])[:, None]
