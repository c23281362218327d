import numpy as np
import pytest
import torch
from PIL import Image

from lit_multiip.data.people import MiniFaces
from lit_multiip.data.tasks import make_tasks
from lit_multiip.evaluation.pictures import draw_tasks, labelled_grid, squares, to_picture


def noise(side, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def contains(picture, part):
    """Does the picture show this part, pixel by pixel, somewhere?"""
    whole, part = np.asarray(picture), np.asarray(part)
    h, w = part.shape[:2]
    corners = (whole[: whole.shape[0] - h + 1, : whole.shape[1] - w + 1] == part[0, 0]).all(axis=-1)
    return any((whole[y : y + h, x : x + w] == part).all() for y, x in np.argwhere(corners))


@pytest.mark.parametrize(("side", "factor"), [(64, 2), (32, 3), (96, 1), (128, 1)])
def test_small_images_are_enlarged_by_whole_pixels_to_96_px_or_more(side, factor):
    image = noise(side)
    picture = labelled_grid([[image]], ["Ann"], ["held-out photo"], side)
    pixels = np.asarray(image).repeat(factor, axis=0).repeat(factor, axis=1)
    assert len(pixels) >= 96
    assert contains(picture, pixels)


def test_all_cells_are_shown_and_empty_ones_stay_white():
    images = [noise(96, seed) for seed in range(3)]
    full = labelled_grid([images[:2], [images[2], noise(96, 9)]], ["a", "b"], ["x", "y"], 96)
    gap = labelled_grid([images[:2], [images[2], None]], ["a", "b"], ["x", "y"], 96)
    assert full.size == gap.size
    assert all(contains(gap, image) for image in images)
    changed = (np.asarray(full) != np.asarray(gap)).any(axis=-1)
    assert 0.99 * 96 * 96 < changed.sum() <= 96 * 96
    assert (np.asarray(gap)[changed] == 255).all()


def test_an_image_that_is_not_square_is_padded_and_not_cut():
    image = noise(96).crop((0, 0, 96, 48))
    assert contains(labelled_grid([[image]], ["Ann"], ["photo"], 96), image)


@pytest.mark.parametrize(
    "label",
    [
        "Zoë_Ångström",
        "Иван",
        "王小明",
        "\U0001f600",
        "bad\udcff",
        "",
        "word " * 200,
        "x" * 500,
        "a_" * 200,
        "two\nlines",
    ],
)
def test_any_label_leaves_the_images_whole(label):
    images = [noise(96, seed) for seed in range(4)]
    picture = labelled_grid([images[:2], images[2:]], [label, label], [label[:100], label[:100]], 96, title=label)
    assert all(contains(picture, image) for image in images)


def test_different_labels_make_different_pictures():
    image = noise(96)
    plain = labelled_grid([[image]], ["Ann"], ["photo"], 96)
    assert plain != labelled_grid([[image]], ["Bob"], ["photo"], 96)
    assert plain != labelled_grid([[image]], ["Ann"], ["other"], 96)
    assert labelled_grid([[image]], ["Ann"], ["photo"], 96, "Title").height > plain.height


@pytest.mark.parametrize(
    ("rows", "row_labels", "column_labels"),
    [([], [], ["x"]), ([[]], ["a"], []), ([[None]], [], ["x"]), ([[None, None]], ["a"], ["x"])],
)
def test_what_does_not_fit_is_refused(rows, row_labels, column_labels):
    with pytest.raises(ValueError, match=r"rows of"):
        labelled_grid(rows, row_labels, column_labels, 96)


def test_a_task_is_a_row_of_its_references_its_held_out_photo_and_what_was_made():
    [person] = MiniFaces(0, train=1, validation=1, test=1, photos=6).people()[:1]
    [first, second] = tasks = make_tasks([person], references=3, held_out=2)
    made = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole, cut = (draw_tasks(tasks, {"generated": made}, 64, "after 100 steps", most) for most in (None, 2))
    assert whole.width - cut.width == 132  # 128 px and a gap
    for image in (*squares([*first.references, first.held_out, second.held_out], 64), *map(to_picture, made)):
        assert contains(whole, image.resize((128, 128), Image.Resampling.NEAREST))
