import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from scoring import Data, Perfect, Thumbnail, read, run
from torch.nn import functional as F

from lit_multiip.data.tasks import protocol
from lit_multiip.evaluation import results as report
from lit_multiip.evaluation.audit import LeakError
from lit_multiip.evaluation.callback import ScoreTest
from lit_multiip.evaluation.extractors import Extraction
from lit_multiip.evaluation.intervals import Score
from lit_multiip.evaluation.summaries import summarise

ANCHORS = ["no_references", "zero_embedding", "other_person", "vae_round_trip", "real_other_photo", "real_held_out"]
ANCHORS += ["real_vs_real"]


@pytest.fixture(scope="module")
def tested(tmp_path_factory):
    folder, data, module = tmp_path_factory.mktemp("run") / "made" / "test", Data(seeds=2), Perfect()
    _, logged = run(folder, data=data, module=module)
    return folder, data, module, logged


def test_images_that_are_the_held_out_photos_score_perfectly(tested):
    folder, *_ = tested
    row = read(folder)[0]["rows"]["Perfect"]
    for name in ("identity_held_out", "prompt"):
        assert row[f"{name}/thumbnail"]["value"] == pytest.approx(1)
    assert row["fid/thumbnail"]["value"] == pytest.approx(0, abs=0.01)  # each photo twice against once
    assert row["diversity/thumbnail"]["value"] == pytest.approx(0, abs=1e-6)


def test_anchors_are_made_as_documented_and_frame_the_method(tested):
    folder, _, module, _ = tested
    assert module.calls[:5] == ["method", "right", "none", "zero", "other"]
    rows = read(folder)[0]["rows"]
    assert list(rows) == ["Perfect", *ANCHORS]
    value = {row: {key: score["value"] for key, score in scores.items()} for row, scores in rows.items()}
    assert value["vae_round_trip"]["identity_held_out/thumbnail"] == pytest.approx(1)
    assert "diversity/thumbnail" not in value["vae_round_trip"]  # of the same image for each seed
    assert value["real_other_photo"]["identity_held_out/thumbnail"] < 1
    noise, real, perfect = (value[row]["fid/thumbnail"] for row in ("no_references", "real_vs_real", "Perfect"))
    assert perfect < real < noise
    assert not any("identity" in key for key in value["real_vs_real"])


def test_copying_is_read_beside_the_real_held_out_photos(tested):
    folder, data, *_ = tested
    rows, key = read(folder)[0]["rows"], "nearest_reference/thumbnail"
    assert rows["real_held_out"].keys() == {key}
    assert rows["Perfect"][key]["value"] == pytest.approx(rows["real_held_out"][key]["value"], abs=1e-6)
    assert rows["real_other_photo"][key]["value"] == pytest.approx(1)  # they are references
    assert rows["real_held_out"][key]["value"] < 0.999
    assert (
        rows["real_held_out"][key]["low"] <= rows["real_held_out"][key]["value"] <= rows["real_held_out"][key]["high"]
    )
    task, best = data.tasks[0], read(folder)[1][0][key]
    pixels = [torch.from_numpy(np.array(photo.image())).permute(2, 0, 1) for photo in (task.held_out, *task.references)]
    seen = F.normalize(F.adaptive_avg_pool2d(torch.stack(pixels).float(), 3).flatten(1), dim=1)
    assert float(best) == pytest.approx(float((seen[1:] @ seen[0]).max()), abs=1e-5)


def test_the_audit_is_in_the_results_and_printed(tmp_path, capsys):
    data = Data()
    run(tmp_path, data=data, anchors=False)
    found = read(tmp_path)[0]["audit"]
    assert (found["people"], found["tasks"], found["photos"], found["pairs"]) == (3, 6, 18, 3 * 2 * 4)
    assert found["same_photo"] == 0
    assert found["training"]["status"] == "nothing"
    assert list(found["near_duplicates"]) == ["pixels"]
    assert "24 pairs of a held-out photo" in capsys.readouterr().out


def test_a_leak_is_refused_before_anything_is_sampled(tmp_path):
    data, module = Data(), Perfect()
    leaky = replace(data.tasks[0], references=(*data.tasks[0].references[1:], data.tasks[0].held_out))
    data.tasks[0] = leaky
    with pytest.raises(LeakError, match="is the same file as its reference"):
        run(tmp_path, module=module, data=data)
    assert module.calls == []
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize(
    ("conditions", "options", "others", "rows"),
    [
        (("right", "none"), {}, True, [ANCHORS[0], *ANCHORS[3:]]),  # of what the method can be conditioned on
        (Perfect.conditions, {}, False, [row for row in ANCHORS if row != "other_person"]),  # without anybody else
        (("right",), {"anchors": False}, True, []),
    ],
)
def test_only_the_anchors_are_made_that_there_can_be(conditions, options, others, rows, tmp_path):
    module = Perfect()
    module.conditions = conditions
    run(tmp_path, module=module, data=Data(test=1, others=others), **options)
    assert set(module.calls) == {"method", *conditions} - (set() if others else {"other"})
    metrics, lines = read(tmp_path)
    assert list(metrics["rows"]) == ["Perfect", *rows] and (rows or len(lines) == 2)


def test_every_long_part_shows_a_bar_from_the_first_batch_on(tmp_path, capsys):
    run(tmp_path / "shown", data=Data(test=2), trainer_options={"enable_progress_bar": True})
    shown = capsys.readouterr().err
    for batch in (1, 2):
        for row in ("no references", "zero embedding", "other person", "vae round trip"):
            assert f"anchors of batch {batch} of 2: {row}" in shown
    assert "scoring real photos by thumbnail" in shown and "40/40" in shown  # 16 real photos, six rows of 4
    run(tmp_path / "quiet", data=Data(test=2))
    assert "anchors" not in (quiet := capsys.readouterr().err) and "scoring" not in quiet


def test_personalising_is_no_part_of_the_methods_seconds(tmp_path):
    class Slow(Perfect):
        def test_step(self, batch, i):
            self.spent["personalise"] += 1000  # as if a thousand seconds of this step had gone into it
            return super().test_step(batch, i)

    run(tmp_path, module=Slow(), data=Data(test=2), anchors=False)  # 4 tasks, 2 batches
    seconds = read(tmp_path)[0]["seconds"]
    assert seconds["personalise"] == 2000.5 and -2000 < seconds["method"] < -1900


def test_every_score_states_how_many_images_and_people_it_is_of(tested):
    folder, data, *_ = tested
    metrics, _ = read(folder)
    purple = [task for task in data.tasks if "purple shirt" in task.prompt]
    assert 0 < len(purple) < len(data.tasks) == 12
    for row, scores in metrics["rows"].items():
        for key, score in scores.items():
            counted = purple if key == "prompt/thumbnail" else data.tasks
            assert score["n"] == len(counted), (row, key)
            assert score["people"] == len({task.person for task in counted}), (row, key)


def test_results_carry_what_made_them_and_no_bare_nan(tested):
    folder, data, *_ = tested
    metrics, _ = read(folder)
    assert metrics["protocol"] == protocol(data.tasks)
    assert metrics["describe"]["guidance_scale"] is None
    assert metrics["versions"]["torch"] == torch.__version__.split("+")[0] or metrics["versions"]["torch"]
    assert metrics["extractors"]["thumbnail"]["num_classes"] == 27
    assert set(metrics["seconds"]) == {"personalise", "method", "anchors", "scoring"}
    assert all(seconds > 0 for seconds in metrics["seconds"].values())


def test_the_table_of_images_gives_back_the_scores(tested):
    folder, data, *_ = tested
    metrics, lines = read(folder)
    assert len(lines) == 12 * 7  # real_vs_real has no tasks
    for row, scores in metrics["rows"].items():
        own = [line for line in lines if line["row"] == row]
        for key in scores:
            if row != "real_vs_real" and key.split("/")[0] not in ("fid", "kid", "is", "is_uniform"):
                values = [float(line[key]) for line in own if line[key]]
                assert np.mean(values) == pytest.approx(scores[key]["value"])
                assert len(values) == scores[key]["n"]
    assert [int(line["seed"]) for line in lines[:12]] == [task.seed for task in data.tasks]


def test_written_images_are_those_that_were_scored(tested):
    folder, data, *_ = tested
    _, lines = read(folder)
    for task, line in zip(data.tasks, lines, strict=False):
        assert (np.asarray(Image.open(folder / line["image"])) == np.asarray(task.held_out.image())).all()
    assert len(list((folder / "images").rglob("*.png"))) == len(data.tasks)
    assert Image.open(folder / "grid.png").width > 10 * 96


def test_the_photos_of_the_pictured_people_lie_beside_their_images(tested):
    folder, data, *_ = tested
    photos = read(folder)[0]["photos"]
    assert list(photos) == [person.name for person in data.split.test]
    for task in data.tasks:
        own = photos[task.person]
        pairs = [
            *zip(own["references"], task.references, strict=True),
            (own["held_out"][task.held_out.name], task.held_out),
        ]
        for file, photo in pairs:
            assert (np.asarray(Image.open(folder / file)) == np.asarray(photo.image())).all()
    assert len(list((folder / "photos").rglob("*.png"))) == 3 * (4 + 2)  # references and held-out photos, seeds once


def test_the_methods_scores_are_logged(tested):
    folder, _, _, logged = tested
    row = read(folder)[0]["rows"]["Perfect"]
    assert logged.keys() == {f"test/{key}" for key in row}
    assert logged["test/kid/thumbnail"] == pytest.approx(row["kid/thumbnail"]["value"], rel=1e-5)


def test_the_table_puts_the_method_first_and_says_what_is_better(tested):
    folder, *_ = tested
    table = (folder / "table.md").read_text("utf-8")
    lines = [line.split(" | ")[0].strip("| ") for line in table.splitlines() if line.startswith("|")]
    assert lines[2:] == ["Perfect", *(row.replace("_", " ") for row in ANCHORS)]
    for text in ("FID ↓", "identity ↑", "12 / 3", "3 people, 6 held-out photos x 2 seeds", "K = 27"):
        assert text in table


def test_the_protocol_is_of_the_tasks_that_were_sampled(tmp_path, caplog):
    data = Data()
    run(tmp_path, data=data, anchors=False, trainer_options={"limit_test_batches": 1})
    assert read(tmp_path)[0]["protocol"] == protocol(data.tasks[:2])
    assert "2 of 6 test tasks were drawn" in caplog.text


def test_an_earlier_tests_images_do_not_stay(tmp_path):
    run(tmp_path, anchors=False)
    before = set((tmp_path / "images").rglob("*.png"))
    (tmp_path / "notes.txt").write_text("mine")
    run(tmp_path, anchors=False, data=Data(test=1))
    after = set((tmp_path / "images").rglob("*.png"))
    assert len(before) == 6
    assert len(after) == 2
    assert (tmp_path / "notes.txt").exists()


@pytest.mark.parametrize(("seeds", "photos", "people"), [(1, 6, 3), (12, 24, 4)])  # of 72 tasks only 4 x 6 photos
def test_photos_of_strangers_come_evenly_from_as_many_people_as_are_tested(tmp_path, seeds, photos, people):
    run(tmp_path, data=Data(test=3, seeds=seeds))
    score = read(tmp_path)[0]["rows"]["real_vs_real"]["fid/thumbnail"]
    assert (score["n"], score["people"]) == (photos, people)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{}", "'clip' has the weights of the image encoder"),
        ("{}/image_encoder", "'clip' has the weights of the image encoder"),
        ("{}/unet/../image_encoder", "'clip' has the weights of the image encoder"),
        ("{}/image_encoder/faces.onnx", "would score its own work"),
    ],
)
def test_an_extractor_that_conditions_is_refused_before_anything_is_sampled(source, message, tmp_path):
    (tmp_path / "image_encoder").mkdir()
    (tmp_path / "unet").mkdir()
    module = Perfect(str(tmp_path))
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "test", module=module, extractors=[Thumbnail("clip", source.format(tmp_path))])
    assert module.calls == []


class SharpFaces(Thumbnail):
    """Finds no face in noise, and gives no features, as a face recogniser does."""

    num_features = num_classes = None

    def compute(self, images):
        embedding = super().compute(images).features
        noisy = (images[..., 1:].float() - images[..., :-1].float()).abs().mean(dim=(1, 2, 3)) > 60
        return Extraction(embedding=embedding.masked_fill(noisy[:, None], float("nan")))


def test_faces_that_are_not_found_are_counted_and_never_averaged_in(tmp_path, capsys):
    run(tmp_path, extractors=[SharpFaces("faces"), Thumbnail()])
    metrics, lines = read(tmp_path)
    assert metrics["faces_not_found"]["faces"] == {
        **{"real_photos": [0, 18 + 6], "Perfect": [0, 6], "vae_round_trip": [0, 6], "real_other_photo": [0, 6]},
        **{row: [6, 6] for row in ("no_references", "zero_embedding", "other_person")},
    }
    assert "thumbnail" not in metrics["faces_not_found"]
    rows = metrics["rows"]
    assert rows["Perfect"]["identity_held_out/faces"]["value"] == pytest.approx(1)
    assert not any(key.endswith("/faces") and "identity" in key for key in rows["no_references"])
    assert not {"fid/faces", "kid/faces", "is/faces", "diversity/faces"} & rows["Perfect"].keys()
    assert all(line["identity_held_out/faces"] == "" for line in lines if line["row"] == "no_references")
    printed = capsys.readouterr().out
    assert "- no references: face not found in 6 of 6 images (100.0%), which are in no mean" in printed


def test_a_method_without_any_face_says_so_and_keeps_its_empty_scores(tmp_path, capsys):
    class Noise(Perfect):
        def generate(self, batch, references="right"):
            return super().generate(batch, "none")

    run(tmp_path, module=Noise(name="Noise"), extractors=[SharpFaces("faces")], anchors=False)
    assert "- Noise: face not found in 6 of 6 images (100.0%), which are in no mean" in capsys.readouterr().out
    assert read(tmp_path)[0]["rows"]["Noise"].keys() == {"prompt/faces"}
    generated, held_out = report.read_features(tmp_path / "features_faces.safetensors")
    assert np.isnan(generated.per_image["identity_held_out"]).all() and held_out.features is None
    assert summarise("faces", generated, held_out, left_out=(reasons := {})).keys() == {"prompt/faces"}
    assert reasons["identity_held_out/faces"] == "it is undefined for all 6 images"


def test_another_network_inside_the_backbones_folder_may_score(tmp_path):
    module = Perfect(str(tmp_path))
    run(tmp_path / "test", module=module, extractors=[Thumbnail("critic", str(tmp_path / "critic"))], anchors=False)
    assert "fid/critic" in read(tmp_path / "test")[0]["rows"]["Perfect"]


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_sampled(tmp_path):
    (tmp_path / "file").write_text("")
    module = Perfect()
    with pytest.raises(OSError, match=r"cannot write test results to .*file.*set ScoreTest's output"):
        run(tmp_path / "file" / "test", module=module)
    assert module.calls == []


def test_two_extractors_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="thumbnail, thumbnail"):
        run(tmp_path, extractors=[Thumbnail(), Thumbnail()])


@pytest.mark.parametrize("options", [{"groups": 1}, {"resamples": 0}, {"grid_people": 0}, {"extractors": []}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="give at least"):
        ScoreTest(**options)


def test_results_lie_in_the_run_whose_checkpoint_is_tested(tmp_path):
    module, data = Perfect(), Data(test=1)
    checkpoint = tmp_path / "run" / "version_3" / "checkpoints" / "best.ckpt"
    checkpoint.parent.mkdir(parents=True)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    trainer = L.Trainer(**options)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(checkpoint)
    score = ScoreTest([Thumbnail()], anchors=False, resamples=10)
    trainer = L.Trainer(**options, default_root_dir=tmp_path / "else", callbacks=[score])
    trainer.test(module, datamodule=data, ckpt_path=str(checkpoint), verbose=False)
    assert (tmp_path / "run" / "version_3" / "test" / "metrics.json").exists()
    trainer.test(module, datamodule=data, verbose=False)
    assert (tmp_path / "else" / "test" / "metrics.json").exists()


def test_anchors_are_sampled_in_the_trainers_precision(tmp_path):
    seen = []

    class Watched(Perfect):
        def generate(self, batch, references="right"):
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().generate(batch, references)

    run(tmp_path, module=Watched(), data=Data(test=1), trainer_options={"precision": "bf16-mixed"})
    assert seen == [True] * 4  # one batch, four rows


TWO_RANKS = """
import sys
from pathlib import Path
sys.path.insert(0, str(Path({tests!r})))
from scoring import Data, run
run(Path({folder!r}), data=Data(test=3, photos=5), trainer_options={{"strategy": "ddp_fork", "devices": 2}})
"""


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_two_ranks_score_what_one_scores(tmp_path):
    # 3 tasks: the second rank is given one of them once more
    run(tmp_path / "one", data=Data(test=3, photos=5))
    script = TWO_RANKS.format(tests=str(Path(__file__).parents[1] / "support"), folder=str(tmp_path / "two"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    assert one[0]["protocol"] == two[0]["protocol"]
    assert one[0]["protocol"]["tasks"] == 3
    assert one[0]["rows"] == two[0]["rows"]
    assert one[1] == two[1]
    assert one[0]["seconds"]["personalise"] == 0.5 and two[0]["seconds"]["personalise"] == 1.0  # of both ranks


def test_a_table_has_the_method_first_and_then_the_anchors():
    counts = {"people": 2, "tasks": 4, "held_out": 4, "references": 9, "seeds": 1, "sha256": "aa"}
    scores = {"Max": Score(1.5, 1.0, 2.0, 4, 2), "no_references": Score(9, None, None, 4, 2)}
    rows = {row: {"fid/c": score._asdict()} for row, score in scores.items()}
    table = report.table({"protocol": counts, "rows": rows, "extractors": {"c": {"num_classes": None}}})
    names = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    assert names[2:] == ["Max", "no references"]
    assert "1.50 [1.00, 2.00]" in table


@pytest.mark.parametrize(
    ("score", "text"),
    [
        (Score(0.81234, 0.79, 0.83, 9, 3), "0.812 [0.790, 0.830]"),
        (Score(123.4, 100.0, 150.0, 9, 3), "123 [100, 150]"),
        (Score(0.00041, -0.0002, 0.001, 9, 3), "0.0004 [-0.0002, 0.0010]"),
        (Score(8.0, None, None, 9, 1), "8.000"),
        (Score(1.0, 1.0, 1.0, 9, 3), "1.000 [1.000, 1.000]"),
        (Score(-1e-9, -2e-9, -1e-9, 9, 3), "0.0000 [0.0000, 0.0000]"),
        (None, ""),
    ],
)
def test_cells_keep_two_digits_of_half_the_interval(score, text):
    assert report.cell(score and score._asdict()) == text


def test_the_commit_is_this_checkouts_or_nothing():
    found = report.commit()
    with nullcontext() if found else pytest.raises(AssertionError):
        assert found
        assert len(found.removesuffix("-dirty")) == 40


def test_file_names_that_are_no_text_can_be_written(tmp_path):
    report.write_csv(tmp_path / "scores.csv", [{"held_out": "bad\udcff.jpg", "score": float("nan")}, {"score": 1.0}])
    assert (tmp_path / "scores.csv").read_text() == "held_out,score\nbad\\udcff.jpg,\n,1.0\n"
    report.write_json(tmp_path / "metrics.json", {"a": [float("nan"), {"b": float("-inf")}], "c": "bad\udcff"})
    assert json.loads((tmp_path / "metrics.json").read_text())["a"] == [None, {"b": None}]
