"""Face-recognition networks in CLIP's place, or beside it; and that none scores its own work."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from commands import config_args, refusal
from onnx_file import write_pooling
from resuming import write_config

from lit_multiip.backbone import faces
from lit_multiip.backbone.components import BackboneError
from lit_multiip.backbone.encoders import PhotoEncoder, replace_missing
from lit_multiip.backbone.faces import TEMPLATE, FaceEncoder, FaceNetwork
from lit_multiip.backbone.features import Features
from lit_multiip.backbone.ip_adapter import read_ip_adapter
from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.data.people import MiniFaces, Person
from lit_multiip.datasets import HeldOutGroups, Request, TaskDataset
from lit_multiip.evaluation.extractors import refuse_conditioning_network
from lit_multiip.evaluation.faces import FaceRecognition
from lit_multiip.methods.adapter import MultiIPAdapter
from lit_multiip.methods.aggregators import AvgPool, MaxPool
from lit_multiip.pixels import to_tensor
from lit_multiip.runs import CheckpointError

pytest.importorskip("onnxruntime")
PHOTOS = list(MiniFaces(train=1, validation=1, test=1, photos=4).people()[0].photos)
E = 3 * 4 * 4  # width of the network's embeddings


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return str(write_pooling(tmp_path_factory.mktemp("onnx") / "faces.onnx", side=64))


def built(backbone: Path, face: FaceEncoder | None, **options: Any) -> MultiIPAdapter:
    image_encoder = options.pop("image_encoder", None)
    model = MultiIPAdapter(Backbone(str(backbone), image_encoder, face_encoder=face), **options)
    model.configure_model()
    return model


def test_it_stands_in_clips_place_or_beside_it(tiny_backbone, network):
    alone, joined = (FaceEncoder(network, beside, detector=None) for beside in (False, True))
    clip = PhotoEncoder(Backbone(str(tiny_backbone)))(PHOTOS)
    face, both = (PhotoEncoder(Backbone(str(tiny_backbone), face_encoder=each))(PHOTOS) for each in (alone, joined))
    assert (clip.shape, face.shape, both.shape) == ((4, 24), (4, E), (4, 24 + E))
    assert torch.equal(both, torch.cat([clip, face], dim=1))
    widths = [Backbone(str(tiny_backbone), face_encoder=each).embed_dim for each in (None, alone, joined)]
    assert widths == [24, E, 24 + E]
    expected = (
        FaceRecognition(network, mean=(0.5,) * 3, std=(0.5,) * 3).extract(to_tensor([PHOTOS[2].image()])).embedding
    )
    assert torch.allclose(face[2], expected[0] * E**0.5, atol=1e-5)
    assert torch.allclose(face.square().mean(dim=1), torch.ones(4), atol=1e-5)


@pytest.mark.parametrize("beside_clip", [False, True])
def test_a_photo_without_a_face_is_missing(beside_clip, tiny_backbone, network, tmp_path, monkeypatch, caplog):
    embed, blank = FaceNetwork.embed, [to_tensor([PHOTOS[index].image()]) for index in (1, 2)]

    def blind(self, images):
        found = embed(self, images)
        return found * float("nan") if any(torch.equal(images, picture) for picture in blank) else found

    monkeypatch.setattr(FaceNetwork, "embed", blind)
    face = FaceEncoder(network, beside_clip, detector=None)
    features = Features(Backbone(str(tiny_backbone), face_encoder=face), tmp_path)
    with caplog.at_level("WARNING", "lit_multiip"):
        features.build(PHOTOS, PHOTOS, ["a", *{photo.prompt for photo in PHOTOS}])
    told = [record.getMessage() for record in caplog.records if "no face is found" in record.getMessage()]
    assert len(told) == 2 and PHOTOS[1].name in told[0]
    stored = features.embeds(PHOTOS)
    assert stored[[1, 2]].isnan().all() and stored[[0, 3]].isfinite().all()

    # photos with a face take its place, in training groups, tasks and by hand alike
    expected = stored[[0, 0, 3, 3]]
    task = TaskDataset([Request(PHOTOS[0].person, tuple(PHOTOS), "a", 0)], features)[0]["references"]
    assert torch.equal(task, expected) and torch.equal(PhotoEncoder(features.backbone)(PHOTOS), expected)
    groups = HeldOutGroups([Person(PHOTOS[0].person, tuple(PHOTOS), None)], features, references=3)
    for index in range(4):
        known = {str(row.tolist()) for row in stored[[0, 3]]}
        assert {str(row.tolist()) for row in groups[0, index]["references"]} <= known

    # where no photo has a face the condition is dropped: zeros after the aggregator, and no NaN in a gradient
    caplog.clear()
    with caplog.at_level("WARNING", "lit_multiip"):
        [none, _] = (TaskDataset([Request("Ann", tuple(PHOTOS[1:3] * 2), "a", n)], features)[0] for n in (0, 1))
    assert [record.getMessage() for record in caplog.records].count(
        "Ann: no reference shows a face, so they condition as if dropped"
    ) == (not beside_clip)  # once in a process
    model = built(tiny_backbone, face)
    embeds = model.condition(torch.stack([none["references"], expected]))
    assert not embeds[0].any() and torch.equal(embeds[1], model.aggregator(expected[None])[0])
    embeds.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_pooling_sees_the_photos_with_a_face_alone():
    embeds = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)) - 3  # mostly negative
    holed = embeds.clone()
    holed[[0, 2]] = float("nan")
    filled = replace_missing(holed, "Ann")
    assert torch.equal(MaxPool(8)(filled[None]), MaxPool(8)(embeds[[1, 3]][None]))
    assert torch.allclose(AvgPool(8)(filled[None]), AvgPool(8)(embeds[[1, 3]][None]), atol=1e-6)
    assert replace_missing(embeds, "Ann") is embeds


def test_of_several_faces_the_largest_conditions_and_that_is_told(tiny_backbone, network, monkeypatch, caplog):
    class Detector:
        """Two faces in the second photo, one in the others."""

        def __init__(self, path): ...

        def faces(self, pixels):
            return np.zeros((2 if np.array_equal(pixels, np.asarray(PHOTOS[1].image())) else 1, 15))

        def landmarks(self, pixels):
            return TEMPLATE

    monkeypatch.setattr(faces, "FaceDetector", Detector)
    encoder = PhotoEncoder(Backbone(str(tiny_backbone), face_encoder=FaceEncoder(network)))
    with caplog.at_level("WARNING", "lit_multiip"):
        embeds = encoder(PHOTOS)
    assert embeds.shape == (4, E) and embeds.isfinite().all()
    told = [record.getMessage() for record in caplog.records]
    assert told == [f"{PHOTOS[1].name} of {PHOTOS[1].person}: of 2 faces the largest conditions"]


def test_features_of_another_network_or_crop_are_never_found(tiny_backbone, network, tmp_path):
    networks = [
        None,
        FaceEncoder(network, detector=None),
        FaceEncoder(network, True, detector=None),
        FaceEncoder(network, detector=None, crop=(0.5, 0.5, 0.5)),
    ]
    stores = [
        Features(Backbone(str(tiny_backbone), face_encoder=face), tmp_path).store["embeds"].folder for face in networks
    ]
    assert len(set(stores)) == 4
    copied = shutil.copy(network, tmp_path / "renamed.onnx")
    again = Features(Backbone(str(tiny_backbone), face_encoder=FaceEncoder(str(copied), detector=None)), tmp_path)
    assert again.store["embeds"].folder == stores[1]


def test_beside_clip_a_published_adapter_starts_as_it_is_and_then_learns_of_faces(tiny_backbone, network):
    plain = built(tiny_backbone, None, aggregator=AvgPool)
    model = built(tiny_backbone, FaceEncoder(network, True, detector=None), aggregator=AvgPool)
    linear = model.unet.encoder_hid_proj.image_projection_layers[0].image_embeds
    assert not linear.weight[:, 24:].any()
    clip = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(0))
    both = torch.cat([clip, torch.randn(2, 9, E)], dim=-1)
    x, eps = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    at = (x, eps, torch.tensor([3, 700]), {"prompt_embeds": torch.randn(2, 16, 32)})
    ours, theirs = (m.denoising_loss(*at, m.condition(refs)) for m, refs in ((model, both), (plain, clip)))
    assert torch.allclose(ours, theirs, atol=1e-6)
    ours.mean().backward()
    assert linear.weight.grad[:, 24:].abs().max() > 0


def test_in_clips_place_training_starts_at_the_text_and_a_published_adapter_is_refused(tiny_backbone, network):
    face = FaceEncoder(network, detector=None)
    model = built(tiny_backbone, face)
    assert model.aggregator.dim == E and model.method() == "SelfAttention + face"
    file = str(tiny_backbone / "ip_adapter" / "ip_adapter.safetensors")
    assert read_ip_adapter(file)["image_proj"]["proj.weight"].shape[1] == Backbone(str(tiny_backbone)).embed_dim == 24
    with pytest.raises(BackboneError, match=rf"'image_proj.proj.weight' has the shape \(128, 24\).*\(128, {E}\)"):
        built(tiny_backbone, face, ip_adapter=file)


def test_a_checkpoint_knows_the_encoder_it_was_trained_with(tiny_backbone, network, tmp_path):
    """Of CLIP or a face network, by content: a renamed copy is the same one."""
    own = shutil.copytree(tiny_backbone / "image_encoder", tmp_path / "own")
    checkpoint = {"state_dict": (model := built(tiny_backbone, None)).state_dict()}
    model.on_save_checkpoint(checkpoint)
    assert len(checkpoint["lit_multiip"]["image_encoder_content"]) == 32

    other = shutil.copytree(tiny_backbone, tmp_path / "other")
    config = other / "image_encoder" / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(
        CheckpointError, match=r"another image_encoder: that of .*backbone.*set backbone.image_encoder and"
    ):
        built(other, None).on_load_checkpoint(checkpoint)
    built(tiny_backbone, None).on_load_checkpoint(checkpoint)
    with pytest.raises(CheckpointError, match=r"another image_encoder: that of .* \(this model: .*own\)"):
        # of equal width, so that shapes say nothing
        built(tiny_backbone, None, image_encoder=str(_changed(own))).on_load_checkpoint(checkpoint)

    of_faces = {"state_dict": (model := built(tiny_backbone, FaceEncoder(network, detector=None))).state_dict()}
    model.on_save_checkpoint(of_faces)
    renamed = FaceEncoder(str(shutil.copy(network, tmp_path / "renamed.onnx")), detector=None)
    built(tiny_backbone, renamed).on_load_checkpoint(of_faces)
    mirrored = FaceEncoder(network, detector=None, colours="bgr")
    with pytest.raises(CheckpointError, match="another image_encoder"):
        built(tiny_backbone, mirrored).on_load_checkpoint(of_faces)


def _changed(folder: Path) -> Path:
    config = folder / "config.json"
    config.write_text(config.read_text().replace("quick_gelu", "gelu"))
    return folder


def test_what_conditions_may_not_score(tiny_backbone, network, tmp_path):
    copied = str(shutil.copy(network, tmp_path / "copy.onnx"))
    other = str(write_pooling(tmp_path / "other.onnx", side=32))
    alone, joined = (FaceEncoder(network, beside, detector=None) for beside in (False, True))
    plain, face, both = (Backbone(str(tiny_backbone), face_encoder=each) for each in (None, alone, joined))
    for path in (network, copied):
        with pytest.raises(ValueError, match=r"is the face network that conditions .*would score its own work"):
            refuse_conditioning_network(FaceRecognition(path), face)
    refuse_conditioning_network(FaceRecognition(other), face)
    refuse_conditioning_network(FaceRecognition(network), plain)
    # CLIP in its place does not condition any more
    clip = FaceRecognition(other)
    clip.source = str(tiny_backbone / "image_encoder")
    refuse_conditioning_network(clip, face)
    with pytest.raises(ValueError, match="weights of the image encoder that conditions"):
        refuse_conditioning_network(clip, both)


def test_one_config_over_a_method_trains_and_scores_with_it(tiny_backbone, network, tmp_path, monkeypatch, capsys):
    from lit_multiip.__main__ import main

    shipped = yaml.safe_load((Path(__file__).parents[2] / "configs" / "with" / "face.yaml").read_text())
    shipped["backbone"]["face_encoder"] |= {"path": network, "detector": None}
    config = tmp_path / "face.yaml"
    config.write_text(yaml.safe_dump(shipped))
    monkeypatch.chdir(tmp_path)
    method = Path(__file__).parents[2] / "configs" / "self_attn.yaml"
    trainer, data = {"max_steps": 2, "val_check_interval": 2}, {"held_out": 1}
    small = write_config(tmp_path / "small.yaml", tiny_backbone, tmp_path / "features", trainer=trainer, data=data)
    main(["fit", *config_args(method, config, small)])
    [checkpoint] = Path("runs").glob("self_attn/version_0/checkpoints/last.ckpt")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert state["aggregator.to_q.weight"].shape == (E, E)
    scores = [
        {"class_path": "lit_multiip.evaluation.faces.FaceRecognition", "init_args": {"path": path, "name": name}}
        for path, name in ((network, "own"), (str(write_pooling(tmp_path / "other.onnx", side=32)), "other"))
    ]
    test = ["test", "--run", "runs/self_attn/version_0", "--config", "score.yaml"]
    (tmp_path / "score.yaml").write_text(yaml.safe_dump({"score": {"extractors": scores, "anchors": False}}))
    assert "would score its own work" in refusal(capsys, *test)
    (tmp_path / "score.yaml").write_text(yaml.safe_dump({"score": {"extractors": scores[1:], "anchors": False}}))
    main(test)
    assert "identity_held_out/other" in Path("runs/self_attn/version_0/test/metrics.json").read_text()
