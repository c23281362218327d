"""What is drawn on request: references of the people in folders, and requests for pictures of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import lightning as L

from lit_multiip.backbone.face_crop import FaceCrop
from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.data.checking import check_photos
from lit_multiip.data.drawing import (
    NOTHING,
    Drawing,
    PredictArgs,
    draw_person,
    draw_together,
    read_masks,
    without_copies,
)
from lit_multiip.data.people import Person, check_names_differ, read_person
from lit_multiip.data.photos import DataError, Photo
from lit_multiip.datasets import Request


class RequestData(L.LightningDataModule):
    """The part of the data module that reads people's photos and serves requests; a subclass sets its attributes."""

    backbone: Backbone
    crop: FaceCrop | None
    references: int
    seed: int
    cache_dir: str
    on_unreadable: Literal["refuse", "skip"]
    per_person: bool
    predict_args: PredictArgs
    requests: list[Request]

    def _build(self, photos: Iterable[Photo], targets: Iterable[Photo], prompts: Iterable[str]) -> None:
        """Encode photos that condition, photos whose latents are needed, and prompts."""
        raise NotImplementedError

    def read_references(self, folder: str) -> tuple[Person, tuple[Photo, ...]]:
        """Read a folder with photos of one person, any number, and draw `references` of them."""
        person = self.readable(read_person(folder))
        return person, self.draw_references(person)

    def _read_drawing(self, folders: str | list[str]) -> tuple[Person, tuple[Photo, ...], Drawing]:
        """Read what `predict` names, and refuse what does not fit before anything is encoded."""
        args, masks = self.predict_args, read_masks(self.predict_args.masks or ())
        people = [read_person(folder) for folder in ([folders] if isinstance(folders, str) else folders)]
        if not people:
            raise DataError("data.predict.photos names no folder: give one a person")
        negatives = [] if args.negatives is None else self.usable([read_person(args.negatives)])
        people = self.usable(people)
        return people[0], *self.draw_together(people, weights=args.weights, negatives=negatives, masks=masks)

    def draw_together(self, people: Sequence[Person], **options: Any) -> tuple[tuple[Photo, ...], Drawing]:
        """Draw the references of people in one picture.

        Args:
            people: less photos that are not `usable`.
            options: of `data.drawing.draw_together`.
        """
        if self.per_person and (len(people) > 1 or any(options.values())):
            raise DataError("a method that tunes on one person takes no weights, negatives or masks: leave them out")
        check_names_differ(people)
        first, drawing = draw_together(people, self.references, self.seed, **options)
        drawing.check_side(self.backbone.image_side)
        return first, drawing

    def usable(self, people: Sequence[Person]) -> list[Person]:
        """Check people's photos, and cut them."""
        return self._cut(check_photos(people, self.on_unreadable, progress=False))

    def readable(self, person: Person) -> Person:
        """Check and cut a person's photos, and keep one of each content."""
        return without_copies(self.usable([person])[0])

    def _cut(self, people: list[Person]) -> list[Person]:
        return people if self.crop is None else self.crop(people, self.cache_dir)

    def draw_references(self, person: Person) -> tuple[Photo, ...]:
        """Draw `references` of a person's photos; missing ones are drawn again."""
        return draw_person(person, self.references, self.seed)

    def _setup_predict(self, person: Person, references: tuple[Photo, ...], drawing: Drawing = NOTHING) -> None:
        args = self.predict_args
        prompts = args.prompts or list(dict.fromkeys(photo.prompt for photo in person.photos))[:4]
        self.request(person.name, references, prompts, args.seeds, drawing)

    def request(
        self,
        person: str,
        references: tuple[Photo, ...],
        prompts: Sequence[str],
        seeds: Sequence[int],
        drawing: Drawing = NOTHING,
    ) -> None:
        """Have `predict_dataloader` serve every prompt with every seed, and encode what that needs."""
        if not seeds or not prompts or not all(prompts):
            raise DataError("give at least one seed, and prompts that are not empty")
        if bad := [seed for seed in seeds if not 0 <= seed < 2**63]:
            raise DataError(f"seed {bad[0]} is out of range: give a number from 0 to 2^63 - 1")
        self.requests = [Request(person, references, prompt, seed, drawing) for prompt in prompts for seed in seeds]
        self._build([*references, *drawing.photos()], [], prompts)
