import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from lit_multiip import files
from lit_multiip.backbone import components
from lit_multiip.backbone.components import BackboneError, resolve_backbone
from lit_multiip.backbone.pipeline import Backbone

EMBED = 24
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny_backbone):
    return tiny_backbone


@pytest.fixture
def copy(folder, tmp_path):
    """A backbone to spoil."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def change_index(backbone: Path, **changes: list[str] | None) -> None:
    """Change entries of model_index.json, or take them out (None)."""
    index = json.loads((backbone / "model_index.json").read_text()) | changes
    (backbone / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if v is not None}))


def test_a_folder_and_a_hub_id_resolve_to_themselves(folder):
    for name in (str(folder), "stable-diffusion-v1-5/stable-diffusion-v1-5"):
        assert resolve_backbone(name) == resolve_backbone(resolve_backbone(name)) == name


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


def test_the_other_components_come_in_the_class_the_pipeline_names(copy):
    change_index(copy, feature_extractor=["transformers", "CLIPFeatureExtractor"])  # with which SD1.5 was saved
    for name, kind in (
        ("tokenizer", "CLIPTokenizer"),
        ("scheduler", "DDIMScheduler"),
        ("feature_extractor", "CLIPImageProcessor"),
    ):
        assert type(Backbone(str(copy)).load(name)).__name__.startswith(kind)


def test_image_encoder_and_feature_extractor_need_not_be_listed(copy):
    before = Backbone(str(copy)).load("feature_extractor")
    change_index(copy, image_encoder=None, feature_extractor=None)
    assert Backbone(str(copy)).load("image_encoder").config.projection_dim == EMBED
    shutil.rmtree(copy / "feature_extractor")
    after = Backbone(str(copy)).load("feature_extractor")  # made from the image encoder's side
    photo = torch.randint(0, 256, (3, 50, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(*(e(photo, return_tensors="pt").pixel_values for e in (before, after)))


def cut_weights(backbone: Path) -> None:
    (backbone / WEIGHTS).write_bytes((backbone / WEIGHTS).read_bytes()[:-1000])


def pickle_weights(backbone: Path) -> None:
    (backbone / WEIGHTS).unlink()
    torch.save({}, backbone / "unet" / "diffusion_pytorch_model.bin")


@pytest.mark.parametrize(
    ("spoil", "component", "message"),
    [
        (lambda f: shutil.rmtree(f / "image_encoder"), "image_encoder", "copy.* lacks the component .*unet/, vae/"),
        (lambda f: None, "text_encoder_2", "lacks the component 'text_encoder_2'"),
        (lambda f: None, "refiner", "no component 'refiner': choose one of unet"),
        (lambda f: (f / "model_index.json").unlink(), "unet", "no readable model_index.json"),
        (cut_weights, "unet", "component 'unet'"),
        (pickle_weights, "unet", "component 'unet'"),
        (lambda f: change_index(f, unet=["os", "PathLike"]), "unet", "wants the class 'os.PathLike'"),
    ],
)
def test_a_component_that_is_missing_broken_or_foreign_is_named(spoil, component, message, copy):
    spoil(copy)
    with pytest.raises(BackboneError, match=message):
        Backbone(str(copy)).load(component)


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder", "image_encoder"])
def test_a_component_that_lacks_weights_is_refused(name, copy):
    [file] = (copy / name).glob("*.safetensors")
    weights = load_file(file)
    lost = sorted(key for key in weights if key.endswith("weight"))[3]
    save_file({key: value for key, value in weights.items() if key != lost}, file, {"format": "pt"})
    with pytest.raises(BackboneError, match=f"'{name}'.*missing.*{lost.rpartition('.')[0].rpartition('.')[2]}"):
        Backbone(str(copy)).load(name)


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
    def cached(commit):
        path = commit and f"/cache/models--org--name/snapshots/{commit}/model_index.json"
        monkeypatch.setattr(components, "try_to_load_from_cache", lambda *_: path)
        monkeypatch.setattr(components, "_fetch", lambda *_: None)
        return Backbone("org/name").fingerprint("unet")

    assert len({cached("abc"), cached("def"), cached(None)}) == 3
    assert cached("abc") == cached("abc")


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


def test_the_miniatures_text_encoder_is_in_the_layout_that_all_versions_read():
    keys = load_file(Path(resolve_backbone("mini")) / "text_encoder" / "model.safetensors")
    assert all(key.startswith("text_model.") for key in keys)  # as of Stable Diffusion 1.5
