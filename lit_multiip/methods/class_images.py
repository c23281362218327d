"""Class images of eq. (13): images that the frozen backbone draws of a class noun, kept by their settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm.auto import tqdm

from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.backbone.sampler import Sampling
from lit_multiip.files import LitMultiIPError, hash_text, write_durably

DRAWN_AT_ONCE = 16


@dataclass
class ClassImages:
    """Images of one prompt, from seeds 0, 1, ..., and their latents.

    Attributes:
        backbone: draws them.
        sampling: how.
        prompt: C_pr.
        count: how many, K.
        folder: where they are kept.
        moments: of the VAE's posteriors, (K, 2C, h, w), once read.
    """

    backbone: Backbone
    sampling: Sampling
    prompt: str
    count: int
    folder: str
    moments: Tensor | None = None

    def file(self) -> Path:
        """Return their file, named by all that decides their pixels."""
        parts = ("unet", "vae", *self.backbone.text_components, "scheduler")
        facts = {
            "backbone": [self.backbone.fingerprint(name) for name in parts],
            "prompt": self.prompt,
            "count": self.count,
            "side": self.backbone.image_side,
            "sampling": self.sampling.describe(),
        }
        name = hash_text(json.dumps(facts))[:16]
        return Path(self.folder).expanduser() / f"class-{name}" / "images.safetensors"

    def read(self) -> None:
        """Read the latents from the file."""
        file = self.file()
        try:
            self.moments = load_file(file)["moments"].float()
        except (SafetensorError, KeyError) as error:
            raise LitMultiIPError(f"class images '{file}' cannot be read ({error}): delete the file") from error

    @torch.no_grad()
    def write(self, draw: Callable[[list[str], list[int]], Tensor], encode: Callable[[Tensor], Tensor]) -> None:
        """Draw them, and write `images` (K, 3, H, W) uint8 and `moments` float16 to the file.

        Args:
            draw: prompts and seeds => (B, 3, H, W) uint8.
            encode: images => moments (B, 2C, h, w).
        """
        file = self.file()
        file.parent.mkdir(parents=True, exist_ok=True)  # fails before the work, not after it
        drawn, encoded = [], []
        for first in tqdm(range(0, self.count, DRAWN_AT_ONCE), "drawing class images", delay=3):
            seeds = list(range(first, min(first + DRAWN_AT_ONCE, self.count)))
            images = draw([self.prompt] * len(seeds), seeds)
            drawn.append(images.cpu())
            encoded.append(encode(images).float().cpu())
        content = save({"images": torch.cat(drawn), "moments": torch.cat(encoded).half()})
        write_durably(file, lambda opened: opened.write(content))
