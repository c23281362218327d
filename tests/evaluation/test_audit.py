import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from lit_multiip.data.people import Folder, MiniFaces, Person
from lit_multiip.data.record import RECORD, Record, is_incomplete, read_record, training_record, unknown_record
from lit_multiip.data.tasks import make_tasks
from lit_multiip.evaluation.audit import (
    SIMILAR_PIXELS,
    LeakError,
    audit_tasks,
    find_record,
    make_signature,
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
def test_a_copy_in_another_quality_size_or_light_is_near(copy, tmp_path):
    photos = [person.photos[0].image() for person in side("test")]
    if LFW.is_dir():
        photos += [Image.open(sorted(folder.glob("*.jpg"))[0]) for folder in sorted(LFW.iterdir())[:10]]
    for photo in photos:
        if copy == "half_the_size" and photo.width == 64:
            continue  # 32 px in a JPEG: what is left is mostly the JPEG
        copied = COPIES[copy](photo, tmp_path).convert("RGB")
        assert pixel_similarity(make_signature(photo), make_signature(copied)) > SIMILAR_PIXELS


def test_other_photos_of_the_same_drawn_person_are_not_near():
    people = [person for person in MiniFaces(train=1, validation=1, test=20).people() if person.split == "test"]
    signatures = [[make_signature(photo.image()) for photo in person.photos] for person in people]
    most = max(pixel_similarity(a, b) for own in signatures for a, b in itertools.combinations(own, 2))
    assert 0.8 < most < SIMILAR_PIXELS  # of 20 x 91 pairs


@needs_lfw
def test_of_lfws_pairs_three_are_near_and_these_are_copies():
    near, pairs = [], 0
    for folder in sorted(LFW.iterdir()):
        paths = sorted(folder.glob("*.jpg"))
        signatures = {path.name: make_signature(Image.open(path).convert("RGB")) for path in paths}
        for a, b in itertools.combinations(signatures, 2):
            pairs += 1
            if pixel_similarity(signatures[a], signatures[b]) >= SIMILAR_PIXELS:
                near.append((a, b))
    assert near == [  # each pair is one shot, encoded or cropped twice
        ("Ari_Fleischer_0006.jpg", "Ari_Fleischer_0011.jpg"),
        ("Julianne_Moore_0001.jpg", "Julianne_Moore_0008.jpg"),
        ("Renee_Zellweger_0010.jpg", "Renee_Zellweger_0013.jpg"),
    ]
    assert pairs == 8167


def test_all_near_pairs_are_counted_and_listed_in_order():
    a, b = side("test")[0].photos[:2]
    pairs, similar = [(a, b)] * 100, np.linspace(0.5, 1.0, 100)
    near = near_duplicates(pairs, similar, 0.7)
    assert near["count"] == len(near["pairs"]) == 60 and near["largest"] == near["pairs"][0]
    assert [pair["similarity"] for pair in near["pairs"]] == sorted(similar[40:], reverse=True)
    none = near_duplicates([(a, b)], similar[:1], 0.7)
    assert none["pairs"] == [] and none["largest"]["similarity"] == 0.5


def test_the_number_of_near_pairs_that_is_told_is_the_true_one(tmp_path, caplog):
    """12 held-out photos with two copies each among their references: 24 pairs."""
    drawn = [photo.image() for person in FACES for photo in person.photos][:12]
    copies = [[jpeg(quality)(image, tmp_path).convert("RGB") for quality in (60, 80)] for image in drawn]
    people = {f"p{i:02d}": [image, *copies[i]] for i, image in enumerate(drawn)}
    tasks = [
        replace(make_tasks([person], 2, 1)[0], held_out=person.photos[0], references=tuple(person.photos[1:]))
        for person in files(tmp_path / "photos", people)
    ]
    audit = audit_tasks(tasks, "nothing", None)
    assert audit["near_duplicates"]["pixels"]["count"] == len(audit["near_duplicates"]["pixels"]["pairs"]) == 24
    warn(audit)
    assert "24 of 24 pairs of a held-out photo and its reference are near-duplicates by pixels" in caplog.text


def test_a_recompressed_copy_is_listed_counted_and_warned_about(tmp_path, caplog):
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
    assert "1 of 2 pairs of a held-out photo and its reference are near-duplicates by pixels" in caplog.text
    assert again.name in caplog.text
    assert "near-duplicates by pixels (0.95 or more): 1; nearest" in summary(audit)


# Exact leaks


@pytest.mark.parametrize(("suffix", "what"), [(".png", "equal in content"), (".bmp", "equal in every pixel")])
def test_a_copy_of_the_held_out_photo_among_its_references_is_refused(tmp_path, suffix, what):
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


def test_a_test_person_on_the_record_is_refused():
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


def test_a_test_photo_trained_on_under_another_name_is_refused(tmp_path):
    images = portraits(side("test")[0], 6)
    [ann] = files(tmp_path / "a", {"Ann": images})
    [eve] = files(tmp_path / "b", {"Eve": images[:1]})
    with pytest.raises(LeakError, match="1 of 6 test photos were trained or validated on under other people's names"):
        audit_tasks(make_tasks([ann], 4, 2), "recorded", training_record([eve]))


def test_a_drawn_person_of_the_critics_range_is_refused():
    tasks = make_tasks(side("train"), 4, 1)
    with pytest.raises(LeakError, match="4 drawn test people, such as 'train_000000'"):
        audit_tasks(tasks, "nothing", None)


# Records


def test_the_record_names_nobody_and_adds_up_over_resumed_fits():
    first = training_record(side("train"))
    assert {key: tuple(rows.shape) for key, rows in first.items()} == {"people": (4, 32), "photos": (32, 32)}
    both = training_record(side("validation"), None, first)
    assert {key: len(rows) for key, rows in both.items()} == {"people": 6, "photos": 48}
    alone = training_record([*side("validation"), *side("train")])
    assert all(torch.equal(both[key], alone[key]) for key in both)


def method_of(trained_on: Record | None, backbone: Record | None = None) -> SimpleNamespace:
    return SimpleNamespace(trained_on=trained_on, backbone=SimpleNamespace(trained_on=lambda: backbone))


def find(path: Path | None, trained_on: Record | None, backbone: Record | None = None) -> tuple[str, Record | None]:
    trainer = SimpleNamespace(ckpt_path=path, global_step=0, datamodule=None)
    return find_record(trainer, method_of(trained_on, backbone))


def test_people_of_the_backbones_own_training_are_on_the_record_too():
    own, other = training_record(side("train")), training_record(side("validation"))
    assert find(None, None, None) == ("nothing", None)
    status, record = find(None, None, own)
    assert status == "recorded" and len(record["people"]) == len(side("train"))
    both = len(side("train")) + len(side("validation"))
    assert len(find(None, other, own)[1]["people"]) == both


def test_the_record_is_found_in_the_checkpoint_or_its_absence_told(tmp_path):
    record = training_record(side("train"))
    torch.save({RECORD: record, "state_dict": {}}, tmp_path / "with.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "without.ckpt")
    status, read = find(tmp_path / "with.ckpt", None)
    assert status == "recorded" and read is not None and torch.equal(read["people"], record["people"])
    assert find(tmp_path / "without.ckpt", None) == ("unknown", None)
    assert find(None, None) == ("nothing", None)


def test_the_people_behind_the_weights_that_a_method_started_from_count(tmp_path):
    """A was trained on P1, B went on from it with others; B's test of P1 is refused, by either record."""
    behind = training_record(side("test"))
    torch.save({RECORD: training_record(side("train"), behind), "state_dict": {}}, tmp_path / "b.ckpt")
    torch.save({RECORD: training_record(side("train")), "state_dict": {}}, tmp_path / "silent.ckpt")
    tasks = make_tasks(side("test"), 4, 2)
    for path, start in ((tmp_path / "b.ckpt", None), (tmp_path / "silent.ckpt", behind), (None, behind)):
        status, record = find(path, start)
        assert status == "recorded"
        with pytest.raises(LeakError, match="3 of 3 test people were trained or validated on"):
            audit_tasks(tasks, status, record)


def test_a_start_without_a_record_makes_the_answer_unknown_and_known_people_still_count(tmp_path):
    tasks = make_tasks(side("test"), 4, 2)
    assert find(None, unknown_record()) == ("unknown", None)
    for number, start in enumerate((training_record(side("train"), unknown_record()), training_record(side("train")))):
        torch.save({RECORD: start, "state_dict": {}}, path := tmp_path / f"{number}.ckpt")
        status, record = find(path, unknown_record())
        assert status == "unknown" and record is not None
        assert "UNKNOWN" in (said := summary(audit_tasks(tasks, status, record)))
        assert "no test person among the 4 people on record" in said
        with pytest.raises(LeakError, match="3 of 3 test people"):
            audit_tasks(tasks, status, training_record(side("test"), record))


@pytest.mark.parametrize("rows", [torch.zeros(3, 31, dtype=torch.uint8), torch.zeros(3, 32), torch.zeros(3)])
def test_what_is_no_record_in_a_file_is_an_unknown_one(rows):
    whole = training_record(side("train"))
    assert not is_incomplete(read_record(whole)) and torch.equal(read_record(whole)["photos"], whole["photos"])
    assert is_incomplete(read_record({**whole, "people": rows}))
    assert is_incomplete(read_record({"people": whole["people"]})) and is_incomplete(read_record(None))


def test_what_is_not_known_is_told(caplog):
    tasks = make_tasks(side("test"), 4, 2)
    for status, text in (("nothing", "nothing was trained in this project"), ("unknown", "UNKNOWN")):
        assert text in summary(audit_tasks(tasks, status, None))
    warn(audit_tasks(tasks, "unknown", None))
    assert "carry no record" in caplog.text


@pytest.mark.parametrize("name", ["validation", "train"])
def test_scores_of_people_who_are_no_test_people_say_so(name):
    data = SimpleNamespace(tested=name)
    trainer = SimpleNamespace(datamodule=data, ckpt_path="any.ckpt", global_step=0)
    status, record = find_record(trainer, method_of(None))
    assert (status, record) == (name, None)
    audit = audit_tasks(make_tasks(side(name), 4, 2), status, record)
    assert f"NO TEST, {'training' if name == 'train' else name} people" in summary(audit)
