"""Pixels: squares, tensors and the VAE's range."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def square(image: Image.Image, side: int) -> Image.Image:
    """Cut the largest centred square out of ``image`` and scale it to ``side`` px."""
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    cut = image.crop((left, top, left + edge, top + edge))
    return cut if edge == side else cut.resize((side, side), Image.Resampling.LANCZOS)


def to_tensor(images: Iterable[Image.Image]) -> Tensor:
    """Stack RGB images of one size: (B, 3, H, W) uint8."""
    return torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images])).permute(0, 3, 1, 2)


def to_signal(pixels: Tensor) -> Tensor:
    """Map uint8 pixels to the VAE's [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_pixels(signal: Tensor) -> Tensor:
    """Map the VAE's [-1, 1] to uint8 pixels, rounding."""
    return ((signal.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
