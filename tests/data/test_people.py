import csv
import hashlib
import json
import logging
import os
import pickle
import subprocess
import sys
import tracemalloc
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lit_multiip.data import (
    DataError,
    DrawnPhoto,
    FilePhoto,
    Folder,
    MiniFaces,
    Person,
    Split,
    check_photos,
    mini_faces,
    read_person,
    select_people,
    split_people,
)


def save(path: Path, size: tuple[int, int] = (32, 32), colour: object = (200, 40, 10), **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)  # type: ignore[arg-type]
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for person, count in {"Ann_Lee": 12, "Bo": 3, "Cy": 10}.items():
        for number in range(1, count + 1):
            save(tmp_path / "photos" / person / f"{person}_{number}.jpg", colour=(number * 20, 0, 0))
    return tmp_path / "photos"


def people_of(count: int, photos: int = 10) -> list[Person]:
    return [
        Person(
            f"p{i:03d}", tuple(FilePhoto(f"p{i:03d}", f"{j}.jpg", "a photo", Path(f"{j}.jpg")) for j in range(photos))
        )
        for i in range(count)
    ]


def names(people: list[Person]) -> list[str]:
    return [person.name for person in people]


def prompts(source: Folder) -> dict[str, str]:
    return {photo.name: photo.prompt for person in source.people() for photo in person.photos}


# Folder: who and what


def test_folders_are_people_in_natural_order(photos: Path) -> None:
    people = Folder(str(photos)).people()
    assert [(person.name, len(person.photos)) for person in people] == [("Ann_Lee", 12), ("Bo", 3), ("Cy", 10)]
    assert [photo.name for photo in people[0].photos] == [f"Ann_Lee_{i}.jpg" for i in range(1, 13)]
    assert people == Folder(str(photos)).people()
    assert {person.split for person in people} == {None}


def test_hidden_files_and_other_types_are_not_photos(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(photos / ".git" / "x.jpg")
    save(photos / "Bo" / "._Bo_1.jpg")
    (photos / "Bo" / ".DS_Store").write_bytes(b"x")
    (photos / "Bo" / "phone.heic").write_bytes(b"x")
    save(photos / "Bo" / "Bo_4.PNG")
    people = Folder(str(photos)).people()
    assert names(people) == ["Ann_Lee", "Bo", "Cy"]
    assert [photo.name for photo in people[1].photos] == ["Bo_1.jpg", "Bo_2.jpg", "Bo_3.jpg", "Bo_4.PNG"]
    assert "phone.heic" in caplog.text and ".DS_Store" not in caplog.text


def test_links_that_form_a_loop_end(photos: Path) -> None:
    (photos / "Bo" / "up").symlink_to(photos)
    (photos / "Dee").symlink_to(photos)
    (photos / "self").symlink_to(photos / "self")
    assert names(Folder(str(photos)).people()) == ["Ann_Lee", "Bo", "Cy"]


@pytest.mark.parametrize(
    "make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_text("x"), lambda p: save(p / "1.jpg")]
)
def test_a_folder_without_people_is_named(tmp_path: Path, make: object) -> None:
    make(tmp_path / "gone")  # type: ignore[operator]
    with pytest.raises(DataError, match="gone"):
        Folder(str(tmp_path / "gone")).people()


def test_one_persons_folder_reads_as_it_does_among_others(photos: Path) -> None:
    assert read_person(photos / "Bo") == Folder(str(photos)).people()[1]
    with pytest.raises(DataError, match="no photos"):
        read_person(photos)


# Folder: captions


def test_a_prompt_comes_from_txt_else_metadata_else_template(photos: Path) -> None:
    (photos / "Bo" / "Bo_1.txt").write_text("\ufeff a photo of a person\n at sea \n", "utf-8")
    (photos / "Bo" / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": f"Bo_{i}.jpg", "prompt": f"own {i}"}) for i in (1, 2)) + "\n"
    )
    with (photos / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [
                ["file_name", "text"],
                ["Bo/Bo_2.jpg", "top 2"],
                ["Bo\\Bo_3.jpg", "in red, at sea"],
                ["./Cy/Cy_1.jpg", "c"],
            ]
        )
    found = prompts(Folder(str(photos), "a picture of a person"))
    assert [found[f"Bo_{i}.jpg"] for i in (1, 2, 3)] == ["a photo of a person at sea", "own 2", "in red, at sea"]
    assert found["Cy_1.jpg"] == "c"
    assert found["Cy_2.jpg"] == "a picture of a person"


def test_only_a_template_that_says_so_holds_the_name(photos: Path) -> None:
    assert not any("Ann" in prompt for prompt in prompts(Folder(str(photos))).values())
    assert prompts(Folder(str(photos), "a photo of {name}"))["Ann_Lee_1.jpg"] == "a photo of Ann Lee"
    for template in ("", "a photo of {nmae}", "a {"):
        with pytest.raises(DataError, match="template"):
            Folder("unread", template)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("Bo/Bo_9.txt", "a photo", r"Bo_9\.txt has no photo"),
        ("Bo/Bo_1.txt", " \n", r"Bo_1\.txt is empty"),
        ("Bo/Bo_1.txt", b"\xff\xfe\x00", r"Bo_1\.txt cannot be read"),
        ("metadata.csv", "file_name,text\nBo/Bo_9.jpg,x\n", r"line 2.*'Bo/Bo_9\.jpg'.*no such photo"),
        ("metadata.csv", "file_name,text\n../Bo/Bo_1.jpg,x\n", r"'\.\./Bo/Bo_1\.jpg'.*outside"),
        ("metadata.csv", "file_name,text\n/etc/Bo_1.jpg,x\n", r"'/etc/Bo_1\.jpg'.*outside"),
        ("metadata.csv", "file_name,text\nBo\\..\\..\\x.jpg,x\n", "outside"),
        ("Bo/metadata.csv", "file_name,text\nBo_1.jpg,in red, at sea\n", "line 2.*quotes"),
        ("Bo/metadata.csv", "file_name,text\nBo_1.jpg\n", "line 2.*must give"),
        ("Bo/metadata.csv", "name,text\nBo_1.jpg,x\n", "must give file_name"),
        ("Bo/metadata.csv", "file_name,text\nBo_1.jpg,x\nBo_1.jpg,y\n", "line 3.*already"),
        ("Bo/metadata.jsonl", '{"file_name": "Bo_1.jpg", "text": 3}', "line 1.*must give"),
        ("Bo/metadata.jsonl", '{"file_name": "Bo_1.jpg", "text": "a", "prompt": "b"}', "one prompt"),
        ("Bo/metadata.jsonl", '\n{"file_name": ', "line 2.*not JSON"),
        ("Bo/metadata.jsonl", "[]", "not a JSON object"),
    ],
)
def test_a_caption_at_fault_is_named(photos: Path, file: str, text: str | bytes, message: str) -> None:
    (photos / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message):
        Folder(str(photos)).people()


def test_accents_match_however_they_are_composed(tmp_path: Path) -> None:
    composed, split = (unicodedata.normalize(form, "Zoë") for form in ("NFC", "NFD"))
    save(tmp_path / split / f"{split}.jpg")
    (tmp_path / "metadata.csv").write_text(f"file_name,text\n{composed}/{composed}.jpg,hello\n", "utf-8")
    (person,) = Folder(str(tmp_path)).people()
    assert (person.name, person.photos[0].prompt) == (composed, "hello")
    save(tmp_path / composed / "1.jpg")
    with pytest.raises(DataError, match="several people are called"):
        Folder(str(tmp_path)).people()


# Photos


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
def test_every_mode_becomes_the_rgb_it_looks_like(
    tmp_path: Path, mode: str, colour: object, suffix: str, rgb: tuple[int, int, int]
) -> None:
    path = tmp_path / f"x.{suffix}"
    Image.new(mode, (20, 20), colour).save(path)  # type: ignore[arg-type]
    assert np.abs(opened(path).astype(int) - rgb).max() <= 1


def test_a_transparent_palette_is_laid_over_white(tmp_path: Path) -> None:
    image = Image.new("P", (20, 20), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((3, 4), 0)
    image.save(tmp_path / "x.png", transparency=0)
    pixels = opened(tmp_path / "x.png")
    assert tuple(pixels[4, 3]) == (255, 255, 255) and tuple(pixels[0, 0]) == (10, 20, 30)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_exif_rotation_is_honoured(tmp_path: Path, suffix: str) -> None:
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (0, 0, 10, 20))  # the left edge
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise: left becomes top
    image.save(tmp_path / f"x.{suffix}", exif=exif)
    pixels = opened(tmp_path / f"x.{suffix}")
    assert pixels.shape == (40, 20, 3)
    assert pixels[:8].min() > 200 and pixels[14:].max() < 55


def test_the_content_key_follows_the_bytes_and_nothing_else(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a.png"), save(tmp_path / "b.png", colour=(200, 40, 11))
    key = FilePhoto("p", "a", "x", a).content_key()
    assert key == FilePhoto("q", "b", "y", a).content_key() == hashlib.sha256(a.read_bytes()).hexdigest()
    assert key != FilePhoto("p", "a", "x", b).content_key()


def faulty(folder: Path) -> set[str]:
    """Write photos that cannot be used; return their names."""
    whole = save(folder / "whole.jpg", (64, 64)).read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    (folder / "text.jpg").write_text("not a picture")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "broken_link.jpg").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe.jpg")
    save(folder / "pixel.png", (1, 1))
    save(folder / "flat.png", (64, 15))
    save(folder / "gif.tmp", format="GIF").rename(folder / "really_a_gif.jpg")
    png = bytearray(save(folder / "damaged.png", (64, 64)).read_bytes())
    png[45] ^= 0xFF  # inside IDAT: the checksum fails
    (folder / "damaged.png").write_bytes(png)
    save(folder / "small_enough.png", (16, 16))
    return {path.name for path in folder.iterdir()} - {"whole.jpg", "small_enough.png"}


def test_every_unreadable_photo_is_named_in_one_error(tmp_path: Path) -> None:
    bad = faulty(tmp_path / "Bo")
    people = Folder(str(tmp_path)).people()
    with pytest.raises(DataError, match=f"{len(bad)} of {len(bad) + 2} photos") as error:
        check_photos(people, progress=False)
    assert len(bad) == 9
    assert {name for name in bad if f"{name}: " in str(error.value)} == bad
    assert "whole.jpg" not in str(error.value) and "small_enough" not in str(error.value)


def test_unreadable_photos_are_skipped_if_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = faulty(tmp_path / "Bo")
    (tmp_path / "Cy").mkdir()
    (tmp_path / "Cy" / "only.jpg").write_bytes(b"")
    (person,) = check_photos(Folder(str(tmp_path)).people(), "skip", progress=False)
    assert [photo.name for photo in person.photos] == ["small_enough.png", "whole.jpg"]
    assert all(name in caplog.text for name in {*bad, "only.jpg"})
    (tmp_path / "Bo" / "whole.jpg").unlink()
    (tmp_path / "Bo" / "small_enough.png").unlink()
    with pytest.raises(DataError, match="none is left"):
        check_photos(Folder(str(tmp_path)).people(), "skip", progress=False)
    with pytest.raises(DataError, match="'ignore'"):
        check_photos([], "ignore")  # type: ignore[arg-type]


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "Bo" / "bomb.png", (64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 2 - 1)
    with pytest.raises(DataError, match=r"bomb\.png.*decompression bomb"):
        check_photos(Folder(str(tmp_path)).people(), progress=False)


def test_readable_photos_pass_unchanged_with_a_progress_bar(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    people = Folder(str(photos)).people()
    assert check_photos(people) == people
    assert "checking photos" in (shown := capsys.readouterr().err) and "25/25" in shown


# Drawn portraits


def test_drawn_people_have_their_roles_disjoint_indices() -> None:
    people = MiniFaces(seed=3, train=12, validation=2, test=4, photos=5).people()
    assert names(people)[:2] == ["test_000000", "test_000001"]
    for side, count in {"train": 12, "validation": 2, "test": 4}.items():
        shots = [photo for person in people if person.split == side for photo in person.photos]
        assert len(shots) == count * 5
        assert all(isinstance(photo, DrawnPhoto) and photo.index in mini_faces.ROLES[side] for photo in shots)
    assert check_photos(people, progress=False) == people
    split = split_people(select_people(people, min_photos=5))
    assert [len(side) for side in (split.train, split.validation, split.test)] == [12, 2, 4]


def test_a_drawn_photo_is_its_recipe() -> None:
    photo = MiniFaces(seed=3, train=1, validation=1, test=1, photos=2).people()[1].photos[1]
    assert photo.name == "train_000000_0001.png"
    expected = mini_faces.photo(3, mini_faces.ROLES["train"].start, 1)
    assert np.array_equal(np.asarray(photo.image()), expected)
    assert photo.prompt == mini_faces.prompt(mini_faces.scene(3, mini_faces.ROLES["train"].start, 1))
    again = pickle.loads(pickle.dumps(photo))
    assert again == photo and again.content_key() == photo.content_key()
    keys = {p.content_key() for seed in (0, 1) for who in MiniFaces(seed, 2, 1, 1, 3).people() for p in who.photos}
    assert len(keys) == 2 * 4 * 3


@pytest.mark.parametrize("wrong", [{"train": 0}, {"test": -1}, {"validation": 1_000_001}, {"photos": 0}, {"seed": -1}])
def test_impossible_numbers_of_drawn_people_are_refused(wrong: dict[str, int]) -> None:
    (name,) = wrong
    with pytest.raises(DataError, match=name):
        MiniFaces(**wrong)


# Selection


def test_people_with_too_few_photos_are_left_out_and_counted(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    people = Folder(str(photos)).people()
    with caplog.at_level(logging.INFO):
        assert names(select_people(people)) == ["Ann_Lee", "Cy"]
    assert "left out 1 of 3 people" in caplog.text
    with pytest.raises(DataError, match=r"none of 3 people has min_photos = 13 .*Ann_Lee has the most, 12"):
        select_people(people, min_photos=13)
    for wrong in ({"min_photos": 1}, {"max_people": 0}):
        with pytest.raises(DataError, match=r"is [01]:"):
            select_people(people, **wrong)


def test_max_people_keeps_a_seeded_nested_subset() -> None:
    people = people_of(40)
    ten, twenty = (names(select_people(people, max_people=n, seed=1)) for n in (10, 20))
    assert len(ten) == 10 and ten == sorted(ten) and set(ten) < set(twenty)
    assert ten == names(select_people(people, max_people=10, seed=1)) != names(select_people(people, max_people=10))
    assert select_people(people, max_people=99) == people


# Split


@pytest.mark.parametrize(("count", "sizes"), [(158, (94, 11, 53)), (60, (36, 4, 20)), (3, (1, 1, 1))])
def test_the_seeded_split_is_two_to_one_by_person(count: int, sizes: tuple[int, int, int]) -> None:
    people = people_of(count)
    split = split_people(people, seed=5)
    assert (len(split.train), len(split.validation), len(split.test)) == sizes
    assert sorted(names(split.train + split.validation + split.test)) == names(people)
    assert split_people(people[::-1], seed=5) == split
    if count > 3:
        assert split_people(people, seed=6) != split


def test_a_split_without_enough_people_says_what_to_do() -> None:
    for count in (0, 1, 2):
        with pytest.raises(DataError, match="people cannot be divided"):
            split_people(people_of(count))
    with pytest.raises(DataError, match="test_fraction"):
        split_people(people_of(4), test_fraction=0.9)
    for wrong in ({"test_fraction": 0.0}, {"validation_fraction": 1.0}, {"test_fraction": float("nan")}):
        with pytest.raises(DataError, match="between 0 and 1"):
            split_people(people_of(9), **wrong)  # type: ignore[arg-type]


def test_a_split_refuses_overlap_and_empty_sides() -> None:
    a, b, c = people_of(3)
    with pytest.raises(DataError, match=r"no test people \(2 train, 1 validation, 0 test\)"):
        Split([a, b], [c], [])
    with pytest.raises(DataError, match="p001"):
        Split([a, b], [c], [b])


def listed(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return str(path)


def test_lists_of_names_decide(tmp_path: Path) -> None:
    people = people_of(12)
    train = listed(tmp_path / "train.txt", *(f"p{i:03d}" for i in range(5)))
    test = listed(tmp_path / "test.txt", "", "p007 ", "p009")
    validation = listed(tmp_path / "validation.txt", "p008")
    only_test = split_people(people, test_names=test)
    assert names(only_test.test) == ["p007", "p009"] and len(only_test.train + only_test.validation) == 10
    only_train = split_people(people, train_names=train)
    assert len(only_train.train) == 4 and names(only_train.test) == [f"p{i:03d}" for i in range(5, 12)]
    everything = split_people(people, train_names=train, test_names=test, validation_names=validation)
    assert [len(side) for side in (everything.train, everything.validation, everything.test)] == [5, 1, 2]
    drawn = split_people(people, validation_names=validation)
    assert names(drawn.validation) == ["p008"] and (len(drawn.train), len(drawn.test)) == (7, 4)


def test_lists_in_lfws_own_format_may_name_people_that_were_left_out(tmp_path: Path) -> None:
    rows = [f"p{i:03d}\t10" for i in range(6)]
    train = listed(tmp_path / "peopleDevTrain.txt", "8", *rows, "Too_Few\t1", "Absent\t2")
    test = listed(tmp_path / "peopleDevTest.txt", "1", "p007\t10")
    split = split_people(people_of(9), train_names=train, test_names=test)
    assert len(split.train + split.validation) == 6 and names(split.test) == ["p007"]
    with pytest.raises(DataError, match="announces 8 people and has 6"):
        split_people(people_of(9), train_names=listed(tmp_path / "cut.txt", "8", *rows))


def test_a_list_of_numbers_is_not_taken_for_lfws_format(tmp_path: Path) -> None:
    people = [Person(str(i), ()) for i in range(5)]
    assert names(split_people(people, test_names=listed(tmp_path / "test.txt", "1", "3")).test) == ["1", "3"]


def test_a_list_at_fault_is_named(tmp_path: Path) -> None:
    people, good = people_of(9), listed(tmp_path / "good.txt", "p001", "p002")
    for lines, message in {
        ("p001",): r"p001 is in both .*good\.txt and .*bad\.txt",
        ("p003", "Nobody"): r"bad\.txt names Nobody.*9 people",
        ("",): "is empty",
    }.items():
        with pytest.raises(DataError, match=message):
            split_people(people, train_names=good, test_names=listed(tmp_path / "bad.txt", *lines))
    with pytest.raises(DataError, match=r"gone\.txt cannot be read"):
        split_people(people, test_names=str(tmp_path / "gone.txt"))
    with pytest.raises(DataError, match="no train people"):
        split_people(people, test_names=listed(tmp_path / "all.txt", *names(people)))


def test_names_are_compared_whatever_their_composition(tmp_path: Path) -> None:
    people = [*people_of(6), Person(unicodedata.normalize("NFD", "Zoë"), ())]
    test = listed(tmp_path / "test.txt", unicodedata.normalize("NFC", "Zoë"))
    assert split_people(people, test_names=test).test == [people[-1]]


def test_a_split_fixed_by_the_source_takes_no_lists(tmp_path: Path) -> None:
    people = MiniFaces(train=3, validation=1, test=2, photos=2).people()
    with pytest.raises(DataError, match="remove test_names"):
        split_people(people, test_names=listed(tmp_path / "x.txt", people[0].name))
    with pytest.raises(DataError, match="p000: None"):
        split_people([*people, *people_of(1)])
    with pytest.raises(DataError, match="no test people"):
        split_people([person for person in people if person.split != "test"])


def test_importing_people_loads_neither_torch_nor_sklearn() -> None:
    code = "import sys, lit_multiip.data; print({'torch', 'sklearn', 'lightning'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_a_photo_of_a_person_takes_fewer_than_a_hundred_bytes_of_memory(tmp_path: Path) -> None:
    picture = tmp_path / "picture.jpg"
    picture.write_bytes(b"content")
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        people = []
        for number in range(500):
            name = f"Person_{number:05d}"
            photos = [FilePhoto(name, f"{i}.jpg", f"a photo of a person, number {i}", picture) for i in range(10)]
            assert all(photo.content_key() for photo in photos)  # read, and packed with the photo
            people.append(Person(name, photos))
        del photos
        a_photo = (tracemalloc.get_traced_memory()[0] - before) / 5_000
    finally:
        tracemalloc.stop()
    picture.unlink()
    assert people[7].photos[3].content_key() == hashlib.sha256(b"content").hexdigest()
    assert a_photo < 100


def test_packed_photos_are_the_tuple_that_they_were() -> None:
    [person, *_] = MiniFaces(train=1, validation=1, test=1, photos=5).people()
    photos = tuple(person.photos)
    assert len(person.photos) == 5 and person.photos == photos and hash(person.photos) == hash(photos)
    assert person.photos[1:3] == photos[1:3] and person.photos[-1] == photos[4] and photos[2] in person.photos
    again = pickle.loads(pickle.dumps(person))
    assert again == person and again.photos == photos and replace(person, photos=photos[:2]).photos == photos[:2]
