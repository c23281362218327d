"""`python -m lit_multiip measure-mini`: what the miniature can do, on people that none of its networks has seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from lit_multiip.backbone.components import resolve_backbone
from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.data import mini_faces
from lit_multiip.evaluation.critic import HEADS, Critic
from lit_multiip.mini.gate import GATE_PEOPLE, clip_embed, critic_embed, rank_one
from lit_multiip.mini.portraits import HIDDEN, labels_of
from lit_multiip.pixels import to_pixels, to_signal


def _portraits(seed: int, people: int, photos: int) -> tuple[Tensor, Tensor, list[str]]:
    """Draw unseen portraits: images (n, 3, 64, 64) uint8, labels (n, heads) and scene prompts."""
    images, labels, prompts = [], [], []
    for index in GATE_PEOPLE[:people]:
        who = mini_faces.person(seed, index)
        for number in range(photos):
            shot = mini_faces.scene(seed, index, number)
            images.append(mini_faces.draw(who, shot))
            labels.append(labels_of(who, shot))
            prompts.append(mini_faces.prompt(shot))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(labels), prompts


@torch.inference_mode()
def _answers(critic: Critic, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which heads answer right, and which are shown what they ask for: two (n, heads) bool."""
    parts = [critic(part)[2] for part in images.split(128)]
    answers = torch.stack([torch.cat([part[name].argmax(1) for part in parts]) for name in HEADS], dim=1)  # (n, heads)
    return answers == labels, labels != HIDDEN


def accuracy(critic: Critic, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of right answers of every head of a critic, over the portraits that show what it asks for."""
    right, shown = _answers(critic, images, labels)
    return {name: float(right[shown[:, k], k].float().mean()) for k, name in enumerate(HEADS)}


def read_back(critic: Critic, images: Tensor, labels: Tensor) -> float:
    """Share of all visible scene attributes that a critic reads back from images."""
    right, shown = (answers[:, : len(mini_faces.SCENE_ATTRIBUTES)] for answers in _answers(critic, images, labels))
    return float(right[shown].float().mean())


@torch.inference_mode()
def round_trip(backbone: str, images: Tensor) -> Tensor:
    """Encode and decode portraits by the VAE (the posterior's mean)."""
    vae = Backbone(backbone).load("vae")
    parts = tqdm(images.split(32), "VAE round trips")
    return torch.cat([to_pixels(vae.decode(vae.encode(to_signal(part)).latent_dist.mean).sample) for part in parts])


@torch.inference_mode()
def text_to_image(backbone: str, prompts: list[str], seed: int, steps: int, guidance_scale: float) -> Tensor:
    """Draw one image a prompt by the plain pipeline, without any adapter."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(resolve_backbone(backbone), torch_dtype=torch.float32)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    images = []
    for start in tqdm(range(0, len(prompts), 25), "text to image"):
        part = prompts[start : start + 25]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        drawn = pipe(
            part, num_inference_steps=steps, guidance_scale=guidance_scale, generator=generators, output_type="pt"
        ).images
        images.append((drawn * 255).round().to(torch.uint8))
    return torch.cat(images)


def measure_mini(
    backbone: str = "mini", seed: int = 0, samples: int = 500, steps: int = 15, guidance_scale: float = 3.0
) -> None:
    """Print the miniature's figures as JSON.

    Args:
        backbone: the miniature's folder.
        seed: of portraits and noise.
        samples: text-to-image samples, and real portraits beside them. Round trips are of five times as many
            portraits, for most traits are hidden in most.
        steps: of DPM-Solver++.
        guidance_scale: of the text.
    """
    folder = Path(resolve_backbone(backbone))
    critics = {name: Critic.load(folder / name) for name in ("critic", "critic_b") if (folder / name).is_dir()}
    images, labels, prompts = _portraits(seed, people=(samples + 9) // 10 * 5, photos=10)
    restored = round_trip(backbone, images)
    error = (restored.float() - images.float()).square().mean(dim=(1, 2, 3))
    accuracies = {
        name: {"original": accuracy(critic, images, labels), "round_trip": accuracy(critic, restored, labels)}
        for name, critic in critics.items()
    }
    seen, prompts = labels[:samples], prompts[:samples]
    drawn = text_to_image(backbone, prompts, seed, steps, guidance_scale)
    report: dict[str, Any] = {
        "samples": samples,
        "round_trips": len(images),
        "seed": seed,
        "vae_psnr_db": float((10 * torch.log10(255**2 / error)).mean()),
        "accuracy": {
            name: {k: [round(of["original"][k], 4), round(of["round_trip"][k], 4)] for k in HEADS}
            for name, of in accuracies.items()
        },
        "largest_loss_points": {
            name: max(100 * (of["original"][k] - of["round_trip"][k]) for k in HEADS) for name, of in accuracies.items()
        },
        "scene_read_back": {
            "real": read_back(critics["critic"], images[:samples], seen),
            "text_to_image": read_back(critics["critic"], drawn, seen),
        },
        "rank_one": {
            name: rank_one(clip_embed(folder) if name == "clip" else critic_embed(folder / name), seed)
            for name in (*critics, "clip")
        },
    }
    print(json.dumps(report, indent=2))
