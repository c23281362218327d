"""`python -m lit_multiip measure-mini`: what a small backbone can do, on people that none of its networks has seen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from lit_multiip.backbone.components import resolve_backbone
from lit_multiip.backbone.face_crop import FaceCrop
from lit_multiip.backbone.faces import FaceEncoder
from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.data import mini_faces
from lit_multiip.data.people import PeopleSource, Person
from lit_multiip.data.photos import DataError
from lit_multiip.data.record import digest_name, digests_in
from lit_multiip.data.split import select_people
from lit_multiip.evaluation.critic import HEADS, Critic
from lit_multiip.files import shorten
from lit_multiip.mini.gate import GATE_PEOPLE, clip_embed, critic_embed, rank_one
from lit_multiip.mini.measured import face_embeds, identify, image_embeds, round_trips
from lit_multiip.mini.photos import Prompted, read_pixels
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


def measure_people(
    backbone: str, people: Sequence[Person], crop: FaceCrop | None, face: FaceEncoder | None, work: Path
) -> dict[str, Any]:
    """Measure a backbone on photos of real people: its VAE's round trips, and who knows them from one and nine photos.

    Args:
        backbone: as `backbone.path`.
        people: those with ten photos or more are found again; all photos go through the VAE.
        crop: as `data.crop`.
        face: a face network to measure beside the image encoder.
        work: where photos are kept.
    """
    frozen = Backbone(backbone)
    check_unseen(frozen, people)
    cut = people if crop is None else crop(people, work / "features")
    photos = [photo for person in cut for photo in person.photos]
    data = Prompted(photos, read_pixels(photos, frozen.image_side, work))
    embeds = {"image_encoder": image_embeds(frozen.load("image_encoder"), data)}
    if face is not None:
        embeds["face"] = face_embeds(face, data, work)
    found = {name: {n: identify(rows, data.person, n) for n in (1, 9)} for name, rows in embeds.items()}
    return {"photos": len(photos), "vae": round_trips(frozen.load("vae"), data), "identify": found}


def check_unseen(backbone: Backbone, people: Sequence[Person]) -> None:
    """Refuse people who are on the backbone's record."""
    record = backbone.trained_on()
    known = set() if record is None else digests_in(record, "people")
    if seen := [person.name for person in people if digest_name(person.name) in known]:
        raise DataError(
            f"backbone '{backbone.path}' was trained on {len(seen)} of {len(people)} people: {shorten(seen)}: measure "
            "it on others, or raise min_photos"
        )


def measure_mini(
    backbone: str = "mini",
    seed: int = 0,
    samples: int = 500,
    steps: int = 15,
    guidance_scale: float = 3.0,
    people: PeopleSource | None = None,
    min_photos: int = 10,
    crop: FaceCrop | None = None,
    face: FaceEncoder | None = None,
    work: str = "runs/faces/work",
) -> None:
    """Print a small backbone's figures as JSON: on drawn portraits, or on photos of real people.

    Args:
        backbone: its folder.
        seed: of portraits and noise.
        samples: text-to-image samples, and real portraits beside them. Round trips are of five times as many
            portraits, for most traits are hidden in most.
        steps: of DPM-Solver++.
        guidance_scale: of the text.
        people: photos of real people to measure on; the options above are for drawn portraits alone.
        min_photos: people with fewer are left out.
        crop: of the photos, as `data.crop`.
        face: a face network to measure beside the image encoder.
        work: where the photos are kept as they are measured.
    """
    if people is not None:
        chosen = select_people(people.people(), min_photos)
        print(json.dumps(measure_people(backbone, chosen, crop, face, Path(work)), indent=2))
        return
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
