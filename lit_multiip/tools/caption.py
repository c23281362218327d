"""Captions for photos that have none, by an image-to-text model, as text files beside them."""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from lit_multiip.data.captions import METADATA, nfc
from lit_multiip.data.people import SUFFIXES, Folder, Person, read_person
from lit_multiip.data.photos import DataError, FilePhoto
from lit_multiip.files import first_line, write_durably

logger = logging.getLogger(__name__)

MODEL = "Salesforce/blip-image-captioning-large"
PREFIX = "a photo of a person"
NONE = "no caption"  # stands for the prompt of photos that have none
Captioner = Callable[[Sequence[Image.Image]], Sequence[str]]


@dataclass
class Captioned:
    """What became of photos."""

    written: list[Path] = field(default_factory=list)  # text files
    kept: int = 0  # photos that had a caption
    unreadable: list[str] = field(default_factory=list)  # why, a line a photo
    named: list[Path] = field(default_factory=list)  # text files from whose captions the person's name was taken


class ImageToText:
    """A captioning model of transformers that continues a text, such as BLIP or GIT.

    Args:
        model: Folder or hub id. Weights are read from safetensors alone, and no code of the model's is run.
        prefix: Start of every caption, which the model continues; empty: it writes freely.
        max_new_tokens: Length of what it adds.
        device: Such as `cuda`; None takes a GPU where there is one.

    Raises:
        DataError: the model cannot be loaded.
    """

    def __init__(
        self, model: str = MODEL, prefix: str = PREFIX, max_new_tokens: int = 30, device: str | None = None
    ) -> None:
        import torch
        from safetensors import SafetensorError
        from transformers import AutoModelForImageTextToText, AutoProcessor

        from lit_multiip.backbone.pipeline import safe_config

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
        """Captions of RGB images, with or without the prefix, as the model gives them. The same every time."""
        text = {"text": [self.prefix] * len(images)} if self.prefix else {}
        inputs = self.processor(images=list(images), return_tensors="pt", **text).to(self.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.network.dtype)
        tokens = self.network.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1)
        captions: list[str] = self.processor.batch_decode(tokens, skip_special_tokens=True)
        return captions


def caption(
    photos: str,
    model: str = MODEL,
    prefix: str = PREFIX,
    batch_size: int = 8,
    overwrite: bool = False,
    max_new_tokens: int = 30,
    device: str | None = None,
) -> None:
    """Write a caption beside every photo that has none, `1.txt` for `1.jpg`.

    Photos with a text file or a row in metadata.csv or metadata.jsonl are left alone, so an interrupted run goes on
    where it was. Words of a person's name, as their folder gives it, are taken out of captions.

    Args:
        photos: A folder of folders, one per person, or one person's folder.
        model: Folder or hub id of an image-to-text model of transformers, such as a BLIP.
        prefix: Start of every caption, with the class noun; empty for none.
        batch_size: Photos at a time.
        overwrite: Replace the captions that are there, a person's own too.
        max_new_tokens: Length of what the model adds to the prefix.
        device: Such as `cuda` or `cpu`; null takes a GPU where there is one.
    """
    if batch_size < 1 or max_new_tokens < 1:
        raise DataError(f"batch_size is {batch_size} and max_new_tokens {max_new_tokens}: give at least 1 of each")
    people = read_people(photos)
    todo, kept = _todo(people, overwrite)
    if not todo:
        print(f"all {kept} photos of {photos} have captions: nothing to do; --overwrite true makes them anew")
        return
    captioner = ImageToText(model, prefix, max_new_tokens, device)
    done = caption_photos(people, captioner, prefix, batch_size, overwrite)
    for fault in done.unreadable:
        logger.warning("no caption, for the photo cannot be read: %s", fault)
    if done.named:
        names = ", ".join(map(str, done.named[:5])) + (", ..." if len(done.named) > 5 else "")
        logger.warning("took words of the person's name out of %d captions, read them: %s", len(done.named), names)
    counts = f"{len(done.written)} captions written, {done.kept} photos had one"
    print(f"{counts}, {len(done.unreadable)} photos could not be read")


def read_people(photos: str) -> list[Person]:
    """People of a folder of folders, or the one of a person's own folder; photos without caption have prompt `NONE`.

    Raises:
        DataError: there are no photos, or a caption cannot be used.
    """
    folder = Path(os.path.abspath(Path(photos).expanduser()))
    if not (folder.is_dir() and any(file.suffix.lower() in SUFFIXES and file.is_file() for file in folder.iterdir())):
        return Folder(str(folder), NONE).people()
    if any((folder.parent / name).exists() for name in METADATA):  # which may hold this person's captions
        return [person for person in Folder(str(folder.parent), NONE).people() if person.name == nfc(folder.name)]
    return [read_person(folder, NONE)]


def caption_photos(
    people: Iterable[Person],
    captioner: Captioner,
    prefix: str = PREFIX,
    batch_size: int = 8,
    overwrite: bool = False,
) -> Captioned:
    """Write what a captioner says of the photos that `read_people` found without caption.

    Each file appears whole or not at all. Photos that cannot be read are left out and told.

    Args:
        people: Whose photos.
        captioner: Gives a caption for each of some RGB images.
        prefix: Start of every caption.
        batch_size: Photos at a time.
        overwrite: Caption the photos that have one as well.
    """
    todo, kept = _todo(people, overwrite)
    done = Captioned(kept=kept)
    with tqdm(total=len(todo), desc="captions", unit="photo") as bar:
        for start in range(0, len(todo), batch_size):
            photos, images = [], []
            for photo in todo[start : start + batch_size]:
                try:
                    images.append(photo.image())
                    photos.append(photo)
                except DataError as error:
                    done.unreadable.append(str(error))
            for photo, text in zip(photos, captioner(images) if images else [], strict=True):
                _keep(photo, with_prefix(text, prefix), prefix, overwrite, done)
            bar.update(len(todo[start : start + batch_size]))
    return done


def with_prefix(text: str, prefix: str) -> str:
    """A caption that starts with the prefix once, whether or not the model repeated it."""
    text, prefix = (" ".join(part.split()) for part in (text, prefix))
    rest = text[len(prefix) :] if text.casefold().startswith(prefix.casefold()) else f" {text}"
    if not prefix:
        return text
    rest = rest.rstrip(" .")
    if re.match(r" (an?|the|his|her) ", rest, re.IGNORECASE) and not text.casefold().startswith(prefix.casefold()):
        rest = f",{rest}"
    return f"{prefix}{rest}"


def without_name(text: str, name: str, prefix: str = "") -> str:
    """A caption less the words of a person's name of three letters or more, wherever they stand behind the prefix.

    Accents, capitals and a possessive 's do not matter. So "White" takes the colour of Jack White's shirt as well.
    """
    words = {word for word in re.split(r"[\W\d_]+", _plain(name)) if len(word) >= 3}
    head, tail = (prefix, text[len(prefix) :]) if prefix and text.startswith(prefix) else ("", text)
    kept = [word for word in tail.split() if not words & {re.sub(r"'s$", "", _plain(word).strip(".,;:!?\"'()"))}]
    return " ".join([*([head] if head else []), *kept]).replace(" ,", ",")


def _keep(photo: FilePhoto, text: str, prefix: str, overwrite: bool, done: Captioned) -> None:
    caption = without_name(text, photo.person, " ".join(prefix.split()))
    path = _text_file(photo.path)
    if not caption:
        done.unreadable.append(f"{photo.path}: the model has nothing to say of it; set --prefix")
        return
    if path.exists() and not overwrite:  # somebody wrote it in the meantime
        done.kept += 1
        return
    write_durably(path, lambda file: file.write(f"{caption}\n".encode()))
    done.written.append(path)
    if caption != text:
        done.named.append(path)


def _todo(people: Iterable[Person], overwrite: bool) -> tuple[list[FilePhoto], int]:
    """Photos to caption, one for a text file, and how many photos have a caption."""
    photos = [photo for person in people for photo in person.photos if isinstance(photo, FilePhoto)]
    chosen = [photo for photo in photos if overwrite or photo.prompt == NONE]
    first = {photo.path.with_suffix(""): photo for photo in reversed(chosen)}  # 1.jpg and 1.png share 1.txt
    return list(first.values())[::-1], len(photos) - len(chosen)


def _text_file(photo: Path) -> Path:
    """The text file of a photo; one that is there keeps its own spelling, such as 1.TXT."""
    there = [file for file in photo.parent.iterdir() if file.stem == photo.stem and file.suffix.lower() == ".txt"]
    return there[0] if there else photo.with_suffix(".txt")


def _plain(text: str) -> str:
    """Letters without accents, in lower case."""
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c)).casefold()
