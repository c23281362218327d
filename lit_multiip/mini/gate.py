"""The gate: several photos must show who someone is where one does not, or the portraits are too easy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from lit_multiip.data import mini_faces
from lit_multiip.evaluation.critic import Critic

Embed = Callable[[Tensor], Tensor]
GATE_PEOPLE = mini_faces.ROLES["validation"][10_000:]  # far from the people that a fit validates on
GALLERIES = 5  # of 50 people: one-photo rank-1 of single galleries differs by ten points
DRAWS = 20  # random reference sets a person, so that the draws' own noise is below a point


@functools.cache
def _pixels(seed: int, first: int, people: int, count: int, clean: bool) -> Tensor:
    """Portraits of `people` people from `GATE_PEOPLE[first]` on, uint8 (people * count, 3, 64, 64)."""
    chosen = GATE_PEOPLE[first : first + people]
    images = [mini_faces.photo(seed, p, n, clean) for p in tqdm(chosen, "portraits", leave=False) for n in range(count)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


@torch.inference_mode()
def rank_one(embed: Embed, seed: int, people: int = 50, photos: int = 18) -> dict[int, float]:
    """Return the share of clean probes that find their person, by number of reference photos (1, 3 and 9).

    A person stands in the gallery as the mean of the unit embeddings of n random photos; a probe is one photo
    without occluders; nearest by cosine. The mean of `GALLERIES` galleries of different people.

    Args:
        embed: uint8 images (B, 3, 64, 64) -> embeddings (B, D).
        seed: of the portraits and of the reference draws.
        people: size of a gallery, none of them seen in any training.
        photos: photos a person from which the references are drawn.
    """

    def embed_all(first: int, count: int, clean: bool) -> Tensor:  # (people, count, D)
        vectors = torch.cat([embed(part) for part in _pixels(seed, first, people, count, clean).split(256)])
        return F.normalize(vectors.float(), dim=-1).view(people, count, -1)

    rng, everyone = np.random.default_rng(seed), torch.arange(people)[:, None]
    hits: dict[int, list[Tensor]] = {1: [], 3: [], 9: []}
    for first in range(0, GALLERIES * people, people):
        references, probes = embed_all(first, photos, False), embed_all(first, 4, True)
        for n, found in hits.items():
            for _ in range(DRAWS):
                chosen = torch.from_numpy(np.stack([rng.permutation(photos)[:n] for _ in range(people)]))
                gallery = F.normalize(references[everyone, chosen].mean(1), dim=-1)  # (people, D)
                found.append(((probes @ gallery.T).argmax(-1) == everyone).float().mean())
    return {n: float(torch.stack(found).mean()) for n, found in hits.items()}


def critic_embed(folder: Path) -> Embed:
    """Return the identity embedding of a critic."""
    critic = Critic.load(folder)
    return lambda images: critic(images)[0]


def clip_embed(backbone: Path) -> Embed:
    """Return the image embedding of the miniature's CLIP."""
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    encoder = CLIPVisionModelWithProjection.from_pretrained(backbone / "image_encoder").float().eval()
    processor = CLIPImageProcessor.from_pretrained(backbone / "feature_extractor")
    return lambda images: encoder(processor(list(images), return_tensors="pt").pixel_values).image_embeds
