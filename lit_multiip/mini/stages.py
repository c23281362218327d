"""How each network of the miniature learns: one LightningModule a network, one schedule for all."""

from __future__ import annotations

from typing import Any, ClassVar

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from diffusers.training_utils import compute_snr
from torch import Tensor, nn
from torchvision.transforms.functional import normalize
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

from lit_multiip.data import mini_faces
from lit_multiip.evaluation.critic import HEADS, Critic
from lit_multiip.mini.portraits import HIDDEN, Portraits
from lit_multiip.pixels import to_signal

Batch = dict[str, Tensor]
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # CLIP's own
MOST_PHRASES = 10  # so that the longest caption fits into the tokenizer's 64 tokens


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
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.learning_rate, steps, pct_start=min(0.1, 300 / steps), cycle_momentum=False
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
        """Restore a batch of portraits."""
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
        """Restore a batch of portraits from latents that are not trained."""
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


def caption(portraits: Portraits, index: int, rng: np.random.Generator, kinds: dict[str, float]) -> str:
    """Draw a caption of portrait `index`: its `scene`, `traits`, `both`, a `bare` one or none (`drop`)."""
    who, shot = portraits.truth(index)
    kind = rng.choice(list(kinds), p=list(kinds.values()))
    if kind == "drop":
        return ""
    if kind == "bare":
        return "a photo of a person"
    if kind == "scene":
        return mini_faces.prompt(shot)
    phrases = mini_faces.trait_phrases(who, shot)
    most = min(len(phrases), MOST_PHRASES)
    keep = rng.permutation(len(phrases))[: rng.integers(max(1, most // 2), most + 1)]
    traits = " with " + ", ".join(phrases[k] for k in keep)
    return f"a photo of a person{traits}" if kind == "traits" else mini_faces.prompt(shot, traits)


class CLIPStage(Stage):
    """The symmetric contrastive loss of CLIP (Radford et al. 2021, figure 3) on portraits and captions.

    Beside it, linear heads read every visible trait from the unit image embedding: by contrast alone, this few images
    teach the scene and the colours (rank-1 from nine photos 9 %), and not who someone is. The heads are not kept.
    """

    KINDS: ClassVar[dict[str, float]] = {"scene": 0.15, "traits": 0.6, "both": 0.25}

    def __init__(
        self,
        vision: CLIPVisionModelWithProjection,
        text: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        portraits: Portraits,
        learning_rate: float = 1e-3,
    ) -> None:
        super().__init__(learning_rate, weight_decay=0.05)
        self.vision, self.text, self.tokenizer, self.portraits = vision, text, tokenizer, portraits
        self.scale = nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32))
        width = int(vision.config.projection_dim)
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(t.names)) for name, t in mini_faces.TRAITS.items()})

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Match a batch of portraits with a caption each."""
        rng = np.random.default_rng([3, self.global_step])
        captions = [caption(self.portraits, int(i), rng, self.KINDS) for i in batch["index"]]
        tokens = self.tokenizer(captions, padding=True, return_tensors="pt").to(self.device)
        pixels = normalize(batch["image"].float() / 255, MEAN, STD)
        image = F.normalize(self.vision(pixel_values=pixels).image_embeds.float(), dim=-1)  # (B, D)
        text = F.normalize(self.text(**tokens).text_embeds.float(), dim=-1)  # (B, D)
        logits = self.scale.clamp(max=np.log(100)).exp() * image @ text.T  # (B, B)
        target = torch.arange(len(logits), device=self.device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        accuracy = (logits.argmax(1) == target).float().mean()
        traits = torch.zeros((), device=self.device)
        for column, head in enumerate(self.heads.values(), len(mini_faces.SCENE_ATTRIBUTES)):
            labels = batch["labels"][:, column]
            traits = traits + F.cross_entropy(head(16 * image).float(), labels, ignore_index=HIDDEN)
        self.log_dict({"loss": loss, "accuracy": accuracy, "traits": traits / len(self.heads)}, prog_bar=True)
        return loss + 0.5 * traits


class CLIPImageStage(CLIPStage):
    """Trains the image tower of a trained pair further, its text tower locked (Zhai et al. 2022)."""

    def __init__(self, pair: CLIPStage, learning_rate: float = 1e-3) -> None:
        super().__init__(pair.vision, pair.text, pair.tokenizer, pair.portraits, learning_rate)
        self.heads, self.scale = pair.heads, pair.scale
        self.text.requires_grad_(False)


class UNetStage(Stage):
    """The epsilon MSE of a latent text-to-image model (eq. 1 without reference photos), weighted by min(SNR, 5) / SNR.

    The weight (Hang et al. 2023) spares a short training the timesteps at which nearly clean latents are polished.
    Latents' mean and logvar (P, 8, h, w) and text states are computed before; a latent is drawn anew each time.
    """

    KINDS: ClassVar[dict[str, float]] = {"scene": 0.45, "both": 0.3, "traits": 0.05, "bare": 0.1, "drop": 0.1}

    def __init__(
        self,
        unet: Any,
        scheduler: Any,
        moments: Tensor,
        scaling_factor: float,
        text: nn.Module,
        tokenizer: CLIPTokenizer,
        portraits: Portraits,
        learning_rate: float = 6e-4,
    ) -> None:
        super().__init__(learning_rate)
        # channels_last would be slower on CPU: its bf16 group norm takes five times as long
        self.unet, self.scheduler = unet, scheduler
        self.moments, self.scaling_factor = moments, scaling_factor
        self.frozen = [text.eval().requires_grad_(False)]  # in a list: not a child, not in checkpoints
        self.tokenizer, self.portraits = tokenizer, portraits

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Denoise the latents of a batch of portraits, given by their indices, (B,)."""
        rng = np.random.default_rng([4, self.global_step])
        captions = [caption(self.portraits, int(i), rng, self.KINDS) for i in batch]
        tokens = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").to(self.device)
        with torch.no_grad():
            states = self.frozen[0](tokens.input_ids).last_hidden_state  # (B, 77, 128)
        mean, logvar = self.moments[batch].float().chunk(2, dim=1)  # (B, 4, 16, 16) each
        x = (mean + (0.5 * logvar).exp() * torch.randn_like(mean)) * self.scaling_factor
        eps = torch.randn_like(x)
        t = torch.randint(self.scheduler.config.num_train_timesteps, (len(x),), device=self.device)
        noised = self.scheduler.add_noise(x, eps, t)  # eq. (8)
        weight = (compute_snr(self.scheduler, t).clamp(max=5) / compute_snr(self.scheduler, t)).view(-1, 1, 1, 1)
        loss = (weight * (self.unet(noised, t, states).sample.float() - eps).square()).mean()
        self.log("loss", loss, prog_bar=True)
        return loss
