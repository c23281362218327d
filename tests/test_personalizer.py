"""The Python API: the lines of its documentation, the same images as the commands, and what it refuses."""

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from commands import config_args
from one_person import write_config, write_person
from PIL import Image
from scoring import Thumbnail
from trainers import quiet_trainer

import lit_multiip
from lit_multiip import Backbone, MiniFaces, MultiIPAdapter, MultiPhotoData, Personalizer, Sampling
from lit_multiip.__main__ import main
from lit_multiip.data.record import digests_in
from lit_multiip.files import LitMultiIPError

PROMPT = "a photo of a person"


def levels(one, other):
    """The largest difference of two pictures, in grey levels."""
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max())


@pytest.fixture(scope="module")
def work(tiny_backbone, tmp_path_factory):
    """A folder with photos, and a run of people whose precision is bf16-mixed."""
    folder = tmp_path_factory.mktemp("personalizer")
    write_person(folder / "ann", 10)
    write_person(folder / "bob", 6, number=1)
    write_config(folder / "tiny.yaml", tiny_backbone, folder / "features")
    faces = ["--data.source.train=3", "--data.source.validation=1", "--data.source.test=1", "--data.source.photos=11"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        options = ["--trainer.max_steps=2", "--trainer.precision=bf16-mixed", "--grid.people=0", "--data.batch_size=4"]
        configs = config_args(Path(__file__).parents[1] / "configs" / "self_attn.yaml", "tiny.yaml")
        main(["fit", *configs, *faces, *options])
    return folder


@pytest.fixture(autouse=True)
def here(work, monkeypatch):
    monkeypatch.chdir(work)


@pytest.fixture(scope="module")
def loaded(work):
    """Of the run, with the commands' store: a text that is encoded beside others may differ in its last bit."""
    return Personalizer.from_pretrained(work / "runs" / "self_attn" / "version_0", cache_dir=work / "features")


@pytest.fixture
def untrained(tiny_backbone):
    options = {"sampling": Sampling(steps=2), "extractors": [Thumbnail()]}
    return Personalizer.from_pretrained(str(tiny_backbone), "AvgPool", **options).with_photos("ann")


def test_importing_the_package_loads_no_torch_and_all_public_names_are_there():
    code = "import sys, lit_multiip; print('torch' in sys.modules or 'lightning' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
    assert {getattr(lit_multiip, name).__name__ for name in lit_multiip.__all__} == set(lit_multiip.__all__)
    assert dir(lit_multiip) == lit_multiip.__all__
    with pytest.raises(AttributeError, match="the public names are in __all__"):
        lit_multiip.Nothing  # noqa: B018


def test_it_draws_what_predict_draws_and_the_exported_files_draw_the_same(loaded, work):
    main(["predict", "--photos", "ann", "--prompts", PROMPT, "in a hat", "--seeds", "0", "1"])
    files = sorted((work / "runs/self_attn/version_0/predict/ann").glob("0*.png"))
    me = loaded.with_photos("ann")
    images = me([PROMPT, "in a hat"], seeds=[0, 1])
    assert [levels(image, Image.open(file)) for image, file in zip(images, files, strict=True)] == [0, 0, 0, 0]
    assert levels(images[0], images[1]) > 0 and levels(images[0], images[2]) > 0

    shutil.rmtree("out", ignore_errors=True)
    names = {path.relative_to("out").as_posix() for path in me.save("out")}
    assert names >= {"README.md", "lit_multiip.json", "ip-adapter_multiip.safetensors", "embeds/ann.safetensors"}
    backbone = me.model.backbone
    again = Personalizer.from_pretrained("out", backbone=Backbone(backbone.path), cache_dir="features")
    again = again.with_photos("ann")
    redrawn = again([PROMPT, "in a hat"], seeds=[0, 1])
    assert max(levels(a, b) for a, b in zip(images, redrawn, strict=True)) <= 1
    with pytest.raises(LitMultiIPError, match="exported for a backbone of another folder"):
        Personalizer.from_pretrained("out")
    with pytest.raises(LitMultiIPError, match="exists"):
        me.save("out")


def test_what_acts_on_a_picture_acts_as_in_predict(loaded, work):
    """Weights, photos to draw away from, masks and a second person, scales by block, and steps, in one picture each."""
    for name in ("left", "right"):
        Image.fromarray(half(name) * np.uint8(255)).save(f"{name}.png")
    ann, bob = loaded.with_photos("ann"), loaded.with_photos("bob")
    weights = [2.0, *[1.0] * 5, 0.0, 0.5, 1.0, 1.0]
    plain, seen = ann(PROMPT)[0], set[bytes]()
    for options, words in (
        ({"weights": weights, "negatives": "bob"}, ["--weights", *map(str, weights), "--negatives", "bob"]),
        ({"beside": bob, "masks": ["left.png", Image.open("right.png")]}, ["bob", "--masks", "left.png", "right.png"]),
        (
            {"ip_scale": {"up": {"block_0": 1.0}}, "ip_end": 0.5},
            ["--ip_scale", "{up: {block_0: 1.0}}", "--ip_end", "0.5"],
        ),
    ):
        shutil.rmtree("runs/self_attn/version_0/predict", ignore_errors=True)
        main(["predict", "--photos", "ann", *words, "--prompts", PROMPT, "--seeds", "0", "--steps", "3"])
        [file] = Path("runs/self_attn/version_0/predict/ann").glob("0*.png")
        [image] = ann(PROMPT, steps=3, **options)
        assert levels(image, Image.open(file)) == 0
        seen.add(image.tobytes())
    assert len(seen | {plain.tobytes()}) == 4
    assert levels(ann(PROMPT)[0], plain) == 0


def half(name, side=32):
    """A mask of the left or the right half of a picture."""
    mask = np.zeros((side, side), dtype=bool)
    mask[:, : side // 2] = True
    return mask if name == "left" else ~mask


def test_files_folders_and_pictures_are_photos_and_their_order_is_theirs(untrained, work):
    files = sorted(path for path in (work / "ann").glob("*.png"))
    given = [str(files[0]), Image.open(files[1]), "bob"]
    me = untrained.with_photos(given, name="ann")
    assert len(me.person.photos) == 2 + 6 and me.person.name == "ann"
    assert me.person.photos[0].prompt == files[0].with_suffix(".txt").read_text()
    assert untrained.person.name == "ann" and len(untrained.person.photos) == 10
    picture = untrained.with_photos([Image.open(file) for file in files], name="ann")
    assert levels(picture(PROMPT)[0], untrained.with_photos(files, name="ann")(PROMPT)[0]) == 0


def test_options_of_drawing_hold_for_one_call(untrained):
    plain = untrained(PROMPT)[0]
    assert levels(plain, untrained(PROMPT, ip_scale=0.0)[0]) > 0
    assert levels(plain, untrained(PROMPT, steps=3, scheduler="DDIMScheduler")[0]) > 0
    assert levels(plain, untrained(PROMPT)[0]) == 0


def test_the_plain_pipeline_draws_the_same_within_a_grey_level(untrained):
    [image] = untrained(PROMPT, seeds=3)
    pipe = untrained.to_pipeline()
    options = {"num_inference_steps": 2, "guidance_scale": untrained.model.sampling.guidance_scale}
    generator = torch.Generator().manual_seed(3)
    [plain] = pipe(PROMPT, ip_adapter_image_embeds=untrained.image_embeds, generator=generator, **options).images
    assert levels(image, plain) <= 1


def test_tuning_keeps_the_best_weights_of_its_own_and_others_keep_theirs(untrained):
    before = untrained(PROMPT)[0]
    other = untrained.with_photos("bob")
    others = other(PROMPT)[0]
    told = []
    assert untrained.tune(steps=4, progress=told.append) is untrained
    assert [progress.step for progress in told] == [1, 2, 3, 4] and told[0].steps == 4
    assert all("train/loss" in progress.scores and "val/identity" in progress.scores for progress in told)
    tuned = untrained.tuned
    assert {*untrained.references} == {*tuned.photos}
    with pytest.raises(LitMultiIPError, match="is among the photos that are drawn from"):
        untrained.score([before], held_out=[tuned.photos[0]])
    assert len(tuned.photos) == 8 and len(tuned.held_out) == 2 and tuned.before["val/identity"] < 1
    assert not {photo.content_key() for photo in tuned.photos} & {photo.content_key() for photo in tuned.held_out}
    assert levels(untrained(PROMPT)[0], before) > 0
    assert levels(other(PROMPT)[0], others) == 0 and other.tuned is None
    record = untrained.trained_on()
    assert len(digests_in(record, "photos")) == 8 and len(digests_in(record, "held_out")) == 2

    scores = untrained.score(untrained(PROMPT, seeds=[0, 1]), prompts=["in a purple shirt"] * 2)
    keys = {"identity_held_out_mean", "identity_references", "nearest_reference", "prompt"}
    assert scores.keys() == {f"{key}/thumbnail" for key in keys}
    files = [photo.path for photo in tuned.held_out]
    again = untrained.score(untrained(PROMPT, seeds=[0, 1]), held_out=files)
    assert again["identity_held_out_mean/thumbnail"] == pytest.approx(
        scores["identity_held_out_mean/thumbnail"], abs=1e-6
    )
    images = untrained(PROMPT, seeds=[0, 1])
    shutil.rmtree("tuned", ignore_errors=True)
    untrained.save("tuned")
    backbone = Backbone(untrained.model.backbone.path)
    back = Personalizer.from_pretrained("tuned", backbone=backbone).with_photos(tuned.photos, name="ann")
    back = back(PROMPT, seeds=[0, 1])
    assert max(levels(a, b) for a, b in zip(images, back, strict=True)) <= 1


def test_tuning_stops_when_it_is_told_to_and_two_at_once_are_refused(untrained):
    refused, steps = [], []

    def progress(now):
        steps.append(now.step)
        thread = threading.Thread(target=try_another)
        thread.start()
        thread.join()

    def try_another():
        try:
            untrained.with_photos("bob").tune(steps=1)
        except LitMultiIPError as error:
            refused.append(str(error))

    untrained.tune(steps=30, progress=progress, stop=lambda: len(steps) >= 2)
    assert steps == [1, 2] and len(refused) == 2 and "another tuning is going on" in refused[0]
    assert untrained.tuned.steps == 2


def test_dreambooth_is_tuned_drawn_saved_and_loaded(tiny_backbone, tmp_path):
    options = {"sampling": Sampling(steps=2), "class_images": 2, "class_folder": str(tmp_path / "class")}
    me = Personalizer.from_pretrained(str(tiny_backbone), "DreamBooth", extractors=[Thumbnail()], **options)
    me = me.with_photos("bob")
    me.tune(steps=3)
    images = me(PROMPT, seeds=[0, 1])
    me.save(tmp_path / "out")
    again = Personalizer.from_pretrained(tmp_path / "out", backbone=Backbone(str(tiny_backbone))).with_photos("bob")
    assert max(levels(a, b) for a, b in zip(images, again(PROMPT, seeds=[0, 1]), strict=True)) <= 1
    with pytest.raises(LitMultiIPError, match="no image embeddings"):
        _ = me.image_embeds
    for option in ({"ip_scale": 0.5}, {"ip_end": 0.5}):
        with pytest.raises(LitMultiIPError, match=r"=0\.5 has no effect"):
            me(PROMPT, **option)
    for option in ({"weights": [1.0] * 6}, {"negatives": "ann"}, {"beside": me.with_photos("ann")}):
        with pytest.raises(LitMultiIPError, match="takes no weights, negatives or masks"):
            me(PROMPT, **option)


def test_what_cannot_be_is_refused_in_a_sentence(untrained, loaded, tiny_backbone, work):
    def refused(words, call):
        with pytest.raises(LitMultiIPError, match=words) as error:
            call()
        assert "\n" not in str(error.value)

    refused("there are no photos yet", lambda: loaded(PROMPT))
    refused("there are no photos", lambda: loaded.with_photos([]))
    refused("'ann/test_000000_0000.txt' is no photo", lambda: loaded.with_photos(["ann/test_000000_0000.txt"]))
    refused("there is no photo 'nobody.jpg'", lambda: loaded.with_photos(["nobody.jpg"]))
    refused("each side needs at least 16 px", lambda: loaded.with_photos([Image.new("RGB", (8, 8))]))
    refused("'ip_scael' is no option of drawing", lambda: untrained(PROMPT, ip_scael=1.0))
    refused("steps=0: give at least 1", lambda: untrained(PROMPT, steps=0))
    refused("is not finite", lambda: untrained(PROMPT, ip_scale=float("nan")))
    refused("7 is no photo", lambda: loaded.with_photos([7]))
    refused("at least one seed", lambda: untrained([], seeds=[0]))
    refused("seed -1 is out of range", lambda: untrained(PROMPT, seeds=[-1]))
    refused("above 0", lambda: untrained.tune(steps=0))
    refused("5, one of them held out", lambda: untrained.with_photos(["ann/test_000000_0000.png"]).tune(steps=1))
    refused("there are no images", lambda: untrained.score([]))
    refused("is a backbone: give a method too", lambda: Personalizer.from_pretrained("mini"))
    refused("there is no aggregator 'Average'", lambda: Personalizer.from_pretrained("mini", "Average"))
    refused("is no run", lambda: Personalizer.from_pretrained(work / "ann"))
    refused("no network scores", lambda: Personalizer.from_pretrained(str(tiny_backbone), "First")
            .with_photos("ann").score([Image.new("RGB", (32, 32))]))  # fmt: skip


def test_what_cannot_act_on_a_picture_is_refused_before_anything_is_encoded(loaded, untrained, monkeypatch):
    ann, bob, black = loaded.with_photos("ann"), loaded.with_photos("bob"), Image.new("1", (32, 32))
    white = Image.new("1", (32, 32), 1)
    monkeypatch.setattr("lit_multiip.backbone.features.Features.build", None)
    for words, options in (
        ("9 weights for 10 photos: give one each, in the order test_000000_0000.png", {"weights": [1.0] * 9}),
        ("1 weights for 10 photos", {"weights": 2}),
        ("weight is nan: give a number", {"weights": [float("nan"), *[1.0] * 9]}),
        ("weight is one: give a number", {"weights": ["one", *[1.0] * 9]}),
        ("all weights .* are 0: give one photo", {"weights": [0] * 10}),
        ("there are no photos", {"negatives": []}),
        ("there is no photo 'nobody.jpg'", {"negatives": ["nobody.jpg"]}),
        ("negative photos act through guidance", {"negatives": "bob", "guidance_scale": 1.0}),
        ("2 masks and 1 people: give one mask a person", {"masks": [white, white]}),
        ("0 masks and 2 people", {"beside": bob}),
        ("a mask is black all over: paint white", {"beside": [bob], "masks": [white, black]}),
        ("mask 1 has 16 x 16 px, and pictures have 32 x 32", {"masks": Image.new("1", (16, 16), 1)}),
        ("mask 'none.png' cannot be read", {"masks": "none.png"}),
        ("mask 1 is of type ndarray: give a file or a picture", {"masks": half("left")}),
        ("several people are called ann", {"beside": ann, "masks": [white, white]}),
        ("of the same model: make them by with_photos", {"beside": untrained, "masks": [white, white]}),
        ("of the same model: make them by with_photos", {"beside": "bob", "masks": [white, white]}),
        ("there are no photos yet", {"beside": loaded, "masks": [white, white]}),
        (r"names 'up\.block_7'", {"ip_scale": {"up": {"block_7": 1.0}}}),
    ):
        with pytest.raises(LitMultiIPError, match=words) as error:
            ann(PROMPT, **options)
        assert "\n" not in str(error.value)


def test_module_and_data_go_into_a_bare_trainer(tiny_backbone, tmp_path):
    backbone = Backbone(str(tiny_backbone))
    module = MultiIPAdapter(backbone, lit_multiip.AvgPool, lr_schedule="constant", sampling=Sampling(steps=1))
    source = MiniFaces(train=2, validation=1, test=1, photos=5)
    data = MultiPhotoData(backbone, source, references=4, min_photos=5, batch_size=2, cache_dir=str(tmp_path))
    trainer = quiet_trainer(max_steps=2, use_distributed_sampler=False)
    assert type(trainer) is L.Trainer
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 2
    images = torch.cat(trainer.predict(module, datamodule=data))
    assert images.shape[1:] == (3, 32, 32) and images.dtype == torch.uint8
