import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from commands import config_args, refusal
from PIL import Image
from scoring import read

from lit_multiip.__main__ import main
from lit_multiip.data import MiniFaces, make_tasks
from lit_multiip.evaluation.audit import LeakError, audit_images
from lit_multiip.pixels import square
from lit_multiip.tools.outside import ImagesError, name_images, read_images

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def there(tiny_backbone, tmp_path_factory):
    """A folder with the config of a test, the test, and what `tasks` writes for the same config."""
    folder = tmp_path_factory.mktemp("outside")
    config = {
        "backbone": {"path": str(tiny_backbone)},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
        "model": {"init_args": {"sampling": {"steps": 2}}},
        "data": {
            "source": {"class_path": "MiniFaces", "init_args": {"train": 3, "validation": 1, "test": 2, "photos": 11}},
            **{"held_out": 2, "seeds": 2, "references": 4, "cache_dir": str(folder / "features")},
        },
        "score": {"extractors": [{"class_path": "scoring.Thumbnail"}], "resamples": 20},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    options = config_args(CONFIGS / "avg_pool.yaml", folder / "config.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["test", *options])
        main(["tasks", *options])
    return folder, options


def wanted(folder: Path) -> list[dict]:
    return json.loads((folder / "tasks" / "tasks.json").read_text())["tasks"]


def copy_out(folder: Path, target: Path) -> tuple[Path, str]:
    """The images of the test in `folder` under the names that `tasks` gave them, and the method's name."""
    test = folder / "runs" / "avg_pool" / "version_0" / "test"
    metrics, lines = read(test)
    method = metrics["describe"]["method"]
    own = [line for line in lines if line["row"] == method]
    for task, line in zip(wanted(folder), own, strict=True):
        (target / task["image"]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(test / line["image"], target / task["image"])
    return test, method


def test_a_tests_own_images_scored_back_have_its_figures_to_the_last_digit(there, tmp_path, monkeypatch, capsys):
    folder, options = there
    monkeypatch.chdir(folder)
    test, method = copy_out(folder, tmp_path / "drawn")
    main(["score", *options, "--images", str(tmp_path / "drawn"), "--name", method])
    [back] = folder.glob(f"runs/{method}/version_0/test")
    (a, lines), (b, lines_back) = read(test), read(back)
    assert b["rows"].keys() == a["rows"].keys() - {"no_references", "zero_embedding", "other_person", "vae_round_trip"}
    assert b["rows"] == {row: a["rows"][row] for row in b["rows"]}
    for same in ("protocol", "extractors", "photos", "versions", "commit", "faces_not_found"):
        assert a[same] == b[same]
    assert a["audit"].pop("training")["status"] == "nothing" and b["audit"].pop("training")["status"] == "unknown"
    assert b["audit"].pop("images")["same_photo"] == 0
    assert a["audit"] == b["audit"]
    assert lines_back == [line for line in lines if line["row"] in b["rows"]]
    name = "features_thumbnail.safetensors"
    assert (back / name).read_bytes() == (test / name).read_bytes()
    assert b["describe"]["image_side"] == a["describe"]["image_side"] and b["seconds"]["method"] is None
    said = capsys.readouterr()
    assert "a held-out photo among the images: none" in said.out and "training: UNKNOWN" in said.out


def test_tasks_have_references_prompts_and_seeds_and_no_held_out_photo(there):
    folder, _ = there
    content = json.loads((folder / "tasks" / "tasks.json").read_text())
    source = MiniFaces(train=3, validation=1, test=2, photos=11)
    tasks = make_tasks([p for p in source.people() if p.split == "test"], references=4, held_out=2, seeds=2)
    assert content["image_side"] == 32 and len(content["tasks"]) == len(tasks) == 8
    assert [(t["person"], t["prompt"], t["seed"]) for t in content["tasks"]] == [
        (t.person, t.prompt, t.seed) for t in tasks
    ]
    for given, task in zip(content["tasks"], tasks, strict=True):
        shown = [np.asarray(Image.open(folder / "tasks" / file)) for file in given["references"]]
        assert all(np.array_equal(a, b.image()) for a, b in zip(shown, task.references, strict=True))
    written = {hashlib.sha256(Image.open(file).tobytes()).digest() for file in (folder / "tasks").rglob("*.png")}
    held_out = {hashlib.sha256(task.held_out.image().tobytes()).digest() for task in tasks}
    assert len(written) == 8 and not written & held_out


def test_every_task_has_an_image_of_its_own_and_another_protocol_other_names():
    people = MiniFaces(train=1, validation=1, test=3, photos=8).people()[:3]
    names = name_images(make_tasks(people, references=3, held_out=5, seeds=2))
    assert len(set(names)) == len(names) == 30
    assert names == name_images(make_tasks(people, references=3, held_out=5, seeds=2))
    fewer = name_images(make_tasks(people, references=2, held_out=5, seeds=2))
    assert {name[:-13] for name in fewer} & {name[:-13] for name in names}  # of the same held-out photos
    assert not set(fewer) & set(names)


@pytest.fixture
def drawn(tmp_path):
    """Tasks of one person, and a folder of images for them."""
    people = MiniFaces(train=1, validation=1, test=1, photos=6).people()[:1]
    tasks = make_tasks(people, references=2, held_out=3)
    rng = np.random.default_rng(0)
    for name in name_images(tasks):
        path = tmp_path / "drawn" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    return tasks, tmp_path / "drawn", [tmp_path / "drawn" / name for name in name_images(tasks)]


def test_images_are_read_in_the_order_of_the_tasks_and_other_files_are_left_alone(drawn):
    tasks, folder, files = drawn
    (folder / "log.txt").write_text("done")
    (folder / ".thumb.png").write_bytes(b"x")
    images = read_images(folder, tasks, 64)
    assert images.shape == (3, 3, 64, 64)
    assert all(
        np.array_equal(image.permute(1, 2, 0), Image.open(file)) for image, file in zip(images, files, strict=True)
    )


def rename_to_jpg(files):
    files[0].rename(files[0].with_suffix(".jpg"))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda files: files[1].unlink(), "lacks 1 of 3 images, such as '{1}': draw"),
        (rename_to_jpg, "lacks 1 of 3 images, such as '{0}', and has 1 of other names, such as '{0:.jpg}': draw"),
        (
            lambda files: shutil.copy(files[0], files[0].parent / "more.png"),
            r"has images that no task asks for \(1\), such as '.*more.png': move",
        ),
        (
            lambda files: Image.new("RGB", (65, 64)).save(files[2]),
            "1 of 3 images .* such as '{2}' with 65 x 64 px, .* 64 x",
        ),
        (lambda files: files[2].write_bytes(files[2].read_bytes()[:99]), "image .*{2}: .*: draw it again"),
        (lambda files: files[2].write_text("sorry"), "{2}: not a JPEG, PNG, WebP or BMP picture: draw it again"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_by_name(drawn, spoil, said):
    tasks, folder, files = drawn
    spoil(files)
    names = [str(file.relative_to(folder)) for file in files]
    said = said.replace("{0:.jpg}", names[0].replace(".png", ".jpg"))
    with pytest.raises(ImagesError, match=said.format(*names)):
        read_images(folder, tasks, 64)


def test_images_of_another_protocol_are_refused_by_name(drawn):
    _, folder, _ = drawn
    people = MiniFaces(train=1, validation=1, test=1, photos=6).people()[:1]
    with pytest.raises(ImagesError, match=r"3 of 3 images in .* are of another protocol: .* that `tasks` was given"):
        read_images(folder, make_tasks(people, references=1, held_out=3), 64)


def test_a_held_out_photo_among_the_images_is_refused_and_a_copy_that_was_encoded_again_is_told(drawn, caplog):
    tasks, folder, files = drawn
    other = square(tasks[2].held_out.image(), 64)  # of another task than the image's
    other.save(files[0])
    names = name_images(tasks)
    with pytest.raises(LeakError, match=f"image '{names[0]}' is the held-out photo '{tasks[2].held_out.name}'"):
        audit_images(tasks, read_images(folder, tasks, 64), names)
    square(tasks[0].held_out.image(), 64).save(folder / "a.jpg", quality=90)
    Image.open(folder / "a.jpg").save(files[0])
    (folder / "a.jpg").unlink()
    near = audit_images(tasks, read_images(folder, tasks, 64), names)["near_duplicates"]["pixels"]
    assert near["count"] == 1 and near["largest"]["image"] == names[0] and near["largest"]["similarity"] > 0.95
    assert names[0] in caplog.text


def test_what_cannot_be_scored_is_one_line_before_work_is_lost(there, tmp_path, monkeypatch, capsys):
    folder, options = there
    monkeypatch.chdir(folder)
    assert "'tasks' is not empty: delete it" in refusal(capsys, "tasks", *options, code=2)
    gone = refusal(capsys, "score", *options, "--images", "gone", "--name", "A", code=2)
    assert "'gone' is not a folder" in gone
    copy_out(folder, tmp_path)
    given = ("--images", str(tmp_path), "--name")
    assert "an anchor's" in refusal(capsys, "score", *options, *given, "vae_round_trip", code=2)
    other = refusal(capsys, "score", *options, *given, "A", "--data.references", "3")
    assert "8 of 8 images" in other and "are of another protocol" in other
    held_out = make_tasks([p for p in MiniFaces(test=2, photos=11).people() if p.split == "test"], 4, 2, 2)[0].held_out
    square(held_out.image(), 32).save(tmp_path / wanted(folder)[3]["image"])
    leak = refusal(capsys, "score", *options, *given, "A")
    assert f"is the held-out photo '{held_out.name}' of '{held_out.person}'" in leak
    assert not list(folder.glob("runs/A/version_*/test/metrics.json"))
