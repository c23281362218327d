"""fit, then bare test, then bare predict, in one process, on a tiny backbone of random weights."""

import csv
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import config_args, refusal
from PIL import Image
from resuming import score_by
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_multiip.__main__ import main

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture(scope="module")
def tiny_config(tiny_backbone, random_critic, tmp_path_factory):
    folder = tmp_path_factory.mktemp("end_to_end")
    faces = {"train": 3, "validation": 2, "test": 3, "photos": 11}
    config = {
        "backbone": {"path": str(tiny_backbone)},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1},
        "model": {"init_args": {"sampling": {"steps": 2}}},
        "data": {
            "source": {"class_path": "lit_multiip.data.MiniFaces", "init_args": faces},
            "batch_size": 8,
            "held_out": 2,
            "cache_dir": str(folder / "features"),
        },
        "score": score_by(random_critic, anchors=True, resamples=20),
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


@pytest.fixture(scope="module")
def fitted(tiny_config, tmp_path_factory):
    """A working folder in which the shortest fit was run."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["fit", *config_args(CONFIGS / "self_attn.yaml", tiny_config), "--trainer.max_steps", "5"])
    return folder


def run_of(folder: Path) -> Path:
    return folder / "runs" / "self_attn" / "version_0"


def results_of(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / "runs" / name / "version_0" / "test" / "metrics.json").read_text())


def test_the_shortest_fit_leaves_best_and_last_of_its_last_step(fitted):
    files = sorted(path.name for path in (run_of(fitted) / "checkpoints").iterdir())
    assert files == ["best-step=5.ckpt", "last.ckpt"]
    for name in files:
        checkpoint = torch.load(run_of(fitted) / "checkpoints" / name, weights_only=True)
        assert checkpoint["global_step"] == 5
        assert {key.split(".")[0] for key in checkpoint["state_dict"]} == {"aggregator", "unet"}
        assert len(checkpoint["state_dict"]) == 3 + 4 + 2 * 4
        assert checkpoint["lit_multiip"]["method"].startswith("SelfAttention(")


def test_tensorboard_has_losses_learning_rate_reference_gap_and_grids(fitted):
    events = EventAccumulator(str(run_of(fitted)))
    events.Reload()
    tags = events.Tags()
    scalars = {"train/loss", "lr-AdamW", "val/loss", "val/gap_shuffled", "val/gap_dropped"}
    scalars |= {f"val/loss_t{t}" for t in (125, 375, 625, 875)}
    assert scalars <= set(tags["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == [0, 1, 2, 3, 4]
    assert tags["images"] == ["val/samples"]
    with Image.open(run_of(fitted) / "grids" / "step_000005.png") as grid:
        assert grid.width > 11 * 96 and grid.height > 2 * 96  # nine references, held-out, generated; two people


def test_bare_test_scores_the_run_into_its_own_folder(fitted, monkeypatch, caplog):
    monkeypatch.chdir(fitted)
    caplog.set_level("INFO")
    main(["test"])
    assert "test of run runs/self_attn/version_0, checkpoint best-step=5.ckpt" in caplog.text
    results = results_of(fitted, "self_attn")
    assert results["protocol"]["people"] == 3 and results["protocol"]["tasks"] == 6
    assert len(list((run_of(fitted) / "test" / "images").rglob("*.png"))) == 6
    assert (run_of(fitted) / "test" / "grid.png").exists()
    training = results["audit"]["training"]
    assert training["status"] == "recorded" and training["people_seen"] == training["photos_seen"] == 0
    assert (training["people"], training["photos"]) == (3 + 2, 5 * 11)  # training and validation
    # no run but fit's: the next bare test must find it again
    assert [path.parent for path in fitted.glob("runs/*/*/config.yaml")] == [run_of(fitted)]
    assert [path.name for path in (fitted / "runs" / "self_attn").iterdir()] == ["version_0"]


def test_bare_predict_writes_images_and_grid_into_a_new_folder(fitted, monkeypatch):
    monkeypatch.chdir(fitted)
    photos = fitted / "Ann_Lee"
    photos.mkdir()
    for number in range(4):
        Image.new("RGB", (50, 40), (60 * number, 10, 99)).save(photos / f"{number}.png")
    options = ["--photos", str(photos), "--prompts", "in a hat", "in a scarf", "--seeds", "1", "2", "3"]
    for folder in ("Ann_Lee", "Ann_Lee-2"):
        main(["predict", *options])
        made = run_of(fitted) / "predict" / folder
        names = sorted(path.name for path in made.glob("0*.png"))
        assert names[0] == "000_in-a-hat_seed1.png" and names[-1] == "005_in-a-scarf_seed3.png" and len(names) == 6
        facts = json.loads((made / "predict.json").read_text())
        assert facts["person"] == "Ann_Lee" and len(facts["references"]) == 9
        assert facts["images"][4] == {"file": "004_in-a-scarf_seed2.png", "prompt": "in a scarf", "seed": 2}
        assert (made / "grid.png").exists()
    first, second = (
        (run_of(fitted) / "predict" / folder / "003_in-a-scarf_seed1.png").read_bytes()
        for folder in ("Ann_Lee", "Ann_Lee-2")
    )
    assert first == second
    main(["predict", *options, "--guidance_scale", "1"])
    assert (run_of(fitted) / "predict" / "Ann_Lee-3" / "003_in-a-scarf_seed1.png").read_bytes() != first


def test_predict_takes_two_people_by_their_masks_with_weights_and_negatives(fitted, monkeypatch, capsys):
    monkeypatch.chdir(fitted)
    for name, count in (("Bo", 3), ("Cy", 2), ("unwanted", 1)):
        Path(name).mkdir()
        for number in range(count):
            Image.new("RGB", (50, 40), (60 * number, len(name), 99 * count % 256)).save(f"{name}/{number}.png")
    for name, box in (("left", (0, 0, 16, 32)), ("right", (16, 0, 32, 32))):
        mask = Image.new("L", (32, 32))
        mask.paste(255, box)
        mask.save(f"{name}.png")
    plain = ["predict", "--photos", "Bo", "Cy", "--prompts", "two people", "--seeds", "1"]
    options = ["--masks", "left.png", "right.png", "--weights", "2", "1", "0", "1", "1", "--negatives", "unwanted"]
    scales = ["--ip_scale", "{mid: 1, up: {block_0: [0.5, 1]}}", "--ip_end", "0.5"]
    main([*plain, *options, *scales])
    made = run_of(fitted) / "predict" / "Bo"
    facts = json.loads((made / "predict.json").read_text())
    assert sorted(facts["references"]) == ["0.png", "0.png", "1.png"]
    beside = {name: sorted(photos) for name, photos in facts["beside"].items()}
    assert beside == {"Cy": ["0.png", "1.png"], "drawn away from": ["0.png"]} and facts["masks"] == 2
    sampling = facts["model"]["sampling"]
    assert sampling["ip_scale"] == {"mid": 1, "up": {"block_0": [0.5, 1]}} and sampling["ip_end"] == 0.5
    image = (made / "000_two-people_seed1.png").read_bytes()
    main([*plain, *options])
    assert (run_of(fitted) / "predict" / "Bo-2" / "000_two-people_seed1.png").read_bytes() != image

    # what does not fit is refused before anything is drawn
    Image.new("L", (64, 64), 255).save("large.png")
    one = ["predict", "--photos", "Bo", "--prompts", "a person"]
    for args, message in (
        (plain, "0 masks and 2 people: give one mask a person"),
        ([*one, "--masks", "large.png"], "mask 1 has 64 x 64 px, and pictures have 32 x 32"),
        ([*one, "--masks", "Bo/0.txt"], "mask 'Bo/0.txt' cannot be read"),
        ([*one, "--weights", "1", "2"], "2 weights for 3 photos: give one each, in the order 0.png, 1.png, 2.png"),
        ([*one, "--weights", "1", ".nan", "1"], "a photo's weight is nan"),
        ([*one, "--negatives", "nobody"], "nobody does not exist"),
        ([*one, "--ip_start", "0.9", "--ip_end", "0.1"], "ip_start=0.9 and ip_end=0.1"),
        ([*one, "--ip_scale", "{up: .nan}"], "ip_scale.up=nan is not finite"),
        ([*one, "--ip_scale", "{up: {block_7: 1}}"], "'up.block_7', and in up this UNet attends in block_0"),
        (["predict", "--weights", "1", "2"], "give --photos <folder>"),
        ([*one, "--negatives", "unwanted", "--guidance_scale", "1"], "negative photos act through guidance"),
    ):
        assert message in refusal(capsys, *args, code=None)
    assert not (run_of(fitted) / "predict" / "Bo-3").exists() or not list((run_of(fitted) / "predict").glob("Bo-3/0*"))


def test_bare_inspect_looks_at_the_newest_run(fitted, monkeypatch, capsys):
    monkeypatch.chdir(fitted)
    main(["inspect", "--people", "2", "--data.held_out", "1"])
    folder = run_of(fitted) / "inspect"
    found = json.loads((folder / "inspect.json").read_text())
    assert found["checkpoint"].endswith("best-step=5.ckpt") and found["weights_are"] == "attention"
    assert [len(person["held_out"]) for person in found["people"]] == [1, 1, 1]
    for person in found["people"]:
        assert sum(person["weight"]) == pytest.approx(1, abs=1e-5) and len(person["loss_increase"]) == 9
    scores = found["summary"]
    assert scores["spearman/loss_increase/rarity"]["people"] == 3
    assert 1 < scores["effective_photos"]["value"] <= 9 + 1e-6
    assert [path.name for path in sorted(folder.glob("*.png"))] == ["01_test_000000.png", "02_test_000001.png"]
    with (folder / "photos.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 3 * 9
    assert "attention ~ shows what others hide" in capsys.readouterr().out
    assert [path.name for path in (fitted / "runs" / "self_attn").iterdir()] == ["version_0"]


def test_an_untrained_method_is_inspected_by_its_config(tiny_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    configs = [*config_args(CONFIGS / "max_pool.yaml", tiny_config)]
    main(["inspect", *configs, "--split", "validation", "--people", "0", "--output", "out"])
    found = json.loads(Path("out/inspect.json").read_text())
    assert found["checkpoint"] is None and found["weights_are"] == "share of dimensions won"
    assert [person["person"] for person in found["people"]] == ["validation_000000", "validation_000001"]
    assert not Path("runs").exists() and not list(Path("out").glob("*.png"))


def test_a_test_person_on_the_checkpoints_record_is_refused_in_one_line(fitted, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint = torch.load(run_of(fitted) / "checkpoints" / "last.ckpt", weights_only=True)
    digest = hashlib.sha256(b"test_000001").digest()
    rows = checkpoint["trained_on"]["people"]
    checkpoint["trained_on"]["people"] = torch.cat([rows, torch.frombuffer(bytearray(digest), dtype=torch.uint8)[None]])
    torch.save(checkpoint, tmp_path / "leaky.ckpt")
    args = [*config_args(run_of(fitted) / "config.yaml"), "--ckpt_path", str(tmp_path / "leaky.ckpt")]
    message = refusal(capsys, "test", *args)
    assert message.startswith("error: 1 of 3 test people were trained or validated on, such as 'test_000001'")


def test_a_finished_run_is_scored_on_another_folder_of_people_all_of_them_test_people(
    fitted, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for person in ("Ann", "Bo"):
        for number in range(10):
            file = tmp_path / "people" / person / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), (25 * number, 99, ord(person[0]))).save(file)
    others = ["--data.source", "Folder", "--data.source.init_args.path", str(tmp_path / "people")]
    others += ["--data.test_fraction", "1", "--score.output", str(tmp_path / "others")]
    before = (run_of(fitted) / "test" / "metrics.json").read_bytes() if (run_of(fitted) / "test").exists() else b""
    main(["test", "--run", str(run_of(fitted)), *others])
    results = json.loads((tmp_path / "others" / "metrics.json").read_text())
    assert results["protocol"]["people"] == 2 and results["protocol"]["tasks"] == 2
    training = results["audit"]["training"]
    assert (training["status"], training["people"], training["people_seen"], training["photos_seen"]) == (
        *("recorded", 5, 0, 0),
    )
    assert {"SelfAttention", "other_person", "vae_round_trip"} <= {name.split("(")[0] for name in results["rows"]}
    assert "real_vs_real" not in results["rows"]  # which takes photos of training people
    assert not before or (run_of(fitted) / "test" / "metrics.json").read_bytes() == before

    # somebody whom it was trained on is refused by name, and so is everything but a test
    (tmp_path / "people" / "Bo").rename(tmp_path / "people" / "train_000001")
    message = refusal(capsys, "test", "--run", str(run_of(fitted)), *others)
    assert message.startswith("error: 1 of 2 test people were trained or validated on, such as 'train_000001'")
    for command, options in (("test", ["--data.tested", "validation"]), ("validate", [])):
        message = refusal(capsys, command, "--run", str(run_of(fitted)), *others, *options)
        assert "data.test_fraction=1 makes test people of everyone, no validation people: lower it" in message
    message = refusal(capsys, "fit", "--config", str(run_of(fitted) / "config.yaml"), *others)
    assert "no train people: lower it" in message


def validations(run: Path) -> list[int]:
    """The steps after which a fit validated."""
    events = EventAccumulator(str(run))
    events.Reload()
    return [event.step + 1 for event in events.Scalars("val/loss")]


def test_val_check_interval_counts_optimiser_steps(tiny_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["fit", *config_args(CONFIGS / "self_attn.yaml", tiny_config), "--grid.people", "0"]
    # an epoch of 3 batches has 2 steps, the second one of a single batch
    args += ["--trainer.accumulate_grad_batches", "2", "--trainer.val_check_interval", "4"]
    main([*args, "--trainer.max_steps", "9"])
    assert validations(run_of(tmp_path)) == [4, 8, 9]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["max_epochs=1", "max_steps=-1", "val_check_interval=1000"], ["best-step=3.ckpt"]),
        (
            ["max_epochs=3", "max_steps=-1", "check_val_every_n_epoch=2", "val_check_interval=1.0"],
            ["best-step=9.ckpt", "last.ckpt"],
        ),
        (["max_steps=3", "limit_val_batches=0"], []),
    ],
)
def test_every_fit_ends_with_a_validation_and_a_checkpoint(options, names, tiny_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["fit", *config_args(CONFIGS / "self_attn.yaml", tiny_config), "--grid.people", "0"]
    main([*args, "--checkpoint.save_top_k", "-1", *(f"--trainer.{option}" for option in options)])
    found = sorted(path.name for path in (run_of(tmp_path) / "checkpoints").iterdir())
    assert set(names) <= set(found) and "last.ckpt" in found
    last = torch.load(run_of(tmp_path) / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == (9 if "max_epochs=3" in options else 3)


def test_the_config_of_fit_is_taken_by_fit_again_whose_console_says_what_matters(fitted, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", str(run_of(fitted) / "config.yaml"), "--trainer.max_steps", "1", "--grid.people", "0"])
    assert (run_of(tmp_path) / "checkpoints" / "last.ckpt").exists()
    text = "".join(capfd.readouterr())
    assert re.search(r"parameters: [\d,]+ trained of [\d,]+", text) and text.count("Seed set to") <= 1
    assert not re.search("litlogger|litmodels|FLOPs|kept in float32", text)


# DreamBooth


@pytest.fixture(scope="module")
def dreambooth(tiny_config, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("class_images"))
    short = [
        "--model.steps",
        "2",
        "--model.prior_weight",
        "1",
        "--model.class_images",
        "3",
        "--model.class_folder",
        folder,
    ]
    return [*config_args(CONFIGS / "dreambooth.yaml", tiny_config), *short]


def test_untrained_methods_are_tested_without_a_checkpoint_by_one_protocol(
    dreambooth, tiny_config, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    main(["test", *dreambooth])
    main(["test", *config_args(CONFIGS / "avg_pool.yaml", tiny_config), "--score.anchors", "false"])
    results, other = (results_of(tmp_path, name) for name in ("dreambooth", "avg_pool"))
    assert results["protocol"] == other["protocol"]
    assert results["protocol"]["people"] == 3 and results["protocol"]["tasks"] == 6
    # there is no image embedding, so no zero one and no other person's
    anchors = ["no_references", "vae_round_trip", "real_other_photo", "real_held_out", "real_vs_real"]
    assert list(results["rows"]) == ["DreamBooth", *anchors]
    assert results["describe"]["trained_parameters"] > 10_000 and results["describe"]["steps"] == 2
    spent = {"personalise", "method", "anchors", "scoring"}  # an adapter pays for the image encoder
    assert set(other["seconds"]) == spent and set(results["seconds"]) == spent | {"class_images"}
    assert other["seconds"]["personalise"] > 0 and all(seconds > 0 for seconds in results["seconds"].values())
    assert not list(tmp_path.glob("runs/*/*/config.yaml"))


def test_fit_keeps_one_person_whom_bare_predict_draws_and_bare_test_tests_everyone(
    dreambooth, tmp_path, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    main(["fit", *dreambooth, "--data.person", "test_000002"])
    run = tmp_path / "runs" / "dreambooth" / "version_0"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["lit_multiip"]["person"] == "test_000002" and checkpoint["global_step"] == 2
    assert {key.split(".")[0] for key in checkpoint["state_dict"]} == {"unet"}

    main(["predict", "--prompts", "a photo of a person", "--seeds", "0", "1"])
    facts = json.loads((run / "predict" / "test_000002" / "predict.json").read_text())
    assert facts["person"] == "test_000002" and len(facts["images"]) == 2
    assert "predict of run runs/dreambooth/version_0, checkpoint last.ckpt" in caplog.text
    assert "the checkpoint is of test_000002" in caplog.text

    main(["test", "--score.anchors", "false"])
    assert "test tunes on everyone from the start, also on test_000002" in caplog.text
    assert results_of(tmp_path, "dreambooth")["protocol"]["people"] == 3
