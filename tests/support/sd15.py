"""Stable Diffusion 1.5 at its real size, with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
