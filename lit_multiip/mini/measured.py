"""What a stage measures of its network, on pictures of people whom no part was trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.transforms.functional import normalize
from tqdm.auto import tqdm

from lit_multiip.backbone.faces import FaceEncoder
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


def face_embeds(encoder: FaceEncoder, data: Pictures, work: Path) -> Tensor:
    """Return a face network's embeddings of all pictures, (P, E), NaN where no face is found; kept in `work`."""
    key = hash_text(json.dumps([encoder.fingerprint(), data.fingerprint()]))[:16]
    path = work / f"faces_{key}.pt"
    if not path.exists():
        network = encoder.load()
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
    """Return `identify` of an image encoder's embeddings, from one picture, and the cosines that it goes by."""
    embeds = image_embeds(vision.float().eval(), unseen)
    return {f"unseen_{name}": value for name, value in identify(embeds, unseen.person, 1).items()}


def identify(embeds: Tensor, person: npt.NDArray[Any], count: int) -> dict[str, float]:
    """Find people again by the cosine of embeddings: rank-1, from the mean of a person's first `count` pictures.

    A probe is the last picture of everyone who has more than `count`; the gallery holds the same people.

    Args:
        embeds: of pictures, (P, D); those that are not finite stand for no face, and are left out.
        person: whom each shows, (P,).
        count: pictures a person in the gallery.

    Returns:
        `people`; `rank_one`, the share of probes whose nearest in the gallery is their person; `same_cosine` and
        `other_cosine`, the mean cosines of probes to their own person and to others.
    """
    there = embeds.isfinite().all(1).numpy()
    units = F.normalize(embeds, dim=-1)
    rows = [np.flatnonzero((person == one) & there) for one in np.unique(person)]
    rows = [row for row in rows if len(row) > count]
    if len(rows) < 2:
        return {"people": len(rows)}
    gallery = F.normalize(torch.stack([units[row[:count]].mean(0) for row in rows]), dim=-1)
    cosine = units[[row[-1] for row in rows]] @ gallery.T  # (people, people)
    own = torch.eye(len(rows), dtype=torch.bool)
    return {
        "people": len(rows),
        "rank_one": float((cosine.argmax(1) == torch.arange(len(rows))).float().mean()),
        "same_cosine": float(cosine[own].mean()),
        "other_cosine": float(cosine[~own].mean()),
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
