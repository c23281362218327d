from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tiny import make_tiny_backbone, tiny_sdxl_unet, tiny_unet
from torch import Tensor

from lit_multiip import files
from lit_multiip.backbone import components, ip_adapter
from lit_multiip.backbone.components import BackboneError, resolve_backbone
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

EMBED, CONTEXT = 24, 32


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return make_tiny_backbone(tmp_path_factory.mktemp("backbone"), ip_adapter=True)


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture
def unet(folder) -> UNet2DConditionModel:
    return Backbone(str(folder)).load("unet")


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
        conditions["image_embeds"] = [embeds]  # type: ignore[assignment]
    with torch.no_grad():
        return unet(*inputs(), added_cond_kwargs=conditions or None).sample


def flat(state: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{section}.{name}": tensor for section, tensors in state.items() for name, tensor in tensors.items()}


def shaken(unet: UNet2DConditionModel, seed: int = 3) -> dict[str, dict[str, Tensor]]:
    """A state in which every value differs from the fresh one."""
    generator = torch.Generator().manual_seed(seed)
    state = ip_adapter_from_text(unet, EMBED)
    return {s: {k: v + torch.randn(v.shape, generator=generator) for k, v in t.items()} for s, t in state.items()}


# ---- names ----


def test_a_folder_and_a_hub_id_resolve_to_themselves(folder):
    assert resolve_backbone(str(folder)) == str(folder)
    assert resolve_backbone("stable-diffusion-v1-5/stable-diffusion-v1-5") == (
        "stable-diffusion-v1-5/stable-diffusion-v1-5"
    )
    assert resolve_backbone(resolve_backbone(str(folder))) == str(folder)


@pytest.mark.parametrize("name", ["", "sd15", "./nowhere/sd15", "../sd15", "/nowhere/sd15", "a/b/c", "~/nowhere"])
def test_what_is_neither_folder_nor_hub_id_is_refused_by_name(name):
    with pytest.raises(BackboneError, match=f"'{name}' is not an existing folder, a hub id"):
        resolve_backbone(name)


def test_a_file_is_no_backbone(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(BackboneError, match="not an existing folder"):
        resolve_backbone("unet/config.json")  # would pass for a hub id


def test_mini_is_the_folder_inside_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr(files.resources, "files", lambda package: tmp_path / package)
    with pytest.raises(BackboneError, match="reinstall"):
        resolve_backbone("mini")
    (tmp_path / "lit_multiip" / "mini" / "weights").mkdir(parents=True)
    assert resolve_backbone("mini") == str(tmp_path / "lit_multiip" / "mini" / "weights")


# ---- components ----


def test_the_folder_is_what_diffusers_calls_a_pipeline(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.load_ip_adapter(str(folder), subfolder="ip_adapter", weight_name="ip_adapter.safetensors")
    assert pipe.image_encoder.config.projection_dim == EMBED
    assert pipe.tokenizer.decode(pipe.tokenizer("a Man").input_ids, skip_special_tokens=True).strip() == "a man"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder", "image_encoder"])
def test_modules_come_frozen_in_eval_mode_and_in_the_asked_precision(folder, name, dtype):
    module = Backbone(str(folder)).load(name, dtype)
    assert not module.training
    assert {(p.requires_grad, p.dtype) for p in module.parameters()} == {(False, dtype)}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("tokenizer", "CLIPTokenizer"), ("scheduler", "DDIMScheduler"), ("feature_extractor", "CLIPImageProcessor")],
)
def test_the_other_components_come_in_the_class_the_pipeline_names(folder, name, kind):
    assert type(Backbone(str(folder)).load(name)).__name__.startswith(kind)


def test_image_encoder_and_feature_extractor_need_not_be_listed(copy):
    before = Backbone(str(copy)).load("feature_extractor")
    index = json.loads((copy / "model_index.json").read_text())
    del index["image_encoder"], index["feature_extractor"]
    (copy / "model_index.json").write_text(json.dumps(index))
    assert Backbone(str(copy)).load("image_encoder").config.projection_dim == EMBED
    shutil.rmtree(copy / "feature_extractor")
    after = Backbone(str(copy)).load("feature_extractor")  # made from the image encoder's side
    photo = torch.randint(0, 256, (3, 50, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(*(e(photo, return_tensors="pt").pixel_values for e in (before, after)))


def test_the_feature_extractor_name_that_sd15_was_saved_with_still_loads(copy):
    index = json.loads((copy / "model_index.json").read_text())
    index["feature_extractor"] = ["transformers", "CLIPFeatureExtractor"]
    (copy / "model_index.json").write_text(json.dumps(index))
    assert type(Backbone(str(copy)).load("feature_extractor")).__name__.startswith("CLIPImageProcessor")


def test_a_missing_component_is_named_with_its_folder_and_what_a_folder_needs(copy):
    shutil.rmtree(copy / "image_encoder")
    with pytest.raises(BackboneError, match=r"lacks the component 'image_encoder'.*unet/, vae/") as error:
        Backbone(str(copy)).load("image_encoder")
    assert str(copy) in str(error.value)
    with pytest.raises(BackboneError, match="lacks the component 'text_encoder_2'"):
        Backbone(str(copy)).load("text_encoder_2")
    with pytest.raises(BackboneError, match="no component 'refiner': choose one of unet"):
        Backbone(str(copy)).load("refiner")


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path):
    with pytest.raises(BackboneError, match=r"no readable model_index.json"):
        Backbone(str(tmp_path)).load("unet")


def test_pickled_and_truncated_weights_are_refused(copy):
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BackboneError, match="component 'unet'"):
        Backbone(str(copy)).load("unet")
    weights.unlink()
    torch.save({}, copy / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(BackboneError, match="component 'unet'"):
        Backbone(str(copy)).load("unet")


def test_classes_from_outside_diffusers_and_transformers_are_refused(copy):
    index = json.loads((copy / "model_index.json").read_text())
    index["unet"] = ["os", "PathLike"]
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(BackboneError, match=r"wants the class 'os.PathLike'"):
        Backbone(str(copy)).load("unet")


def test_fingerprint_follows_content_not_place(folder, copy):
    before = Backbone(str(folder)).fingerprint("unet")
    assert len(before) == 16
    assert Backbone(str(copy)).fingerprint("unet") == before != Backbone(str(copy)).fingerprint("vae")
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert Backbone(str(copy)).fingerprint("unet") != before
    config = copy / "vae" / "config.json"
    config.write_text(config.read_text().replace("0.18215", "0.2"))
    assert Backbone(str(copy)).fingerprint("vae") != Backbone(str(folder)).fingerprint("vae")
    with pytest.raises(BackboneError, match="lacks the component 'text_encoder_2'"):
        Backbone(str(copy)).fingerprint("text_encoder_2")


def test_fingerprint_of_a_hub_id_follows_the_commit_in_the_local_cache(monkeypatch):
    def cached(commit: str | None) -> str:
        path = commit and f"/cache/models--org--name/snapshots/{commit}/model_index.json"
        monkeypatch.setattr(components, "try_to_load_from_cache", lambda *_: path)
        monkeypatch.setattr(components, "_fetch", lambda *_: None)
        return Backbone("org/name").fingerprint("unet")

    assert len({cached("abc"), cached("def"), cached(None)}) == 3
    assert cached("abc") == cached("abc")


# ---- adapter: fresh ----


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


# ---- adapter: installed ----


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


def test_a_state_survives_install_and_read_out_and_makes_two_unets_equal(folder, unet):
    other, state = Backbone(str(folder)).load("unet"), shaken(unet)
    install_ip_adapter(unet, state)
    read = ip_adapter_state(unet)
    assert flat(read).keys() == flat(state).keys()
    assert all(torch.equal(tensor, flat(state)[key]) for key, tensor in flat(read).items())
    install_ip_adapter(other, read)
    assert torch.equal(eps(unet, photos()), eps(other, photos()))


def test_an_installed_adapter_shares_no_memory_with_the_state_it_came_from(unet):
    state = ip_adapter_from_text(unet, EMBED)
    before = {key: tensor.clone() for key, tensor in flat(state).items()}
    text = {key: tensor.clone() for key, tensor in text_kv(unet).items()}
    install_ip_adapter(unet, state)
    with torch.no_grad():
        for parameter in ip_adapter_parameters(unet).values():
            parameter.add_(1)
    assert all(torch.equal(tensor, before[key]) for key, tensor in flat(state).items())
    assert all(torch.equal(tensor, text[key]) for key, tensor in text_kv(unet).items())


def test_a_second_adapter_replaces_the_first(unet):
    install_ip_adapter(unet, shaken(unet, seed=1))
    install_ip_adapter(unet, shaken(unet, seed=2))
    assert all(torch.equal(t, flat(shaken(unet, seed=2))[k]) for k, t in flat(ip_adapter_state(unet)).items())
    assert sum(p.requires_grad for p in unet.parameters()) == 12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapter_weights_stay_float32_and_exact_in_a_half_precision_unet(folder, dtype):
    unet = Backbone(str(folder)).load("unet", dtype)
    state = shaken(unet)
    for _ in range(2):  # the second time, the UNet holds both precisions
        install_ip_adapter(unet, state)
        own = ip_adapter_parameters(unet)
        assert all(p.dtype == torch.float32 and torch.equal(p, flat(state)[key]) for key, p in own.items())
        assert {p.dtype for p in unet.parameters() if not p.requires_grad} == {dtype}


def test_a_half_precision_unet_runs_and_trains_its_adapter_in_autocast(folder):
    unet = Backbone(str(folder)).load("unet", torch.bfloat16)
    install_ip_adapter(unet, ip_adapter_from_text(unet, EMBED))
    with torch.autocast("cpu", torch.bfloat16):
        loss = unet(*inputs(), added_cond_kwargs={"image_embeds": [photos()]}).sample.float().square().mean()
    loss.backward()
    assert {p.grad.dtype for p in ip_adapter_parameters(unet).values() if p.grad is not None} == {torch.float32}
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in ip_adapter_parameters(unet).values())


def test_half_precision_weights_are_trained_in_float32(unet):
    state = {s: {k: v.half() for k, v in t.items()} for s, t in ip_adapter_from_text(unet, EMBED).items()}
    install_ip_adapter(unet, state)
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


def test_sd15_has_32_attention_layers_16_of_them_cross_with_19_17_million_k_v_weights():
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)  # diffusers' defaults are SD1.5's otherwise
    weights = text_kv(unet)
    assert (len(unet.attn_processors), len(weights)) == (32, 2 * 16)
    assert sorted({int(key.split(".")[1]) for key in weights}) == list(range(1, 32, 2))
    assert sum(w.numel() for w in weights.values()) == 19_169_280
    middle = unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2.to_k").weight
    assert weights["ip_adapter.31.to_k_ip.weight"] is middle  # the middle block comes last


# ---- adapter: refused ----


def test_an_adapter_for_another_image_encoder_names_both_widths(unet):
    with pytest.raises(BackboneError, match=r"'image_proj.proj.weight' has the shape \(128, 16\).*\(128, 24\)"):
        install_ip_adapter(unet, ip_adapter_from_text(unet, 16), embed_dim=EMBED)


def test_an_adapter_for_another_unet_names_both_widths_and_leaves_the_unet_as_it_was(unet):
    plain = eps(unet)
    with pytest.raises(BackboneError, match=r"has the shape .*text width 32.*needs"):
        install_ip_adapter(unet, ip_adapter_from_text(tiny_unet(cross_attention_dim=40), EMBED))
    assert torch.equal(eps(unet), plain)


def test_missing_and_surplus_weights_are_refused_by_name(unet):
    state = ip_adapter_from_text(unet, EMBED)
    del state["ip_adapter"]["7.to_v_ip.weight"]
    with pytest.raises(BackboneError, match=r"lacks 1 weights, such as 'ip_adapter.7.to_v_ip.weight'"):
        install_ip_adapter(unet, state)
    with pytest.raises(BackboneError, match=r"beyond what this UNet takes, 8 weights, such as 'ip_adapter.11"):
        install_ip_adapter(unet, ip_adapter_from_text(tiny_sdxl_unet(), EMBED))


@pytest.mark.parametrize("state", [{}, {"image_proj": {}}, {"image_proj": 1, "ip_adapter": 2}])
def test_a_state_without_its_sections_is_refused(unet, state):
    with pytest.raises(BackboneError, match="lacks the sections"):
        install_ip_adapter(unet, state)


def test_a_value_that_is_no_tensor_is_refused_by_name(unet):
    with pytest.raises(BackboneError, match=r"other than a tensor under 'proj.weight'"):
        install_ip_adapter(unet, {"image_proj": {"proj.weight": 3}, "ip_adapter": {}})


def test_reading_parameters_or_scaling_without_an_adapter_is_refused(unet):
    for use in (ip_adapter_parameters, ip_adapter_state, lambda u: set_ip_scale(u, 1.0)):
        with pytest.raises(BackboneError, match="install_ip_adapter first"):
            use(unet)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
def test_a_scale_that_is_not_finite_is_refused(unet, scale):
    with pytest.raises(ValueError, match=f"finite, got {scale}"):
        set_ip_scale(unet, scale)


# ---- adapter: files ----


def test_both_published_file_formats_give_the_same_state(folder, unet, tmp_path):
    state = ip_adapter_from_text(unet, EMBED)
    torch.save(state, tmp_path / "adapter.bin")
    path = Backbone(str(folder)).adapter_file()
    assert path == str(folder / "ip_adapter" / "ip_adapter.safetensors")
    for read in (read_ip_adapter(path), read_ip_adapter(str(tmp_path / "adapter.bin"))):
        assert flat(read).keys() == flat(state).keys()
        assert all(torch.equal(tensor, flat(state)[key]) for key, tensor in flat(read).items())


def test_further_sections_are_read_and_not_installed(unet, tmp_path):
    state = {**ip_adapter_from_text(unet, EMBED), "aggregator": {"to_q.weight": torch.eye(EMBED)}}
    save_file(flat(state), tmp_path / "adapter.safetensors")
    read = read_ip_adapter(str(tmp_path / "adapter.safetensors"))
    assert torch.equal(read["aggregator"]["to_q.weight"], torch.eye(EMBED))
    install_ip_adapter(unet, read)
    assert len(ip_adapter_parameters(unet)) == 12


class Malicious:
    def __reduce__(self):
        return os.mkdir, (os.environ["LIT_MULTIIP_TEST_TRAP"],)


def test_a_pickled_object_is_refused_by_name_and_does_not_run(tmp_path, monkeypatch):
    trap = tmp_path / "trap"
    monkeypatch.setenv("LIT_MULTIIP_TEST_TRAP", str(trap))
    torch.save({"image_proj": Malicious(), "ip_adapter": {}}, tmp_path / "adapter.bin")
    with pytest.raises(BackboneError, match=r"adapter.bin' holds the pickled object '\w+.mkdir'.*refused"):
        read_ip_adapter(str(tmp_path / "adapter.bin"))
    assert not trap.exists()


@pytest.mark.parametrize(
    ("keys", "family"),
    [
        (["image_proj.latents", "image_proj.proj_in.weight"], r"IP-Adapter Plus \(resampler\)"),
        (["image_proj.proj.0.weight", "image_proj.norm.weight"], "IP-Adapter FaceID:"),
        (["image_proj.proj.0.weight", "image_proj.perceiver_resampler.proj_in.weight"], "IP-Adapter FaceID Plus"),
        (["image_proj.proj.0.weight", "image_proj.proj.3.weight"], "IP-Adapter Full Face"),
        (["image_proj.proj.weight", "ip_adapter.0.to_q_lora.down.weight"], "IP-Adapter FaceID:"),
    ],
)
def test_other_adapter_families_are_refused_by_name(tmp_path, keys, family):
    tensors = {key: torch.zeros(1) for key in [*keys, "ip_adapter.1.to_k_ip.weight"]}
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(BackboneError, match=rf"other.safetensors' is an {family}"):
        read_ip_adapter(str(tmp_path / "other.safetensors"))


@pytest.mark.parametrize("name", ["broken.safetensors", "broken.bin"])
def test_broken_files_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"not weights")
    with pytest.raises(BackboneError, match=name):
        read_ip_adapter(str(tmp_path / name))


def test_missing_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(BackboneError, match=r"no IP-Adapter file .*gone.safetensors'"):
        read_ip_adapter(str(tmp_path / "gone.safetensors"))
    (tmp_path / "weights.ckpt").touch()
    with pytest.raises(BackboneError, match=r"neither .safetensors nor .bin"):
        read_ip_adapter(str(tmp_path / "weights.ckpt"))


def test_a_folder_without_an_adapter_has_none_and_one_with_two_must_be_told_which(copy):
    shutil.copy(copy / "ip_adapter" / "ip_adapter.safetensors", copy / "ip_adapter" / "second.safetensors")
    with pytest.raises(BackboneError, match=r"several adapters .*ip_adapter.safetensors, second.safetensors"):
        Backbone(str(copy)).adapter_file()
    shutil.rmtree(copy / "ip_adapter")
    assert Backbone(str(copy)).adapter_file() is None
    assert Backbone("org/name").adapter_file() is None


# ---- apart from the backbone ----


def test_an_image_encoder_apart_is_the_same_encoder_with_clips_preprocessing(folder, copy):
    apart = copy / "image_encoder"
    processor, encoder = Backbone("org/name", str(apart)).load_image_encoder()
    own_processor, own = Backbone(str(folder)).load_image_encoder()
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), encoder.parameters(), strict=True))
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert processor.crop_size == own_processor.crop_size
    assert (Backbone("org/name", str(apart)).embed_dim, processor.crop_size["height"]) == (EMBED, 32)
    with pytest.raises(BackboneError, match=r"image encoder '.*gone' is not an existing folder, nor a hub id"):
        Backbone(str(folder), str(folder / "gone")).load_image_encoder()
    with pytest.raises(BackboneError, match=r"image encoder '.*' has no readable config.json"):
        _ = Backbone(str(folder), str(folder)).embed_dim


def test_the_name_of_an_image_encoder_follows_its_content(folder, copy):
    apart = copy / "image_encoder"
    before = Backbone(str(folder), str(apart)).fingerprint_image_encoder()
    assert before == Backbone("org/name", str(apart)).fingerprint_image_encoder() and len(before) == 32
    assert before[:16] == Backbone(str(folder)).fingerprint("image_encoder")
    config = apart / "config.json"
    config.write_text(config.read_text().replace("}", " }"))
    assert Backbone(str(folder), str(apart)).fingerprint_image_encoder() != before


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("h94/IP-Adapter/models/image_encoder", ("h94/IP-Adapter", "models/image_encoder")),
        ("openai/clip-vit-large-patch14", ("openai/clip-vit-large-patch14", "")),
        ("/models/image_encoder", None),
        ("../models/image_encoder", None),
        ("encoder", None),
    ],
)
def test_hub_id_and_path_are_told_apart(name, place):
    assert components.hub_place(name) == place


def test_an_adapter_on_the_hub_is_fetched_or_the_message_says_what_was_wanted(folder, monkeypatch):
    wanted = "h94/IP-Adapter/models/ip-adapter_sd15.safetensors"
    asked = []

    def fetch(*place):
        asked.append(place)
        return Backbone(str(folder)).adapter_file()

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


@pytest.mark.parametrize(
    ("load", "wanted", "option"),
    [
        (lambda: Backbone("org/name").load("unet"), "'model_index.json' of the hub's 'org/name'", "--backbone.path"),
        (lambda: Backbone("org/name").image_side, "'unet/config.json' of the hub's 'org/name'", "--backbone.path"),
        (
            lambda: Backbone("org/name", "h94/IP-Adapter/models/image_encoder").embed_dim,
            "'models/image_encoder/config.json' of the hub's 'h94/IP-Adapter'",
            "--backbone.image_encoder",
        ),
    ],
)
def test_a_hub_that_cannot_be_reached_is_told_with_the_file_that_was_wanted_and_the_remedy(
    load, wanted, option, monkeypatch
):
    for name in ("huggingface_hub.constants.HF_HUB_OFFLINE", "transformers.utils.hub.is_offline_mode"):
        monkeypatch.setattr(name, True if name.endswith("OFFLINE") else lambda: True, raising=False)
    with pytest.raises(BackboneError) as error:
        load()
    text = str(error.value)
    assert wanted in text and "hf download" in text and f"give your copy, {option} <folder>" in text


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder", "image_encoder"])
def test_a_component_that_lacks_weights_is_refused(name: str, tiny_backbone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "backbone"
    shutil.copytree(tiny_backbone, folder)
    [file] = (folder / name).glob("*.safetensors")
    weights = load_file(file)
    lost = sorted(key for key in weights if key.endswith("weight"))[3]
    save_file({key: value for key, value in weights.items() if key != lost}, file, {"format": "pt"})
    with pytest.raises(BackboneError, match=f"'{name}'.*missing") as raised:
        Backbone(str(folder)).load(name)
    assert lost.rpartition(".")[0].rpartition(".")[2] in str(raised.value)


def test_the_miniatures_text_encoder_is_in_the_layout_that_all_versions_read() -> None:
    keys = load_file(Path(resolve_backbone("mini")) / "text_encoder" / "model.safetensors")
    assert all(key.startswith("text_model.") for key in keys)  # as of Stable Diffusion 1.5
