"""The callback that scores a test: it collects what every task's image became; rank 0 scores and writes it."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor
from tqdm import tqdm

from lit_multiip.data.record import Record
from lit_multiip.data.tasks import Task, image_files, protocol
from lit_multiip.datamodule import MultiPhotoData
from lit_multiip.evaluation import audit
from lit_multiip.evaluation import results as report
from lit_multiip.evaluation.critic import SHIPPED, CriticExtractor, shipped_critic
from lit_multiip.evaluation.extractors import (
    Extractor,
    leave_out_trainers,
    refuse_conditioning_network,
    refuse_training_network,
)
from lit_multiip.evaluation.intervals import Score
from lit_multiip.evaluation.pictures import draw_tasks, first_tasks
from lit_multiip.evaluation.scoring import RealPhotos, RowScores, Scorer, choose_other_photos, draw_strangers
from lit_multiip.files import LitMultiIPError, move_into, only_writer
from lit_multiip.methods.method import Method, References

logger = logging.getLogger(__name__)

ANCHORS: dict[str, References] = {"no_references": "none", "zero_embedding": "zero", "other_person": "other"}
UNFINISHED = "unfinished"  # folder of a test that is being written


class ScoreTest(L.Callback):
    """Scores the test people, and writes images, scores.csv, metrics.json, grid.png, table.md and photos.

    `photos/` holds the references and held-out photos of the first 12 people, as the model and the scores see them.

    Rows. The method's own images, and anchors, by which its scores can be read:

    | row              | images                                              | what it tells                         |
    |------------------|-----------------------------------------------------|---------------------------------------|
    | no_references    | IP-Adapter scale 0, or nothing tuned                | the backbone alone                    |
    | zero_embedding   | a zero image embedding, whose tokens are not zero   | the adapter alone                     |
    | other_person     | references of another person                        | the identity of a stranger            |
    | vae_round_trip   | the held-out photo through the VAE                  | what the best of samplers could reach |
    | real_other_photo | a reference itself; its prompt is another one       | how alike two photos of a person are  |
    | real_held_out    | the held-out photo itself, `nearest_reference` alone | what is not copied scores this much  |
    | real_vs_real     | as many photos of training people, set scores alone | FID and KID of real photos at this N  |

    Of the first three, those are drawn that the method can be conditioned on. The other person of the only person in a
    test is a training person; where there is nobody else, the row is left out.

    FID and KID compare a row's images with all held-out photos, each once. real_vs_real takes its photos evenly from as
    many training people as are tested, if there are so many; the images counted may be fewer than the tasks.

    `seconds` in metrics.json are wall time, added up over ranks: `personalise` is what all people cost before the first
    image of each (DreamBooth: tuning, twice where two ranks share a person's tasks; the adapters: the image encoder's
    pass over the references and the aggregator, measured on one person), `class_images` what drawing those took where
    they were not there yet, `method` and `anchors` drawing alone. `scoring` is rank 0's.

    A network may not both condition and score, nor both train, by `model.identity_loss`, and score: see
    `refuse_conditioning_network` and `refuse_training_network`. Of the miniature's critics, where they are not named,
    the one that trained is left out.

    A face that an extractor does not find leaves that image's scores undefined. It is in no mean. How many there are
    is printed and stands in metrics.json, `faces_not_found.<extractor>.<row>` = [missing, images], of rows and of
    `real_photos`.

    What the test must not have known is audited (`evaluation.audit`): a held-out photo among its references or a test
    person in training is refused before anything is drawn.

    Args:
        extractors: networks that score; None takes the miniature's critic, and critic_b where its folder is there.
        anchors: make and score the anchor rows too; each of the first three takes as long as drawing the method's own.
        groups: of the jackknife over people.
        resamples: of the bootstrap over people.
        grid_people: people in grid.png, at most.
        output: folder for what is written. None takes `test/` in the folder of the run that is tested: where the
            checkpoint lies in `checkpoints/`, the folder around that; else the logger's. All is written into
            `unfinished/` in it first, and replaces what an earlier test wrote when it is whole.
    """

    def __init__(
        self,
        extractors: list[Extractor] | None = None,
        anchors: bool = True,
        groups: int = 20,
        resamples: int = 2000,
        grid_people: int = 8,
        output: str | None = None,
    ) -> None:
        if groups < 2 or resamples < 1 or grid_people < 1:
            given = f"groups is {groups}, resamples {resamples} and grid_people {grid_people}"
            raise LitMultiIPError(f"{given}: give at least 2, 1 and 1")
        if extractors is not None and not extractors:
            raise LitMultiIPError("extractors is empty: give at least one, or null for the miniature's critic")
        self.extractors = extractors
        self.anchors = anchors
        self.groups, self.resamples = groups, resamples
        self.grid_people = grid_people
        self.output = output
        self._lock = ExitStack()  # of the output folder

    # ---- before work ------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Load the extractors."""
        if stage == "test":
            self._load_extractors()

    def _load_extractors(self) -> None:
        self._named = self.extractors is not None
        if self.extractors is None:
            first, *others = SHIPPED
            shipped = [first, *(name for name in others if shipped_critic(name).is_dir())]
            self.extractors = [CriticExtractor(name) for name in shipped]
        names = [extractor.name for extractor in self.extractors]
        if len(set(names)) < len(names):
            raise LitMultiIPError(
                f"extractors are called {', '.join(names)}: their scores would be mixed up; rename one"
            )

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check, before anything is drawn, that nothing leaks, results can be written, and no extractor conditions."""
        module, data = _parts_of(trainer, pl_module)
        self.extractors = self._allowed(module)
        self._begin(trainer, data.tasks, *audit.find_record(trainer, module))
        self._index: list[Tensor] = []
        self._rows: dict[str, list[Tensor]] = defaultdict(list)
        self._seconds = {"method": 0.0, "anchors": 0.0}

    def _begin(self, trainer: L.Trainer, tasks: Sequence[Task], status: str, record: Record | None) -> None:
        """Find the folder, audit the tasks, and keep other processes out of the folder."""
        self._output = self._find_output(trainer)
        self._show_progress = trainer.is_global_zero and trainer.progress_bar_callback is not None
        self._audit = audit.audit_tasks(tasks, status, record, self._show_progress)
        if trainer.is_global_zero:
            audit.warn(self._audit)
            self._lock.enter_context(only_writer(self._output))

    def _allowed(self, module: Method) -> list[Extractor]:
        """Return the extractors that may score the module; those that were named are refused otherwise."""
        for extractor in self._loaded():
            refuse_conditioning_network(extractor, module.backbone)
            if self._named:
                refuse_training_network(extractor, module.identity_networks)
        allowed = leave_out_trainers(self._loaded(), module.identity_networks)
        if not allowed:
            raise LitMultiIPError(
                "both critics trained the model, so neither may score it: give others by score.extractors"
            )
        return allowed

    def _find_output(self, trainer: L.Trainer) -> Path:
        """Return the folder of the test; it can be written to."""
        log_dir = trainer.log_dir  # a collective call: on every rank, whether needed or not
        output = Path(log_dir or trainer.default_root_dir) / "test"
        if self.output is not None:
            output = Path(self.output).expanduser()
        elif trainer.ckpt_path is not None and (checkpoints := Path(trainer.ckpt_path).parent).name == "checkpoints":
            output = checkpoints.parent / "test"
        try:
            output.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=output):
                pass
        except OSError as error:
            raise OSError(
                f"cannot write test results to '{output}' ({error.strerror}): set ScoreTest's output to a folder that "
                "can be written to"
            ) from error
        return output

    def _loaded(self) -> list[Extractor]:
        assert self.extractors is not None  # after setup
        return self.extractors

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Let go of the folder; what an earlier test wrote is still there."""
        self._lock.close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let go of the folder."""
        self._lock.close()

    # ---- per batch --------------------------------------------------------------------------------------------------

    def on_test_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        """Start the clocks."""
        module, _data = _parts_of(trainer, pl_module)
        self._started, self._personalised = time.perf_counter(), module.spent["personalise"]

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the method's images, and draw those of the anchors."""
        module, _ = _parts_of(trainer, pl_module)
        self._index.append(batch["task"].cpu())
        self._rows["method"].append(outputs.cpu())
        drawn = time.perf_counter()
        self._seconds["method"] += drawn - self._started - (module.spent["personalise"] - self._personalised)
        if self.anchors:
            # hooks lack the autocast that the steps have
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                self._draw_anchors(module, batch, f"batch {batch_idx + 1} of {trainer.num_test_batches[0]}")
            self._seconds["anchors"] += time.perf_counter() - drawn

    def _draw_anchors(self, module: Method, batch: dict[str, Tensor], which: str) -> None:
        """Draw the anchors of a batch that the method can be conditioned on and the batch has references for."""
        given = {row: how for row, how in ANCHORS.items() if how in module.conditions}
        if "other_references" not in batch:  # there is only one person
            given.pop("other_person", None)
        rows = [*given, "vae_round_trip"]
        with tqdm(rows, f"anchors of {which}", unit="row", leave=False, disable=not self._show_progress) as bar:
            for row in bar:
                bar.set_description(f"anchors of {which}: {row.replace('_', ' ')}")
                if row in given:
                    images = module.generate(batch, given[row])
                else:
                    mean, _ = batch["moments"].chunk(2, dim=1)  # (B, 2C, h, w) => (B, C, h, w)
                    images = module.decode(mean)
                self._rows[row].append(images.cpu())

    # ---- afterwards -------------------------------------------------------------------------------------------------

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score and write on rank 0; log the method's scores as `test/<score>/<extractor>`."""
        module, data = _parts_of(trainer, pl_module)
        index, rows = self._gather_rows(trainer)
        seconds = sum_over_ranks(trainer, module.spent | self._seconds)
        if trainer.is_global_zero:
            device = trainer.strategy.root_device
            scores = self._score_and_write(data, index, rows, module.describe(), seconds, device)
            values = {f"test/{key}": score.value for key, score in scores.items()}
            pl_module.log_dict(values, rank_zero_only=True)
        trainer.strategy.barrier("scores")
        self._index, self._rows = [], defaultdict(list)

    def score_images(
        self,
        trainer: L.Trainer,
        data: MultiPhotoData,
        images: Tensor,
        names: Sequence[str],
        describe: dict[str, Any],
    ) -> None:
        """Score images that were drawn elsewhere as `test` scores its own, and write the same files.

        Rows that only a method of this project can draw are left out, and whom the network was trained on is unknown.

        Args:
            trainer: of one process.
            data: whose tasks these are; they are drawn already.
            images: one a task, (T, 3, H, W) uint8.
            names: of their files, for messages.
            describe: what is known of who drew them; `method` is the row's name.

        Raises:
            LeakError: a held-out photo is among its references or among the images.
        """
        self._load_extractors()
        try:
            self._begin(trainer, data.tasks, "unknown" if data.tested == "test" else data.tested, None)
            self._audit["images"] = audit.audit_images(data.tasks, images, names, self._show_progress)
            index, device = list(range(len(data.tasks))), trainer.strategy.root_device
            self._score_and_write(data, index, {"method": images}, describe, {"method": None}, device)
        finally:
            self._lock.close()

    def _gather_rows(self, trainer: L.Trainer) -> tuple[list[int], dict[str, Tensor]]:
        """Return all ranks' tasks in order, and their images by row, (T, 3, H, W).

        Each task once: samplers repeat some, so that all ranks have equally many.
        """

        def gather(parts: list[Tensor]) -> Tensor:
            if trainer.world_size > 1:
                device = trainer.strategy.root_device  # a batch at a time, to spare its memory
                parts = [trainer.strategy.all_gather(part.to(device)).flatten(0, 1).cpu() for part in parts]
            return torch.cat(parts)

        place: dict[int, int] = {}
        for position, task in enumerate(gather(self._index).tolist()):
            place.setdefault(task, position)
        index = sorted(place)
        return index, {name: gather(parts)[[place[task] for task in index]] for name, parts in self._rows.items()}

    def _score_and_write(
        self,
        data: MultiPhotoData,
        index: list[int],
        rows: dict[str, Tensor],
        describe: dict[str, Any],
        seconds: dict[str, Any],
        device: torch.device,
    ) -> dict[str, Score]:
        """Write a new test folder, and return the scores of the row `method`, which is called as `describe` says."""
        started = time.perf_counter()
        tasks = [data.tasks[i] for i in index]
        files = [image_files(data.tasks)[i] for i in index]
        if len(tasks) < len(data.tasks):
            logger.warning("%d of %d test tasks were drawn: scores are of these", len(tasks), len(data.tasks))
        method = str(describe["method"])
        rows = {method if row == "method" else row: images for row, images in rows.items()}

        # first what took long to make: whatever goes wrong with the scores, it is there
        folder = self._output / UNFINISHED
        shutil.rmtree(folder, ignore_errors=True)  # of a test that was stopped
        folder.mkdir()
        report.write_images(folder, rows[method], files, self._show_progress)
        at = first_tasks(tasks, self.grid_people)
        shown = {row.replace("_", " "): images[at] for row, images in rows.items()}
        title = f"{method}: made from the references and the held-out photo's prompt"
        draw_tasks([tasks[i] for i in at], shown, rows[method].shape[-1], title, 4).save(folder / "grid.png")

        photos, found = self._score(data, tasks, rows, method, device)

        seconds["scoring"] = time.perf_counter() - started
        for name, (generated, held_out) in found.sets.items():
            report.write_features(folder / f"features_{name}.safetensors", generated, held_out)
        report.write_scores(folder / "scores.csv", tasks, files, found.cells, method)
        missing = found.faces_not_found
        results = {
            "protocol": protocol(tasks),
            "rows": {row: {key: score._asdict() for key, score in own.items()} for row, own in found.rows.items()},
            "extractors": report.describe_extractors(self._loaded()),
            "describe": describe,
            "seconds": seconds,
            "versions": report.versions(),
            "commit": report.commit(),
            "photos": report.write_photos(folder, tasks, files, lambda photo: photos.pixels[photos.place[photo]]),
            "audit": self._audit,
            "faces_not_found": {name: own for name, own in missing.items() if any(n for n, _ in own.values())},
        }
        table = report.table(results)
        (folder / "table.md").write_text(table, encoding="utf-8")
        report.write_json(folder / "metrics.json", results)
        move_into(folder, self._output)
        print(f"\n{table}\n{audit.summary(self._audit)}\n\nImages, scores and grid: {self._output}", flush=True)
        return found.rows[method]

    def _score(
        self, data: MultiPhotoData, tasks: list[Task], rows: dict[str, Tensor], method: str, device: torch.device
    ) -> tuple[RealPhotos, RowScores]:
        """Score all rows by all extractors; the row real_other_photo is added to them."""
        assert data.split is not None  # after setup
        strangers = draw_strangers(tasks, data.split.train, data.seed) if self.anchors else []
        shown = [photo for task in tasks for photo in (task.held_out, *task.references)]
        photos = RealPhotos([*shown, *strangers], rows[method].shape[-1], self._show_progress)
        if self.anchors:
            rows = {**rows, "real_other_photo": photos.pixels[photos.find(choose_other_photos(tasks))]}
        scorer = Scorer(tasks, photos, strangers, self.groups, self.resamples, device, self._show_progress)
        return photos, scorer.score(self._loaded(), rows, method, self.anchors)


def _parts_of(trainer: L.Trainer, pl_module: L.LightningModule) -> tuple[Method, MultiPhotoData]:
    """Return the tested module and its data as what the callback asks of them."""
    return cast(Method, pl_module), trainer.datamodule  # type: ignore[attr-defined]


def sum_over_ranks(trainer: L.Trainer, seconds: Mapping[str, float]) -> dict[str, float]:
    """Add up the seconds of all ranks, by the names that rank 0 has. A collective call."""
    if trainer.world_size == 1:
        return dict(seconds)
    names: list[str] = trainer.strategy.broadcast(list(seconds))
    own = torch.tensor([seconds.get(name, 0.0) for name in names], device=trainer.strategy.root_device)
    total = trainer.strategy.reduce(own, reduce_op="sum")
    assert isinstance(total, Tensor)
    return dict(zip(names, total.tolist(), strict=True))
