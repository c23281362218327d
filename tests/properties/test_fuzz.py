"""Thousands of broken photos, captions and configs: each is used or refused by name, and none ends in a traceback."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import string
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from resuming import METHOD, write_config

from lit_multiip.__main__ import main
from lit_multiip.backbone.features import prompt_key
from lit_multiip.data import Folder
from lit_multiip.data.captions import METADATA
from lit_multiip.data.photos import MIN_SIDE, DataError, FilePhoto


@contextmanager
def ends(seconds: int = 30) -> Iterator[None]:
    """Fail where what is within hangs."""

    def late(*_: Any) -> None:
        raise AssertionError(f"not done after {seconds} s")

    earlier = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, earlier)


# ---- photos ---------------------------------------------------------------------------------------------------------


def originals(seed: int = 0) -> list[bytes]:
    """Pictures of every kind that a folder may hold."""
    rng = np.random.default_rng(seed)
    pixels = Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
    grey16 = Image.fromarray(rng.integers(0, 65536, (20, 24), dtype=np.uint16))
    frames = [Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)) for _ in range(3)]
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    kinds: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (pixels, "JPEG", {}),
        (pixels, "JPEG", {"exif": exif, "progressive": True}),
        (pixels.convert("CMYK"), "JPEG", {}),
        (pixels.convert("L"), "JPEG", {}),
        (pixels, "PNG", {"exif": exif}),
        (grey16, "PNG", {}),
        (pixels.convert("P"), "PNG", {"transparency": 3}),
        (pixels.convert("1"), "PNG", {}),
        (pixels.convert("RGBA"), "WEBP", {"lossless": True}),
        (frames[0], "WEBP", {"save_all": True, "append_images": frames[1:]}),
        (frames[0], "PNG", {"save_all": True, "append_images": frames[1:]}),
        (pixels, "BMP", {}),
        (pixels.convert("P"), "BMP", {}),
        (frames[0], "GIF", {"save_all": True, "append_images": frames[1:]}),  # not a type that is taken
        (pixels, "TIFF", {}),
        (pixels.crop((0, 0, 1, 1)), "PNG", {}),
    ]
    files = []
    for image, kind, options in kinds:
        image.save(file := io.BytesIO(), kind, **options)
        files.append(file.getvalue())
    return files


def spoiled(content: bytes, rng: random.Random) -> bytes:
    """The same with a fault."""
    broken = bytearray(content)
    fault = rng.randrange(6)
    if fault == 0:
        del broken[rng.randrange(len(broken)) :]
    elif fault == 1:
        for _ in range(rng.randint(1, 12)):
            broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
    elif fault == 2:
        at = rng.randrange(len(broken))
        broken[at : at + rng.randint(1, 40)] = bytes(rng.randrange(256) for _ in range(rng.randint(0, 40)))
    elif fault == 3:
        at = rng.randrange(min(64, len(broken)))  # sizes and types stand here
        broken[at : at + 4] = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\0\x75\x30", b"\x30\x75\0\0"])
    elif fault == 4:
        broken[:] = bytes(rng.randrange(256) for _ in range(rng.randint(0, 200)))
    else:
        broken += broken[rng.randrange(len(broken)) :]
    return bytes(broken)


def read(path: Path) -> bool:
    """Whether a photo can be used; anything else but a refusal by name is an error."""
    with ends(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = FilePhoto("Ann", path.name, "a photo", path).image()
        except DataError as error:
            assert str(path) in str(error)
            return False
    assert image.mode == "RGB" and min(image.size) >= MIN_SIDE
    return True


def test_two_thousand_broken_photos_are_read_or_refused_by_name(tmp_path: Path) -> None:
    rng, files, readable = random.Random(0), originals(), 0
    for _ in range(2000):
        path = tmp_path / f"photo{rng.choice(['.jpg', '.png', '.webp', '.bmp'])}"
        path.write_bytes(spoiled(rng.choice(files), rng))
        readable += read(path)
    assert 100 < readable < 1900  # it tries both


def bomb(kind: str) -> bytes:
    """30000 x 30000 px in a few bytes."""
    if kind == "BMP":
        header = bytearray(originals()[11])
        header[18:26] = np.array([30000, 30000], "<i4").tobytes()
        return bytes(header)
    content = bytearray(originals()[4])
    content[16:24] = np.array([30000, 30000], ">u4").tobytes()
    import zlib

    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.parametrize("kind", ["BMP", "PNG"])
def test_a_decompression_bomb_is_refused_before_memory_is_taken(kind: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(bomb(kind))
    with ends(5), pytest.raises(DataError, match=r"a\.png: .*decompression bomb"):
        FilePhoto("Ann", "a.png", "", tmp_path / "a.png").image()


def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / "Ann"
    folder.mkdir()
    os.mkfifo(folder / "pipe.jpg")
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    (folder / "nothing.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "endless.jpg").symlink_to("/dev/zero")
    for path in sorted(folder.iterdir()):
        assert not read(path)
    for name in ("a.txt", "metadata.csv", "metadata.jsonl"):
        for other in folder.iterdir():
            other.unlink()
        (folder / "a.jpg").write_bytes(b"")
        os.mkfifo(folder / name)
        with ends(5), pytest.raises(DataError, match=name):
            Folder(str(tmp_path)).people()


# ---- captions -------------------------------------------------------------------------------------------------------

PIECES = [
    *("a photo", "\0", "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "\u202e", "\ufeff", "e\u0301", '"'),
    *("\n", "\r", ",", "file_name", "text", "prompt", "1.jpg", "{", "}", "[", '{"file_name": "1.jpg", "text": "', '"}'),
    *("\\ud800", "null", "1e999", "9" * 5000, "[" * 3000, "x" * 100_000, "../", "/", "\t", "'", "\x1b[2J", "\u200b"),
]


def broken_text(rng: random.Random) -> bytes:
    if rng.random() < 0.2:
        return bytes(rng.randrange(256) for _ in range(rng.randint(0, 60)))
    encoding = rng.choice(["utf-8", "utf-8", "utf-8", "utf-16", "latin-1"])
    text = "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 12)))
    if rng.random() < 0.5:
        text = f"file_name,text\n1.jpg,{text}"
    return text.encode(encoding, "ignore")


def test_five_hundred_broken_captions_are_used_or_refused_by_name(tmp_path: Path) -> None:
    rng, folder, used = random.Random(1), tmp_path / "Ann", 0
    folder.mkdir()
    (folder / "1.jpg").write_bytes(b"")
    for _ in range(500):
        file = folder / rng.choice(["1.txt", *METADATA])
        file.write_bytes(broken_text(rng))
        with ends():
            try:
                [person] = Folder(str(tmp_path)).people()
            except DataError as error:
                assert file.name in str(error) and len(str(error)) < 2000
            else:
                assert person.photos[0].prompt.strip()
                prompt_key(person.photos[0].prompt)
                used += 1
        file.unlink()
    assert 20 < used < 480


ODD = [
    "Zoë",
    "Zoe\u0308",
    "李小龙",
    "🙂",
    "a b",
    "-rf",
    "…",
    "x" * 200,
    "%s{}",
    os.fsdecode(b"\xff\xfe"),
    "a\nb",
    "'\"",
]


def test_odd_names_of_people_and_photos_train_and_are_tested(
    tiny_backbone: Path, random_critic: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """And a caption of 10^5 characters, a picture in CMYK and one on its side."""
    monkeypatch.chdir(tmp_path)
    photos = tmp_path / "photos"
    people = [name for name in ODD if name != "Zoe\u0308"]  # which is another one's in other letters
    rng = random.Random(2)
    for person in people:
        (photos / person).mkdir(parents=True)
        for number in range(4):
            name = f"{rng.choice(ODD)[:100]}{number}"
            content = originals(10 * people.index(person) + number)[rng.choice([0, 1, 2, 4, 5, 8, 9])]
            (photos / person / f"{name}.png").write_bytes(content)
    (photos / "a b" / "long.jpg").write_bytes(originals(999)[0])
    (photos / "a b" / "long.txt").write_text("a very long photo " * 5556)
    critic = {
        "class_path": "lit_multiip.evaluation.critic.CriticExtractor",
        "init_args": {"folder": str(random_critic)},
    }
    config = write_config(
        tmp_path / "tiny.yaml",
        tiny_backbone,
        tmp_path / "features",
        data={
            "source": {"class_path": "lit_multiip.data.Folder", "init_args": {"path": str(photos)}},
            "min_photos": 4,
            "held_out": 1,
        },
        score={"extractors": [critic], "groups": 2, "resamples": 2, "anchors": False},
        grid={"people": 3},
    )
    with ends(120):
        main(["fit", "--config", str(METHOD), "--config", str(config), "--trainer.max_steps=2"])
        main(["test", "--data.tested=train"])
        main(["predict", "--photos", str(photos / "a b"), "--prompts", "x" * 100_000, "--seeds", "1"])


# ---- configs --------------------------------------------------------------------------------------------------------

VALUES: list[Any] = [None, -1, 0, -1.5, 1e30, float("nan"), "", "nonsense", [], [1, "a"], {}, {"a": 1}, True, 2**70]


def leaves(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of all values of a config."""
    if isinstance(config, dict) and config:
        for key, value in config.items():
            yield from leaves(value, (*path, key))
            if isinstance(value, dict):
                yield (*path, key)
    else:
        yield path


def changed(config: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    key, *rest = path
    inner = changed(config[key], tuple(rest), value) if rest else value
    return {**config, key: inner}


@pytest.fixture(scope="module")
def whole_config(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every option of ``fit``, as a run writes it."""
    folder = tmp_path_factory.mktemp("config")
    config = write_config(folder / "tiny.yaml", tiny_backbone, folder / "features", trainer={"max_steps": 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["fit", "--config", str(METHOD), "--config", str(config)])
    return yaml.safe_load((folder / "runs" / "self_attn" / "version_0" / "config.yaml").read_text())


def faulty(config: dict[str, Any], rng: random.Random) -> tuple[str, dict[str, Any]]:
    """One wrong value, or a key that does not exist."""
    paths = [
        path
        for path in leaves(config)
        # what would wait for other machines, or train for ever
        if path[:2] not in {("trainer", "num_nodes"), ("trainer", "max_steps"), ("trainer", "max_epochs")}
    ]
    path = rng.choice(paths)
    if rng.random() < 0.1:
        path = (*path[:-1], "".join(rng.choices(string.ascii_lowercase, k=6)))
    value = rng.choice(VALUES)
    if path == ("data",) and not value:  # all defaults: fine, and long
        value = "nonsense"
    return f"{'.'.join(path)} = {value!r}", changed(config, path, value)


def refused_or_run(config: dict[str, Any], folder: Path, capsys: Any) -> str | None:
    """Run a fit of one step; what it was refused with, in one line."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    try:
        with ends(90):
            main(["fit", "--config", str(path), "--trainer.max_steps=1"])
    except SystemExit as exit_:
        assert exit_.code in (1, 2)
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        return error
    finally:
        capsys.readouterr()
    return None


@pytest.mark.parametrize("seed", [*range(8), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(8, 300))])
def test_a_faulty_config_is_run_or_refused_in_one_line(
    seed: int, whole_config: dict[str, Any], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    what, config = faulty(whole_config, random.Random(seed))
    error = refused_or_run(config, tmp_path, capsys)
    if error is not None:
        assert len(error) < 3000, what


@pytest.mark.parametrize("section", ["trainer", "data", "score", "grid", "checkpoint"])
def test_a_value_in_place_of_a_section_is_not_ignored(
    section: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text(f"{section}: 1.0e+30\n")
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", "bad.yaml"])
    assert exit_.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message == f"error: '{section}' in a config is 1e+30: write its options below it, one a line"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- a\n- b\n",
        "a: [",
        "\t",
        "!!python/object/apply:os.system ['touch harm']",
        "*x",
        "a: 1\na: 2",
        "\xff",
        "{" * 2000,
    ],
)
def test_a_file_that_is_no_config_is_refused_in_one_line(
    text: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_bytes(text.encode("latin-1"))
    with ends(), pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", "bad.yaml", "--nonsense"])  # what else is wrong with it does not matter
    assert exit_.value.code in (1, 2)
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "harm").exists()


def test_json_that_is_too_deep_is_no_metadata(tmp_path: Path) -> None:
    (tmp_path / "Ann").mkdir()
    (tmp_path / "Ann" / "1.jpg").write_bytes(b"")
    for line in ("[" * 100_000, json.dumps({"file_name": "1.jpg", "text": "\ud800"}), '{"a": ' + "9" * 5000 + "}"):
        (tmp_path / "Ann" / "metadata.jsonl").write_text(line)
        with pytest.raises(DataError, match=r"metadata\.jsonl"):
            Folder(str(tmp_path)).people()
