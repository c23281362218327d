"""A small backbone is made by a recipe: every stage, at tiny sizes, from photos of noise."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from commands import refusal
from jsonargparse import ArgumentParser
from onnx_file import write_pooling
from PIL import Image
from safetensors.torch import load_file

from lit_multiip.backbone.encoders import encode_faces
from lit_multiip.backbone.face_crop import FaceCrop
from lit_multiip.backbone.faces import FaceEncoder
from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.data import DataError, Folder
from lit_multiip.data.record import digest_name, digests_in
from lit_multiip.data.tasks import make_tasks
from lit_multiip.evaluation.audit import LeakError, audit_tasks
from lit_multiip.files import package_file
from lit_multiip.mini import stages, training
from lit_multiip.mini.make import make_mini
from lit_multiip.mini.maker import STAGES, Maker
from lit_multiip.mini.measure import check_unseen, measure_people
from lit_multiip.mini.measured import identify
from lit_multiip.mini.photos import Prompted, RealPeople, check_apart, swap_sides
from lit_multiip.mini.recipe import AdapterTraining, CLIPTraining, CriticTraining, Training, UNetTraining, VAETraining
from lit_multiip.mini.start import Start
from lit_multiip.mini.training import RecipeError, ShuffledBatches

SIDE, PEOPLE, PHOTOS = 32, 9, 3
RECIPE = {
    "clip": CLIPTraining(3, 8, 1e-3, image_steps=2, captions={"prompt": 0.8, "bare": 0.2}, varied=True),
    "vae": VAETraining(3, 4, 1e-3, ema=0.9, network={"latent_channels": 8}),
    "vae_decoder": Training(2, 4, 1e-3, ema=0.9),
    "unet": UNetTraining(3, 4, 1e-3, 0.9, captions={"prompt": 0.7, "bare": 0.2, "drop": 0.1}, adapter="image_encoder"),
    "ip_adapter": AdapterTraining(
        2,
        {
            "model.init_args.ip_adapter": "auto",
            "data.min_photos": 2,
            "data.batch_size": 2,
            "data.test_fraction": 0.3,
            "data.validation_fraction": 0.3,
            "data.validation_held_out": 1,
            "trainer.val_check_interval": 2,
            "grid.people": 1,
        },
    ),
}


def write_people(folder: Path, people: int = PEOPLE, photos: int = PHOTOS, side: int = 40, first: int = 0) -> Path:
    rng = np.random.default_rng(first)
    for person in range(first, first + people):
        place = folder / f"p{person:02d}"
        place.mkdir(parents=True)
        for number in range(photos):
            pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{number}.png")
            (place / f"{number}.txt").write_text(f"a photo of a person looking {'left' if number else 'right'}")
    return folder


def photos_of(folder: Path, **options: object) -> RealPeople:
    return RealPeople(Folder(str(folder)), FaceCrop(share=0.9), measured=2, **options)


def maker(photos: RealPeople, root: Path, start: str | None, **recipe: object) -> Maker:
    return Maker(photos, root / "out", root / "work", 0, SIDE, Start(start), {**RECIPE, **recipe}, "32-true")


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_backbone):
    """A backbone made of nine people by every stage but the critics."""
    root = tmp_path_factory.mktemp("made")
    write_people(root / "photos")
    make = maker(photos_of(root / "photos"), root, str(tiny_backbone))
    for name in STAGES:
        if name in RECIPE:
            make.make(name)
    return root


def test_every_stage_makes_its_part_of_a_backbone_whose_sizes_are_the_recipes(made):
    backbone = Backbone(str(made / "out"))
    assert backbone.latent_shape == (8, 8, 8) and backbone.image_side == SIDE
    assert backbone.load("unet").config.in_channels == 8 and backbone.adapter_file() is not None
    text = backbone.encode_prompts(backbone.text_pipeline(), ["looking left"])["prompt_embeds"]
    assert text.shape[-1] == backbone.load("unet").config.cross_attention_dim
    for name in RECIPE:
        measured = json.loads((made / "out" / "made" / f"{name}.json").read_text())["measured"]
        assert measured["steps"] == RECIPE[name].steps and all(np.isfinite(v) for v in measured.values()), name


def test_latents_have_unit_variance(made):
    vae = Backbone(str(made / "out")).load("vae")
    photos = photos_of(made / "photos").read(made / "work", SIDE, 0).training
    images = torch.stack([photos[i]["image"] for i in range(len(photos))]).float() / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mean * vae.config.scaling_factor
    assert latents.std() == pytest.approx(1, abs=0.02)


def test_the_folder_says_whom_it_was_trained_on_and_an_audit_refuses_them(made):
    record = Backbone(str(made / "out")).trained_on()
    people = Folder(str(made / "photos")).people()
    assert digests_in(record, "people") == {digest_name(person.name) for person in people}
    with pytest.raises(LeakError, match=r"2 of 2 test people were trained or validated on, such as 'p00'"):
        audit_tasks(make_tasks(people[:2], 2, 1), "recorded", record)
    with pytest.raises(DataError, match=r"was trained on 9 of 9 people: p00, p01"):
        check_unseen(Backbone(str(made / "out")), people)


def test_unseen_people_measure_it_from_one_and_from_nine_photos(made, tmp_path):
    people = Folder(str(write_people(tmp_path / "photos", people=3, photos=10, first=60))).people()
    found = measure_people(str(made / "out"), people, FaceCrop(share=0.9), None, tmp_path)
    assert found["photos"] == 30 and found["vae"]["unseen_psnr_db"] > 3
    assert [found["identify"]["image_encoder"][n]["people"] for n in (1, 9)] == [3, 3]


def test_a_stage_that_is_made_is_passed_over(made, caplog):
    with caplog.at_level(logging.INFO, "lit_multiip"):
        maker(photos_of(made / "photos"), made, json.loads(report(made, "vae"))["facts"]["start_from"]).make("vae")
    assert "vae: made already" in caplog.text


def report(root: Path, name: str) -> str:
    return (root / "out" / "made" / f"{name}.json").read_text()


FILES = {
    "clip": ["image_encoder/model.safetensors", "text_encoder/model.safetensors"],
    "vae": ["vae/diffusion_pytorch_model.safetensors"],
    "unet": ["unet/diffusion_pytorch_model.safetensors", "ip_adapter/ip-adapter_mini.safetensors"],
}


@pytest.mark.parametrize("name", FILES)
def test_a_stage_that_stopped_goes_on_as_if_it_had_not(name, made, tmp_path, monkeypatch):
    start = json.loads(report(made, name))["facts"]["start_from"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for root in (whole, parts):
        shutil.copytree(made / "out", root / "out")
        (root / "out" / "made" / f"{name}.json").unlink()
    monkeypatch.setattr(training, "SAVE_EVERY", 1)
    maker(photos_of(made / "photos"), whole, start).make(name)

    cls = {"clip": stages.CLIPStage, "vae": stages.VAEStage, "unet": stages.UNetStage}[name]

    def killed(self, batch, batch_idx):
        if self.global_step == 2:
            raise RuntimeError("killed")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(cls, "on_train_batch_start", killed)
        maker(photos_of(made / "photos"), parts, start).make(name)
    maker(photos_of(made / "photos"), parts, start).make(name)
    for file in FILES[name]:
        assert (whole / "out" / file).read_bytes() == (parts / "out" / file).read_bytes(), file


def test_a_training_of_other_settings_is_not_gone_on_with(made):
    start = json.loads(report(made, "vae"))["facts"]["start_from"]
    other = replace(RECIPE["vae"], steps=5)
    with pytest.raises(RecipeError, match=r"vae.ckpt' is of a training with other settings \(settings.steps 3 => 5"):
        maker(photos_of(made / "photos"), made, start, vae=other).make("vae")


def test_weights_of_other_sizes_are_named_and_the_others_taken(made, tiny_backbone, caplog):
    state = Backbone(str(tiny_backbone)).load("vae").state_dict()
    vae = Backbone(str(made / "out")).load("vae")
    with caplog.at_level(logging.INFO, "lit_multiip"):
        Start(str(tiny_backbone)).fill(vae, "vae")
    assert "encoder.conv_out.weight (8, 16, 3, 3) => (16, 16, 3, 3)" in caplog.text
    own = vae.state_dict()
    assert all(torch.equal(own[key], v) for key, v in state.items() if own[key].shape == v.shape)
    assert "begin anew" in caplog.text and len(caplog.records) == 2


def test_a_stage_names_the_earlier_one_that_it_needs(tmp_path):
    write_people(tmp_path / "photos")
    with pytest.raises(RecipeError, match=r"stage unet needs clip, .* first --stage clip"):
        maker(photos_of(tmp_path / "photos"), tmp_path, None).make("unet")


# The photos


def test_small_and_broken_photos_are_counted_and_nothing_is_made(tmp_path):
    write_people(tmp_path / "photos")
    write_people(tmp_path / "photos", people=1, side=20, first=50)
    (tmp_path / "photos" / "p00" / "0.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"of 2. photos cannot be used") as error:
        photos_of(tmp_path / "photos").read(tmp_path / "work", SIDE, 0)
    text = str(error.value)
    assert "20 px" in text or "18 x 18 px after it is cut, fewer than the side of 32 px" in text
    assert not list((tmp_path / "work").glob("*.npy"))


def test_people_of_the_experiment_are_named_by_name_and_by_content(tmp_path):
    people = Folder(str(write_people(tmp_path / "photos"))).people()
    shutil.copytree(tmp_path / "photos" / "p03", tmp_path / "experiment" / "p03")
    shutil.copytree(tmp_path / "photos" / "p04", tmp_path / "experiment" / "another_name")
    write_people(tmp_path / "experiment", people=1, first=80)
    experiment = Folder(str(tmp_path / "experiment"))
    with pytest.raises(
        DataError, match=r"2 of 9 training people are the experiment's, by name or by a photo: p03, p04"
    ):
        check_apart(people, experiment.people())
    check_apart(people[:3], experiment.people())
    with pytest.raises(DataError, match="p03, p04"):
        photos_of(tmp_path / "photos", fewer_than=None, experiment=experiment).read(tmp_path / "work", SIDE, 0)


def test_people_with_many_photos_are_left_to_the_experiment(tmp_path):
    write_people(tmp_path / "photos")
    write_people(tmp_path / "photos", people=2, photos=5, first=50)
    found = photos_of(tmp_path / "photos", fewer_than=5).read(tmp_path / "work", SIDE, 0)
    assert len(found.people) == PEOPLE - 2 and len(found.measuring) == 2
    assert all(len(person.photos) < 5 for person in [*found.people, *found.measuring])
    assert len(found.training) == 2 * (PEOPLE - 2) * PHOTOS and len(found.unseen) == 2 * PHOTOS
    with pytest.raises(DataError, match=r"9 people are left to train and measure a backbone, and 9 of them measure it"):
        replaced = RealPeople(Folder(str(tmp_path / "photos")), fewer_than=5, measured=9)
        replaced.read(tmp_path / "work", SIDE, 0)


def test_a_mirrored_photo_is_mirrored_in_pixels_and_words(tmp_path):
    data = photos_of(write_people(tmp_path / "photos")).read(tmp_path / "work", SIDE, 0).training
    half = len(data) // 2
    assert torch.equal(data[half + 1]["image"], data[1]["image"].flip(-1))
    rng = np.random.default_rng(0)
    assert [data.caption(i, rng, {"prompt": 1.0}).split()[-1] for i in (1, half + 1)] == ["left", "right"]
    assert swap_sides("looks left, leftover on the right") == "looks right, leftover on the left"


def test_an_epoch_has_every_picture_once_and_its_order_is_torchs_own():
    torch.manual_seed(3)
    batches = list(ShuffledBatches(10, 3, 6))
    torch.manual_seed(3)
    order = list(torch.utils.data.RandomSampler(range(10)))
    assert batches[:3] == [order[:3], order[3:6], order[6:9]]
    assert len({i for batch in batches[:3] for i in batch}) == 9 and batches[:3] != batches[3:]
    with pytest.raises(RecipeError, match=r"batch_size=11 is more than the 10 pictures"):
        ShuffledBatches(10, 11, 1)


# The image encoder


def test_an_encoder_learns_a_face_networks_embedding(tmp_path):
    write_people(tmp_path / "photos")
    face = FaceEncoder(str(write_pooling(tmp_path / "face.onnx", side=32, cell=8)), detector=None)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**vision, "hidden_size": 16}
    clip = CLIPTraining(60, 16, 3e-3, vision={**vision, "patch_size": 8}, text=text, face=face)
    maker(photos_of(tmp_path / "photos"), tmp_path, None, clip=clip).make("clip")
    measured = json.loads(report(tmp_path, "clip"))["measured"]
    assert measured["face_distance"] < 0.5
    config = json.loads((tmp_path / "out" / "image_encoder" / "config.json").read_text())
    assert config["projection_dim"] == 48  # 3 colours of 4 x 4 cells


def test_a_unet_learns_an_adapter_of_the_face_network(made, tmp_path):
    shutil.copytree(made / "out", tmp_path / "out")
    start = json.loads(report(made, "unet"))["facts"]["start_from"]
    unet = replace(RECIPE["unet"], adapter="face")
    with pytest.raises(RecipeError, match=r"unet.adapter is face, and clip.face names no face network"):
        maker(photos_of(made / "photos"), tmp_path, start, unet=unet).make("unet")
    face = FaceEncoder(str(write_pooling(tmp_path / "face.onnx", side=32, cell=8)), detector=None)
    clip = replace(RECIPE["clip"], face=face)
    make = maker(photos_of(made / "photos"), tmp_path, start, unet=unet, clip=clip)
    make.make("unet")
    state = load_file(tmp_path / "out" / "face_adapter" / "ip-adapter_face.safetensors")
    assert state["image_proj.proj.weight"].shape[1] == 48  # 3 colours of 4 x 4 cells
    images = [Image.fromarray(pixels) for pixels in make.pictures.unseen.images]
    seen = make._photo_embeds("face", make.pictures.unseen)
    torch.testing.assert_close(seen[: len(images)], encode_faces(face.load(), images))  # as backbone.face_encoder
    other = replace(RECIPE["clip"], face=replace(face, crop=(0.5, 0.5, 0.9)))
    with pytest.raises(RecipeError, match=r"unet.ckpt' is of a training with other settings \(settings.face"):
        maker(photos_of(made / "photos"), tmp_path, start, unet=unet, clip=other).make("unet")


def test_people_are_found_by_the_nearest_of_the_means():
    embeds = torch.tensor([[1.0, 0.1], [1, -0.1], [1, 0], [0, 1], [0.1, 1], [1, 0.2]])
    person = np.array([0, 0, 0, 1, 1, 1])
    assert identify(embeds, person, 2)["rank_one"] == 0.5  # the last of person 1 looks like person 0
    embeds[5] = torch.nan
    assert identify(embeds, person, 1)["rank_one"] == 1 and identify(embeds, person, 2) == {"people": 1}


# The command line


@pytest.mark.parametrize("recipe", ["portraits", "faces"])
def test_a_shipped_recipe_parses_and_its_stages_are_known(recipe):
    file = package_file(f"mini/{recipe}.yaml")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(make_mini)
    parser.add_argument("--config", action="config")
    config = parser.parse_args(["--config", str(file)])
    given = yaml.safe_load(file.read_text())
    assert {name for name in STAGES if config[name] is not None} == STAGES.keys() & given.keys()


def test_a_command_line_without_photos_is_refused_in_one_line(tmp_path, capsys):
    where = ["--config", str(package_file("mini/faces.yaml")), "--work", str(tmp_path), "--out", str(tmp_path / "out")]
    assert "LFW has no path" in refusal(capsys, "make-mini", *where, "--stage", "vae")
    assert "photos" in refusal(capsys, "make-mini", "--out", "a", "--work", "b", code=None)
    assert "the recipe has no stage critic" in refusal(capsys, "make-mini", *where, "--stage", "critic")
    assert "give two steps or more" in refusal(capsys, "make-mini", *where, "--vae.steps", "0", code=None)


def test_a_critic_of_real_photos_and_unknown_captions_are_refused(tmp_path):
    photos = photos_of(write_people(tmp_path / "photos"))
    with pytest.raises(RecipeError, match="photos have none: leave it out"):
        maker(photos, tmp_path, None, critic=CriticTraining(2, 2, 1e-3)).make("critic")
    with pytest.raises(RecipeError, match=r"clip.captions has scene: these pictures have bare, drop, prompt"):
        maker(photos, tmp_path, None, clip=CLIPTraining(2, 2, 1e-3, captions={"scene": 1.0})).make("clip")
    with pytest.raises(DataError, match="are no probabilities"):
        CLIPTraining(2, 2, 1e-3, captions={"prompt": 0.7})
    assert isinstance(photos.read(tmp_path / "work", SIDE, 0).training, Prompted)
    assert load_file(tmp_path / "out" / "trained_on.safetensors")["people"].shape == (PEOPLE, 32)
