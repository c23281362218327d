import hashlib
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from folders import save
from PIL import Image

from lit_multiip.data import FilePhoto, Folder, MiniFaces, mini_faces
from lit_multiip.data.photos import distinct_photos


def opened(path: Path) -> np.ndarray:
    image = FilePhoto("p", path.name, "", path).image()
    assert image.mode == "RGB"
    return np.asarray(image)  # (H, W, 3)


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "rgb"),
    [
        ("L", 77, "png", (77, 77, 77)),
        ("1", 1, "bmp", (255, 255, 255)),
        ("I;16", 128 * 257, "png", (128, 128, 128)),
        ("RGBA", (200, 0, 0, 255), "png", (200, 0, 0)),
        ("RGBA", (200, 0, 0, 0), "png", (255, 255, 255)),
        ("RGBA", (0, 0, 0, 51), "png", (204, 204, 204)),
        ("LA", (0, 0), "png", (255, 255, 255)),
        ("RGBA", (0, 0, 0, 0), "webp", (255, 255, 255)),
        ("CMYK", (0, 0, 0, 0), "jpg", (255, 255, 255)),
        ("CMYK", (0, 0, 0, 255), "jpg", (0, 0, 0)),
    ],
)
def test_every_mode_becomes_the_rgb_it_looks_like(tmp_path, mode, colour, suffix, rgb):
    path = tmp_path / f"x.{suffix}"
    Image.new(mode, (20, 20), colour).save(path)
    assert np.abs(opened(path).astype(int) - rgb).max() <= 1


def test_a_transparent_palette_is_laid_over_white(tmp_path):
    image = Image.new("P", (20, 20), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((3, 4), 0)
    image.save(tmp_path / "x.png", transparency=0)
    pixels = opened(tmp_path / "x.png")
    assert tuple(pixels[4, 3]) == (255, 255, 255) and tuple(pixels[0, 0]) == (10, 20, 30)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_exif_rotation_is_honoured(tmp_path, suffix):
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (0, 0, 10, 20))  # the left edge
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise: left becomes top
    image.save(tmp_path / f"x.{suffix}", exif=exif)
    pixels = opened(tmp_path / f"x.{suffix}")
    assert pixels.shape == (40, 20, 3)
    assert pixels[:8].min() > 200 and pixels[14:].max() < 55


def test_the_content_key_follows_the_bytes_and_nothing_else(tmp_path):
    a, b = save(tmp_path / "a.png"), save(tmp_path / "b.png", colour=(200, 40, 11))
    key = FilePhoto("p", "a", "x", a).content_key()
    assert key == FilePhoto("q", "b", "y", a).content_key() == hashlib.sha256(a.read_bytes()).hexdigest()
    assert key != FilePhoto("p", "a", "x", b).content_key()


def test_a_drawn_photo_is_its_recipe():
    photo = MiniFaces(seed=3, train=1, validation=1, test=1, photos=2).people()[1].photos[1]
    assert photo.name == "train_000000_0001.png"
    expected = mini_faces.photo(3, mini_faces.ROLES["train"].start, 1)
    assert np.array_equal(np.asarray(photo.image()), expected)
    assert photo.prompt == mini_faces.prompt(mini_faces.scene(3, mini_faces.ROLES["train"].start, 1))
    again = pickle.loads(pickle.dumps(photo))
    assert again == photo and again.content_key() == photo.content_key()
    keys = {p.content_key() for seed in (0, 1) for who in MiniFaces(seed, 2, 1, 1, 3).people() for p in who.photos}
    assert len(keys) == 2 * 4 * 3


def test_of_photos_with_equal_content_the_first_is_kept(tmp_path):
    contents = {"1.png": "red", "2.png": "blue", "3.png": "red", "4.png": "green"}
    photos = [FilePhoto("p", name, "", save(tmp_path / name, colour=colour)) for name, colour in contents.items()]
    assert [photo.name for photo in distinct_photos(photos)] == ["2.png", "1.png", "4.png"]


def test_a_photo_takes_fewer_than_800_bytes_of_memory_and_its_file_is_read_once(tmp_path):
    for number in range(1000):
        path = tmp_path / f"Person_{number // 10:04d}" / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"content")
    tracemalloc.start()
    try:
        people = Folder(str(tmp_path)).people()
        assert all(photo.content_key() for person in people for photo in person.photos)
        a_photo = tracemalloc.get_traced_memory()[0] / 1000
    finally:
        tracemalloc.stop()
    people[7].photos[3].path.unlink()
    for person in (people[7], pickle.loads(pickle.dumps(people[7]))):
        assert person.photos[3].content_key() == hashlib.sha256(b"content").hexdigest()
    assert a_photo < 800
