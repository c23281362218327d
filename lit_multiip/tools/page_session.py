"""One visitor of the page: photos, tuned weights and pictures, in a folder that goes with the visit; no web library."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lit_multiip.backbone.encoders import replace_missing
from lit_multiip.backbone.faces import FaceDetector
from lit_multiip.backbone.features import Features
from lit_multiip.data.people import MiniFaces, is_photo, read_photos
from lit_multiip.data.photos import DataError, Photo
from lit_multiip.evaluation.extractors import Extractor
from lit_multiip.evaluation.person import see
from lit_multiip.evaluation.photo_check import CheckedPhoto, PhotoCheck, check_person
from lit_multiip.evaluation.scores import identity_similarity, nearest_reference
from lit_multiip.files import LitMultiIPError, shorten
from lit_multiip.methods.adapter import MultiIPAdapter
from lit_multiip.personalizer import Personalizer
from lit_multiip.pixels import square, to_tensor
from lit_multiip.tools.measures import mean_token
from lit_multiip.tuning import Progress

MOST_PHOTOS, MOST_PICTURES = 60, 16  # of a visit, and of one drawing: the others wait for it
THUMBNAIL = 192  # px
PHOTOS, NEGATIVES, BESIDE = KINDS = "photos", "negatives", "beside"  # of one person, to draw away from, of a second one


class PageError(LitMultiIPError):
    """What the page cannot do with what it was given; the message says what to do."""


@dataclass(frozen=True)
class Studio:
    """What all visitors share.

    Args:
        base: the method, with no photos and as loaded.
        folder: for all files; each session has a folder of its own in it.
        features: the folder of `base` that keeps what encoders say of photos; emptied whenever a session ends.
        checker: tells of two photos whether they show one person; None leaves that unsaid. Not one of `base`'s own
            extractors, as photos are checked while another visitor draws.
    """

    base: Personalizer
    folder: Path
    features: Path
    checker: Extractor | None

    def judge(self) -> Extractor | None:
        """Return the network whose scores are shown."""
        found = self.base.extractors or []
        return next((extractor for extractor in found if extractor.can_identify), next(iter(found), None))


@dataclass
class Drawn:
    """A picture, and how like the person it is.

    Attributes:
        file: PNG.
        seed: of its noise.
        scores: title -> cosine, -1 to 1; empty where no network scores.
        nearest: of the photos that it was drawn from, the most similar one.
    """

    file: Path
    seed: int
    scores: dict[str, float] = field(default_factory=dict)
    nearest: Photo | None = None


class Session:
    """One visit to the page.

    Args:
        studio: what all visits share.
        token: a name that cannot be guessed, of its folder.
    """

    def __init__(self, studio: Studio, token: str) -> None:
        self.studio, self.folder = studio, studio.folder / token
        self.checks: dict[str, PhotoCheck] = {}
        self.tuned: Personalizer | None = None
        self.stopping = self.ended = False
        self._examples = self._pictures = 0
        for name in (*KINDS, "thumbnails", "pictures"):
            (self.folder / name).mkdir(parents=True)

    # ---- photos -------------------------------------------------------------------------------------------------

    @property
    def photos(self) -> dict[str, Photo]:
        """The photos by name, best first."""
        return {checked.photo.name: checked.photo for checked in self.checked(PHOTOS)}

    def checked(self, kind: str) -> list[CheckedPhoto]:
        """Return the photos of a kind, best first, with what is known of them."""
        return self.checks[kind].photos if kind in self.checks else []

    def add(self, files: Sequence[str | Path], kind: str = PHOTOS) -> list[str]:
        """Move files into the session's folder, and look at all photos of their kind again.

        A text file is the prompt of the photo of its name.

        Args:
            files: of the visitor.
            kind: one of `KINDS`.

        Returns:
            A sentence for each file that is left out.
        """
        paths = [Path(file) for file in dict.fromkeys(files)]
        new = [path for path in paths if is_photo(path)]
        names, folder = [checked.photo.name for checked in self.checked(kind)], self.folder / kind
        if len(names) + len(new) > MOST_PHOTOS:
            raise PageError(f"{len(names) + len(new)} photos are more than the page takes: give {MOST_PHOTOS}")
        stems = {Path(name).stem: Path(name).stem for name in names}
        left_out = []
        for path in new:
            target = self._free_name(path, folder)
            stems[path.stem] = target.stem
            self._move(path, target)
        for path in paths:
            if path.suffix.lower() == ".txt" and path.stem in stems:
                self._move(path, folder / f"{stems[path.stem]}.txt")
            elif path not in new:
                path.unlink(missing_ok=True)
                left_out.append(
                    f"'{path.name}' is left out: it is no .jpg, .png, .webp or .bmp picture, and no text file with a "
                    "picture's name"
                )
        self._look(kind)
        return left_out

    def add_example(self) -> None:
        """Add photos of a drawn person, another one each time."""
        self.clear(PHOTOS)
        people = [person for person in MiniFaces(train=1, validation=1, photos=10).people() if person.split == "test"]
        person = people[self._examples % len(people)]
        self._examples += 1
        for photo in person.photos:
            file = self.folder / "photos" / photo.name
            photo.image().save(file)
            file.with_suffix(".txt").write_text(photo.prompt, encoding="utf-8")
        self._look(PHOTOS)

    def clear(self, kind: str) -> None:
        """Delete the photos of a kind; with those of the person go all pictures and tuned weights."""
        self.checks.pop(kind, None)
        if kind == PHOTOS:
            self.tuned = None
        for name in (kind, *(("pictures", "exported") if kind == PHOTOS else ())):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / name).mkdir(parents=True)
        kept = {checked.photo.content_key() for other in KINDS for checked in self.checked(other)}
        for file in (self.folder / "thumbnails").iterdir():
            if file.stem not in kept:
                file.unlink()

    def thumbnail(self, photo: Photo) -> Path | None:
        """Return a small picture of a photo; None of one that cannot be read."""
        file = self.folder / "thumbnails" / f"{photo.content_key()}.png"
        return file if file.is_file() else None

    def _free_name(self, path: Path, folder: Path) -> Path:
        """Return a name that no photo has: telephones call every photo image.jpg."""
        number = 1
        taken = {file.stem for file in folder.iterdir() if is_photo(file)}
        stem = path.stem
        while stem in taken:
            number += 1
            stem = f"{path.stem}_{number}"
        return folder / f"{stem}{path.suffix.lower()}"

    def _move(self, path: Path, target: Path) -> None:
        try:
            shutil.move(path, target)
        except FileNotFoundError:
            raise PageError(f"'{path.name}' did not arrive: add it again") from None

    def _look(self, kind: str) -> None:
        """Check all photos of a kind, and make thumbnails; those to draw away from may be of anyone."""
        files = sorted(file for file in (self.folder / kind).iterdir() if is_photo(file))
        self.checks.pop(kind, None)
        if not files:
            return
        person = read_photos(files, kind)
        checker, side = self.studio.checker, self.studio.base.model.image_side
        if checker is not None and kind != NEGATIVES:
            detector = getattr(checker, "detector", None)
            found = check_person(person, checker, detector if isinstance(detector, FaceDetector) else None, side=side)
        else:
            found = PhotoCheck(person.name, [CheckedPhoto(photo) for photo in person.photos])
        self.checks[kind] = found
        for checked in found.photos:
            try:
                image = checked.photo.image()
            except DataError as error:
                checked.faults["unreadable"] = str(error).removeprefix(f"{self.folder / kind}/")
                continue
            checked.size = image.size
            file = self.folder / "thumbnails" / f"{checked.photo.content_key()}.png"
            if not file.is_file():
                square(image, min(THUMBNAIL, *image.size)).save(file)

    # ---- who is drawn, and by which weights -----------------------------------------------------------------------

    def personalizer(
        self, use: Sequence[str], held_out: str | None, tuned: bool, name: str = "person"
    ) -> tuple[Personalizer, list[Photo]]:
        """Return who draws, and the photos that are only compared with.

        Args:
            use: names of photos to draw from, less those that are held out.
            held_out: name of a photo that is only compared with.
            tuned: draw by the tuned weights.
            name: of the person, in files.
        """
        photos = self.photos
        if not photos:
            raise PageError("there are no photos: add some of one person; they are deleted when the page is closed")
        if missing := [one for one in (*use, *([held_out] if held_out else ())) if one not in photos]:
            raise PageError(f"there is no photo '{missing[0]}': choose among {shorten(photos)}")
        if not re.fullmatch(r"\w[\w-]{0,39}", name):
            raise PageError(f"'{name[:40]}' cannot name files: give letters, digits, _ and -, at most 40")
        source, out = self.studio.base, [photos[held_out]] if held_out else []
        if tuned:
            if self.tuned is None or self.tuned.tuned is None:
                raise PageError("nothing is tuned yet: press 'Tune', or choose the weights as loaded")
            source, done = self.tuned, self.tuned.tuned
            trained_on = {photo.content_key() for photo in done.photos}
            if known := [photo.name for photo in out if photo.content_key() in trained_on]:
                raise PageError(f"'{known[0]}' was tuned on, and may not be compared with: hold out another, or none")
            out += [photo for photo in done.held_out if photo.content_key() not in {one.content_key() for one in out}]
        keys = {photo.content_key() for photo in out}
        kept = [photos[one] for one in photos if one in set(use) and photos[one].content_key() not in keys]
        if not kept:
            raise PageError("no photo is left to draw from: tick one that is not held out")
        return source.with_photos(kept, name), out

    # ---- pictures ---------------------------------------------------------------------------------------------------

    def acting(self, me: Personalizer, table: Sequence[Sequence[Any]], border: float) -> dict[str, Any]:
        """Return what acts on a picture besides the photos, as arguments of `Personalizer.choose_photos`.

        Args:
            me: who draws.
            table: a row a photo, its name and its weight; photos without a row have 1.
            border: share of the picture's width at which the second person's part begins.
        """
        wished = {str(row[0]): row[-1] for row in table if row and row[0]}
        if missing := [name for name in wished if name not in self.photos]:
            raise PageError(f"there is no photo '{missing[0]}' to weigh: choose among {shorten(self.photos)}")
        weights = [read_weight(photo.name, wished.get(photo.name, 1)) for photo in me.person.photos]
        negatives, beside = (
            [checked.photo for checked in self.checked(kind) if "unreadable" not in checked.faults]
            for kind in (NEGATIVES, BESIDE)
        )
        found: dict[str, Any] = {"negatives": negatives} if negatives else {}
        if beside:
            found |= {"beside": me.with_photos(beside, BESIDE), "masks": halves(me.model.image_side, border)}
        if any(weight != 1 for weight in weights):
            found["weights"] = weights + [1.0] * len(beside)
        return found

    def draw(
        self,
        me: Personalizer,
        out: Sequence[Photo],
        prompt: str,
        seeds: Sequence[int],
        options: Mapping[str, Any],
        progress: Callable[[int, int], None],
        acting: Mapping[str, Any] | None = None,
    ) -> list[Drawn]:
        """Draw a prompt with every seed, and score the pictures.

        Args:
            me: who draws.
            out: photos to compare with.
            prompt: what to draw.
            seeds: a picture each.
            options: of `Sampling`.
            progress: is told of the number of pictures that are drawn, and of all.
            acting: on the pictures besides the photos; None: nothing.
        """
        self.check_request(prompt, seeds)
        acting = acting or {}
        references, _ = me.choose_photos(**acting)
        images: list[Image.Image] = []
        for number, seed in enumerate(seeds):
            if self.ended:
                raise PageError("the page was closed")
            progress(number, len(seeds))
            images += me(prompt, seeds=[seed], **acting, **options)
        found = []
        for seed, image in zip(seeds, images, strict=True):
            self._pictures += 1
            place = self.folder / "pictures" / f"{self._pictures:04d}_seed_{seed}.png"
            image.save(place)
            found.append(Drawn(place, seed))
        self._score(me, list(dict.fromkeys(references)), out, images, found)
        return found

    def check_request(self, prompt: str, seeds: Sequence[int]) -> None:
        """Refuse too many pictures, and a prompt that is empty or that the text encoder would cut."""
        if len(seeds) > MOST_PICTURES:
            raise PageError(f"{len(seeds)} seeds are {len(seeds)} pictures: give at most {MOST_PICTURES}")
        if not prompt.strip():
            raise PageError("the prompt is empty: say what to draw, such as 'a photo of a smiling person'")
        tokenizer = self.studio.base.model.backbone.load("tokenizer")
        count, most = len(tokenizer(prompt, verbose=False).input_ids), tokenizer.model_max_length
        if count > most:
            raise PageError(f"the prompt has {count:,} tokens, and {most} are read: shorten it")

    def _score(
        self,
        me: Personalizer,
        references: Sequence[Photo],
        out: Sequence[Photo],
        images: Sequence[Image.Image],
        found: Sequence[Drawn],
    ) -> None:
        """Note how like the person each picture is."""
        judge = self.studio.judge()
        if judge is None:
            return
        with me.weights_in_place() as model:  # which also guards the network that scores
            side, device = model.image_side, model.device
            photos = see(judge, to_tensor(square(p.image(), side) for p in (*references, *out)), device).vectors()
            made = see(judge, to_tensor(images), device).vectors()  # (T, E)
        near, far = photos[: len(references)], photos[len(references) :]

        def rows(of: Tensor) -> Tensor:
            return of.expand(len(made), -1, -1)  # (T, K, E)

        word = judge.likeness
        scores = {f"{word} to the photos": identity_similarity(made, rows(near))}
        if len(far):
            scores[f"{word} to held-out photos"] = identity_similarity(made, rows(far))
        scores["nearest photo"] = nearest_reference(made, rows(near))
        cosines = F.normalize(made.double(), dim=1) @ F.normalize(near.double(), dim=1).T  # (T, R)
        for drawn, row in zip(found, cosines.cpu().numpy(), strict=True):
            if not np.isnan(row).all():
                drawn.nearest = references[int(np.nanargmax(row))]
        for title, values in scores.items():
            for drawn, value in zip(found, values, strict=True):
                drawn.scores[title] = float(value)

    def shares(self, me: Personalizer, references: Sequence[Photo]) -> tuple[str, dict[str, float]]:
        """Say what each photo contributes: the aggregator's weights, or what changes where a photo is left out.

        Args:
            me: who draws.
            references: that are drawn from; a photo may be among them several times.

        Returns:
            What the shares are of, and a share of at least 0 by the photo's name; all add to 1. Empty for a method that
            does not look at photos while it draws, or whose adapter takes two embeddings of a photo.
        """
        with me.weights_in_place() as model, torch.no_grad():
            if not isinstance(model, MultiIPAdapter):
                return "", {}
            dtype = model.unet.dtype
            features = Features(model.backbone, str(self.studio.features), model.device)
            features.build(references, [], [])
            features.refresh()
            embeds = replace_missing(features.embeds(references), me.person.name).to(model.device)[None]  # (1, N, D)
            if embeds.isnan().any():  # no photo has a face
                return "", {}
            autocast = nullcontext() if dtype == torch.float32 else torch.autocast(model.device.type, dtype)
            photos = list(dict.fromkeys(references))
            own = torch.tensor([[one == photo for one in references] for photo in photos])  # (K, N): its rows
            aggregator, shares = model.aggregator, torch.ones(len(photos))
            what = (aggregator.weights_are or "weight").removeprefix("share of ")
            with autocast:
                weights = aggregator.photo_weights(embeds)  # (1, N)
                if weights is not None:
                    shares = own.double() @ weights[0].double().cpu()
                elif len(photos) > 1 and len(features.kinds) > 1:  # the adapter takes them apart
                    return "", {}
                elif len(photos) > 1:
                    what = "change of the image tokens where it is left out"
                    left = [embeds[:, ~rows] for rows in own]
                    without = torch.cat([mean_token(model, model.condition(rows)) for rows in left])  # (K, E)
                    cosines = F.cosine_similarity(mean_token(model, model.condition(embeds)), without)
                    shares = (1 - cosines.float()).clamp(min=0)
        values = shares.double().cpu().numpy()
        values = values / values.sum() if values.sum() > 0 else np.full(len(values), 1 / len(values))
        found = {photo.name: float(value) for photo, value in zip(photos, values, strict=True)}
        return what, dict(sorted(found.items(), key=lambda item: -item[1]))

    # ---- tuning, and away -------------------------------------------------------------------------------------------

    def tune(
        self, use: Sequence[str], held_out: str | None, steps: float | None, progress: Callable[[Progress], None]
    ) -> Personalizer:
        """Tune on photos, from the weights as loaded; what was tuned before stays until this has ended.

        Args:
            use: names of photos.
            held_out: name of a photo that is only compared with.
            steps: of the optimiser.
            progress: is told of every step.
        """
        me, _ = self.personalizer(use, held_out, tuned=False)
        if steps is None or steps != int(steps):
            raise PageError(f"{steps} are no steps: give a whole number, such as 40")
        self.stopping = False
        me.tune(steps=int(steps), progress=progress, stop=lambda: self.stopping or self.ended)
        self.tuned = me
        return me

    def export(self, me: Personalizer) -> Path:
        """Write what `export` writes, and return it as one ZIP file."""
        folder = self.folder / "exported" / me.person.name
        me.save(folder, overwrite=True)
        return Path(shutil.make_archive(str(folder), "zip", folder))

    def end(self) -> None:
        """Delete everything of this visit, what the encoders said of its photos too."""
        self.stopping = self.ended = True
        with self.studio.base.weights_in_place():  # when nothing draws or tunes
            shutil.rmtree(self.folder, ignore_errors=True)
            shutil.rmtree(self.studio.features, ignore_errors=True)  # of others it is made again
        self.checks, self.tuned = {}, None


def read_seeds(text: str) -> list[int]:
    """Read whole numbers between commas or spaces."""
    words = text.replace(",", " ").split()
    if not words or not all(re.fullmatch(r"\d{1,18}", word) for word in words):
        raise PageError(f"'{text[:40]}' are no seeds: give whole numbers, a picture each, such as 0, 1")
    return [int(word) for word in words]


def read_weight(name: str, value: Any) -> float:
    """Read the weight of a photo of this name."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise PageError(f"the weight of '{name}' is '{str(value)[:40]}': give a number of at least 0") from None


def halves(side: int, border: float) -> list[Image.Image]:
    """Return masks of what lies left of a share of a picture's width, and of the rest."""
    left = np.zeros((side, side), dtype=np.uint8)
    left[:, : round(border * side)] = 255
    return [Image.fromarray(left), Image.fromarray(255 - left)]
