"""fit --photos: one person's photos are split in place of people, and all commands go on from there."""

import hashlib
import json
import zlib
from pathlib import Path

import pytest
import torch
import yaml
from commands import config_args, refusal
from one_person import DREAMBOOTH, write_config, write_person
from resuming import differences, logged, run, state_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_multiip import datamodule, datasets
from lit_multiip.__main__ import main
from lit_multiip.data.record import digests_in

CONFIGS = Path(__file__).parents[1] / "configs"
SCORES = {"val/identity", *(f"val/{name}/thumbnail" for name in ("identity_held_out_mean", "nearest_reference"))}


@pytest.fixture(scope="module")
def work(tiny_backbone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_person")
    for count in (2, 5, 10, 40):
        write_person(folder / f"photos_{count}", count)
    write_person(folder / "people" / "Ann", 3)
    write_person(folder / "people" / "Bob", 3)
    write_config(folder / "tiny.yaml", tiny_backbone, folder / "features")
    return folder


@pytest.fixture(autouse=True)
def here(work, monkeypatch):
    monkeypatch.chdir(work)


@pytest.fixture
def served(monkeypatch):
    """The contents of all photos that training is served, as target or as reference."""
    seen: set[str] = set()
    draw, one = datasets.HeldOutGroups.draw, datamodule.reference_set

    def drawn(self, epoch, index):
        target, references = draw(self, epoch, index)
        seen.update(photo.content_key() for photo in (target, *references))
        return target, references

    def person(name, references, features):
        seen.update(photo.content_key() for photo in references)
        return one(name, references, features)

    monkeypatch.setattr(datasets.HeldOutGroups, "draw", drawn)
    monkeypatch.setattr(datamodule, "reference_set", person)
    return seen


def fit(name, photos, *args):
    main(["fit", "--photos", photos, *args, "--trainer.logger.name", name, "--grid.people", "2"])
    return Path("runs") / name / "version_0"


def contents(folder):
    return {hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).glob("*.png")}


VARIANTS = {
    "adapter": config_args("tiny.yaml"),
    "adapter_lora": config_args("tiny.yaml", CONFIGS / "with" / "lora.yaml"),
    "dreambooth": [*config_args(CONFIGS / "dreambooth.yaml", "tiny.yaml"), *DREAMBOOTH],
    "dreambooth_lora": [
        *config_args(CONFIGS / "dreambooth.yaml", "tiny.yaml", CONFIGS / "with" / "lora.yaml"), *DREAMBOOTH,
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("variant", "count"),
    [
        ("adapter", 10),
        ("dreambooth", 5),
        ("adapter_lora", 40),
        pytest.param("dreambooth_lora", 10, marks=pytest.mark.slow),
        pytest.param("adapter", 5, marks=pytest.mark.slow),
        pytest.param("dreambooth", 40, marks=pytest.mark.slow),
    ],
)
def test_held_out_photos_are_never_trained_on_and_choose_the_checkpoint(variant, count, served, capsys):
    name = f"{variant}_{count}"
    folder = fit(name, f"photos_{count}", *VARIANTS[variant])
    everything = contents(f"photos_{count}")
    best, last = (
        torch.load(next((folder / "checkpoints").glob(pattern)), weights_only=True)
        for pattern in ("best-*.ckpt", "last.ckpt")
    )
    tuned, held_out = ({row.hex() for row in digests_in(last["trained_on"], key)} for key in ("photos", "held_out"))
    assert tuned | held_out == everything and len(held_out) == {5: 1, 10: 2, 40: 2}[count]
    assert len(tuned) + len(held_out) == count and served <= tuned and len(served) > min(len(tuned), 30) / 2

    events = EventAccumulator(str(folder))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= {*SCORES, "val/loss", "train/loss"}
    identity = [(event.step, event.value) for event in events.Scalars("val/identity")]
    assert [step for step, _ in identity] == [0, 1, 3, 5]  # before training, and after 2, 4 and 6 steps
    values = [value for _, value in identity[1:]]
    assert best["global_step"] == 2 * (values.index(max(values)) + 1)
    assert len(list((folder / "grids").iterdir())) == 3

    # the commands that go on from it
    main(["test", "--run", str(folder)])
    results = json.loads((folder / "test" / "metrics.json").read_text())
    assert results["audit"]["training"] == {
        "status": "one_person", "people": 1, "photos": len(tuned), "people_seen": None, "photos_seen": 0,
        "drawn_people_of_other_roles": None,
    }  # fmt: skip
    assert results["protocol"]["held_out"] == len(held_out)
    main(["predict", "--run", str(folder), "--prompts", "a photo of a person", "--seeds", "0"])
    assert (folder / "predict" / f"photos_{count}" / "000_a-photo-of-a-person_seed0.png").exists()
    main(["export", "--run", str(folder), "--output", f"out_{name}"])
    assert Path(f"out_{name}/embeds/photos_{count}.safetensors").exists() is variant.startswith("adapter")
    if variant == "adapter":
        main(["inspect", "--run", str(folder)])
        assert json.loads((folder / "inspect" / "inspect.json").read_text())["people"][0]["person"] == f"photos_{count}"


def test_a_held_out_photo_on_record_as_trained_on_is_refused(capsys):
    folder = fit("leaky", "photos_5", *VARIANTS["adapter"], "--trainer.max_steps", "1")
    path = folder / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    record = checkpoint["trained_on"]
    record["photos"] = torch.cat([record["photos"], record["held_out"]])
    torch.save(checkpoint, path)
    args = ["--config", str(folder / "config.yaml"), "--ckpt_path", str(path)]
    assert "1 of 1 held-out photos, such as" in refusal(capsys, "test", *args)


def test_tuning_starts_at_a_run_whose_people_stay_on_record_and_other_people_serve_as_prior(served, caplog):
    caplog.set_level("INFO")
    faces = {"class_path": "MiniFaces", "init_args": {"train": 3, "validation": 1, "test": 1, "photos": 4}}
    config = yaml.safe_load(Path("tiny.yaml").read_text())
    config["data"] |= {"source": faces, "min_photos": 3, "references": 3, "batch_size": 4}
    config["trainer"]["max_steps"] = 1
    Path("people.yaml").write_text(yaml.safe_dump(config))
    args = config_args(CONFIGS / "self_attn.yaml", "people.yaml")
    main(["fit", *args, "--trainer.logger.name", "start", "--grid.people", "0"])
    start = Path("runs/start/version_0")
    first = torch.load(start / "checkpoints" / "last.ckpt", weights_only=True)
    served.clear()

    main(["fit", "--photos", "photos_5", "--run", str(start), "--trainer.max_steps", "2", "--data.prior_people", "2"])
    assert "fit starts at run runs/start/version_0" in caplog.text
    folder = Path("runs/one_person/version_0")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["data"]["photos"] == "photos_5" and config["checkpoint"]["monitor"] == "val/identity"
    assert config["model"]["init_args"]["start"].startswith(str(start)) and "run" not in config
    second = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert second["global_step"] == 2
    names, photos = (digests_in(second["trained_on"], key) for key in ("people", "photos"))
    assert names == digests_in(first["trained_on"], "people") | {hashlib.sha256(b"photos_5").digest()}
    assert digests_in(first["trained_on"], "photos") < photos
    # an optimiser's two steps of 2e-4 from there, and not from the published weights
    for key, weight in first["state_dict"].items():
        assert (second["state_dict"][key] - weight).abs().max() <= 2 * 2e-4 * 1.1
    # the prior's photos are of the source's training people: 2 of 3, 4 photos each
    assert len(served - contents("photos_5")) == 8 and len(served & contents("photos_5")) == 4


@pytest.mark.parametrize(
    ("variant", "stop"),
    [
        ("adapter", "batch:5"),
        ("adapter", "batch:3:TERM"),
        pytest.param("dreambooth", "tuning:5", marks=pytest.mark.slow),
    ],
)
def test_what_was_interrupted_ends_as_what_was_not(variant, stop, work):
    args = ["fit", "--photos", str(work / "photos_10"), *VARIANTS[variant], "--grid.people", "0"]
    args = [str(work / "tiny.yaml") if arg == "tiny.yaml" else arg for arg in args]
    folders = [work / f"{variant}_{name}_{stop.replace(':', '_')}" for name in ("whole", "stopped")]
    whole = run(folders[0], *args)
    assert whole.code == 0, whole.said()
    assert run(folders[1], *args, stop=stop).code != 0
    again = run(folders[1], "fit", "--ckpt_path", "last")
    assert again.code == 0, again.said()
    [one, two] = [next((folder / "runs").glob("*/version_0")) for folder in folders]
    assert differences(state_of(one), state_of(two)) == []
    assert logged(one) == logged(two)


def test_what_is_no_folder_of_one_person_is_refused_in_a_sentence(work, capsys):
    def said(photos, *args, code=1):
        return refusal(capsys, "fit", "--photos", photos, *config_args("tiny.yaml"), *args, code=code)

    assert "2 different photos, and tuning takes 5, one of them held out: add photos, or draw" in said("photos_2")
    message = said("people")
    assert "the folders of 2 people (Ann, Bob)" in message and "fit --config configs/self_attn.yaml" in message
    assert "is not a folder: give a folder of photos" in said("tiny.yaml")
    Path("nothing").mkdir()
    assert "no photos in" in said("nothing")
    vast = bytearray(next(write_person(work / "vast", 6).glob("*.png")).read_bytes())
    vast[16:24] = 2 * (30000).to_bytes(4, "big")  # width and height, in the header
    vast[29:33] = zlib.crc32(bytes(vast[12:29])).to_bytes(4, "big")
    Path("vast/vast.png").write_bytes(vast)
    with pytest.raises(SystemExit):
        main(["fit", "--photos", "vast", *config_args("tiny.yaml")])
    said_all = capsys.readouterr().err
    assert "vast.png: Image size (900000000 pixels)" in said_all and "replace or delete them" in said_all
    assert "is one person alone" in said("photos_5", "--data.person", "test_000000")
    message = said("photos_5", *config_args(CONFIGS / "dreambooth.yaml"), "--run", "runs/none", code=2)
    assert "is not a run" in message
