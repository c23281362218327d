"""Squares at faces: where they lie, what is said of photos without a face or with several, and that nothing leaks."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lit_multiip.backbone.face_crop import CroppedPhoto, FaceCrop
from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.data.people import Folder, Person
from lit_multiip.data.photos import DataError, FilePhoto
from lit_multiip.data.tasks import make_tasks, protocol
from lit_multiip.datamodule import MultiPhotoData, PredictArgs
from lit_multiip.evaluation import audit

cv2 = pytest.importorskip("cv2")


class RedIsAFace:
    """In place of OpenCV's YuNet: each red rectangle of an image is a face."""

    made = 0

    def __init__(self, *_: Any) -> None:
        type(self).made += 1

    def setInputSize(self, size: Any) -> None:
        pass

    def detect(self, image: Any) -> Any:
        red = ((image[..., 2] > 200) & (image[..., 1] < 90)).astype(np.uint8)
        count, _, stats, _ = cv2.connectedComponentsWithStats(red)
        rows = [[*box[:4], *[0] * 10, 0.9] for box in stats[1:count] if box[4] > 4]
        return 1, np.array(rows, np.float32) if rows else None


@pytest.fixture(autouse=True)
def detector(monkeypatch, tmp_path):
    monkeypatch.setattr(cv2.FaceDetectorYN, "create", RedIsAFace)
    (tmp_path / "yunet.onnx").write_bytes(b"yunet")
    return str(tmp_path / "yunet.onnx")


def photo_of(folder: Path, name: str, size: tuple[int, int], *faces: tuple[int, int, int, int]) -> FilePhoto:
    """A grey photo with red rectangles (left, top, right, bottom)."""
    image = Image.new("RGB", size, (90, 100, 110))
    for face in faces:
        image.paste((255, 0, 0), face)
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / name)
    return FilePhoto(folder.name, name, "a photo", folder / name)


def test_the_square_holds_the_face_that_the_centre_would_cut_off(tmp_path, detector):
    wide = photo_of(tmp_path / "p", "wide.png", (320, 160), (250, 40, 310, 120))
    [person] = FaceCrop(detector)([Person("p", (wide,))], tmp_path / "cache")
    [cut] = person.photos
    assert isinstance(cut, CroppedPhoto) and cut.box == (160, 0, 160)  # as far right as the photo goes
    assert (cut.person, cut.name, cut.prompt, cut.original()) == ("p", "wide.png", "a photo", wide)
    assert np.argwhere(np.asarray(cut.image())[..., 0] > 200)[:, 1].min() in range(88, 93)


@pytest.mark.parametrize(
    ("row", "size", "box"),
    [
        ((100, 50, 40, 60, 1, 320, 240), None, (0, 0, 240)),  # around x = 120, and at the left border
        ((160, 50, 40, 60, 1, 320, 240), None, (60, 0, 240)),
        ((160, 50, 40, 60, 1, 320, 240), 2.0, (120, 20, 120)),  # twice the longer side, around (180, 80)
        ((160, 50, 40, 60, 1, 320, 240), 9.0, (60, 0, 240)),  # no larger than the photo
        ((300, 220, 4, 4, 1, 320, 240), 1.0, (294, 214, 16)),  # no smaller than a photo may be
        ((0, 0, 0, 0, 0, 320, 240), 2.0, (40, 0, 240)),  # no face: the middle
    ],
)
def test_the_box_is_around_the_face_and_in_the_photo(row, size, box, detector):
    assert FaceCrop(detector, size).box(np.array(row, np.float32)) == box


def test_photos_without_a_face_and_with_several_are_counted_and_said_and_faces_are_looked_for_once(
    tmp_path, detector, caplog
):
    photos = (
        photo_of(tmp_path / "p", "none.png", (100, 60)),
        photo_of(tmp_path / "p", "two.png", (100, 60), (0, 0, 10, 10), (70, 20, 95, 45)),
        photo_of(tmp_path / "p", "one.png", (100, 60), (5, 5, 25, 25)),
    )
    made = RedIsAFace.made
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            [person] = FaceCrop(detector)([Person("p", photos)], tmp_path / "cache")
        boxes = [photo.box for photo in person.photos if isinstance(photo, CroppedPhoto)]
        assert boxes == [(20, 0, 60), (40, 0, 60), (0, 0, 60)]  # of the two, the larger is at the right
        assert "1 of 3 photos have no face, such as 'none.png' of 'p': their central" in caplog.text
        assert "1 of 3 photos have several faces, such as 'two.png' of 'p': the largest is taken" in caplog.text
    assert RedIsAFace.made == made + 1


def people_of(folder: Path, count: int, photos: int) -> Path:
    for person in range(count):
        for number in range(photos):
            left = 5 + 3 * number
            photo_of(folder / f"p{person}", f"{number}.png", (90, 48 + person), (left, 10, left + 20, 34))
    return folder


def data_of(backbone: Path, folder: Path, cache: Path, crop: FaceCrop | None) -> MultiPhotoData:
    data = MultiPhotoData(
        Backbone(str(backbone)),
        Folder(str(people_of(folder, 6, 4))),
        references=3,
        min_photos=4,
        cache_dir=str(cache),
        crop=crop,
    )
    data.prepare_data()
    return data


def test_encoders_and_scores_see_the_same_squares(tiny_backbone, tmp_path, detector):
    data, plain = (
        data_of(tiny_backbone, tmp_path / "people", tmp_path / "cache", c) for c in (FaceCrop(detector), None)
    )
    for each in (data, plain):
        each.setup("test")
    [task, *_], [other, *_] = data.tasks, plain.tasks
    assert (task.person, task.held_out.name, task.prompt) == (other.person, other.held_out.name, other.prompt)
    assert task.held_out.image().size[0] == task.held_out.image().size[1] < other.held_out.image().size[0]
    assert data.features is not None and plain.features is not None
    assert not (data.features.moments(task.held_out) == plain.features.moments(other.held_out)).all()
    assert protocol(data.tasks)["sha256"] != protocol(plain.tasks)["sha256"]  # so that they stand in no table together
    data.predict_args = PredictArgs(str(tmp_path / "people" / "p0"), ["a"], [0])
    data.setup("predict")
    assert all(isinstance(photo, CroppedPhoto) for photo in data.requests[0].references)


def test_a_photo_that_was_trained_on_whole_is_known_when_it_is_cut(tmp_path, detector):
    whole = Folder(str(people_of(tmp_path / "people", 2, 4))).people()
    cut = FaceCrop(detector)(whole, tmp_path / "cache")
    renamed = [Person(f"other {person.name}", person.photos) for person in whole]
    record = audit.training_record(renamed)
    with pytest.raises(audit.LeakError, match="test photos were trained or validated on under other people's names"):
        audit.audit_tasks(make_tasks(cut, 3, 1), "recorded", record)


def test_a_size_that_cuts_into_the_face_is_refused():
    with pytest.raises(DataError, match=r"data.crop.size=0.5 would cut into the face"):
        FaceCrop(size=0.5)


def test_a_fixed_share_cuts_the_middle_out_and_needs_no_detector(tmp_path):
    wide = FilePhoto("p", "a.png", "a photo", tmp_path / "a.png")
    [person] = FaceCrop(share=0.6)([Person("p", (wide,))], tmp_path / "cache")
    [photo] = person.photos
    whole = Image.new("RGB", (100, 50))
    whole.paste((255, 255, 255), (35, 10, 65, 40))
    whole.save(tmp_path / "a.png")
    assert photo.image().size == (30, 30) and photo.image().getextrema() == ((255, 255),) * 3
    assert photo.original() == wide and photo.content_key() not in (wide.content_key(), "")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 1.5}, "data.crop.share=1.5 is no share of a photo"),
        ({"share": 0}, "data.crop.share=0 is no share of a photo"),
        ({"share": 0.6, "size": 2}, "looks for no face: leave data.crop.size and detector out"),
        ({"share": 0.6, "detector": "mine.onnx"}, "looks for no face"),
    ],
)
def test_a_share_that_is_none_or_stands_beside_a_detector_is_refused(options, message):
    with pytest.raises(DataError, match=message):
        FaceCrop(**options)
