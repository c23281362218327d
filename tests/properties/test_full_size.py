"""Stable Diffusion 1.5 at its real size, of random weights, through the real code; minutes on a CPU.

pytest tests/properties/test_full_size.py -m slow -s
"""

import resource
import time

import pytest
import torch
from sd15 import write_sd15
from torch.utils.data import default_collate

from lit_multiip.backbone.ip_adapter import ip_adapter_parameters
from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.backbone.sampler import Sampling
from lit_multiip.data.people import MiniFaces
from lit_multiip.datamodule import MultiPhotoData
from lit_multiip.methods.adapter import MultiIPAdapter

pytestmark = pytest.mark.slow
SIDE, STEPS = 256, 6


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    return write_sd15(tmp_path_factory.mktemp("sd15"))


def test_sd15_loads_trains_on_a_fixed_batch_and_draws_at_256_px(sd15, tmp_path):
    started = time.perf_counter()
    source = MiniFaces(train=1, validation=1, test=1, photos=3)
    few = {"references": 2, "min_photos": 3, "batch_size": 1, "encode_batch_size": 1}
    data = MultiPhotoData(Backbone(str(sd15), image_side=SIDE), source, cache_dir=str(tmp_path), drop=(0, 0, 0), **few)
    data.prepare_data()
    data.setup("fit")
    encoded = time.perf_counter() - started

    sampling = Sampling(steps=2)
    model = MultiIPAdapter(
        Backbone(str(sd15), image_side=SIDE), sampling=sampling, lr_warmup_steps=0
    )  # AdamW, 1e-4: as published
    model.configure_model()
    adapter = sum(parameter.numel() for parameter in ip_adapter_parameters(model.unet).values())
    assert adapter == 22_319_616  # the published 22.3M
    trained = sum(parameter.numel() for parameter in model.trained_parameters().values())
    assert trained == adapter + 3 * 1024**2

    batch = next(iter(data.train_dataloader()))
    assert batch["moments"].shape == (1, 8, 32, 32) and batch["references"].shape == (1, 2, 1024)
    model.log = lambda *_, **__: None
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
