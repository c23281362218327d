"""Plus, Plus-Face, Full Face, FaceID and FaceID Plus v2: in as published, several photos through them, out again."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from onnx_file import write_pooling
from published import Published, attention_weights, projection
from safetensors.torch import save_file
from torch import Tensor

from lit_multiip.backbone.components import BackboneError
from lit_multiip.backbone.faces import FaceEncoder
from lit_multiip.backbone.features import Features
from lit_multiip.backbone.ip_adapter import (
    install_ip_adapter,
    ip_adapter_parameters,
    ip_adapter_state,
    read_ip_adapter,
    text_kv,
)
from lit_multiip.backbone.layouts import LAYOUTS, find_layout, join_kv
from lit_multiip.backbone.lora import lora_parameters
from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.backbone.sampler import Sampling
from lit_multiip.data.people import MiniFaces
from lit_multiip.datamodule import MultiPhotoData
from lit_multiip.datasets import Request, TaskDataset
from lit_multiip.export.card import record_of
from lit_multiip.export.weights import adapter_tensors, write_adapter
from lit_multiip.methods.adapter import MultiIPAdapter
from lit_multiip.methods.aggregators import AvgPool, Concat, First, SelfAttention
from lit_multiip.pixels import square, to_signal, to_tensor

pytest.importorskip("onnxruntime")
pytest.importorskip("peft")
PUBLISHED = ["plus", "full_face", "faceid", "faceid_plus_v2"]  # Plus-Face is Plus of photos that are cut to the face
FACE, TOKENS, CONTEXT, PLACES = 48, 32, 32, 17  # E, H, width of the text states and T of the tiny backbone
FIXTURES = {"sd": "tiny_backbone", "sdxl": "tiny_sdxl"}
PHOTOS = list(MiniFaces(train=1, validation=1, test=1, photos=9).people()[0].photos)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return str(write_pooling(tmp_path_factory.mktemp("onnx") / "faces.onnx", side=64))


def published(layout: str, unet: UNet2DConditionModel, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """The sections of a file as published, of random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        project = projection(layout, unet.config.cross_attention_dim, FACE, TOKENS)
        attention = attention_weights(unet, "faceid" in layout)
    return {"image_proj": dict(project.state_dict()), "ip_adapter": attention}


def flat(state: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{section}.{name}": value for section, values in state.items() for name, value in values.items()}


def backbone(folder: Path, kind: str, network: str, **options: Any) -> Backbone:
    """With the face network that a layout takes; the layout itself is told by an option, or by the adapter's file."""
    face = FaceEncoder(network, beside_clip=kind == "faceid_plus_v2", detector=None) if "faceid" in kind else None
    return Backbone(str(folder), face_encoder=face, **options)


def built(folder: Path, layout: str, network: str, file: Path | None = None, **options: Any) -> MultiIPAdapter:
    own = {"published_adapter": str(file)} if file else {"layout": layout}
    model = MultiIPAdapter(backbone(folder, layout, network, **own), **options)
    model.configure_model()
    model.log = lambda *_, **__: None  # type: ignore[method-assign]
    model._trainer = None
    return model.eval()


def references(model: MultiIPAdapter, batch: int = 2, photos: int = 9, seed: int = 0) -> Tensor:
    width = model.aggregator.dim
    shape = (PLACES, width) if model.backbone.layout.kinds == ("tokens",) else (width,)
    return torch.randn(batch, photos, *shape, generator=torch.Generator().manual_seed(seed))


# ---- in and out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("layout", PUBLISHED)
def test_a_published_file_is_recognised_and_goes_out_bit_for_bit(layout, kind, network, request, tmp_path):
    folder = request.getfixturevalue(FIXTURES[kind])
    state = published(layout, Backbone(str(folder)).load("unet"))
    halves = {section: {k: v.half() for k, v in values.items()} for section, values in state.items()}
    if kind == "sd":
        torch.save(halves, file := tmp_path / "ip-adapter.bin")
    else:
        save_file(flat(halves), file := tmp_path / "ip-adapter.safetensors")
    model = built(folder, layout, network, file, aggregator=First)
    assert model.backbone.layout.name == layout and not model.adapter_is_random
    out = adapter_tensors(model, torch.float16)
    assert out.keys() == flat(halves).keys()
    assert all(torch.equal(out[key], value) for key, value in flat(halves).items())
    again = ip_adapter_state(model.unet)
    assert all(torch.equal(value.half(), flat(halves)[key]) for key, value in flat(again).items())
    trained = {id(p) for p in model.trained_parameters().values()}
    assert trained == {id(p) for p in ip_adapter_parameters(model.unet).values()}  # LoRA too, and First has no weights


def test_another_adapter_in_its_place_leaves_nothing_of_the_first(tiny_backbone):
    unet = Backbone(str(tiny_backbone)).load("unet")
    plain = read_ip_adapter(str(tiny_backbone / "ip_adapter" / "ip_adapter.safetensors"))
    install_ip_adapter(unet, published("faceid_plus_v2", unet))
    assert len(lora_parameters(unet)) == 8 * 4 * 2  # of 8 layers, and none of the resampler's
    for state in (plain, published("faceid", Backbone(str(tiny_backbone)).load("unet"))):
        install_ip_adapter(unet, state)
        assert all(torch.equal(value, flat(state)[key]) for key, value in flat(ip_adapter_state(unet)).items())
        assert bool(lora_parameters(unet)) == (state is not plain)


@pytest.mark.parametrize("layout", PUBLISHED)
def test_plain_diffusers_draws_the_same_from_what_is_exported(layout, network, tiny_backbone, tmp_path):
    """With a person's file, negatives and, of FaceID Plus, patch tokens included."""
    torch.save(published(layout, Backbone(str(tiny_backbone)).load("unet")), tmp_path / "adapter.bin")
    options: dict[str, Any] = {"aggregator": SelfAttention, "sampling": Sampling(steps=2, guidance_scale=3.0)}
    model = built(tiny_backbone, layout, network, tmp_path / "adapter.bin", **options)
    (tmp_path / "out").mkdir()
    record = record_of(model, MultiPhotoData(model.backbone, references=3), 1, "run", "float32")
    written = write_adapter(model, record, tmp_path / "out", {}, {"Ann": PHOTOS[:3]})
    assert written.difference <= 1
    assert ("clip_embeds" in written.lines) == (layout == "faceid_plus_v2")
    assert not list((tmp_path / "out").glob("pytorch_lora*"))  # FaceID's LoRA is in the adapter's file

    again = MultiIPAdapter(
        backbone(tiny_backbone, layout, network, layout=layout), ip_adapter=str(next((tmp_path / "out").glob("ip-*")))
    )
    again.configure_model()
    pairs = zip(
        adapter_tensors(model, torch.float32).items(), adapter_tensors(again, torch.float32).items(), strict=True
    )
    assert all(ours == theirs and torch.equal(a, b) for (ours, a), (theirs, b) in pairs)


# ---- the published training step --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "kind"), [*((layout, "sd") for layout in PUBLISHED), ("plus", "sdxl"), ("faceid", "sdxl")]
)
def test_the_loss_and_its_gradient_are_those_of_the_published_training_step(layout, kind, network, request, tmp_path):
    """One batch of photos, noise and timesteps; relative 1e-3 and 1e-2, as features are kept in 16 bits."""
    folder = request.getfixturevalue(FIXTURES[kind])
    torch.save(state := published(layout, Backbone(str(folder)).load("unet")), tmp_path / "adapter.bin")
    model = built(folder, layout, network, tmp_path / "adapter.bin", aggregator=First, snr_gamma=None)
    options: dict[str, Any] = {"references": 1, "target": "reference", "drop": (0.4, 0.1, 0.1), "batch_size": 6}
    source = MiniFaces(train=3, validation=2, test=2, photos=11)
    data = MultiPhotoData(model.backbone, source, cache_dir=str(tmp_path), **options)
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    batch, keys = next(iter(loader)), list(loader.sampler)[:6]
    dropped = batch["drop_image"]
    assert dropped.any() and not dropped.all()
    loss = model.training_step(batch, 0)
    loss.backward()

    # photos in, and every encoder of photos is run; a dropped photo is an input of zeros, a dropped face zeros
    own, photos = Backbone(str(folder)), [loader.dataset.draw(*key)[0] for key in keys]
    with torch.no_grad():
        processor, encoder = own.load_image_encoder()
        pixels = processor([photo.image() for photo in photos], return_tensors="pt").pixel_values
        pixels = torch.where(dropped[:, None, None, None], torch.zeros_like(pixels), pixels)
        tokens = encoder(pixels, output_hidden_states=True).hidden_states[-2]
        faces = FaceEncoder(network, detector=None).load().embed(to_tensor([photo.image() for photo in photos]))
        faces = torch.where(dropped[:, None], torch.zeros_like(faces), faces)
        posterior = (
            own.load("vae").encode(to_signal(to_tensor(square(photo.image(), 32) for photo in photos))).latent_dist
        )
        latents = (posterior.mean + posterior.std * batch["latent_noise"]) * own.scaling_factor
    assert not faces.numel() or torch.allclose(
        faces[~dropped].norm(dim=1), torch.ones(int((~dropped).sum())), atol=1e-5
    )
    taken = {"tokens": tokens, "face": faces}
    project = projection(layout, CONTEXT, FACE, TOKENS)
    project.load_state_dict(state["image_proj"])
    count = find_layout(layout).tokens or PLACES
    theirs = Published(own.load("unet"), project, state["ip_adapter"], count)
    t = (batch["time"] * 1000).long()
    noisy = DDPMScheduler.from_config(own.load("scheduler").config).add_noise(latents, batch["eps"], t)
    added = {k: v for k, v in batch["text"].items() if k != "prompt_embeds"}
    added |= {"text_embeds": added.pop("pooled_prompt_embeds")} if added else {}
    predicted = theirs(
        noisy, t, batch["text"]["prompt_embeds"], *(taken[k] for k in find_layout(layout).kinds), added=added or None
    )
    expected = F.mse_loss(predicted, batch["eps"])
    expected.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    gradients = join_kv({name: p.grad for name, p in ip_adapter_parameters(model.unet).items()})  # type: ignore[misc]
    assert gradients.keys() == theirs.gradients().keys()
    flat_ours, flat_theirs = (
        torch.cat([found[name].flatten() for name in sorted(gradients)]) for found in (gradients, theirs.gradients())
    )
    assert float(flat_ours.norm()) == pytest.approx(float(flat_theirs.norm()), rel=1e-2)
    assert F.cosine_similarity(flat_ours, flat_theirs, dim=0) > 0.999


# ---- several photos ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", PUBLISHED)
def test_the_order_of_nine_photos_changes_nothing_and_their_number_and_contents_do(
    layout, network, tiny_backbone, tmp_path
):
    torch.save(published(layout, Backbone(str(tiny_backbone)).load("unet")), tmp_path / "adapter.bin")
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    g = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 8, 8, generator=g), {"prompt_embeds": torch.randn(2, 16, 32, generator=g)}
    for aggregator in (Concat, AvgPool, SelfAttention):
        model = built(tiny_backbone, layout, network, tmp_path / "adapter.bin", aggregator=aggregator)

        def eps(photos: Tensor, model: MultiIPAdapter = model) -> Tensor:
            with torch.no_grad():
                return model.backbone.predict(model.unet, x, torch.tensor([500, 20]), text, model.condition(photos))

        nine = references(model)
        assert (eps(nine) - eps(nine[:, order])).abs().max() < 1e-5
        assert min((eps(nine) - eps(other)).abs().max() for other in (nine[:, :1], references(model, seed=3))) > 1e-3
        equal = nine[:, :1].expand_as(nine)
        assert (eps(equal) - eps(nine[:, :1])).abs().max() < 1e-4


@pytest.mark.parametrize("layout", PUBLISHED)
def test_from_the_text_k_and_v_it_trains_on_several_photos_and_a_checkpoint_brings_it_back(
    layout, network, tiny_backbone, tmp_path
):
    model = built(tiny_backbone, layout, network, aggregator=SelfAttention)
    kv = text_kv(model.unet)
    assert model.adapter_is_random and all(torch.equal(ip_adapter_parameters(model.unet)[key], kv[key]) for key in kv)
    assert model.lora_rank == (128 if "faceid" in layout else None)
    source = MiniFaces(train=3, validation=2, test=2, photos=11)
    data = MultiPhotoData(model.backbone, source, cache_dir=str(tmp_path), batch_size=2, references=3)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    optimizer = torch.optim.AdamW(model.trained_parameters().values(), lr=1e-2)
    for _ in range(2):  # the second step moves LoRA's A, whose B starts at zero
        optimizer.zero_grad()
        model.training_step(batch, 0).backward()
        optimizer.step()
    gradients = {name: p.grad for name, p in model.trained_parameters().items()}
    assert all(grad is not None and grad.isfinite().all() and grad.any() for grad in gradients.values())

    checkpoint: dict[str, Any] = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    again = built(tiny_backbone, layout, network, aggregator=SelfAttention)
    again.on_load_checkpoint(checkpoint)
    again.load_state_dict(checkpoint["state_dict"], strict=False)
    tasks = next(iter(data.val_dataloader()))
    with torch.no_grad():
        one, two = (each.generate(tasks) for each in (model, again))
        none = model.generate(tasks, "none")
        start = built(tiny_backbone, layout, network).generate(tasks, "none")
    assert torch.equal(one, two) and not torch.equal(one, none)
    assert torch.equal(none, start)  # LoRA off: the plain backbone
    plain = MultiIPAdapter(Backbone(str(tiny_backbone)))
    plain.configure_model()
    with pytest.raises(Exception, match="the checkpoint is of another"):
        plain.on_load_checkpoint(checkpoint)


def test_features_are_the_penultimate_tokens_and_faces_of_norm_one(network, tiny_backbone, tmp_path):
    own = backbone(tiny_backbone, "faceid_plus_v2", network, layout="faceid_plus_v2")
    features = Features(own, tmp_path)
    features.build(PHOTOS[:2], PHOTOS[:1], ["a"])
    assert own.photo_shapes() == {"face": (FACE,), "tokens": (PLACES, TOKENS)}
    assert {kind: features.row_bytes()[kind] for kind in own.layout.kinds} == {"face": 4 * FACE, "tokens": 2 * 17 * 32}
    processor, encoder = own.load_image_encoder()
    pixels = processor([photo.image() for photo in PHOTOS[:2]], return_tensors="pt").pixel_values
    with torch.no_grad():
        tokens, zeros = (
            encoder(x, output_hidden_states=True).hidden_states[-2] for x in (pixels, torch.zeros_like(pixels[:1]))
        )
    rows, blank = features.embeds(PHOTOS[:2]), features.blank()
    assert torch.allclose(rows[:, FACE:].unflatten(1, (PLACES, TOKENS)), tokens, atol=5e-3)
    assert torch.allclose(rows[:, :FACE].norm(dim=1), torch.ones(2), atol=1e-5)
    assert blank is not None and not blank[:FACE].any() and torch.allclose(blank[FACE:], zeros.flatten(), atol=5e-3)
    item = TaskDataset([Request("Ann", tuple(PHOTOS[:2]), "a", 0)], features)[0]
    assert torch.equal(item["references"], rows) and torch.equal(item["blank"], blank)
    # Plus reads the same tokens, and an adapter of embeddings has no row for no photo
    plus = Features(Backbone(str(tiny_backbone), layout="plus"), tmp_path)
    assert torch.equal(plus.embeds(PHOTOS[:2]).flatten(1), rows[:, FACE:])
    assert Features(Backbone(str(tiny_backbone)), tmp_path).blank() is None


# ---- the real sizes ---------------------------------------------------------------------------------------------

SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


SD15 = {"cross_attention_dim": 768}
WIDTHS = {"face": 512, "tokens": 1280}  # of w600k_r50 and ViT-H


@pytest.mark.parametrize(
    ("layout", "unet", "count", "size"),  # weights by the published classes; bytes of the published file, 2 a weight
    [
        ("plus", SD15, 49_087_488, 98_183_288),  # ip-adapter-plus_sd15, and -plus-face_sd15, .safetensors
        ("plus", SDXL, 423_748_864, 847_517_512),  # ip-adapter-plus_sdxl_vit-h, and -plus-face_sdxl_vit-h, .safetensors
        ("full_face", SD15, 21_794_304, 43_592_352),  # ip-adapter-full-face_sd15.safetensors
        ("faceid", SD15, 48_354_816, 96_740_574),  # ip-adapter-faceid_sd15.bin
        ("faceid", SDXL, 535_507_968, None),  # ip-adapter-faceid_sdxl.bin, listed as 1.07 GB
        ("faceid_plus_v2", SD15, 78_260_736, 156_558_509),  # ip-adapter-faceid-plusv2_sd15.bin
        ("faceid_plus_v2", SDXL, 743_707_648, 1_487_555_181),  # ip-adapter-faceid-plusv2_sdxl.bin
    ],
)
def test_the_real_sizes_have_as_many_weights_as_the_published_files(layout, unet, count, size):
    with torch.device("meta"):
        real, found = UNet2DConditionModel(**unet), find_layout(layout)
        project = found.build(real.config.cross_attention_dim, [WIDTHS[kind] for kind in found.kinds])
    shapes = [p.shape for p in project.parameters()] + [w.shape for w in text_kv(real).values()]
    if found.lora:
        for name in real.attn_processors:
            attn: Any = real.get_submodule(name.removesuffix(".processor"))
            for layer in (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0]):
                shapes += [torch.Size([128, layer.in_features]), torch.Size([layer.out_features, 128])]
    assert sum(shape.numel() for shape in shapes) == count
    if size is None:
        assert round(2 * count / 1e9, 2) == 1.07
    else:  # the rest are names and places of the tensors
        assert 0 < size - 2 * count < 400 * len(shapes)


@pytest.mark.parametrize("context", [768, 2048], ids=["sd15", "sdxl"])
@pytest.mark.parametrize("layout", PUBLISHED)
def test_a_projection_has_the_published_weights_at_the_real_sizes_by_name_and_shape(layout, context):
    found = find_layout(layout)
    with torch.device("meta"):
        ours = found.build(context, [WIDTHS[kind] for kind in found.kinds])
        theirs = projection(layout, context, WIDTHS["face"], WIDTHS["tokens"])
    named = {f"image_proj.{found.publish_name(name)}": weight for name, weight in ours.named_parameters()}
    shapes = {name: weight.shape for name, weight in join_kv(named).items()}
    assert shapes == {f"image_proj.{name}": weight.shape for name, weight in theirs.named_parameters()}


def test_each_layout_is_listed_with_a_weight_that_tells_it_apart(tiny_backbone):
    unet = Backbone(str(tiny_backbone)).load("unet")
    for layout in LAYOUTS[1:]:
        keys = published(layout.name, unet)["image_proj"].keys()
        assert next(each.name for each in LAYOUTS if each.key in keys) == layout.name


# ---- refused ----------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_in_one_sentence_before_a_photo_is_encoded(network, tiny_backbone, tmp_path):
    unet = Backbone(str(tiny_backbone)).load("unet")
    files = {}
    for layout in PUBLISHED:
        save_file(flat(published(layout, unet)), file := tmp_path / f"{layout}.safetensors")
        files[layout] = str(file)
    bare = {k: v for k, v in flat(published("faceid", unet)).items() if "_lora." not in k}
    save_file(bare, tmp_path / "bare.safetensors")
    wide = published("plus", unet) | {"image_proj": dict(projection("plus", CONTEXT, FACE, 40).state_dict())}
    save_file(flat(wide), tmp_path / "wide.safetensors")
    save_file(flat(published("faceid_plus_v2", unet)), tmp_path / "ip-adapter-faceid-plus_sd15.safetensors")
    other = str(write_pooling(tmp_path / "other.onnx", side=32))

    def refused(message: str, own: Backbone, **options: Any) -> None:
        with pytest.raises(BackboneError, match=message) as found:
            MultiIPAdapter(own, **options).configure_callbacks()
        assert "\n" not in str(found.value)

    def own(kind: str, net: str = network, **options: Any) -> Backbone:
        return backbone(tiny_backbone, kind, net, **options)

    refused(
        "without its LoRA.*give the published .bin", own("faceid", published_adapter=str(tmp_path / "bare.safetensors"))
    )
    refused(
        "takes patch tokens of width 40, and this backbone's have 32: set backbone.image_encoder",
        own("plus", published_adapter=str(tmp_path / "wide.safetensors")),
    )
    refused(
        "takes face embeddings of width 48, and this backbone's have 12: set backbone.face_encoder.path",
        own("faceid", other, published_adapter=files["faceid"]),
    )
    refused(
        "is IP-Adapter Plus, and photos are encoded for IP-Adapter: set backbone.layout=plus",
        Backbone(str(tiny_backbone)),
        ip_adapter=files["plus"],
    )
    for layout, beside in (("faceid", "false"), ("faceid_plus_v2", "true")):
        refused(
            rf"set backbone.face_encoder.path, and backbone.face_encoder.beside_clip to {beside}",
            Backbone(str(tiny_backbone), published_adapter=files[layout]),
        )
    refused("patch tokens of CLIP alone: leave backbone.face_encoder out", own("faceid", layout="plus"))
    version_1 = str(tmp_path / "ip-adapter-faceid-plus_sd15.safetensors")
    refused(
        "FaceID Plus of version 1.*'ip-adapter-faceid-plusv2_sd15.safetensors'",
        own("faceid_plus_v2", published_adapter=version_1),
    )
    with pytest.raises(BackboneError, match=r"backbone.layout is 'pluss': choose one of plain, full_face"):
        Backbone(layout="pluss")
    with pytest.raises(BackboneError, match=r"has LoRA of rank 4, and model.lora_rank is 8: leave model.lora_rank out"):
        built(tiny_backbone, "faceid", network, Path(files["faceid"]), lora_rank=8)
