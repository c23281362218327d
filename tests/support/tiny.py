"""A Stable Diffusion pipeline folder of random weights: the shape of a backbone, not its skill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from lit_multiip.backbone.ip_adapter import ip_adapter_from_text

VAE_FACTOR = 4  # pixels per latent
MAX_TOKENS = 16
POOLED_DIM = 16


def make_tiny_backbone(
    folder: Path,
    *,
    image_side: int = 32,
    projection_dim: int = 24,
    cross_attention_dim: int = 32,
    ip_adapter: bool = False,
    sdxl: bool = False,
    prediction_type: str = "epsilon",
    seed: int = 0,
) -> Path:
    """Write a pipeline folder in the standard layout, optionally with a fresh adapter in ip_adapter/."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        make_unet = tiny_sdxl_unet if sdxl else tiny_unet
        unet = make_unet(sample_size=image_side // VAE_FACTOR, cross_attention_dim=cross_attention_dim)
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=image_side,
        )
        tokenizer = make_tokenizer(folder / "tokenizer")
        text_config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=cross_attention_dim // 2 if sdxl else cross_attention_dim,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            projection_dim=POOLED_DIM,
        )
        text_encoder = CLIPTextModel(text_config)
        image_encoder = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=image_side,
                patch_size=8,
                projection_dim=projection_dim,
            )
        )
        second = CLIPTextModelWithProjection(text_config) if sdxl else None
    parts = {
        "vae": vae,
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "unet": unet,
        "scheduler": DDIMScheduler(
            beta_schedule="scaled_linear", clip_sample=False, steps_offset=1, prediction_type=prediction_type
        ),
        "feature_extractor": CLIPImageProcessor(
            size={"shortest_edge": image_side}, crop_size={"height": image_side, "width": image_side}
        ),
        "image_encoder": image_encoder,
    }
    if sdxl:
        pipe = StableDiffusionXLPipeline(
            **parts, text_encoder_2=second, tokenizer_2=make_tokenizer(folder / "tokenizer_2"), add_watermarker=False
        )
    else:
        pipe = StableDiffusionPipeline(**parts, safety_checker=None, requires_safety_checker=False)
    pipe.save_pretrained(folder)
    if ip_adapter:
        state = ip_adapter_from_text(unet, projection_dim, seed=seed)
        flat = {f"{section}.{name}": tensor for section, tensors in state.items() for name, tensor in tensors.items()}
        (folder / "ip_adapter").mkdir()
        save_file(flat, folder / "ip_adapter" / "ip_adapter.safetensors")
    return folder


def tiny_unet(sample_size: int = 8, cross_attention_dim: int = 32, **particulars: Any) -> UNet2DConditionModel:
    """Two levels, cross-attention in the lower one and in the middle: 2 + 1 + 1 = 4 cross-attention layers."""
    shape: dict[str, Any] = {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
    }
    return UNet2DConditionModel(sample_size=sample_size, cross_attention_dim=cross_attention_dim, **shape | particulars)


def tiny_sdxl_unet(sample_size: int = 8, cross_attention_dim: int = 32) -> UNet2DConditionModel:
    """SDXL's particulars: no attention in level 0, several transformer layers, text_time conditioning."""
    return tiny_unet(
        sample_size,
        cross_attention_dim,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + POOLED_DIM,
    )


def make_tokenizer(folder: Path, length: int = MAX_TOKENS) -> CLIPTokenizer:
    """CLIP's tokenizer over single letters, digits and commas, with no merges."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.-'<>"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)
