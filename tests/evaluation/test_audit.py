from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageOps

from lit_multiip.data.people import Folder, MiniFaces, Person
from lit_multiip.data.record import RECORD, training_record
from lit_multiip.data.tasks import make_tasks
from lit_multiip.evaluation.audit import (
    SIMILAR_PIXELS,
    LeakError,
    audit_tasks,
    embedding_similarity,
    find_record,
    look,
    near_duplicates,
    pixel_similarity,
    summary,
    warn,
)

LFW = Path(__file__).parents[3] / "shared" / "lfw-deepfunneled"
needs_lfw = pytest.mark.skipif(not LFW.is_dir(), reason="needs photos of LFW")
FACES = MiniFaces(train=4, validation=2, test=3, photos=8).people()


def side(name: str) -> list[Person]:
    return [person for person in FACES if person.split == name]


def files(folder: Path, people: dict[str, list[Image.Image]]) -> list[Person]:
    """People of files, the photos of each under another name than anybody else's."""
    for name, images in people.items():
        (folder / name).mkdir(parents=True)
        for number, image in enumerate(images):
            image.save(folder / name / f"{name}_{number}.png")
    return Folder(str(folder)).people()


def portraits(person: Person, count: int) -> list[Image.Image]:
    return [photo.image() for photo in person.photos[:count]]


# Copies by pixels


def jpeg(quality: int, scale: float = 1.0) -> Callable[[Image.Image, Path], Image.Image]:
    def copy(image: Image.Image, folder: Path) -> Image.Image:
        image.resize([round(scale * length) for length in image.size]).save(folder / "copy.jpg", quality=quality)
        return Image.open(folder / "copy.jpg")

    return copy


COPIES = {
    "jpeg_20": jpeg(20),
    "half_the_size": jpeg(95, 0.5),
    "twice_the_size": jpeg(60, 2.0),
    "mirrored": lambda image, folder: ImageOps.mirror(image),
    "brighter": lambda image, folder: image.point(lambda value: min(255, round(1.15 * value))),
}


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_in_another_quality_size_or_light_is_near(copy: str, tmp_path: Path) -> None:
    photos = [person.photos[0].image() for person in side("test")]
    if LFW.is_dir():
        photos += [Image.open(sorted(folder.glob("*.jpg"))[0]) for folder in sorted(LFW.iterdir())[:10]]
    for photo in photos:
        if copy == "half_the_size" and photo.width == 64:
            continue  # 32 px in a JPEG: what is left is mostly the JPEG
        assert pixel_similarity(look(photo), look(COPIES[copy](photo, tmp_path).convert("RGB"))) > SIMILAR_PIXELS


def test_other_photos_of_the_same_drawn_person_are_not_near() -> None:
    people = MiniFaces(train=1, validation=1, test=20).people()
    looks = [[look(photo.image()) for photo in person.photos] for person in people if person.split == "test"]
    most = max(pixel_similarity(a, b) for own in looks for a, b in itertools.combinations(own, 2))
    assert 0.8 < most < SIMILAR_PIXELS  # of 20 x 91 pairs


@needs_lfw
def test_of_lfws_pairs_one_alone_is_near_and_that_is_a_copy() -> None:
    near, pairs = [], 0
    for folder in sorted(LFW.iterdir()):
        looks = {path.name: look(Image.open(path).convert("RGB")) for path in sorted(folder.glob("*.jpg"))}
        for a, b in itertools.combinations(looks, 2):
            pairs += 1
            if pixel_similarity(looks[a], looks[b]) >= SIMILAR_PIXELS:
                near.append((a, b))
    assert near == [("Julianne_Moore_0001.jpg", "Julianne_Moore_0008.jpg")]
    assert pairs == 4933


def test_pairs_are_ranked_and_counted_by_the_threshold() -> None:
    a, b, c = side("test")[0].photos[:3]
    place = {a: 0, b: 1, c: 2}
    embedding = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]])
    similar = embedding_similarity([(a, b), (a, c), (c, b)], embedding, place)
    assert similar.tolist() == pytest.approx([0.0, 0.6, 0.8])
    near = near_duplicates([(a, b), (a, c), (c, b)], similar, 0.7)
    assert near["count"] == 1 and near["largest"] == near["pairs"][0]
    assert (near["largest"]["held_out"], near["largest"]["reference"]) == (c.name, b.name)
    assert near_duplicates([(a, b)], similar[:1], 0.7)["largest"]["similarity"] == pytest.approx(0.0)


def test_a_recompressed_copy_is_listed_counted_and_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = portraits(side("test")[0], 3)
    copy = jpeg(60)(images[0], tmp_path)
    [person] = files(tmp_path / "photos", {"Ann": [*images, copy.convert("RGB")]})
    original, _, other, again = person.photos
    [task] = make_tasks([person], references=3, held_out=1)
    task = replace(task, held_out=original, references=(other, again))
    audit = audit_tasks([task], "nothing", None)
    near = audit["near_duplicates"]["pixels"]
    assert (near["count"], near["largest"]["reference"], audit["pairs"]) == (1, again.name, 2)
    assert near["largest"]["similarity"] > SIMILAR_PIXELS
    warn(audit)
    assert "1 held-out photos have a near-duplicate by pixels" in caplog.text and again.name in caplog.text
    assert "near-duplicates by pixels (0.95 or more): 1; nearest" in summary(audit)


# Exact leaks


@pytest.mark.parametrize(("suffix", "what"), [(".png", "equal in content"), (".bmp", "equal in every pixel")])
def test_a_copy_of_the_held_out_photo_among_its_references_is_refused(tmp_path: Path, suffix: str, what: str) -> None:
    images = portraits(side("test")[0], 3)
    [person] = files(tmp_path, {"Ann": images})
    if suffix == ".png":
        (tmp_path / "Ann" / "z.png").write_bytes((tmp_path / "Ann" / "Ann_0.png").read_bytes())
    else:
        images[0].save(tmp_path / "Ann" / "z.bmp")
    [person] = Folder(str(tmp_path)).people()
    by_name = {photo.name: photo for photo in person.photos}
    task = replace(make_tasks([person], 2, 1)[0], held_out=by_name["Ann_0.png"])
    task = replace(task, references=(by_name["Ann_1.png"], by_name["z" + suffix]))
    with pytest.raises(LeakError, match=f"'Ann_0.png' of 'Ann' is {what} as its reference 'z{suffix}'"):
        audit_tasks([task], "nothing", None)


def test_a_test_person_on_the_record_is_refused() -> None:
    tasks = make_tasks(side("test"), 4, 2)
    clean = training_record([*side("train"), *side("validation")])
    training = audit_tasks(tasks, "recorded", clean)["training"]
    assert training == {
        **{"status": "recorded", "people": 6, "photos": 48, "people_seen": 0, "photos_seen": 0},
        "drawn_people_of_other_roles": 0,
    }
    leaky = training_record([*side("train"), side("test")[1]])
    with pytest.raises(LeakError, match=f"1 of 3 test people were trained or validated on, such as '{FACES[1].name}'"):
        audit_tasks(tasks, "recorded", leaky)


def test_a_test_photo_trained_on_under_another_name_is_refused(tmp_path: Path) -> None:
    images = portraits(side("test")[0], 6)
    [ann] = files(tmp_path / "a", {"Ann": images})
    [eve] = files(tmp_path / "b", {"Eve": images[:1]})
    with pytest.raises(LeakError, match="1 of 6 test photos were trained or validated on under other people's names"):
        audit_tasks(make_tasks([ann], 4, 2), "recorded", training_record([eve]))


def test_a_drawn_person_of_the_critics_range_is_refused() -> None:
    tasks = make_tasks(side("train"), 4, 1)
    with pytest.raises(LeakError, match="4 drawn test people, such as 'train_000000'"):
        audit_tasks(tasks, "nothing", None)


# Records


def test_the_record_names_nobody_and_adds_up_over_resumed_fits() -> None:
    first = training_record(side("train"))
    assert {key: tuple(rows.shape) for key, rows in first.items()} == {"people": (4, 32), "photos": (32, 32)}
    both = training_record(side("validation"), first)
    assert {key: len(rows) for key, rows in both.items()} == {"people": 6, "photos": 48}
    alone = training_record([*side("validation"), *side("train")])
    assert all(torch.equal(both[key], alone[key]) for key in both)


def test_the_record_is_found_in_the_checkpoint_or_its_absence_told(tmp_path: Path) -> None:
    def found(path: Path | None, **describe: str) -> tuple[str, object]:
        return find_record(SimpleNamespace(ckpt_path=path, global_step=0, datamodule=None), describe)

    record = training_record(side("train"))
    torch.save({RECORD: record, "state_dict": {}}, tmp_path / "with.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "without.ckpt")
    status, read = found(tmp_path / "with.ckpt")
    assert status == "recorded" and isinstance(read, dict) and torch.equal(read["people"], record["people"])
    assert found(tmp_path / "without.ckpt") == ("unknown", None)
    assert found(None, ip_adapter="auto") == ("nothing", None)
    assert found(None, ip_adapter="file") == ("unknown", None)


def test_what_is_not_known_is_told(caplog: pytest.LogCaptureFixture) -> None:
    tasks = make_tasks(side("test"), 4, 2)
    for status, text in (("nothing", "nothing was trained in this project"), ("unknown", "UNKNOWN")):
        assert text in summary(audit_tasks(tasks, status, None))
    warn(audit_tasks(tasks, "unknown", None))
    assert "carry no record" in caplog.text


@pytest.mark.parametrize("name", ["validation", "train"])
def test_scores_of_people_who_are_no_test_people_say_so(name: str) -> None:
    data = SimpleNamespace(tested=name)
    trainer = SimpleNamespace(datamodule=data, ckpt_path="any.ckpt", global_step=0)
    status, record = find_record(trainer, {})
    assert (status, record) == (name, None)
    audit = audit_tasks(make_tasks(side(name), 4, 2), status, record)
    assert f"NO TEST, {'training' if name == 'train' else name} people" in summary(audit)
