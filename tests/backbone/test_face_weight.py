"""Maps that weigh the face: their numbers, where drawn faces lie, and that all ones change no bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lit_multiip.backbone import face_weight
from lit_multiip.backbone.face_weight import FaceMaps, FaceWeight
from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.data import mini_faces
from lit_multiip.data.people import MiniFaces
from lit_multiip.data.photos import DataError, DrawnPhoto, FaceBox, FilePhoto
from lit_multiip.datamodule import MultiPhotoData
from lit_multiip.methods.adapter import MultiIPAdapter

PHOTO = FilePhoto("Ann", "1.png", "a photo", Path("1.png"))


def map_of(box: FaceBox | None, weight: float = 3.0) -> torch.Tensor:
    return FaceMaps({PHOTO: box}, weight, (4, 4))(PHOTO)


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0, 0, 50, 100, 100, 100), [1.5, 1.5, 0.5, 0.5]),  # (3, 3, 1, 1) / 2
        ((0, -20, 62.5, 140, 100, 100), [4 / 3, 4 / 3, 8 / 9, 4 / 9]),  # (3, 3, 2, 1) / 2.25; half a place, and beyond
        ((50, 0, 50, 100, 200, 100), [1.5, 1.5, 0.5, 0.5]),  # of the central square of a wide photo
        ((0, 0, 40, 100, 200, 100), [1, 1, 1, 1]),  # outside of it
    ],
)
def test_the_map_is_larger_in_the_face_and_has_mean_1(box, expected):
    made = map_of(FaceBox(*box))
    torch.testing.assert_close(made, torch.tensor([expected] * 4, dtype=torch.float32))
    assert float(made.mean()) == pytest.approx(1)


def test_without_a_face_or_at_weight_1_all_is_1_to_the_bit():
    assert torch.equal(map_of(None), torch.ones(4, 4))
    assert torch.equal(map_of(FaceBox(10, 20, 33, 41, 100, 90), weight=1.0), torch.ones(4, 4))


def test_a_drawn_face_is_where_the_photo_says():
    """Another colour of the skin changes what is in the box, and the ears beside it."""
    for number in range(20):
        box = DrawnPhoto("p", "1", "", 0, 7, number).face_box()
        who, shot = mini_faces.person(0, 7), mini_faces.scene(0, 7, number, clean=True)
        other = mini_faces.Person(who.values | {"skin": 1 - who.values["skin"], "hair_style": 0, "facial_hair": 0})
        bald = mini_faces.Person(other.values | {"skin": who.values["skin"]})
        changed = np.abs(mini_faces.draw(bald, shot).astype(int) - mini_faces.draw(other, shot)).sum(2) > 6
        rows, columns = np.nonzero(changed[:44])  # above the neck
        assert abs(rows.min() - box.top) < 2
        ears = 2 * 2.6  # px, which lie outside
        assert box.width - 1.5 < columns.max() + 1 - columns.min() < box.width + ears + 1.5
        assert 0.25 < box.width * box.height / 64**2 < 0.4


def test_photos_without_any_face_are_refused_and_some_are_told(tmp_path, monkeypatch, caplog):
    other, drawn = FilePhoto("Bob", "2.png", "a photo", Path("2.png")), DrawnPhoto("p", "1", "", 0, 7, 1)
    found = {PHOTO: np.zeros(7, np.float32), other: np.array([0, 0, 50, 100, 2, 100, 100], np.float32)}
    monkeypatch.setattr(face_weight, "find_faces", lambda _, photos, __: {photo: found[photo] for photo in photos})
    backbone = Backbone("mini")
    maps = FaceWeight(3.0).maps([PHOTO, other, drawn], backbone, tmp_path)
    assert "1 of 3 photos have no face, such as '1.png' of 'Ann': all their places weigh alike" in caplog.text
    assert torch.equal(maps(PHOTO), torch.ones(maps.shape)) and maps(other)[0, 0] == 1.5 and maps(drawn).max() > 1.5
    with pytest.raises(DataError, match=r"1 of 1 photos have no face, .* 'Ann': leave data\.face_weight out"):
        FaceWeight(3.0).maps([PHOTO], backbone, tmp_path)
    with pytest.raises(DataError, match=r"data\.face_weight\.weight=0\.0 must be above 0: 1 weighs all places alike"):
        FaceWeight(0.0)


def test_the_map_weighs_the_training_loss_and_all_ones_are_the_same_bits(tiny_backbone, tmp_path):
    def batch(**options: Any) -> dict[str, Any]:
        source = MiniFaces(train=2, validation=2, test=2, photos=11)
        backbone = Backbone(str(tiny_backbone))
        data = MultiPhotoData(backbone, source, batch_size=4, cache_dir=str(tmp_path), **options)
        data.setup("fit")
        return next(iter(data.train_dataloader()))

    module = MultiIPAdapter(Backbone(str(tiny_backbone)))
    module.configure_model()
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    plain, ones, weighted = batch(), batch(face_weight=FaceWeight(1.0)), batch(face_weight=FaceWeight(4.0))
    assert "loss_map" not in plain and torch.equal(ones["loss_map"], torch.ones(4, 8, 8))
    with torch.no_grad():
        losses = [module.training_step(one, 0) for one in (plain, ones, weighted)]
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])
    predicted = torch.zeros(4, 4, 8, 8)
    predicted[:, :, 2:6, 2:6] = 1  # wrong in the middle alone
    module.noise.register_to_config(prediction_type="epsilon")
    error = module.prediction_error(
        predicted, predicted, torch.zeros_like(predicted), torch.zeros(4).long(), weighted["loss_map"]
    )
    torch.testing.assert_close(error, weighted["loss_map"][:, 2:6, 2:6].sum(dim=(1, 2)) / 64)
    assert error.min() > 0.25 * 1.3


def test_a_method_that_learns_one_person_takes_no_map(tiny_backbone, tmp_path):
    data = MultiPhotoData(Backbone(str(tiny_backbone)), cache_dir=str(tmp_path), face_weight=FaceWeight(2.0))
    data.per_person = True
    with pytest.raises(DataError, match=r"data\.face_weight is for methods that train on held-out groups"):
        data.setup("test")
