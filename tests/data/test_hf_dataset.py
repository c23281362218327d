import io
import pickle
import socket
from pathlib import Path

import numpy as np
import pytest
from commands import refusal
from PIL import Image

from lit_multiip.data import DataError, FilePhoto, Folder, HFDataset, check_photos, make_tasks
from lit_multiip.data.captions import TEMPLATE

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*_):
        raise OSError("the network is not reached in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def encoded(colour: tuple[int, int, int], size: tuple[int, int] = (32, 24), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


def columns(**changed):
    """Seven photos of three people, as they lie in a table."""
    people = ["Bo", "Ann", "Bo", "Ann", "Cy", "Ann", "Bo"]
    texts = [f"photo {i}" for i in range(6)] + [""]
    images = [{"bytes": encoded((30 * i, 200, 10)), "path": None} for i in range(7)]
    table = {"image": images, "person": people, "text": texts} | changed
    return {name: column for name, column in table.items() if column is not None}


def source(path: Path, table: dict | None = None, **options) -> HFDataset:
    """A parquet file that knows nothing of `datasets`, and the source of it."""
    pq.write_table(pa.table(columns() if table is None else table), path / "photos.parquet")
    return HFDataset(str(path / "photos.parquet"), cache_dir=str(path / "cache"), **options)


def test_rows_become_people_in_natural_order(tmp_path):
    people = source(tmp_path).people()
    assert [(p.name, [photo.name for photo in p.photos]) for p in people] == [
        ("Ann", ["000001", "000003", "000005"]),
        ("Bo", ["000000", "000002", "000006"]),
        ("Cy", ["000004"]),
    ]
    assert [photo.prompt for photo in people[1].photos] == ["photo 0", "photo 2", TEMPLATE]
    assert people == source(tmp_path).people() and {person.split for person in people} == {None}
    assert people[0].photos[1].image().getpixel((0, 0)) == (90, 200, 10)
    assert pickle.loads(pickle.dumps(people[0].photos[1])).image().size == (32, 24)
    assert check_photos(people, progress=False) == people
    assert len(make_tasks(people[:2], references=2, held_out=1)) == 2


def test_what_datasets_itself_writes_reads_the_same(tmp_path):
    features = {"image": datasets.Image(), "person": datasets.ClassLabel(names=["Zoe", "Ann", "Bo", "Cy"])}
    table = columns(person=[2, 1, 2, 1, 3, 1, 2])
    made = datasets.Dataset.from_dict(table, datasets.Features(features | {"text": datasets.Value("string")}))
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    made.to_parquet(tmp_path / "a" / "train-00000.parquet")
    people = HFDataset(str(tmp_path / "a"), cache_dir=str(tmp_path / "cache")).people()  # a folder
    other = source(tmp_path / "b", columns(image=[image["bytes"] for image in table["image"]])).people()  # bytes alone
    assert [person.name for person in people] == ["Ann", "Bo", "Cy"]
    for a, b in zip(people, other, strict=True):
        assert [(p.name, p.prompt, p.content_key()) for p in a.photos] == [
            (p.name, p.prompt, p.content_key()) for p in b.photos
        ]


def test_the_bytes_of_a_photo_decide_its_key_as_in_a_file(tmp_path):
    photo = source(tmp_path).people()[2].photos[0]
    (tmp_path / "4.png").write_bytes(columns()["image"][4]["bytes"])
    assert photo.content_key() == FilePhoto("Cy", "4.png", "", tmp_path / "4.png").content_key()
    assert np.array_equal(photo.image(), FilePhoto("Cy", "4.png", "", tmp_path / "4.png").image())


def test_columns_and_split_may_be_called_otherwise(tmp_path):
    table = columns()
    table = {"photo": table["image"], "label": [3, 1, 3, 1, 12, 1, 3], "text": table["text"]}
    found = source(tmp_path, table, image="photo", person="label", text=None, split="train[:5]").people()
    assert [(p.name, len(p.photos)) for p in found] == [("1", 2), ("3", 2), ("12", 1)]
    assert {photo.prompt for person in found for photo in person.photos} == {TEMPLATE}


def test_ten_thousand_rows_are_read_without_a_picture(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    count = 10_000  # 57 MB as JPEG and 123 MB of pixels
    rows = {
        "image": pa.array([{"bytes": buffer.getvalue(), "path": None}] * count),
        "person": [f"p{i % 500}" for i in range(count)],
        "text": ["a photo"] * count,
    }
    made = source(tmp_path, rows)
    made.people()  # which writes the cache once
    opened = []
    monkeypatch.setattr(Image, "open", lambda *a, _open=Image.open, **k: opened.append(1) or _open(*a, **k))
    before = pa.total_allocated_bytes()
    people = made.people()
    assert sum(len(person.photos) for person in people) == count and not opened
    for person in people[:100]:
        assert person.photos[0].image().size == (64, 64)
    assert len(opened) == 100
    assert pa.total_allocated_bytes() - before < 5e6


@pytest.mark.parametrize(
    ("changed", "options", "said"),
    [
        (
            {"person": None},
            {},
            "has no column 'person', but image, text: set .*person to the one of the person, or lay a",
        ),
        ({"image": None}, {}, "has no column 'image', but person, text: set .*image to the one of the image"),
        ({}, {"text": "caption"}, "has no column 'caption', but image, person, text: set .*text .*, or to null"),
        ({}, {"image": "text"}, "column 'text' of .* holds string, and the image is wanted: set .*init_args.image"),
        ({}, {"person": "image"}, "column 'image' of .* holds .*, and the person is wanted"),
        ({"person": ["Bo", None, *["Bo"] * 5]}, {}, "row 1 of .* says of the person None, which names nobody"),
        (
            {"person": ["Bo", *["../../Bo"] * 6]},
            {},
            r"row 1 of .* '../../Bo', which names nobody or no folder: correct",
        ),
        ({}, {"split": "tset"}, "cannot be loaded .*: .* check split 'tset'"),
        ({}, {"template": "a {thing}"}, "must be a prompt"),
    ],
)
def test_a_wrong_table_is_one_sentence_with_the_remedy(tmp_path, changed, options, said):
    with pytest.raises(DataError, match=said) as error:
        source(tmp_path, columns(**changed), **options).people()
    assert "\n" not in str(error.value)


def test_a_wrong_name_or_file_is_one_sentence_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        DataError, match=r"'org/gone' cannot be loaded \(.*\): give a hub id that can be reached, or"
    ) as e:
        HFDataset("org/gone", cache_dir=str(tmp_path)).people()
    assert "\n" not in str(e.value)
    (tmp_path / "photos.csv").write_text("image,person\n")
    with pytest.raises(DataError, match=r"photos.csv' is no table: give \.parquet"):
        HFDataset(str(tmp_path / "photos.csv")).people()
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"torn.parquet' cannot be loaded"):
        HFDataset(str(tmp_path / "torn.parquet"), cache_dir=str(tmp_path / "cache")).people()


def test_a_broken_picture_is_named_by_its_row(tmp_path):
    images = columns()["image"]
    images[3] = {"bytes": images[3]["bytes"][:40], "path": None}
    images[4] = {"bytes": None, "path": "gone.png"}
    people = source(tmp_path, columns(image=images)).people()
    with pytest.raises(
        DataError, match=r"2 of 7 photos cannot be used:\n.*photos.parquet, row 3: .*\n.*row 4: it has no"
    ):
        check_photos(people, progress=False)


def test_the_command_line_finds_it_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source(tmp_path)
    where = ["--data.source", "HFDataset", "--data.source.path", "photos.parquet", "--data.source.person", "who"]
    said = refusal(capsys, "tasks", *where, "--data.source.cache_dir", str(tmp_path / "cache"))
    assert "has no column 'who', but image, person, text" in said


def test_it_has_the_people_of_a_folder_of_the_same_photos(tmp_path):
    for row, (person, image) in enumerate(zip(columns()["person"], columns()["image"], strict=True)):
        path = tmp_path / "folder" / person / f"{row:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image["bytes"])
    folder, rows = Folder(str(tmp_path / "folder")).people(), source(tmp_path).people()
    assert [person.name for person in folder] == [person.name for person in rows]
    for a, b in zip(folder, rows, strict=True):
        assert [photo.content_key() for photo in a.photos] == [photo.content_key() for photo in b.photos]
