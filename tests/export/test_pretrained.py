"""Exported files come back by themselves: the adapter's layout, what photos are to it, aggregator, LoRA and data."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx_file import write_pooling
from PIL import Image
from run_folder import write_run

from lit_multiip import Backbone, Personalizer
from lit_multiip.backbone.faces import FaceEncoder
from lit_multiip.export.card import RECORD_FILE
from lit_multiip.files import LitMultiIPError
from lit_multiip.methods.adapter import MultiIPAdapter
from lit_multiip.methods.aggregators import OfKinds, SelfAttention

pytest.importorskip("onnxruntime")
pytest.importorskip("peft")
LAYOUTS = ["plain", "plus", "full_face", "faceid", "faceid_plus_v2"]
PROMPT = "a photo of a person"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a face network and four photos of a person."""
    folder = tmp_path_factory.mktemp("back")
    write_pooling(folder / "faces.onnx", side=64)
    (folder / "ann").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 5, 3), dtype=np.uint8)
    for number, photo in enumerate(pixels):
        Image.fromarray(photo).resize((40, 40)).save(folder / "ann" / f"{number}.png")
    return folder


def run_of(layout: str, work: Path, backbone: Path, lora_rank: int | None = None) -> Personalizer:
    """A run of that layout, with options that are not the defaults, loaded."""
    face = {"path": str(work / "faces.onnx"), "detector": None, "beside_clip": layout == "faceid_plus_v2"}
    parts = {"path": str(backbone), "layout": layout, "face_encoder": face if "faceid" in layout else None}
    attention = {"heads": 2, "pool": "mean", "attend": layout != "plus"}  # attend is in no text of its settings
    options = {"sampling": {"steps": 2, "guidance_scale": 3.0}, "lora_rank": lora_rank}
    aggregator = {"class_path": "SelfAttention", "init_args": attention}
    config: dict[str, Any] = {
        "backbone": {"class_path": "Backbone", "init_args": parts},
        "model": {"class_path": "MultiIPAdapter", "init_args": options | {"aggregator": aggregator}},
        "data": {"references": 2, "seed": 5, "crop": {"share": 0.6}},
    }
    own = Backbone(str(backbone), layout=layout, face_encoder=parts["face_encoder"] and FaceEncoder(**face))
    model = MultiIPAdapter(own, partial(SelfAttention, **attention), lora_rank=lora_rank)
    model.configure_model()
    folder = work / "runs" / f"{layout}{lora_rank}" / "version_0"
    shutil.rmtree(folder, ignore_errors=True)
    return Personalizer.from_pretrained(write_run(folder, model, config), cache_dir=work / "features")


@pytest.mark.parametrize(("layout", "lora_rank"), [*((layout, None) for layout in LAYOUTS), ("plus", 2)])
def test_every_layout_comes_back_and_draws_what_its_run_draws(layout, lora_rank, work, tiny_backbone, tmp_path):
    me = run_of(layout, work, tiny_backbone, lora_rank).with_photos(work / "ann")
    images = me(PROMPT, seeds=[0, 1])
    me.save(tmp_path / "out")
    text = (tmp_path / "out" / RECORD_FILE).read_text()
    assert str(work) not in text and str(tiny_backbone) not in text  # of folders the names alone

    if "faceid" in layout:
        shutil.copy(work / "faces.onnx", tmp_path / "out")
    again = Personalizer.from_pretrained(tmp_path / "out", backbone=Backbone(str(tiny_backbone)))
    again = again.with_photos(work / "ann")
    model, own = again.model, me.model
    assert model.backbone.layout is own.backbone.layout and model.backbone.photo_shapes() == own.backbone.photo_shapes()
    assert model.settings() == own.settings() and isinstance(model.aggregator, OfKinds) == (layout == "faceid_plus_v2")
    assert model.lora_rank == own.lora_rank == (128 if "faceid" in layout else lora_rank)
    weights = own.trained_parameters()
    assert all(torch.equal(weights[name], value) for name, value in model.trained_parameters().items())
    assert [photo.content_key() for photo in again.references] == [photo.content_key() for photo in me.references]
    assert torch.equal(again.image_embeds[0], me.image_embeds[0])
    redrawn = again(PROMPT, seeds=[0, 1])
    apart = [np.abs(np.asarray(a, int) - np.asarray(b, int)).max() for a, b in zip(images, redrawn, strict=True)]
    assert max(apart) <= 1
    # and out and back once more
    again.save(tmp_path / "twice")
    one, two = (json.loads((tmp_path / name / RECORD_FILE).read_text())["build"] for name in ("out", "twice"))
    assert one == two


def test_plain_diffusers_draws_from_the_pipeline_and_embeddings_of_patch_tokens(work, tiny_backbone):
    """Their negatives are patch tokens of no photo, not zeros."""
    me = run_of("plus", work, tiny_backbone).with_photos(work / "ann")
    [image], [embeds] = me(PROMPT, seeds=3), me.image_embeds
    assert embeds.shape == (2, 1, 17, 32) and embeds[0].abs().max() > 0
    pipe, generator = me.to_pipeline(), torch.Generator().manual_seed(3)
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "generator": generator}
    [plain] = pipe(PROMPT, ip_adapter_image_embeds=[embeds], **options).images
    assert np.abs(np.asarray(image, int) - np.asarray(plain, int)).max() <= 1


def test_what_is_missing_or_another_is_named_with_the_remedy(work, tiny_backbone, tmp_path):
    out, own = tmp_path / "out", Backbone(str(tiny_backbone))
    run_of("faceid", work, tiny_backbone).save(out)

    def refused(words: str, **options: Any) -> None:
        with pytest.raises(LitMultiIPError, match=words) as error:
            Personalizer.from_pretrained(out, **{"backbone": own, **options})
        assert "\n" not in str(error.value)

    refused("exported for a backbone of another folder", backbone=None)
    refused(rf"needs the face network 'faces.onnx', which is not here: copy its file to '{out / 'faces.onnx'}'")
    elsewhere = FaceEncoder(str(work / "faces.onnx"), detector=None)
    given = Backbone(str(tiny_backbone), face_encoder=elsewhere)
    assert Personalizer.from_pretrained(out, backbone=given).model.backbone.face_encoder is elsewhere
    write_pooling(out / "faces.onnx", side=64, batch=1)  # as wide, and another
    refused("was exported for another image encoder, faces.onnx, than this one: give the one it was trained with")

    record = json.loads((out / RECORD_FILE).read_text())
    shutil.copy(work / "faces.onnx", out)
    record["build"]["aggregator"] = None
    (out / RECORD_FILE).write_text(json.dumps(record))
    refused("does not say how its aggregator is made, as a function made it: give it, aggregator=")
    refused(r"was trained with SelfAttention\(.*pool=mean", aggregator=SelfAttention)
    given = partial(SelfAttention, heads=2, pool="mean")
    assert Personalizer.from_pretrained(out, backbone=own, aggregator=given).model.aggregator.heads == 2
    del record["build"]
    (out / RECORD_FILE).write_text(json.dumps(record))
    refused("was exported by a version that recorded too little: export its run again")
