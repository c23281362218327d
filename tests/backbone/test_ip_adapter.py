import logging
import shutil

import pytest
import torch
from batches import equal
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import ImageProjection
from safetensors.torch import save_file
from tiny import tiny_sdxl_unet, tiny_unet
from torch import Tensor

from lit_multiip.backbone import ip_adapter
from lit_multiip.backbone.components import BackboneError
from lit_multiip.backbone.ip_adapter import (
    install_ip_adapter,
    ip_adapter_from_text,
    ip_adapter_parameters,
    ip_adapter_state,
    read_ip_adapter,
    set_ip_scale,
    text_kv,
)
from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.methods.aggregators import SelfAttention

EMBED, CONTEXT = 24, 32


@pytest.fixture
def unet(tiny_backbone):
    return Backbone(str(tiny_backbone)).load("unet")


@pytest.fixture
def fresh(unet):
    """The state of an adapter that was never trained."""
    return ip_adapter_from_text(unet, EMBED)


def inputs(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(batch, 4, 8, 8, generator=generator),
        torch.tensor([10, 700])[:batch],
        torch.randn(batch, 6, CONTEXT, generator=generator),
    )


def photos(count: int = 9, seed: int = 5) -> Tensor:
    return torch.randn(2, count, EMBED, generator=torch.Generator().manual_seed(seed))


def eps(unet: UNet2DConditionModel, embeds: Tensor | None = None, **conditions: Tensor) -> Tensor:
    if embeds is not None:
        conditions["image_embeds"] = [embeds]
    with torch.no_grad():
        return unet(*inputs(), added_cond_kwargs=conditions or None).sample


def flat(state: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{section}.{name}": tensor for section, tensors in state.items() for name, tensor in tensors.items()}


def shaken(unet: UNet2DConditionModel, seed: int = 3) -> dict[str, dict[str, Tensor]]:
    """A state in which every value differs from the fresh one."""
    generator = torch.Generator().manual_seed(seed)
    state = ip_adapter_from_text(unet, EMBED)
    return {s: {k: v + torch.randn(v.shape, generator=generator) for k, v in t.items()} for s, t in state.items()}


def test_k_and_v_of_a_fresh_adapter_copy_the_text_k_and_v(unet):
    state = ip_adapter_from_text(unet, EMBED)
    cross = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    assert len(state["ip_adapter"]) == 2 * len(cross) == 8
    for number, name in enumerate(unet.attn_processors):  # the published index counts all processors
        attention = unet.get_submodule(name.removesuffix(".processor"))
        for kv in ("k", "v"):
            key = f"{number}.to_{kv}_ip.weight"
            assert (key in state["ip_adapter"]) == (name in cross)
            if name in cross:
                assert torch.equal(state["ip_adapter"][key], getattr(attention, f"to_{kv}").weight)


def test_a_fresh_adapter_is_a_function_of_its_seed_and_leaves_the_global_one_alone(unet):
    torch.manual_seed(7)
    first = ip_adapter_from_text(unet, EMBED, seed=1)["image_proj"]["proj.weight"]
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(3))
    assert torch.equal(first, ip_adapter_from_text(unet, EMBED, seed=1)["image_proj"]["proj.weight"])
    assert not torch.equal(first, ip_adapter_from_text(unet, EMBED, seed=2)["image_proj"]["proj.weight"])


def test_exactly_linear_layernorm_and_k_v_are_trainable(unet):
    install_ip_adapter(unet.requires_grad_(True), ip_adapter_from_text(unet, EMBED))
    own = ip_adapter_parameters(unet)
    linear, norm, kv = EMBED * 4 * CONTEXT + 4 * CONTEXT, 2 * CONTEXT, 4 * 2 * CONTEXT * 32
    assert sum(p.numel() for p in own.values()) == linear + norm + kv == 11_456
    assert {id(p) for p in unet.parameters() if p.requires_grad} == {id(p) for p in own.values()}
    assert list(own)[:4] == [f"image_proj.{k}" for k in ("proj.weight", "proj.bias", "norm.weight", "norm.bias")]
    assert list(own)[4:] == [f"ip_adapter.{i}.to_{kv}_ip.weight" for i in (1, 3, 5, 7) for kv in "kv"]


def test_every_adapter_weight_gets_a_gradient(unet):
    install_ip_adapter(unet, ip_adapter_from_text(unet, EMBED))
    unet(*inputs(), added_cond_kwargs={"image_embeds": [photos()]}).sample.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in ip_adapter_parameters(unet).values())


def test_zero_ip_scale_equals_the_plain_backbone(unet):
    plain = eps(unet)
    install_ip_adapter(unet, shaken(unet))
    with_photos = eps(unet, photos())
    set_ip_scale(unet, 0.0)
    assert (eps(unet, photos()) - plain).abs().max() < 1e-6
    assert (with_photos - plain).abs().max() > 1e-3
    set_ip_scale(unet, 1.0)
    assert torch.equal(eps(unet, photos()), with_photos)


def test_photo_order_and_repetition_do_not_matter_to_the_unet(unet):
    install_ip_adapter(unet, shaken(unet))
    nine, one = photos(), photos(count=1)
    assert (eps(unet, nine.flip(1)) - eps(unet, nine)).abs().max() < 1e-5
    assert (eps(unet, one.expand(-1, 9, -1)) - eps(unet, one)).abs().max() < 1e-5


def test_a_state_survives_install_and_read_out_and_makes_two_unets_equal(tiny_backbone, unet):
    other, state = Backbone(str(tiny_backbone)).load("unet"), shaken(unet)
    install_ip_adapter(unet, state)
    read = ip_adapter_state(unet)
    assert equal(read, state)
    install_ip_adapter(other, read)
    assert torch.equal(eps(unet, photos()), eps(other, photos()))


def test_an_installed_adapter_shares_no_memory_with_the_state_it_came_from(unet, fresh):
    before = [tensor.clone() for tensor in (*flat(fresh).values(), *text_kv(unet).values())]
    install_ip_adapter(unet, fresh)
    with torch.no_grad():
        for parameter in ip_adapter_parameters(unet).values():
            parameter.add_(1)
    assert all(map(torch.equal, before, (*flat(fresh).values(), *text_kv(unet).values())))


def test_a_second_adapter_replaces_the_first(unet):
    install_ip_adapter(unet, shaken(unet, seed=1))
    install_ip_adapter(unet, shaken(unet, seed=2))
    assert equal(ip_adapter_state(unet), shaken(unet, seed=2))
    assert sum(p.requires_grad for p in unet.parameters()) == 12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapter_weights_stay_float32_and_exact_in_a_half_precision_unet_and_train_in_autocast(tiny_backbone, dtype):
    unet = Backbone(str(tiny_backbone)).load("unet", dtype)
    state = shaken(unet)
    for _ in range(2):  # the second time, the UNet holds both precisions
        install_ip_adapter(unet, state)
        own = ip_adapter_parameters(unet)
        assert all(p.dtype == torch.float32 and torch.equal(p, flat(state)[key]) for key, p in own.items())
        assert {p.dtype for p in unet.parameters() if not p.requires_grad} == {dtype}
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype):
            loss = unet(*inputs(), added_cond_kwargs={"image_embeds": [photos()]}).sample.float().square().mean()
        loss.backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.abs().max() > 0 for p in own.values())


def test_half_precision_weights_are_trained_in_float32(unet, fresh):
    install_ip_adapter(unet, {s: {k: v.half() for k, v in t.items()} for s, t in fresh.items()})
    assert {p.dtype for p in ip_adapter_parameters(unet).values()} == {torch.float32}


def test_installing_warns_of_nothing(unet, caplog):
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    install_ip_adapter(unet, ip_adapter_from_text(unet, EMBED))
    for logger in loggers:
        logger.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_an_sdxl_unet_takes_an_adapter_and_zero_scale_gives_it_back():
    unet = tiny_sdxl_unet().requires_grad_(False).eval()
    added = {"text_embeds": torch.ones(2, 16), "time_ids": torch.arange(12.0).reshape(2, 6)}
    plain = eps(unet, **added)
    install_ip_adapter(unet, shaken(unet))
    assert len(ip_adapter_parameters(unet)) == 4 + 2 * 8  # 2 down, 2 middle, 2 x 2 up
    assert (eps(unet, photos(), **added) - plain).abs().max() > 1e-3
    set_ip_scale(unet, 0)
    assert (eps(unet, photos(), **added) - plain).abs().max() < 1e-6


def test_sd15_has_32_attention_layers_16_of_them_cross_and_trains_the_published_22_3_million():
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)  # diffusers' defaults are SD1.5's otherwise
    weights = text_kv(unet)
    assert (len(unet.attn_processors), len(weights)) == (32, 2 * 16)
    assert sorted({int(key.split(".")[1]) for key in weights}) == list(range(1, 32, 2))
    assert sum(w.numel() for w in weights.values()) == 19_169_280
    middle = unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2.to_k").weight
    assert weights["ip_adapter.31.to_k_ip.weight"] is middle  # the middle block comes last
    with torch.device("meta"):
        projection = ImageProjection(image_embed_dim=1024, cross_attention_dim=768, num_image_text_embeds=4)
        aggregator = SelfAttention(1024)
    assert sum(p.numel() for p in projection.parameters()) == 3_150_336 == 22_319_616 - 19_169_280
    assert sum(p.numel() for p in aggregator.parameters()) == 3 * 1024**2


# ---- refused ----


def other_state(unet: UNet2DConditionModel, kind: str) -> dict:
    """A state that does not fit the UNet."""
    if kind == "encoder":
        return ip_adapter_from_text(unet, 16)
    if kind in ("width", "sdxl"):
        return ip_adapter_from_text(tiny_unet(cross_attention_dim=40) if kind == "width" else tiny_sdxl_unet(), EMBED)
    state = ip_adapter_from_text(unet, EMBED)
    if kind == "lora":
        state["ip_adapter"]["0.to_q_lora.down.weight"] = torch.zeros(1, 1)
    else:
        del state["ip_adapter"]["7.to_v_ip.weight"]
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("encoder", r"'image_proj.proj.weight' has the shape \(128, 16\).*\(128, 24\)"),
        ("width", r"has the shape .*text width 32.*needs"),
        ("lacking", r"lacks 1 weights, such as 'ip_adapter.7.to_v_ip.weight'"),
        ("lora", r"beyond what this UNet takes, 1 weights, such as 'ip_adapter.0.to_q_lora.down.weight'"),
        ("sdxl", r"beyond what this UNet takes, 8 weights, such as 'ip_adapter.11"),
        ({}, "lacks the sections"),
        ({"image_proj": {}}, "lacks the sections"),
        ({"image_proj": 1, "ip_adapter": 2}, "lacks the sections"),
        ({"image_proj": {"proj.weight": 3}, "ip_adapter": {}}, "other than a tensor under 'proj.weight'"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_by_name_and_leaves_the_unet_as_it_was(unet, state, message):
    plain = eps(unet)
    with pytest.raises(BackboneError, match=message):
        install_ip_adapter(unet, other_state(unet, state) if isinstance(state, str) else state, embed_dim=EMBED)
    assert torch.equal(eps(unet), plain)


def test_reading_parameters_or_scaling_without_an_adapter_is_refused(unet):
    for use in (ip_adapter_parameters, ip_adapter_state, lambda u: set_ip_scale(u, 1.0)):
        with pytest.raises(BackboneError, match="install_ip_adapter first"):
            use(unet)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
def test_a_scale_that_is_not_finite_is_refused(unet, scale):
    with pytest.raises(ValueError, match=f"ip_scale={scale} is not finite"):
        set_ip_scale(unet, scale)


def test_both_published_file_formats_give_the_same_state(tiny_backbone, fresh, tmp_path):
    torch.save(fresh, tmp_path / "adapter.bin")
    path = Backbone(str(tiny_backbone)).adapter_file()
    assert path == str(tiny_backbone / "ip_adapter" / "ip_adapter.safetensors")
    assert equal(read_ip_adapter(path), fresh) and equal(read_ip_adapter(str(tmp_path / "adapter.bin")), fresh)


def test_further_sections_are_read_and_not_installed(unet, tmp_path):
    state = {**ip_adapter_from_text(unet, EMBED), "aggregator": {"to_q.weight": torch.eye(EMBED)}}
    save_file(flat(state), tmp_path / "adapter.safetensors")
    read = read_ip_adapter(str(tmp_path / "adapter.safetensors"))
    assert torch.equal(read["aggregator"]["to_q.weight"], torch.eye(EMBED))
    install_ip_adapter(unet, read)
    assert len(ip_adapter_parameters(unet)) == 12


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("broken.safetensors", b"not weights", "broken.safetensors"),
        ("broken.bin", b"not weights", "broken.bin"),
        ("gone.safetensors", None, "no IP-Adapter file .*gone.safetensors'"),
        ("weights.ckpt", b"", "neither .safetensors nor .bin"),
    ],
)
def test_broken_missing_and_foreign_files_are_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BackboneError, match=message):
        read_ip_adapter(str(tmp_path / name))


def test_a_folder_without_an_adapter_has_none_and_one_with_two_must_be_told_which(tiny_backbone, tmp_path):
    copy = shutil.copytree(tiny_backbone, tmp_path / "copy")
    shutil.copy(copy / "ip_adapter" / "ip_adapter.safetensors", copy / "ip_adapter" / "second.safetensors")
    with pytest.raises(BackboneError, match=r"several adapters .*ip_adapter.safetensors, second.safetensors"):
        Backbone(str(copy)).adapter_file()
    shutil.rmtree(copy / "ip_adapter")
    assert Backbone(str(copy)).adapter_file() is None
    assert Backbone("org/name").adapter_file() is None


def test_an_adapter_on_the_hub_is_fetched_or_the_message_says_what_was_wanted(tiny_backbone, monkeypatch):
    wanted = "h94/IP-Adapter/models/ip-adapter_sd15.safetensors"
    asked = []

    def fetch(*place):
        asked.append(place)
        return Backbone(str(tiny_backbone)).adapter_file()

    monkeypatch.setattr(ip_adapter, "hf_hub_download", fetch)
    assert len(read_ip_adapter(wanted)["ip_adapter"]) == 8
    assert asked == [("h94/IP-Adapter", "models/ip-adapter_sd15.safetensors")]

    def unreachable(*_):
        raise OSError("no network")

    monkeypatch.setattr(ip_adapter, "hf_hub_download", unreachable)
    with pytest.raises(
        BackboneError,
        match=r"'models/ip-adapter_sd15.safetensors' of the hub's 'h94/IP-Adapter' cannot be fetched \(no network\).*"
        r"--model.ip_adapter <file>",
    ):
        read_ip_adapter(wanted)
