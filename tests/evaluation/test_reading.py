"""What landmarks say of a photo, and whether the same is read back."""

import io
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lit_multiip.evaluation.reading import ATTRIBUTES, FaceReader, measure, merge_words, self_agreement
from lit_multiip.files import LitMultiIPError
from lit_multiip.pixels import square

LFW = Path(__file__).resolve().parents[2].parent / "shared" / "lfw-deepfunneled"
GREY = np.full((100, 100, 3), 100, np.uint8)
FRONT = np.array([[35, 40], [65, 40], [50, 55], [40, 70], [60, 70]], np.float32)


class Five:
    """In place of a detector: five landmarks, where the image is not black."""

    def __init__(self, landmarks=FRONT):
        self.landmarks = landmarks

    def points(self, pixels):
        return self.landmarks if pixels.any() else None


READER = FaceReader(Five())


def all_68(mouth: float, gap: float) -> np.ndarray:
    """Landmarks of a face from the front whose mouth is so wide and so far open, in px."""
    points = np.full((68, 2), 50, np.float32)
    points[36:42], points[42:48], points[30] = (35, 40), (65, 40), (50, 55)
    points[36], points[45] = (30, 40), (70, 40)
    points[48], points[54] = (50 - mouth / 2, 70), (50 + mouth / 2, 70)
    points[62], points[66] = (50, 70 - gap / 2), (50, 70 + gap / 2)
    return points


def turned(points: np.ndarray, degrees: float) -> np.ndarray:
    """Turn landmarks about the middle of the image, clockwise as the viewer sees it."""
    turn = np.deg2rad(degrees)
    return (points - 50) @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]) + 50


@pytest.mark.parametrize(("degrees", "words"), [(15, "tilted to the right"), (-15, "tilted to the left"), (2, "")])
def test_the_tilt_is_that_of_the_eyes_and_leaves_the_turn_alone(degrees, words):
    values = measure(GREY, turned(FRONT, degrees))
    assert values["tilt"] == pytest.approx(degrees) and values["turn"] == pytest.approx(0, abs=1e-6)
    text = READER.describe(values)
    assert "facing the camera" in text and words in text and ("tilted" in text) == bool(words)


def test_a_mirrored_face_looks_the_other_way():
    aside = FRONT + np.array([[0, 0], [0, 0], [-9, 0], [-5, 0], [-5, 0]], np.float32)
    mirrored = (np.array([99, 0]) - aside * [1, -1])[[1, 0, 2, 4, 3]]
    left, right = measure(GREY, aside), measure(GREY, mirrored)
    assert left["turn"] == pytest.approx(-0.3) and right["turn"] == pytest.approx(0.3)
    assert "looking to the left" in READER.describe(left) and "looking to the right" in READER.describe(right)


def test_a_mouth_needs_68_landmarks():
    assert not {"mouth", "expression"} & measure(GREY, FRONT).keys()
    smile, pursed = measure(GREY, all_68(32, 8)), measure(GREY, all_68(20, 0))
    assert smile["mouth"] == pytest.approx(0.25) and smile["expression"] == pytest.approx(0.8)
    assert READER.describe(smile).startswith("smiling, with an open mouth, facing the camera")
    assert READER.describe(pursed).startswith("with a serious look, with a closed mouth, facing the camera")


@pytest.mark.parametrize(
    ("left", "right", "words"), [(20, 40, "dark"), (200, 240, "bright"), (20, 220, None), (100, 100, None)]
)
def test_a_background_is_what_both_upper_corners_have(left, right, words):
    pixels = GREY.copy()
    pixels[:15, :20], pixels[:15, -20:] = left, right
    text = READER.describe(measure(pixels, FRONT))
    assert ("background" in text) == (words is not None) and (words or "") in text
    assert text.endswith("in black and white")
    pixels[..., 0] = 160
    assert "black and white" not in READER.describe(measure(pixels, FRONT))


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_what_is_said_is_read_back_and_what_lies_between_two_classes_is_not_said(name):
    attribute, reader = ATTRIBUTES[name], READER
    bounds = list(attribute.proven.items())
    for kind, (low, high) in bounds:
        inside = low if np.isfinite(low) else high
        assert attribute.prove(inside) == attribute.read(inside) == kind
        said = reader.describe({name: inside})
        assert reader.named(f"a photo of a person {said}") == ({name: kind} if kind in attribute.words else {})
        if said:
            assert reader.agreement({name: inside}, said) == 1
    for (below, (_, high)), (above, (low, _)) in pairwise(bounds):
        assert high < low and attribute.prove((high + low) / 2) is None
        assert [attribute.read(high + share * (low - high)) for share in (0.4, 0.6)] == [below, above]


def test_the_agreement_is_the_share_of_what_is_named_and_can_be_read():
    prompt = "A photo of a person, smiling, facing  the camera, in front of a dark background"
    assert READER.named(prompt) == {"expression": "smiling", "turn": "front", "background": "dark"}
    values = {"expression": 0.9, "turn": 0.5, "background": 20.0}
    assert READER.agreement(values, prompt) == pytest.approx(2 / 3)
    assert READER.agreement(values | {"background": float("nan")}, prompt) == 0.5
    assert READER.agreement({"turn": 0.5}, prompt) == 0 and np.isnan(READER.agreement({"tilt": 0.0}, prompt))
    assert READER.named("a photo of an unsmiling person") == {}


def test_words_are_the_users_own():
    words = {"turn": {"left": "Seen from her  right", "front": ""}, "tilt": {"upright": "upright"}}
    reader = FaceReader(Five(), words)
    assert reader.describe({"turn": -0.4, "tilt": 0.0}) == "seen from her right, upright"
    assert reader.describe({"turn": 0.0}) == "" and reader.named("seen from her right") == {"turn": "left"}
    wrong = [
        ({"hair": {"red": "red hair"}}, "'hair': give classes and words of one of expression"),
        ({"turn": {"up": "looking up"}}, "'up': 'looking up': give a text for one of left, front, right"),
        ({"turn": "left"}, "words of 'turn'"),
        ({"turn": {"left": "aside", "right": "Aside"}}, "say 'aside' of two things"),
    ]
    for given, message in wrong:
        with pytest.raises(LitMultiIPError, match=message):
            merge_words(given)


def test_self_agreement_counts_faces_and_what_was_read_alike():
    images = [Image.fromarray(pixels) for pixels in (GREY, GREY // 3, GREY * 0)]
    same = self_agreement(READER, images, lambda image: image)
    assert same["faces"] == {"images": 3, "found": 2, "lost": 0}
    assert same["all"] == {"named": 5, "agree": 1} and same["background"] == {"named": 1, "agree": 1}
    lost = self_agreement(READER, images, lambda image: Image.new("RGB", image.size))
    assert lost["faces"]["lost"] == 2 and lost["all"]["named"] == 0
    brighter = self_agreement(READER, images, lambda image: image.point(lambda value: value + 130))
    assert brighter["background"] == {"named": 1, "agree": 0} and brighter["turn"]["agree"] == 1


def jpeg(image: Image.Image) -> Image.Image:
    image.save(file := io.BytesIO(), "JPEG", quality=75)
    return Image.open(file).convert("RGB")


@pytest.mark.skipif(not LFW.is_dir(), reason="needs photos of LFW")
def test_a_jpeg_of_a_real_photo_at_64_px_is_read_as_the_photo_is(capsys):
    pytest.importorskip("dlib")
    files = sorted(LFW.glob("*/*_0001.jpg"))[:40]
    photos = [square(Image.open(file).convert("RGB").crop((50, 50, 200, 200)), 64) for file in files]
    found = self_agreement(FaceReader(), photos, jpeg)
    print(found)
    assert found["faces"]["found"] >= 38 and found["faces"]["lost"] <= 2
    assert found["all"]["named"] > 70 and found["all"]["agree"] > 0.95
