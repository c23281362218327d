"""What is measured on: people without pictures, features without encoders, and SD1.5 with random weights.

Speed does not depend on any of their values.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from lit_multiip.data.people import DrawnPhoto, PeopleSource, Person, Photo
from lit_multiip.features import Features, content_key, prompt_key

PROMPTS = [f"a photo of a person, scene {number}" for number in range(16)]


class Strangers(PeopleSource):
    """People whose photos are never looked at.

    Args:
        train: how many to train on; one validates and one tests.
        photos: of each.
    """

    def __init__(self, train: int = 4, photos: int = 10) -> None:
        self.counts, self.photos = {"train": train, "validation": 1, "test": 1}, photos

    def people(self) -> list[Person]:
        """Return them; the numbers of all their photos differ."""
        people, index = [], 0
        for side, count in self.counts.items():
            for number in range(count):
                name = f"{side}_{number:06d}"
                photos = tuple(
                    DrawnPhoto(name, f"{name}_{i:04d}.png", PROMPTS[(index + i) % 16], 0, index, i)
                    for i in range(self.photos)
                )
                people.append(Person(name, photos, side))
                index += 1
        return people


def fill(features: Features, photos: Iterable[Photo], seed: int = 0) -> None:
    """Store features of photos that no encoder made, as ``Features.build`` stores the encoders'."""
    rng = np.random.default_rng(seed)
    photos = list(photos)
    shapes = {"embeds": (features.row_bytes()["embeds"] // 4,), "latent": features.latent_shape}
    shapes["latent"] = (2 * shapes["latent"][0], *shapes["latent"][1:])
    for kind, shape in shapes.items():
        dtype = np.dtype(np.float32 if kind == "embeds" else np.float16)
        keys = features.store[kind].missing(map(content_key, photos))
        for first in range(0, len(keys), 1024):
            part = keys[first : first + 1024]
            _sparse_shard(features.store[kind].folder, part, shape, dtype, rng)
    text = features.store["text"]
    keys = text.missing(map(prompt_key, ["", *PROMPTS]))
    if keys:
        tokens, width = _text_shape(features)
        text.add(keys, rng.standard_normal((len(keys), tokens, width)).astype(np.float16))
    features.refresh()


def _text_shape(features: Features) -> tuple[int, int]:
    from lit_multiip.backbone import load_feature_shapes

    tokens, width = load_feature_shapes(features.backbone, features.image_side)["text"]
    return tokens, width


def _sparse_shard(
    folder: Path, keys: Sequence[str], shape: tuple[int, ...], dtype: np.dtype, rng: np.random.Generator
) -> None:
    """Write a shard of which 16 rows are random and the others are holes in the file, zeros."""
    folder.mkdir(parents=True, exist_ok=True)
    name = uuid.uuid4().hex
    array = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, (len(keys), *shape))
    array[:16] = rng.standard_normal(array[:16].shape)
    array.flush()
    (folder / f"{name}.json").write_text(json.dumps(list(keys)))


def write_sd15(folder: Path) -> Path:
    """Write Stable Diffusion 1.5, and the published IP-Adapter's ViT-H/14, by their configurations: 3.4 GB, fp16."""
    if (folder / "model_index.json").exists():
        return folder
    with torch.device("meta"):
        modules: dict[str, Any] = {
            "unet": UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
            "vae": AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                latent_channels=4,
                sample_size=512,
            ),
            "text_encoder": CLIPTextModel(
                CLIPTextConfig(
                    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                    projection_dim=768,
                )
            ),
            "image_encoder": CLIPVisionModelWithProjection(
                CLIPVisionConfig(
                    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16,
                    patch_size=14, projection_dim=1024, hidden_act="gelu",
                )
            ),
        }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for name, module in modules.items():
        modules[name] = _random(module, generator)
    pipe: Any = StableDiffusionPipeline(
        **modules,
        tokenizer=_tokenizer(folder / "tokenizer"),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=CLIPImageProcessor(),
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder


def _random(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """Give a module of the meta device small random weights in fp16; norms stay the identity."""
    fresh = module.half().to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in fresh.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        for name, buffer in fresh.named_buffers():
            if name.endswith("position_ids"):
                buffer.copy_(torch.arange(buffer.numel()).view_as(buffer))
    return fresh


def _tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's tokenizer over single letters: 77 tokens, like SD1.5's."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.-'"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)
