"""What is wrong with a person's photos is found, and the best come first."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import refusal
from PIL import Image, ImageFilter
from torch import Tensor

from lit_multiip.__main__ import main
from lit_multiip.data.people import Folder, MiniFaces, Person, read_person
from lit_multiip.evaluation.critic import Resemblance
from lit_multiip.evaluation.extractors import Extraction, Extractor
from lit_multiip.evaluation.faces import Dlib, FaceRecognition
from lit_multiip.evaluation.photo_check import check_person, sharpness
from lit_multiip.files import LitMultiIPError

SHARED = Path(__file__).resolve().parents[2].parent / "shared"


class ByColour(Extractor):
    """Tells people by the mean colour of their photos; black photos show no face."""

    name, can_identify, same_person = "by_colour", True, 0.9

    def compute(self, images: Tensor) -> Extraction:
        means = images.float().mean(dim=(2, 3))  # (B, 3)
        return Extraction(embedding=torch.where(means.sum(dim=1, keepdim=True) > 3, means, torch.nan))


class Counter:
    """Finds as many faces as the first pixel's blue says."""

    def boxes(self, pixels: np.ndarray) -> list[tuple[int, int, int, int]]:
        return [(0, 0, 8, 8)] * (int(pixels[0, 0, 2]) // 100)


def noisy(colour: tuple[int, int, int], seed: int, side: int = 64) -> Image.Image:
    noise = np.random.default_rng(seed).normal(0, 30, (side, side, 1))
    return Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8))


@pytest.fixture
def folder(tmp_path):
    """Six good red photos, and one of every fault."""
    for number in range(6):
        noisy((200, 60, 50), number).save(tmp_path / f"good_{number}.png")
    noisy((40, 60, 220), 10).save(tmp_path / "stranger.png")
    noisy((200, 60, 50), 1).resize((96, 96)).save(tmp_path / "larger_copy.png")
    (tmp_path / "same_bytes.png").write_bytes((tmp_path / "good_0.png").read_bytes())
    noisy((200, 60, 50), 11, 4).resize((64, 64)).save(tmp_path / "blurred.png")
    noisy((200, 60, 50), 12, 40).save(tmp_path / "small.png")
    noisy((0, 0, 0), 13).point(lambda value: min(value, 1)).save(tmp_path / "black.png")
    (tmp_path / "text.jpg").write_text("no picture")
    return tmp_path


def test_every_fault_is_found_and_nothing_else(folder):
    result = check_person(read_person(folder), ByColour())
    faults = {checked.photo.name: set(checked.faults) for checked in result.photos if checked.faults}
    assert faults == {
        "stranger.png": {"stranger"},
        "good_1.png": {"copy"},  # of a larger one
        "same_bytes.png": {"copy"},
        "blurred.png": {"blurred"},
        "small.png": {"small"},
        "black.png": {"no face"} | ({"blurred"} & faults["black.png"]),
        "text.jpg": {"unreadable"},
    }
    names = [checked.photo.name for checked in result.photos]
    assert [checked.rank for checked in result.photos] == list(range(1, 14))
    assert set(names[:6]) == {"good_0.png", *(f"good_{n}.png" for n in (2, 3, 4, 5)), "larger_copy.png"}
    assert names[6:8] == ["small.png", "blurred.png"] and names[-1] == "text.jpg" and names[-2] == "stranger.png"
    assert [photo.name for photo in result.best(20)] == names[:8]
    assert result.with_fault("stranger")[0].name == "stranger.png"
    likeness = {checked.photo.name: checked.likeness for checked in result.photos}
    assert likeness["stranger.png"] < 0.7 < 0.95 < likeness["good_0.png"]


def test_faces_are_counted_where_a_detector_is_given(tmp_path):
    for number in range(4):
        noisy((200, 60, 50), number).save(tmp_path / f"{number}.png")
        image = Image.open(tmp_path / f"{number}.png")
        image.putpixel((0, 0), (200, 60, number * 100 if number < 3 else 100))
        image.save(tmp_path / f"{number}.png")
    result = check_person(read_person(tmp_path), ByColour(), Counter())  # type: ignore[arg-type]
    found = {checked.photo.name: (checked.faces, list(checked.faults)) for checked in result.photos}
    assert found == {"0.png": (0, ["no face"]), "1.png": (1, []), "2.png": (2, ["several faces"]), "3.png": (1, [])}
    assert [checked.photo.name for checked in result.photos][-2:] == ["2.png", "0.png"]


def test_sharpness_falls_with_blur_and_ignores_contrast():
    image = MiniFaces(train=1, validation=1, test=1).people()[0].photos[0].image()
    blurred = [sharpness(image.filter(ImageFilter.GaussianBlur(radius))) for radius in (0, 0.5, 1, 2)]
    assert blurred == sorted(blurred, reverse=True) and blurred[0] > 0.4 and blurred[3] < 0.2
    flat = image.point(lambda value: 100 + value // 4)
    assert sharpness(flat) == pytest.approx(sharpness(image), rel=0.1)
    assert sharpness(Image.new("RGB", (64, 64), "red")) == 0


def test_two_photos_say_nothing_of_strangers(folder):
    two = Person("two", tuple(p for p in read_person(folder).photos if p.name in ("good_0.png", "stranger.png")))
    result = check_person(two, ByColour())
    assert not result.with_fault("stranger") and result.photos[0].likeness < 0.7
    one = check_person(Person("one", two.photos[:1]), ByColour())
    assert np.isnan(one.photos[0].likeness) and one.photos[0].usable


@pytest.mark.parametrize(
    ("extractor", "options", "message"),
    [
        (ByColour, {"same_person": 1.5}, "same_person=1.5"),
        (ByColour, {"side": 0}, "side=0"),
        (lambda: setattr(e := ByColour(), "same_person", None) or e, {}, "same_person is not known of by_colour"),
        (lambda: setattr(e := ByColour(), "can_identify", False) or e, {}, "does not tell people apart"),
    ],
)
def test_what_cannot_be_checked_is_refused(extractor: Callable[[], Extractor], options, message, folder):
    with pytest.raises(LitMultiIPError, match=message):
        check_person(read_person(folder), extractor(), **options)


def found_and_false(people: list[Person], extractor: Extractor, seed: int = 0) -> tuple[int, int]:
    """How often one stranger among ten photos is found, and how many people without one have a false alarm."""
    rng, found, false = np.random.default_rng(seed), 0, 0
    for number, person in enumerate(people):
        own = person.photos[:10]
        false += bool(check_person(Person(person.name, own), extractor).with_fault("stranger"))
        other = people[(number + 1 + rng.integers(len(people) - 1)) % len(people)]
        place, stranger = rng.integers(10), other.photos[rng.integers(10)]
        mixed = (*own[:place], stranger, *own[place + 1 :])
        found += stranger in check_person(Person(person.name, mixed), extractor).with_fault("stranger")
    return found, false


def drawn_people() -> list[Person]:
    people = MiniFaces(train=1, validation=1, test=50, photos=10).people()
    return [person for person in people if person.split == "test"]


def test_a_stranger_among_drawn_portraits_is_found():
    found, false = found_and_false(drawn_people()[-8:], Resemblance())
    assert found >= 6 and false <= 1


@pytest.mark.slow
def test_strangers_among_50_drawn_people():
    found, false = found_and_false(drawn_people(), Resemblance())
    print(f"found {found}, false alarms {false} of 50")
    assert found >= 45 and false <= 5


def mobilefacenet() -> Extractor:
    file = SHARED / "models/mobilefacenet.onnx"
    if not file.is_file():
        pytest.skip("needs ../shared/models")
    network = FaceRecognition(str(file), crop=(0.5, 0.48, 0.448))
    network.same_person = 0.26
    return network


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "lfw-deepfunneled").is_dir(), reason="needs ../shared/lfw-deepfunneled")
@pytest.mark.parametrize("make", [mobilefacenet, Dlib])
def test_strangers_among_50_people_of_lfw(make):
    """The cosine was chosen on the 50 people before them."""
    people = [person for person in Folder(str(SHARED / "lfw-deepfunneled")).people() if len(person.photos) >= 10]
    found, false = found_and_false(people[50:100], make())
    print(f"found {found}, false alarms {false} of 50")
    assert found >= 45 and false <= 5


def test_the_command_says_what_to_take(folder, capsys, random_critic):
    critic = ["--extractor", "CriticExtractor", "--extractor.folder", str(random_critic), "--same_person", "-1"]
    main(["photos", "check", str(folder), *critic])
    text = capsys.readouterr().out
    assert text.startswith(f"{folder.name}: 13 photos, best first")
    assert "a copy of larger_copy.png" in text and "\ntake " in text and "text.jpg" in text.split("leave out: ")[1]
    assert "small: the shorter side should have 64 px" in text
    assert "give at least 1" in refusal(capsys, "photos", "check", str(folder), "--take", "0")
    assert "does not exist" in refusal(capsys, "photos", "check", str(folder / "nowhere"))
