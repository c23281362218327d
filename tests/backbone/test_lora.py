"""LoRA on the UNet's attention, trained together with the adapter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_multiip.backbone.ip_adapter import ip_adapter_parameters
from lit_multiip.backbone.lora import lora_parameters, read_lora, save_lora
from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.methods.adapter import MultiIPAdapter
from lit_multiip.runs import CheckpointError

pytest.importorskip("peft")


def built(backbone: Path, **options: Any) -> MultiIPAdapter:
    model = MultiIPAdapter(Backbone(str(backbone)), **options)
    model.configure_model()
    return model.eval()


def batch(seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "references": (2, 9, 24),
        "moments": (2, 8, 8, 8),
        "latent_noise": (2, 4, 8, 8),
        "eps": (2, 4, 8, 8),
    }
    values: dict[str, Any] = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    return values | {
        "text": {"prompt_embeds": torch.randn(2, 16, 32, generator=g)},
        "negative_text": {"prompt_embeds": torch.randn(2, 16, 32, generator=g)},
        "drop_image": torch.tensor([False, True]),
        "time": torch.tensor([0.2, 0.7]),
        "seed": torch.arange(2),
    }


def loss(model: MultiIPAdapter) -> Tensor:
    model.log = lambda *_, **__: None
    model._trainer = None
    return model.training_step(batch(), 0)


def test_untrained_it_changes_nothing_and_it_trains_in_all_attention_with_the_adapter(tiny_backbone):
    plain, model = built(tiny_backbone), built(tiny_backbone, lora_rank=2)
    assert torch.equal(loss(plain), loss(model))
    lora = lora_parameters(model.unet)
    assert len(lora) == 8 * 4 * 2  # 8 attention layers, self and cross; q, k, v and out; A and B
    trained = {id(parameter) for parameter in model.trained_parameters().values()}
    own = {id(parameter) for parameter in ip_adapter_parameters(model.unet).values()}
    assert trained == own | {id(p) for p in lora.values()} | {id(p) for p in model.aggregator.parameters()}
    assert {parameter.dtype for parameter in lora.values()} == {torch.float32}

    optimizer = torch.optim.AdamW(model.trained_parameters().values(), lr=1e-2)
    before = float(loss(model).detach())
    for _ in range(5):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    assert float(loss(model).detach()) < before - 1e-3
    assert all(parameter.abs().max() > 0 for name, parameter in lora.items() if "lora_B" in name)


def test_trained_with_the_aggregator_alone_the_adapter_rests(tiny_backbone):
    model = built(tiny_backbone, lora_rank=2, trained="aggregator")
    assert not any(parameter.requires_grad for parameter in ip_adapter_parameters(model.unet).values())
    assert all(parameter.requires_grad for parameter in lora_parameters(model.unet).values())


def test_without_references_the_backbone_draws_alone(tiny_backbone):
    """Neither image attention nor LoRA, which are both back afterwards."""
    plain, model = built(tiny_backbone), built(tiny_backbone, lora_rank=2)
    for parameter in lora_parameters(model.unet).values():
        parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone, with_photos = model.generate(batch(), "none"), model.generate(batch())
        assert torch.equal(alone, plain.generate(batch(), "none"))
        assert (with_photos.int() - plain.generate(batch()).int()).abs().max() > 1
        assert torch.equal(model.generate(batch()), with_photos)
    assert all(parameter.requires_grad for parameter in lora_parameters(model.unet).values())


def test_a_checkpoint_of_another_rank_is_refused(tiny_backbone):
    checkpoint = {"state_dict": (model := built(tiny_backbone, lora_rank=2)).state_dict()}
    model.on_save_checkpoint(checkpoint)
    assert sum(".lora_" in name for name in checkpoint["state_dict"]) == 64
    with pytest.raises(
        CheckpointError, match=r"another lora_rank: 2 \(this model: None\); set model.lora_rank likewise"
    ):
        built(tiny_backbone).on_load_checkpoint(checkpoint)


def test_a_file_of_another_unet_is_refused_by_a_weights_name(tiny_backbone, tiny_sdxl, tmp_path):
    other = built(tiny_sdxl, lora_rank=2)
    save_lora(type(other.sampler.pipe), tmp_path, {"unet": other.unet}, torch.float32)
    with pytest.raises(ValueError, match=r"is of another unet, such as '.*lora_A.weight'"):
        read_lora({"unet": built(tiny_backbone, lora_rank=2).unet}, tmp_path / "pytorch_lora_weights.safetensors")


def test_a_rank_below_one_is_refused():
    with pytest.raises(ValueError, match="lora_rank=0 must be at least 1"):
        MultiIPAdapter(lora_rank=0)
