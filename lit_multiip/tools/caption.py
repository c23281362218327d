"""The command `caption`: a model, or landmarks of the face, write a caption beside every photo that has none."""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from PIL import Image
from tqdm import tqdm

from lit_multiip.backbone.dlib_faces import DLIB, load_detector
from lit_multiip.data.captions import METADATA, read_text
from lit_multiip.data.names import normalise_name
from lit_multiip.data.people import Folder, Person, is_photo, read_person
from lit_multiip.data.photos import DataError, FilePhoto
from lit_multiip.evaluation.reading import FaceReader
from lit_multiip.files import first_line, shorten, write_durably

logger = logging.getLogger(__name__)

MODEL = "Salesforce/blip-image-captioning-large"
PREFIX = "a photo of a person"
UNCAPTIONED = "no caption"  # stands for the prompt of photos that have none
MAX_NEW_TOKENS = 30
NO_FACE = "no face was found: write its caption by hand, or take --by model"
Captioner = Callable[[Sequence[Image.Image]], Sequence[str | None]]  # None: it can say nothing of that image


@dataclass
class Outcome:
    """What became of the photos."""

    written: list[Path] = field(default_factory=list)  # text files
    kept: int = 0  # photos that had a caption
    failed: list[str] = field(default_factory=list)  # a line for each photo that got none, with the reason
    name_removed: list[Path] = field(default_factory=list)  # text files less the person's name


class ImageToText:
    """A captioning model of transformers that continues a text, such as BLIP or GIT.

    Args:
        model: folder or hub id; weights are read from safetensors alone, and code of the model's is not run.
        prefix: start of every caption, which the model continues; if empty, the model writes freely.
        max_new_tokens: length of what the model adds.
        device: such as `cuda`; None takes a GPU where there is one.
    """

    def __init__(
        self, model: str = MODEL, prefix: str = PREFIX, max_new_tokens: int = MAX_NEW_TOKENS, device: str | None = None
    ) -> None:
        import torch
        from safetensors import SafetensorError
        from transformers import AutoModelForImageTextToText, AutoProcessor

        from lit_multiip.backbone.components import safe_config

        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        folder = Path(model).expanduser()
        place = str(folder) if folder.is_dir() else model
        dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        try:
            self.processor: Any = AutoProcessor.from_pretrained(place)
            options: dict[str, Any] = {"use_safetensors": True, "dtype": dtype, "config": safe_config(place)}
            network: Any = AutoModelForImageTextToText.from_pretrained(place, **options)
        except (OSError, ValueError, SafetensorError) as error:
            raise DataError(
                f"captioning model '{model}' cannot be loaded ({first_line(error)}): give --model a folder that "
                "save_pretrained wrote, with safetensors, or a hub id that can be reached"
            ) from error
        self.network = network.to(self.device).eval().requires_grad_(False)
        self.prefix, self.max_new_tokens = prefix, max_new_tokens

    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """Return captions of RGB images, with or without the prefix, as the model gives them; the same every time."""
        text = {"text": [self.prefix] * len(images)} if self.prefix else {}
        inputs = self.processor(images=list(images), return_tensors="pt", **text).to(self.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.network.dtype)
        tokens = self.network.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1)
        captions: list[str] = self.processor.batch_decode(tokens, skip_special_tokens=True)
        return captions


def caption(
    photos: str,
    by: Literal["model", "landmarks"] = "model",
    model: str | None = None,
    prefix: str = PREFIX,
    batch_size: int = 8,
    overwrite: bool = False,
    max_new_tokens: int | None = None,
    device: str | None = None,
    detector: str | None = None,
    words: str | None = None,
) -> None:
    """Write a caption beside every photo that has none, `1.txt` for `1.jpg`.

    Photos with a text file or a row in metadata.csv or metadata.jsonl are left alone, so that an interrupted run
    continues where it was. Words of a person's name, as their folder gives it, are removed from captions.

    Args:
        photos: a folder of folders, one per person, or one person's folder.
        by: `model`, an image-to-text model of transformers; `landmarks`, what those of the face and the pixels around
            it prove, offline, such as "smiling, facing the camera, in front of a dark background".
        model: folder or hub id of the model, such as a BLIP; null takes Salesforce/blip-image-captioning-large.
        prefix: start of every caption, with the class noun; empty for none.
        batch_size: photos at a time.
        overwrite: replace the captions that exist, those written by hand too.
        max_new_tokens: length of what the model adds to the prefix; null takes 30.
        device: of the model, such as `cuda` or `cpu`; null takes a GPU where there is one.
        detector: of the landmarks: `dlib` (null, too), which gives 68, or the file of YuNet, which gives five, so that
            nothing is said of mouth and expression.
        words: of the landmarks: a YAML file with other words, by attribute and class.
    """
    if batch_size < 1 or (max_new_tokens is not None and max_new_tokens < 1):
        raise DataError(f"batch_size is {batch_size} and max_new_tokens {max_new_tokens}: give at least 1 of each")
    options: dict[str, dict[str, Any]] = {
        "landmarks": {"detector": detector, "words": words},
        "model": {"model": model, "max_new_tokens": max_new_tokens, "device": device},
    }
    for way, own in options.items():
        if ignored := [f"--{name}" for name, value in own.items() if value is not None and by != way]:
            raise DataError(f"{', '.join(ignored)} is for captions by {way}, and they are by {by}: set --by {way}")
    people = read_people(photos)
    waiting, kept = _photos_to_caption(people, overwrite)
    if not waiting:
        print(f"all {kept} photos of {photos} have captions: nothing to do; --overwrite true replaces them")
        return
    captioner: Captioner
    if by == "landmarks":
        captioner = FaceReader(load_detector(detector or DLIB), read_words(words))
    else:
        captioner = ImageToText(model or MODEL, prefix, max_new_tokens or MAX_NEW_TOKENS, device)
    outcome = caption_photos(people, captioner, prefix, batch_size, overwrite)
    for reason in outcome.failed:
        logger.warning("no caption for %s", reason)
    if outcome.name_removed:
        names = shorten(outcome.name_removed)
        logger.warning(
            "removed the person's name from %d captions, please read them: %s", len(outcome.name_removed), names
        )
    print(f"captions: {len(outcome.written)} written, {outcome.kept} kept, {len(outcome.failed)} failed")


def read_words(path: str | None) -> dict[str, dict[str, str]]:
    """Read the words of captions by landmarks, by attribute and class, from a YAML file."""
    if path is None:
        return {}
    try:
        words = yaml.safe_load(read_text(Path(path).expanduser()))
    except yaml.YAMLError as error:
        raise DataError(
            f"words '{path}' are no YAML ({first_line(error)}): write attribute, class and words"
        ) from error
    if not isinstance(words, dict):
        raise DataError(
            f"words '{path}' are {words!r:.100}: write attribute, class and words, such as mouth: {{open: ...}}"
        )
    return words


def read_people(photos: str) -> list[Person]:
    """Read a folder of folders, or one person's folder; the prompt of photos without a caption is `UNCAPTIONED`."""
    folder = Path(os.path.abspath(Path(photos).expanduser()))
    if not (folder.is_dir() and any(map(is_photo, folder.iterdir()))):
        return Folder(str(folder), UNCAPTIONED).people()
    if any((folder.parent / name).exists() for name in METADATA):  # which may hold this person's captions
        people = Folder(str(folder.parent), UNCAPTIONED).people()
        return [person for person in people if person.name == normalise_name(folder.name)]
    return [read_person(folder, UNCAPTIONED)]


def caption_photos(
    people: Iterable[Person],
    captioner: Captioner,
    prefix: str = PREFIX,
    batch_size: int = 8,
    overwrite: bool = False,
) -> Outcome:
    """Write what a captioner says of the photos that `read_people` found without a caption.

    Each file appears whole or not at all. Photos that cannot be read get no caption, and are named in the outcome.

    Args:
        people: whose photos.
        captioner: returns a caption for each of some RGB images.
        prefix: start of every caption.
        batch_size: photos at a time.
        overwrite: caption the photos that have a caption as well.
    """
    waiting, kept = _photos_to_caption(people, overwrite)
    outcome = Outcome(kept=kept)
    with tqdm(total=len(waiting), desc="captions", unit="photo") as bar:
        for start in range(0, len(waiting), batch_size):
            batch = waiting[start : start + batch_size]
            photos, images = [], []
            for photo in batch:
                try:
                    images.append(photo.image())
                    photos.append(photo)
                except DataError as error:
                    outcome.failed.append(str(error))
            for photo, text in zip(photos, captioner(images) if images else [], strict=True):
                if text is None:
                    outcome.failed.append(f"{photo.path}: {NO_FACE}")
                    continue
                _write_caption(photo, with_prefix(text, prefix), prefix, overwrite, outcome)
            bar.update(len(batch))
    return outcome


def with_prefix(text: str, prefix: str) -> str:
    """Return a caption that starts with the prefix once, whether or not the model repeated it."""
    text, prefix = (" ".join(part.split()) for part in (text, prefix))
    rest = text[len(prefix) :] if text.casefold().startswith(prefix.casefold()) else f" {text}"
    if not prefix:
        return text
    rest = rest.rstrip(" .")
    if re.match(r" (an?|the|his|her) ", rest, re.IGNORECASE) and not text.casefold().startswith(prefix.casefold()):
        rest = f",{rest}"
    return f"{prefix}{rest}"


def without_name(text: str, name: str, prefix: str = "") -> str:
    """Return a caption less the words of the person's name that have three letters or more; the prefix stays.

    Accents, capitals and a possessive 's do not matter. Of "Jack_White" the colour of a white shirt goes as well.
    """
    words = {word for word in re.split(r"[\W\d_]+", _fold(name)) if len(word) >= 3}
    head, tail = (prefix, text[len(prefix) :]) if prefix and text.startswith(prefix) else ("", text)
    kept = [word for word in tail.split() if not words & {re.sub(r"'s$", "", _fold(word).strip(".,;:!?\"'()"))}]
    return " ".join([*([head] if head else []), *kept]).replace(" ,", ",")


def _write_caption(photo: FilePhoto, text: str, prefix: str, overwrite: bool, outcome: Outcome) -> None:
    caption = without_name(text, photo.person, " ".join(prefix.split()))
    path = _text_file(photo.path)
    if not caption:
        outcome.failed.append(f"{photo.path}: the model wrote nothing, set --prefix")
    elif path.exists() and not overwrite:  # somebody wrote it in the meantime
        outcome.kept += 1
    else:
        write_durably(path, lambda file: file.write(f"{caption}\n".encode()))
        outcome.written.append(path)
        if caption != text:
            outcome.name_removed.append(path)


def _photos_to_caption(people: Iterable[Person], overwrite: bool) -> tuple[list[FilePhoto], int]:
    """Return the photos to caption, one for a text file, and how many photos have a caption."""
    photos = [photo for person in people for photo in person.photos if isinstance(photo, FilePhoto)]
    chosen = [photo for photo in photos if overwrite or photo.prompt == UNCAPTIONED]
    first = {photo.path.with_suffix(""): photo for photo in reversed(chosen)}  # 1.jpg and 1.png share 1.txt
    return list(first.values())[::-1], len(photos) - len(chosen)


def _text_file(photo: Path) -> Path:
    """Return the text file of a photo; one that exists keeps its own spelling, such as 1.TXT."""
    found = [file for file in photo.parent.iterdir() if file.stem == photo.stem and file.suffix.lower() == ".txt"]
    return found[0] if found else photo.with_suffix(".txt")


def _fold(text: str) -> str:
    """Return text without accents, in lower case."""
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c)).casefold()
