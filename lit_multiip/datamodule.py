"""The LightningDataModule: people, split, held-out groups, evaluation tasks, all on features computed once."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from lit_multiip.backbone.face_crop import FaceCrop, find_faces
from lit_multiip.backbone.face_weight import FaceMaps, FaceWeight
from lit_multiip.backbone.features import Features
from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.data.checking import check_photos
from lit_multiip.data.drawing import (
    PredictArgs,
    without_copies,
)
from lit_multiip.data.groups import Balance, Target
from lit_multiip.data.people import MiniFaces, PeopleSource, Person, find_person, read_person
from lit_multiip.data.photos import DataError, Photo
from lit_multiip.data.split import PhotoSplit, Split, select_people, split_people, split_photos
from lit_multiip.data.tasks import Task, add_intruders, make_tasks, person_tasks
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
    warn_of_changes,
)
from lit_multiip.requested import RequestData

logger = logging.getLogger(__name__)

MOST_WORKERS = 256  # of a loader; more are a slip


class MultiPhotoData(RequestData):
    """Groups of a person's photos for training, and tasks for validation, test and predict.

    Where the trainer's module learns a person at a time (`per_person`), fit is given `person` alone: the reference
    set that a test gives them, nothing held out, and no validation.

    With `photos`, one person's photos are split in place of people, and fit tunes on all but the held-out ones.

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
        validation_held_out: held-out photos a validation person; of the person in `photos`, at most one of five.
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
        photos: folder with five photos or more of the one person whom fit learns.
        prior_people: training people of the source that an adapter is tuned on beside them, as often; 0 needs no
            source.
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
        batch_size: int = 8,
        eval_batch_size: int = 25,
        num_workers: int = 0,
        cache_dir: str = "runs/features",
        encode_batch_size: int = 32,
        seed: int = 0,
        training_seed: int | None = None,
        predict: PredictArgs | None = None,
        photos: str | None = None,
        prior_people: int = 0,
        person: str | None = None,
        crop: FaceCrop | None = None,
        variants: int = 1,
        augment: Callable[[Any], Any] | None = None,
        intruders: int = 0,
        face_weight: FaceWeight | None = None,
    ) -> None:
        super().__init__()
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
        self.photos, self.prior_people = photos, prior_people
        self.variants, self.augment, self.intruders = variants, augment, intruders
        self.device: torch.device | str = "cpu"  # of the encoders, where there is no trainer
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
        self._check_options()

    def _check_options(self) -> None:
        """Refuse what cannot be meant, before any photo is read."""
        if self.variants < 1 or (self.variants > 1) != (self.augment is not None):
            raise DataError(
                f"data.variants={self.variants} and data.augment={self.augment}: several variants need an "
                "augmentation, and an augmentation needs at least 2 variants, so set both or neither"
            )
        if self.augment is not None:
            describe_augment(self.augment)
        sizes = self.batch_size, self.eval_batch_size, self.encode_batch_size
        if min(*sizes, self.references, self.held_out, self.seeds, self.validation_held_out) < 1:
            raise DataError("batch sizes, references, held_out and seeds must be at least 1")
        if not 0 <= self.num_workers <= MOST_WORKERS:
            raise DataError(f"data.num_workers is {self.num_workers}: give 0 to {MOST_WORKERS}")
        if self.photos is not None and (self.person is not None or self.intruders):
            raise DataError(
                f"data.photos='{self.photos}' is one person alone: leave data.person and data.intruders out"
            )
        for name in ("seed", "training_seed", "prior_people"):
            if getattr(self, name) < 0:
                raise DataError(f"data.{name} is {getattr(self, name)}: it must not be negative")
        if min(self.drop) < 0 or sum(self.drop) > 1:
            raise DataError(
                f"data.drop={self.drop} are no probabilities: give three of at least 0 that add to at most 1"
            )

    def prepare_data(self) -> None:
        """Fetch or extract the source once, on one process, and find the faces where photos are cut at them."""
        people = self.source.people() if self.photos is None or self.prior_people else []
        if people and self.crop is not None and self.crop.share is None:
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
            self.split = self._split() if self.photos is None else self.split_photos(read_person(self.photos))
        if stage == "predict":
            person = self._chosen() if self.photos or self.person else self.split.test[0]
            self._setup_predict(person, self._tested(person).references)
            return
        training: list[Photo] = []
        if stage == "fit" and self.per_person:
            self.tuning = self._tested(self._chosen())
            training = list(self.tuning.references)
        elif stage == "fit":
            training = [photo for person in self.split.people_of("train") for photo in person.photos]
        if self.photos is not None:
            self.validation_tasks, self.tasks = ([], self.draw_tasks()) if stage == "test" else (self.draw_tasks(), [])
        elif stage in ("fit", "validate") and not self.per_person:
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
            self.split = self._split() if self.photos is None else self.split_photos(read_person(self.photos))
        if self.photos is not None:
            out, references = self.split.validation[0].photos, self._tested(self._chosen()).references
            self.tasks = person_tasks(references, out, self.seeds, self.seed)
            return self.tasks
        people = select_people(self.split.people_of(self.tested), 2, self.tested_people, self.seed)
        tasks = make_tasks(people, self.references, self.held_out, self.seeds, self.seed)
        self.tasks = add_intruders(tasks, self.intruders, self.seed)
        return self.tasks

    def own_references(self) -> dict[str, Sequence[Photo]]:
        """Return the references of the person in `photos`, by name; none of them is held out."""
        self.split = self.split or self.split_photos(read_person(str(self.photos)))
        return {self._chosen().name: self._tested(self._chosen()).references}

    def split_photos(self, person: Person) -> PhotoSplit:
        """Hold out some photos of one person; beside the others train the people who serve as prior."""
        wanted = 0 if self.per_person else self.prior_people
        prior = select_people(self._split().train, 2, wanted, self.seed) if wanted else []
        return split_photos(self.readable(person), self.validation_held_out, self.seed, prior)

    def _chosen(self) -> Person:
        """Return the person of `photos`, else `person`."""
        assert self.split is not None
        return self.split.train[0] if self.photos is not None else find_person(self.split.everyone, self.person)

    def _tested(self, person: Person) -> Task:
        """Return one of a person's tasks in a test; all of them have the same references."""
        if self.photos is not None:  # a method that tunes on one person takes all of theirs
            photos = person.photos if self.per_person else self.draw_references(person)
            return Task(person.name, photos, photos[0], photos[0].prompt, self.seed)
        return make_tasks([person], self.references, self.held_out, 1, self.seed)[0]

    def _find_stranger(self, tasks: Sequence[Task]) -> dict[str, tuple[Photo, ...]]:
        """Return, where all tasks are of one person, a training person's references under that person's name."""
        names = {task.person for task in tasks}
        if len(names) != 1 or self.per_person:
            return {}
        assert self.split is not None
        others = [person for person in self.split.train if person.name not in names]
        if not others:
            what = (
                "%s is the only person: without others' photos val/gap_shuffled and the row other_person are left out"
            )
            logger.log(logging.INFO if self.photos is not None else logging.WARNING, what, *names)
            return {}
        return {name: self._tested(others[0]).references for name in names}

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

    def _build(self, photos: Iterable[Photo], targets: Iterable[Photo], prompts: Iterable[str]) -> None:
        """Encode photos that condition, photos whose latents are needed, and prompts."""
        if self.per_person:  # it tunes on the latents of the references, and needs no embeddings
            photos, targets = [], [*photos, *targets]
        strategy: Any = self.trainer.strategy if self.trainer is not None else None
        device = strategy.root_device if strategy else self.device
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
        groups = HeldOutGroups(self._trained_people(), self.features, self.training_seed, references, *choices)
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

    def _trained_people(self) -> list[Person]:
        """Return the training people; the one of `photos` as often as all others, and as often as a batch has room."""
        assert self.split is not None
        if self.photos is None:
            return self.split.train
        person, *prior = self.split.train
        room = self.batch_size * self._rank_and_world()[1] / (self.references + 1)  # persons a batch of all ranks
        return [person] * max(len(prior), math.ceil(room)) + prior

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
        warn_of_changes(self.position, self._divisions(samples))
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
