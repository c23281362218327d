import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lit_multiip.__main__ import main
from lit_multiip.data.people import Folder
from lit_multiip.data.photos import DataError
from lit_multiip.tools.caption import PREFIX, ImageToText, caption_photos, read_people, with_prefix, without_name

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a photo of person man in the red shirt ann smiling".split()  # noqa: SIM905


def write_photos(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), "red").save(path)
    return folder


class Captions:
    """Says the same of every photo, and remembers how many it saw at a time."""

    def __init__(self, text: str = "a man in a red shirt") -> None:
        self.text, self.batches = text, []

    def __call__(self, images):
        self.batches.append(len(images))
        assert all(image.mode == "RGB" for image in images)
        return [self.text] * len(images)


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    import torch
    from transformers import (
        BertTokenizerFast,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    folder = tmp_path_factory.mktemp("models") / "blip"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = BertTokenizerFast.from_pretrained(folder)
    layers = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    text = {**layers, **ids, "vocab_size": len(WORDS), "max_position_embeddings": 40, "encoder_hidden_size": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BlipConfig(text_config=text, vision_config={**layers, "image_size": 32, "patch_size": 8})
        BlipForConditionalGeneration(config).save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


def test_a_persons_own_captions_stay_unless_overwrite_is_set(tmp_path):
    write_photos(tmp_path, "Ann/1.jpg", "Ann/2.jpg", "Ann/3.jpg", "Bo/1.png", "Bo/2.png")
    (tmp_path / "Ann/1.txt").write_text("a person on a bridge")
    with (tmp_path / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file_name", "text"), ("Bo/2.png", "a person at sea")])
    own = {"1.jpg": "a person on a bridge", "2.png": "a person at sea"}
    done = caption_photos(read_people(str(tmp_path)), Captions())
    assert sorted(path.relative_to(tmp_path).as_posix() for path in done.written) == [
        "Ann/2.txt",
        "Ann/3.txt",
        "Bo/1.txt",
    ]
    assert done.kept == 2
    text = "a photo of a person, a man in a red shirt"
    after = [photo.prompt for person in Folder(str(tmp_path)).people() for photo in person.photos]
    assert after == [own["1.jpg"], text, text, text, own["2.png"]]
    caption_photos(read_people(str(tmp_path)), Captions(), overwrite=True)
    assert {photo.prompt for person in Folder(str(tmp_path)).people() for photo in person.photos} == {text}


def test_captions_of_the_folder_above_one_persons_own_are_kept_too(tmp_path):
    write_photos(tmp_path, "Ann/1.jpg", "Ann/2.jpg")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "Ann/1.jpg", "text": "a person at sea"}\n')
    done = caption_photos(read_people(str(tmp_path / "Ann")), Captions())
    assert [path.name for path in done.written] == ["2.txt"] and done.kept == 1


def test_an_interrupted_run_continues_where_it_was(tmp_path):
    write_photos(tmp_path, *(f"Ann/{i}.jpg" for i in range(5)))

    class Fails(Captions):
        def __call__(self, images):
            if len(self.batches) == 1:
                raise KeyboardInterrupt
            return super().__call__(images)

    with pytest.raises(KeyboardInterrupt):
        caption_photos(read_people(str(tmp_path)), Fails(), batch_size=2)
    captioner = Captions()
    done = caption_photos(read_people(str(tmp_path)), captioner, batch_size=2)
    assert captioner.batches == [2, 1] and done.kept == 2
    assert not list(tmp_path.rglob("*.part")) and len(list(tmp_path.rglob("*.txt"))) == 5
    assert caption_photos(read_people(str(tmp_path)), captioner).written == []


def test_photos_that_cannot_be_read_are_named_and_the_others_captioned(tmp_path):
    write_photos(tmp_path, "1.jpg", "3.jpg")
    (tmp_path / "2.jpg").write_bytes(b"not a picture")
    done = caption_photos(read_people(str(tmp_path)), Captions())
    assert [path.name for path in done.written] == ["1.txt", "3.txt"]
    assert len(done.failed) == 1 and "2.jpg" in done.failed[0]


def test_photos_of_one_stem_share_one_caption(tmp_path):
    write_photos(tmp_path, "1.jpg", "1.png")
    assert len(caption_photos(read_people(str(tmp_path)), Captions()).written) == 1


@pytest.mark.parametrize(
    ("text", "prefix", "expected"),
    [
        ("a photo of a person in a red shirt.", PREFIX, "a photo of a person in a red shirt"),
        ("A photo of a person  smiling", PREFIX, "a photo of a person smiling"),
        ("a man in a red shirt", PREFIX, "a photo of a person, a man in a red shirt"),
        ("smiling at the sea", PREFIX, "a photo of a person smiling at the sea"),
        ("", PREFIX, PREFIX),
        ("a man in a red shirt", "", "a man in a red shirt"),
    ],
)
def test_every_caption_starts_with_the_prefix_once(text, prefix, expected):
    assert with_prefix(text, prefix) == expected


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("a photo of a person, george w bush in a suit", "George_W_Bush", "a photo of a person, w in a suit"),
        ("a photo of a person at jose's house", "José_Li", "a photo of a person at house"),
        ("a photo of a person in a red shirt", "person_01", "a photo of a person in a red shirt"),
        ("a photo of a person in a red shirt", "Al_Bo", "a photo of a person in a red shirt"),
    ],
)
def test_captions_never_name_the_person(text, name, expected):
    assert without_name(text, name, PREFIX) == expected


def test_captions_that_named_the_person_are_listed(tmp_path):
    write_photos(tmp_path, "Ann_Lee/1.jpg", "Bo/1.jpg")
    done = caption_photos(read_people(str(tmp_path)), Captions("ann smiling"))
    assert (tmp_path / "Ann_Lee/1.txt").read_text() == "a photo of a person smiling\n"
    assert [path.parent.name for path in done.name_removed] == ["Ann_Lee"]


def test_a_model_of_transformers_continues_the_prefix(blip):
    images = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    captions = ImageToText(str(blip), max_new_tokens=5, device="cpu")(images)
    assert len(captions) == 2 and all(caption.startswith(PREFIX) for caption in captions)
    assert captions == ImageToText(str(blip), max_new_tokens=5, device="cpu")(images)
    free = ImageToText(str(blip), prefix="", max_new_tokens=5, device="cpu")(images)
    assert len(free) == 2 and not free[0].startswith(PREFIX)


def test_the_command_captions_a_folder_and_then_has_nothing_to_do(blip, tmp_path, capsys):
    write_photos(tmp_path, "Ann/1.jpg", "Ann/2.jpg")
    (tmp_path / "Ann/3.jpg").write_bytes(b"")
    command = ["caption", "--photos", str(tmp_path), "--model", str(blip), "--device", "cpu", "--max_new_tokens", "4"]
    main(command)
    assert "captions: 2 written, 0 kept, 1 failed" in capsys.readouterr().out
    assert all((tmp_path / f"Ann/{i}.txt").read_text().startswith(PREFIX) for i in (1, 2))
    (tmp_path / "Ann/3.jpg").unlink()
    main(command)
    assert "all 2 photos" in capsys.readouterr().out


def test_a_model_that_cannot_be_loaded_is_named(tmp_path, capsys):
    write_photos(tmp_path, "Ann/1.jpg")
    with pytest.raises(DataError, match=r"captioning model '.*nothing' cannot be loaded"):
        ImageToText(str(tmp_path / "nothing"))
    with pytest.raises(SystemExit):
        main(["caption", "--photos", str(tmp_path), "--batch_size", "0"])
    assert "batch_size is 0" in capsys.readouterr().err


class Landmarks:
    """In place of a detector: five landmarks of a face that looks to the left, where the photo is red."""

    def points(self, pixels):
        aside = np.array([[5, 8], [15, 8], [7, 11], [6, 15], [12, 15]], np.float32)
        return aside if pixels[0, 0, 0] > 200 else None


def test_captions_by_landmarks_say_what_is_proven_and_name_photos_without_a_face(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setattr("lit_multiip.tools.caption.load_detector", lambda given: Landmarks())
    write_photos(tmp_path, "Ann/1.jpg", "Ann/2.jpg")
    Image.new("RGB", (20, 20), "blue").save(tmp_path / "Ann/3.jpg")
    (tmp_path / "Ann/2.txt").write_text("my own words")
    command = ["caption", "--photos", str(tmp_path), "--by", "landmarks"]
    main(command)
    assert "captions: 1 written, 1 kept, 1 failed" in capsys.readouterr().out
    assert "3.jpg: no face was found: write its caption by hand, or take --by model" in caplog.text
    expected = "a photo of a person looking to the left\n"
    assert (tmp_path / "Ann/1.txt").read_text() == expected and not (tmp_path / "Ann/3.txt").exists()
    assert (tmp_path / "Ann/2.txt").read_text() == "my own words"
    assert [p.prompt for p in Folder(str(tmp_path)).people()[0].photos][2] == PREFIX  # nothing is lost

    (tmp_path / "words.yaml").write_text("turn: {left: seen from her right}\n")
    main([*command, "--overwrite", "true", "--words", str(tmp_path / "words.yaml")])
    assert (tmp_path / "Ann/1.txt").read_text() == "a photo of a person seen from her right\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--by", "landmarks", "--model", "blip"], "--model is for captions by model, and they are by landmarks"),
        (["--detector", "dlib", "--words", "w.yaml"], "--detector, --words is for captions by landmarks"),
        (["--by", "landmarks", "--words", "absent.yaml"], "absent.yaml cannot be read"),
        (
            ["--by", "landmarks", "--words", "list.yaml"],
            "words 'list.yaml' are ['a']: write",
        ),
        (["--by", "landmarks", "--detector", "absent.onnx"], "no file 'absent.onnx'"),
    ],
)
def test_options_of_captions_that_do_not_fit_are_refused_in_one_line(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path, "photos/Ann/1.jpg")
    (tmp_path / "list.yaml").write_text("[a]")
    if "--words" in options:
        monkeypatch.setattr("lit_multiip.tools.caption.load_detector", lambda given: Landmarks())
    with pytest.raises(SystemExit):
        main(["caption", "--photos", "photos", *options])
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.txt"))
