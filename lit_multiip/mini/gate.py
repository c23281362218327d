"""The gate: several photos must show who someone is where one does not, or the portraits are too easy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_multiip.data import mini_faces
from lit_multiip.mini.critic import Critic

Embed = Callable[[Tensor], Tensor]
GATE_PEOPLE = mini_faces.ROLES["validation"][10_000:]  # far from the people that a fit validates on
DRAWS = 20  # random reference sets a person, so that the figures' own noise is below a point


@torch.inference_mode()
def rank_one(embed: Embed, seed: int, people: int = 50, photos: int = 36) -> dict[int, float]:
    """Return the share of clean probes that find their person, by number of reference photos (1, 3 and 9).

    A person stands in the gallery as the mean of the unit embeddings of n random photos; a probe is one photo
    without occluders; nearest by cosine.

    Args:
        embed: uint8 images (B, 3, 64, 64) -> embeddings (B, D).
        seed: of the portraits and of the reference draws.
        people: size of the gallery, none of them seen in any training.
        photos: photos a person from which the references are drawn.
    """

    def embed_all(clean: bool, count: int) -> Tensor:  # (people, count, D)
        images = [mini_faces.photo(seed, p, n, clean) for p in GATE_PEOPLE[:people] for n in range(count)]
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        vectors = torch.cat([embed(part) for part in pixels.split(256)])
        return F.normalize(vectors.float(), dim=-1).view(people, count, -1)

    references, probes = embed_all(False, photos), embed_all(True, 4)
    rng, shares = np.random.default_rng(seed), {}
    for n in (1, 3, 9):
        hits = []
        for _ in range(DRAWS):
            chosen = torch.from_numpy(np.stack([rng.permutation(photos)[:n] for _ in range(people)]))
            gallery = F.normalize(references[torch.arange(people)[:, None], chosen].mean(1), dim=-1)  # (people, D)
            found = (probes @ gallery.T).argmax(-1)  # (people, 4)
            hits.append((found == torch.arange(people)[:, None]).float().mean())
        shares[n] = float(torch.stack(hits).mean())
    return shares


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
