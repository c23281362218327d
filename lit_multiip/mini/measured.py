"""What a stage measures of its network, on pictures of people whom no part was trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.transforms.functional import normalize
from tqdm.auto import tqdm

from lit_multiip.backbone.faces import FaceEncoder, FaceNetwork
from lit_multiip.files import hash_text, write_durably
from lit_multiip.mini.photos import Pictures
from lit_multiip.mini.stages import MEAN, STD, UNetStage
from lit_multiip.pixels import to_pixels, to_signal

MOST = 1000  # pictures that are measured
BATCH = 64


def _batches(data: Pictures, what: str) -> Any:
    return tqdm(DataLoader(data, BATCH), what)


@torch.inference_mode()
def image_embeds(vision: Any, data: Pictures) -> Tensor:
    """Return an image encoder's embeddings of all pictures, (P, D)."""
    parts = _batches(data, "image embeddings")
    return torch.cat([vision(pixel_values=normalize(b["image"].float() / 255, MEAN, STD)).image_embeds for b in parts])


def face_embeds(network: FaceNetwork, data: Pictures, work: Path, encoder: FaceEncoder) -> Tensor:
    """Return a face network's embeddings of all pictures, (P, E), NaN where no face is found; kept in `work`."""
    key = hash_text(json.dumps([encoder.fingerprint(), data.fingerprint()]))[:16]
    path = work / f"faces_{key}.pt"
    if not path.exists():
        rows = torch.cat([network.embed(b["image"]) for b in _batches(data, "face embeddings")])
        write_durably(path, lambda file: torch.save(rows, file))
    found: Tensor = torch.load(path, weights_only=True)
    return found


@torch.inference_mode()
def round_trips(vae: Any, unseen: Pictures) -> dict[str, float]:
    """Return the PSNR in dB of encoding and decoding, by the posterior's mean, averaged over pictures."""
    values: list[Tensor] = []
    for batch in _batches(unseen, "VAE round trips"):
        restored = to_pixels(vae.decode(vae.encode(to_signal(batch["image"])).latent_dist.mean).sample)
        error = (restored.float() - batch["image"].float()).square().mean(dim=(1, 2, 3))
        values.append(10 * torch.log10(255**2 / error.clamp(min=1e-9)))
    psnr = torch.cat(values)
    return {"unseen_pictures": len(psnr), "unseen_psnr_db": float(psnr.mean())}


def know_people(vision: Any, unseen: Pictures) -> dict[str, float]:
    """Return how often a picture's nearest other one, by the cosine of embeddings, is of the same person.

    A probe is the last picture of everyone who has two or more; the gallery holds everyone's first picture.
    """
    embeds = F.normalize(image_embeds(vision.float().eval(), unseen), dim=-1)
    everyone = np.unique(unseen.person)
    first = np.array([np.flatnonzero(unseen.person == person)[0] for person in everyone])
    last = np.array([np.flatnonzero(unseen.person == person)[-1] for person in everyone])
    probes = np.flatnonzero(first != last)
    cosine = embeds[last[probes]] @ embeds[first].T  # (probes, people)
    hits = cosine.argmax(1).numpy() == probes
    same = cosine[torch.arange(len(probes)), torch.from_numpy(probes)].mean() if len(probes) else float("nan")
    return {
        "unseen_people": len(everyone),
        "unseen_probes": len(probes),
        "unseen_rank_one": float(hits.mean()) if len(probes) else float("nan"),
        "unseen_same_cosine": float(same),
        "unseen_other_cosine": float(cosine.mean()),
    }


@torch.inference_mode()
def denoising(stage: UNetStage, moments: Tensor, unseen: Pictures, embeds: Tensor | None) -> dict[str, float]:
    """Return the training loss on pictures of unseen people, with their own noise and timesteps."""
    stage.eval()
    kept, stage.embeds = stage.embeds, embeds
    count = min(MOST, len(moments))
    rng, losses = np.random.default_rng(0), []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for index in torch.arange(count).split(BATCH):
            captions = [unseen.caption(int(i), rng, stage.captions) for i in index]
            losses += [float(stage.denoise(captions, moments[index], index))] * len(index)
    stage.embeds = kept
    return {"unseen_pictures": count, "unseen_loss": float(np.mean(losses))}
