"""The LightningDataModule: people, split, held-out groups, evaluation tasks, all on features computed once."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import lightning as L
import torch
from torch.utils.data import DataLoader

from lit_multiip.backbone.face_crop import FaceCrop, find_faces
from lit_multiip.backbone.face_weight import FaceMaps, FaceWeight
from lit_multiip.backbone.features import Features
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
from lit_multiip.data.groups import Balance, Target
from lit_multiip.data.people import MiniFaces, PeopleSource, Person, check_names_differ, read_person
from lit_multiip.data.photos import DataError, Photo
from lit_multiip.data.split import Split, select_people, split_people
from lit_multiip.data.tasks import Task, add_intruders, make_tasks
from lit_multiip.data.variants import describe_augment, vary
from lit_multiip.datasets import (
    EpochSampler,
    HeldOutGroups,
    OnePerson,
    Position,
    Request,
    ShareSampler,
    TaskDataset,
    ignore_ctrl_c,
    reference_set,
)

logger = logging.getLogger(__name__)

MOST_WORKERS = 256  # of a loader; more are a slip


class MultiPhotoData(L.LightningDataModule):
    """Groups of a person's photos for training, and tasks for validation, test and predict.

    Where the trainer's module learns a person at a time (`per_person`), fit is given `person` alone: the reference
    set that a test gives them, nothing held out, and no validation.

    Args:
        backbone: its frozen encoders make the features; shared with the model.
        source: where the people come from.
        references: N - 1, photos that condition.
        min_photos: people with fewer are left out.
        max_people: keep a seeded subset of this many people.
        training_people: train on a seeded subset of this many of the training side; None takes all. Other than
            `max_people` it leaves validation and test people as they are.
        balance: `person` (every person gives N targets an epoch) or `photo` (every photo is a target once).
        target: `held_out`, or `reference` to train as the published single-photo IP-Adapter (references = 1).
        drop: probabilities of dropping image, text and both in training.
        test_fraction: of the people, where neither source nor list decides; 1 makes test people of all in any case.
        validation_fraction: of the training side.
        train_names: file with the names of training people, one a line (LFW's people files, too).
        validation_names: likewise.
        test_names: likewise.
        held_out: evaluation tasks: held-out photos a test person, at most.
        seeds: images per held-out photo.
        validation_held_out: held-out photos a validation person.
        tested: whose tasks `test` scores; options are chosen on `validation`, and `train` shows what was learned
            by heart.
        tested_people: the most people of them, a seeded subset; None takes all.
        on_unreadable: `refuse` or `skip` photos that cannot be decoded.
        batch_size: training samples a step and device.
        eval_batch_size: tasks at once.
        num_workers: of the loaders.
        cache_dir: feature store.
        encode_batch_size: photos at once in an encoder.
        variants: of every training photo, encoded once like any photo; 1 takes the photos alone.
        augment: makes a photo's variants but the first, which is the photo itself; such as
            `torchvision.transforms.v2.RandomHorizontalFlip`.
        intruders: so many of a person's references are photos of other people, in tests; in training 0 to so many.
        seed: of the split, the groups and the tasks.
        training_seed: of the training groups alone, for several trainings on one protocol; None takes `seed`.
        predict: what `predict` draws.
        person: whom fit learns, where the method learns one person; whom predict draws.
        crop: cut every photo to a square at its face, or to a fixed share of its middle, for encoders and scores alike;
            None takes its central square.
        face_weight: weigh the training loss more in the target's face; None weighs all places alike.
    """

    def __init__(
        self,
        backbone: Backbone | None = None,
        source: PeopleSource | None = None,
        references: int = 9,
        min_photos: int = 10,
        max_people: int | None = None,
        training_people: int | None = None,
        balance: Balance = "person",
        target: Target = "held_out",
        drop: tuple[float, float, float] = (0.05, 0.05, 0.05),
        test_fraction: float = 1 / 3,
        validation_fraction: float = 0.1,
        train_names: str | None = None,
        validation_names: str | None = None,
        test_names: str | None = None,
        held_out: int = 4,
        seeds: int = 1,
        validation_held_out: int = 2,
        tested: Literal["test", "validation", "train"] = "test",
        tested_people: int | None = None,
        on_unreadable: Literal["refuse", "skip"] = "refuse",
        batch_size: int = 16,
        eval_batch_size: int = 25,
        num_workers: int = 0,
        cache_dir: str = "runs/features",
        encode_batch_size: int = 32,
        seed: int = 0,
        training_seed: int | None = None,
        predict: PredictArgs | None = None,
        person: str | None = None,
        crop: FaceCrop | None = None,
        variants: int = 1,
        augment: Callable[[Any], Any] | None = None,
        intruders: int = 0,
        face_weight: FaceWeight | None = None,
    ) -> None:
        super().__init__()
        if variants < 1 or (variants > 1) != (augment is not None):
            raise DataError(
                f"data.variants={variants} and data.augment={augment}: several variants need an augmentation, and an "
                "augmentation needs at least 2 variants, so set both or neither"
            )
        if augment is not None:
            describe_augment(augment)
        if min(batch_size, eval_batch_size, encode_batch_size, references, held_out, seeds, validation_held_out) < 1:
            raise DataError("batch sizes, references, held_out and seeds must be at least 1")
        if not 0 <= num_workers <= MOST_WORKERS:
            raise DataError(f"data.num_workers is {num_workers}: give 0 to {MOST_WORKERS}")
        for name, given in (("seed", seed), ("training_seed", training_seed or 0)):
            if given < 0:
                raise DataError(f"data.{name} is {given}: it must not be negative")
        if min(drop) < 0 or sum(drop) > 1:
            raise DataError(f"data.drop={drop} are no probabilities: give three of at least 0 that add to at most 1")
        self.backbone, self.source = backbone or Backbone(), source or MiniFaces()
        self.crop, self.references = crop, references
        self.min_photos, self.max_people, self.training_people = min_photos, max_people, training_people
        self.balance, self.target, self.drop = balance, target, drop
        self.test_fraction, self.validation_fraction = test_fraction, validation_fraction
        self.names = {"train_names": train_names, "validation_names": validation_names, "test_names": test_names}
        self.held_out, self.seeds, self.validation_held_out = held_out, seeds, validation_held_out
        self.tested: Literal["test", "validation", "train"] = tested
        self.tested_people = tested_people
        self.on_unreadable: Literal["refuse", "skip"] = on_unreadable
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.cache_dir, self.encode_batch_size, self.seed = cache_dir, encode_batch_size, seed
        self.training_seed = seed if training_seed is None else training_seed
        self.predict_args, self.person = predict or PredictArgs(), person
        self.variants, self.augment, self.intruders = variants, augment, intruders
        self.face_weight = face_weight
        self.face_maps: FaceMaps | None = None  # of the training photos, once fit is set up
        self.per_person = False  # setup asks the trainer's module
        self.split: Split | None = None
        self.features: Features | None = None
        self.tasks: list[Task] = []
        self.validation_tasks: list[Task] = []
        self.strangers: dict[str, tuple[Photo, ...]] = {}  # stand in for the next person where there is only one
        self.requests: list[Request] = []
        self.tuning: Task | None = None
        self.position: dict[str, Any] | None = None  # of the checkpoint that fit goes on from

    def prepare_data(self) -> None:
        """Fetch or extract the source once, on one process, and find the faces where photos are cut at them."""
        people = self.source.people()
        if self.crop is not None and self.crop.share is None:
            chosen = select_people(people, self.min_photos, self.max_people, self.seed)
            readable = check_photos(chosen, self.on_unreadable)
            photos = [photo for person in readable for photo in person.photos]
            find_faces(self.crop.detector, photos, self.cache_dir)

    def setup(self, stage: str) -> None:
        """Choose and split the people, then encode what this stage will need."""
        if self.trainer is not None:
            self.per_person = getattr(self.trainer.lightning_module, "per_person", False)
        if stage == "fit" and not self.per_person and self.person is not None:
            raise DataError(f"data.person='{self.person}' is for methods that learn one person: leave it out of fit")
        if stage == "fit" and self.per_person and self.variants > 1:
            raise DataError("data.variants is for methods that train on held-out groups: leave it and augment out")
        if stage == "fit" and self.per_person and self.intruders:
            raise DataError("data.intruders is for methods that train on held-out groups, and for tests: leave it out")
        if stage != "predict" and self.per_person and self.face_weight is not None:
            raise DataError("data.face_weight is for methods that train on held-out groups: leave it out")
        if stage == "predict" and self.predict_args.photos is not None:
            self._setup_predict(*self._read_drawing(self.predict_args.photos))
            return
        if self.split is None:
            self.split = self._split()
        if stage == "predict":
            person = self._find(self.person) if self.person else self.split.test[0]
            self._setup_predict(person, self._tested(person).references)
            return
        training: list[Photo] = []
        if stage == "fit" and self.per_person:
            self.tuning = self._tested(self._find(self.person))
            training = list(self.tuning.references)
        elif stage == "fit":
            training = [photo for person in self.split.people_of("train") for photo in person.photos]
        if stage in ("fit", "validate") and not self.per_person:
            self.validation_tasks = make_tasks(
                self.split.people_of("validation"), self.references, self.validation_held_out, 1, self.seed
            )
        if stage == "test":
            self.draw_tasks()
        tasks = [*self.validation_tasks, *self.tasks]
        self.strangers = self._find_stranger(self.validation_tasks) | self._find_stranger(self.tasks)
        references = [photo for task in tasks for photo in task.references]
        references += [photo for photos in self.strangers.values() for photo in photos]
        held_out = [task.held_out for task in tasks]
        prompts = [photo.prompt for photo in (*training, *held_out)]
        varied = [vary(photo, v, self.augment) for photo in training for v in range(self.variants)]
        self._build([*varied, *references], [*varied, *held_out], prompts)
        if stage == "fit" and self.face_weight is not None:
            self.face_maps = self.face_weight.maps(varied, self.backbone, self.cache_dir)

    def draw_tasks(self) -> list[Task]:
        """Draw the tasks of a test, and encode nothing."""
        if self.split is None:
            self.split = self._split()
        people = select_people(self.split.people_of(self.tested), 2, self.tested_people, self.seed)
        tasks = make_tasks(people, self.references, self.held_out, self.seeds, self.seed)
        self.tasks = add_intruders(tasks, self.intruders, self.seed)
        return self.tasks

    def read_references(self, folder: str) -> tuple[Person, tuple[Photo, ...]]:
        """Read a folder with photos of one person, any number, and draw `references` of them."""
        [person] = self._cut(check_photos([read_person(folder)], self.on_unreadable, progress=False))
        return person, self._draw_references(person)

    def _read_drawing(self, folders: str | list[str]) -> tuple[Person, tuple[Photo, ...], Drawing]:
        """Read what `predict` names, and refuse what does not fit before anything is encoded."""
        args, read = self.predict_args, partial(check_photos, on_unreadable=self.on_unreadable, progress=False)
        people = [read_person(folder) for folder in ([folders] if isinstance(folders, str) else folders)]
        negatives = [] if args.negatives is None else self._cut(read([read_person(args.negatives)]))
        if not people:
            raise DataError("data.predict.photos names no folder: give one a person")
        check_names_differ(people)
        people, masks = self._cut(read(people)), read_masks(args.masks or ())
        options = {"weights": args.weights, "negatives": negatives, "masks": masks}
        return people[0], *self.draw_together(people, **options)

    def draw_together(self, people: Sequence[Person], **options: Any) -> tuple[tuple[Photo, ...], Drawing]:
        """Draw the references of people in one picture, by the options of `data.drawing.draw_together`."""
        if self.per_person and (len(people) > 1 or any(options.values())):
            raise DataError("a method that tunes on one person takes no weights, negatives or masks: leave them out")
        first, drawing = draw_together(people, self.references, self.seed, **options)
        drawing.check_side(self.backbone.image_side)
        return first, drawing

    def _find(self, name: str | None) -> Person:
        """Return the person of that name, on whichever side of the split."""
        assert self.split is not None
        people = [*self.split.test, *self.split.validation, *self.split.train]
        for person in people:
            if person.name == name:
                return person
        known = [person.name for person in people]
        close = ", ".join(difflib.get_close_matches(name or "", known) or known[:3])
        wrong = "this method learns one person" if name is None else f"there is no person '{name}'"
        raise DataError(f"{wrong}: set data.person to one of the {len(known)}, such as {close}")

    def _tested(self, person: Person) -> Task:
        """Return one of a person's tasks in a test; all of them have the same references."""
        return make_tasks([person], self.references, self.held_out, 1, self.seed)[0]

    def _find_stranger(self, tasks: Sequence[Task]) -> dict[str, tuple[Photo, ...]]:
        """Return, where all tasks are of one person, a training person's references under that person's name."""
        names = {task.person for task in tasks}
        if len(names) != 1 or self.per_person:
            return {}
        assert self.split is not None
        others = [person for person in self.split.train if person.name not in names]
        if not others:
            logger.warning(
                "%s is the only person: without others' photos val/gap_shuffled and the row other_person are left out",
                *names,
            )
            return {}
        return {name: self._tested(others[0]).references for name in names}

    def _cut(self, people: list[Person]) -> list[Person]:
        return people if self.crop is None else self.crop(people, self.cache_dir)

    def _split(self) -> Split:
        people = select_people(self.source.people(), self.min_photos, self.max_people, self.seed)
        people = check_photos(people, self.on_unreadable)
        people = [without_copies(person) for person in people]
        people = self._cut(select_people(people, self.min_photos, None, self.seed))
        split = split_people(people, self.seed, self.test_fraction, self.validation_fraction, **self.names)
        if self.training_people is not None and split.train:
            split = replace(split, train=select_people(split.train, 2, self.training_people, self.seed))
        sizes = len(split.train), len(split.validation), len(split.test)
        logger.info("people: %d train, %d validation, %d test", *sizes)
        return split

    def _draw_references(self, person: Person) -> tuple[Photo, ...]:
        return draw_person(person, self.references, self.seed)

    def _setup_predict(self, person: Person, references: tuple[Photo, ...], drawing: Drawing = NOTHING) -> None:
        args = self.predict_args
        prompts = args.prompts or list(dict.fromkeys(photo.prompt for photo in person.photos))[:4]
        if not args.seeds or not all(prompts):
            raise DataError("data.predict needs at least one seed, and prompts that are not empty")
        rest = (person.name, references)
        self.requests = [Request(*rest, prompt, seed, drawing) for prompt in prompts for seed in args.seeds]
        self._build([*references, *drawing.photos()], [], prompts)

    def _build(self, photos: Iterable[Photo], targets: Iterable[Photo], prompts: Iterable[str]) -> None:
        """Encode photos that condition, photos whose latents are needed, and prompts."""
        if self.per_person:  # it tunes on the latents of the references, and needs no embeddings
            photos, targets = [], [*photos, *targets]
        strategy: Any = self.trainer.strategy if self.trainer is not None else None
        device = strategy.root_device if strategy else "cpu"
        self.features = Features(
            self.backbone, self.cache_dir, device, self.encode_batch_size, conditions=not self.per_person
        )
        self.features.build(photos, targets, prompts, *self._rank_and_world())
        if strategy:
            strategy.barrier("features")
        self.features.refresh()

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of `HeldOutGroups` items; its own sampler serves all ranks (`use_distributed_sampler: false`)."""
        assert self.split is not None and self.features is not None
        if self.tuning is not None:
            item = reference_set(self.tuning.person, self.tuning.references, self.features)
            return DataLoader(OnePerson(item), batch_size=1)
        references = 1 if self.target == "reference" else self.references
        choices = (self.balance, self.target, self.drop, self.variants, self.augment, self.intruders, self.face_maps)
        groups = HeldOutGroups(self.split.train, self.features, self.training_seed, references, *choices)
        rank, world = self._rank_and_world()
        sampler = EpochSampler(len(groups), self.training_seed, rank, world, self._start(len(groups) // world))
        if len(sampler) < self.batch_size:
            raise DataError(
                f"data.batch_size={self.batch_size} is more than the {len(sampler)} samples of an epoch: lower it"
            )
        return DataLoader(
            groups,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            worker_init_fn=ignore_ctrl_c,
            drop_last=True,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return where training is, and by what its epochs are divided, for a checkpoint."""
        loader = None if self.trainer is None else self.trainer.train_dataloader
        if self.trainer is None or loader is None:  # nothing is being trained
            return {}
        position = Position.of(self.trainer)
        samples = None if position.batches is None else len(loader.sampler)
        return {"epoch": position.epoch, "batch": position.batch, **self._divisions(samples)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember where a checkpoint's training was."""
        self.position = state_dict

    def _divisions(self, samples: int | None) -> dict[str, Any]:
        """Return what divides an epoch into steps; `samples` is the number of a rank."""
        assert self.trainer is not None
        return {
            "samples": samples,
            "batch_size": self.batch_size,
            "ranks": self.trainer.world_size,
            "accumulated": self.trainer.accumulate_grad_batches,
            "training_seed": self.training_seed,
        }

    def _start(self, samples: int) -> tuple[int, int]:
        """Return the epoch in which training goes on, and how many of its samples this rank has had."""
        if self.position is None:
            return 0, 0
        then, now = self.position, self._divisions(samples)
        changed = [f"{name} {then.get(name)} => {value}" for name, value in now.items() if then.get(name) != value]
        if changed:
            logger.warning(
                "the checkpoint was trained with other data or batches (%s): training goes on from its weights, with "
                "other samples than an uninterrupted run's",
                ", ".join(changed),
            )
        return self.position["epoch"], min(self.position["batch"] * self.batch_size, samples)

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches of the validation people's tasks."""
        return self._task_loader(self.validation_tasks)

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of the test people's tasks."""
        return self._task_loader(self.tasks)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches of what is to be drawn."""
        return self._task_loader(self.requests)

    def _task_loader(self, tasks: Sequence[Task | Request]) -> DataLoader[Any]:
        assert self.features is not None
        dataset = TaskDataset(tasks, self.features, self.per_person, self.strangers)
        sampler = ShareSampler(len(dataset), *self._rank_and_world())
        return DataLoader(dataset, batch_size=self.eval_batch_size, sampler=sampler)  # by name: Lightning rebuilds it

    def _rank_and_world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
