"""Stable Diffusion 1.5 at its real size, of random weights, through the real code; minutes on a CPU.

pytest tests/test_full_size.py -m slow -s
"""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tiny import make_tokenizer
from torch.utils.data import default_collate
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from lit_multiip.adapter import MultiIPAdapter
from lit_multiip.backbone import ip_adapter_parameters
from lit_multiip.data.datamodule import MultiPhotoData
from lit_multiip.data.people import MiniFaces
from lit_multiip.evaluation.sampling import Sampling

pytestmark = pytest.mark.slow
SIDE, STEPS = 256, 6


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published configurations of SD1.5 and of ViT-H/14; 1.7 billion random weights in 16 bits, 3.4 GB."""
    folder = tmp_path_factory.mktemp("sd15")
    torch.manual_seed(0)
    tokenizer = make_tokenizer(folder / "tokenizer", length=77)
    text = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    vision = CLIPVisionConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
        projection_dim=1024,
        hidden_act="gelu",
    )
    parts: dict[str, Any] = {
        "unet": UNet2DConditionModel(sample_size=64, cross_attention_dim=768),  # diffusers' defaults are SD1.5's else
        "vae": AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            sample_size=512,
        ),
        "text_encoder": CLIPTextModel(text),
        "image_encoder": CLIPVisionModelWithProjection(vision),
    }
    parts = {name: part.half() for name, part in parts.items()}
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, skip_prk_steps=True
    )
    StableDiffusionPipeline(
        **parts,
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=CLIPImageProcessor(),
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def test_sd15_loads_trains_on_a_fixed_batch_and_draws_at_256_px(sd15: Path, tmp_path: Path) -> None:
    started = time.perf_counter()
    source = MiniFaces(train=1, validation=1, test=1, photos=3)
    few: dict[str, Any] = {"references": 2, "min_photos": 3, "batch_size": 1, "encode_batch_size": 1}
    data = MultiPhotoData(str(sd15), source, SIDE, cache_dir=str(tmp_path), drop=(0, 0, 0), **few)
    data.prepare_data()
    data.setup("fit")
    encoded = time.perf_counter() - started

    sampling = Sampling(steps=2)
    model = MultiIPAdapter(
        str(sd15), sampling=sampling, image_side=SIDE, lr_warmup_steps=0
    )  # AdamW, 1e-4: as published
    model.configure_model()
    adapter = sum(parameter.numel() for parameter in ip_adapter_parameters(model.unet).values())
    assert adapter == 22_319_616  # the published 22.3M
    trained = sum(parameter.numel() for parameter in model.trained_parameters().values())
    assert trained == adapter + 3 * 1024**2

    batch = next(iter(data.train_dataloader()))
    assert batch["moments"].shape == (1, 8, 32, 32) and batch["references"].shape == (1, 2, 1024)
    model.log = lambda *_, **__: None  # type: ignore[method-assign]
    model._trainer = None
    optimizer, _ = model.optimizer_and_schedule(STEPS)
    frozen = model.unet.conv_in.weight.clone()
    losses, seconds = [], []
    for _ in range(STEPS):
        started = time.perf_counter()
        loss = model.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
    assert losses[-1] < losses[0] - 1e-4 and losses == sorted(losses, reverse=True)
    assert torch.equal(model.unet.conv_in.weight, frozen)

    data.setup("validate")
    item = default_collate([data.val_dataloader().dataset[0]])
    started = time.perf_counter()
    with torch.no_grad():
        [image] = model.eval().generate(item)
    assert image.shape == (3, SIDE, SIDE) and image.dtype == torch.uint8 and image.float().std() > 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"\nSD1.5 at {SIDE} px, float32, batch 1, {torch.get_num_threads()} thread(s): {trained:,} trained parameters; "
        f"features of 6 photos {encoded:.0f} s; {sum(seconds[1:]) / (STEPS - 1):.1f} s a step; "
        f"loss {' '.join(f'{loss:.5f}' for loss in losses)}; an image in {sampling.steps} steps "
        f"{time.perf_counter() - started:.0f} s; peak {peak:.1f} GiB"
    )
