import math

import numpy as np
import pytest
from PIL import Image

from lit_multiip.data.drawing import Drawing, draw_person, draw_together, read_masks, repeats_of
from lit_multiip.data.people import MiniFaces, Person
from lit_multiip.data.photos import DataError

ANN, BOB = MiniFaces(train=1, validation=1, test=1, photos=9).people()[:2]
LEFT = np.zeros((64, 64), dtype=bool)
LEFT[:, :32] = True


@pytest.mark.parametrize(
    ("weights", "repeats"),
    [
        ([1, 1, 1], [1, 1, 1]),
        ([0.5, 0.5, 0.0], [1, 1, 0]),
        ([2, 1, 0.5], [4, 2, 1]),
        ([1, 0.1, 0.3], [10, 1, 3]),
        ([3, 1, 1], [3, 1, 1]),
        ([1, 1 / math.pi, 1e-9], [20, 6, 1]),  # rounded to a twentieth; never to nothing
    ],
)
def test_photos_are_repeated_in_the_ratio_of_their_weights(weights, repeats):
    assert repeats_of(weights) == repeats


def test_a_weight_of_0_leaves_the_photo_out_and_equal_weights_change_nothing():
    fewer = Person(ANN.name, ANN.photos[:4] + ANN.photos[5:])
    out = [float(number != 4) for number in range(9)]
    assert draw_person(ANN, 9, 0, out) == draw_person(fewer, 8, 0)
    assert draw_person(ANN, 9, 0, [0.7] * 9) == draw_person(ANN, 9, 0)
    # a photo of weight 2 stands among them twice, and no photo is drawn again to fill up
    twice = draw_person(ANN, 9, 0, [2.0, 1.0, 1.0, *[0.0] * 6])
    assert sorted(photo.name for photo in twice) == [p.name for p in (ANN.photos[0], *ANN.photos[:3])]


def test_each_of_several_people_has_a_share_of_the_weights():
    weights = [1.0] * 9 + [0.0] * 8 + [2.0]
    first, drawing = draw_together([ANN, BOB], 9, 0, weights, masks=(LEFT, ~LEFT))
    assert set(first) == set(ANN.photos) and drawing.beside == ((BOB.photos[8],),)
    assert not drawing.weighted  # all that are left weigh alike
    assert draw_together([ANN], 9, 0, [2.0, *[1.0] * 8])[1].weighted


def test_masks_are_true_where_pictures_are_light(tmp_path):
    for name, mode in (("a.png", "L"), ("b.png", "RGB"), ("c.png", "1")):
        Image.fromarray(np.where(LEFT, 255, 0).astype(np.uint8)).convert(mode).save(tmp_path / name)
    for mask in read_masks([tmp_path / name for name in ("a.png", "b.png", "c.png")]):
        assert np.array_equal(mask, LEFT)
    (tmp_path / "d.png").write_text("no picture")
    with pytest.raises(DataError, match=r"mask '.*d\.png' cannot be read .*black and white"):
        read_masks([tmp_path / "d.png"])


@pytest.mark.parametrize(
    ("people", "options", "message"),
    [
        ([ANN], {"weights": [1.0] * 8}, "8 weights for 9 photos: give one each, in the order .*_0000.png"),
        ([ANN, BOB], {"weights": [1.0] * 9, "masks": (LEFT, LEFT)}, "9 weights for 18 photos"),
        ([ANN], {"weights": [float("nan"), *[1.0] * 8]}, "weight is nan"),
        ([ANN], {"weights": [-1.0, *[1.0] * 8]}, "weight is -1.0"),
        ([ANN], {"weights": [0.0] * 9}, "all weights of .* are 0"),
        ([ANN, BOB], {"weights": [1.0] * 9 + [0.0] * 9, "masks": (LEFT, LEFT)}, f"all weights of {BOB.name}'s"),
        ([ANN, BOB], {}, "0 masks and 2 people: give one mask a person"),
        ([ANN, BOB], {"masks": (LEFT,)}, "1 masks and 2 people"),
        ([ANN], {"masks": (LEFT, LEFT)}, "2 masks and 1 people"),
        ([ANN], {"masks": (LEFT & ~LEFT,)}, "black all over"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(people, options, message):
    with pytest.raises(DataError, match=message):
        draw_together(people, 9, 0, **options)


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(DataError, match="mask 1 has 64 x 64 px, and pictures have 512 x 512: scale it"):
        Drawing(masks=(LEFT,)).check_side(512)
