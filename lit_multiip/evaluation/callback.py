"""The callback that scores a test: it collects what every task's image became, and rank 0 scores and writes it."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.data.people import Person
from lit_multiip.data.photos import Photo
from lit_multiip.data.tasks import Task, image_files, protocol
from lit_multiip.evaluation import audit
from lit_multiip.evaluation import results as report
from lit_multiip.evaluation.critic import CriticExtractor, shipped_critic
from lit_multiip.evaluation.extractors import Extraction, Extractor
from lit_multiip.evaluation.intervals import Score, person_bootstrap
from lit_multiip.evaluation.pictures import labelled_grid, to_picture
from lit_multiip.evaluation.scores import ImageSet, diversity, identity_scores, nearest_reference, summarise
from lit_multiip.files import move_into, only_writer
from lit_multiip.methods.method import References

logger = logging.getLogger(__name__)

NO_SEEDS = ("vae_round_trip", "real_other_photo")  # rows that do not depend on the noise
ANCHORS: dict[str, References] = {"no_references": "none", "zero_embedding": "zero", "other_person": "other"}
BATCH = 64  # images a pass of an extractor
PHOTO_PEOPLE = 12  # whose photos are written beside the images
UNFINISHED = "unfinished"  # folder of a test that is being written


class Scored(Protocol):
    """What the callback asks of a LightningModule, besides `test_step(batch, i) -> uint8 (B, 3, H, W)`."""

    image_side: int  # px
    conditions: Sequence[References]  # what `generate` can be conditioned on: of the anchors, those are made
    backbone: Backbone  # whose image encoder conditions
    spent: dict[str, float]  # wall seconds of this test that are not drawing: `personalise`, and others by name

    def generate(self, batch: Any, references: References = "right") -> Tensor:
        """Sample every task of a batch from its own noise, uint8 (B, 3, H, W)."""

    def decode(self, latents: Tensor) -> Tensor:
        """Unscaled VAE latents (B, C, h, w) -> uint8 (B, 3, H, W)."""

    def describe(self) -> dict[str, Any]:
        """JSON-able facts; `method` names the row, `backbone` is a name, folder or hub id."""


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

    Those of the first three are made that the method can be conditioned on.

    `seconds` in metrics.json are rank 0's wall time: `personalise` is what all its people cost before the first image
    of each (DreamBooth: tuning; the adapters: the image encoder's pass over the references and the aggregator, measured
    on one person), `class_images` what drawing those took where they were not there yet, `method` drawing alone,
    `anchors` and `scoring` what they say.

    FID and KID compare a row's images with all held-out photos, each once. real_vs_real takes its photos from as many
    training people as are tested, if there are so many, and evenly; fewer photos than tasks are counted as such.

    An extractor that conditions the images may not score them: `source` of an extractor is refused where it is the
    backbone itself or its image encoder, by id or by path; a CLIP that scores, by its weights too. Other copies
    elsewhere are not recognised.

    A face that an extractor does not find leaves that image's scores undefined. It is in no mean; how many there are
    is printed and stands in metrics.json, `faces_not_found.<extractor>.<row>` = [missing, images], of rows and of
    `real_photos`.

    What the test must not have known is audited (`evaluation.audit`): a held-out photo among its references or a test
    person in training is refused before anything is sampled.

    Args:
        extractors: Networks that score; None takes the miniature's critic, and critic_b where its folder is there.
        anchors: Make and score the anchor rows too; each of the first three takes as long as drawing the method's own.
        groups: Of the jackknife over people.
        resamples: Of the bootstrap over people.
        grid_people: People in grid.png, at most.
        output: Folder for what is written. None takes `test/` in the folder of the run that is tested: where the
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
            raise ValueError(f"{given}: give at least 2, 1 and 1")
        if extractors is not None and not extractors:
            raise ValueError("extractors is empty: give at least one, or null for the miniature's critic")
        self.extractors = extractors
        self.anchors = anchors
        self.groups, self.resamples = groups, resamples
        self.grid_people = grid_people
        self.output = output
        self._alone = ExitStack()  # in the output folder

    # ---- before work ------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Load the extractors.

        Raises:
            FileNotFoundError: a critic is missing.
            ValueError: two extractors have one name.
        """
        if stage != "test":
            return
        if self.extractors is None:
            other = shipped_critic("critic_b")
            self.extractors = [CriticExtractor(), *([CriticExtractor(str(other))] if other.is_dir() else [])]
        names = [extractor.name for extractor in self.extractors]
        if len(set(names)) < len(names):
            raise ValueError(f"extractors are called {', '.join(names)}: their scores would be mixed up; rename one")

    def _output_folder(self, trainer: L.Trainer) -> Path:
        log_dir = trainer.log_dir  # a collective call: on every rank, whether needed or not
        if self.output is not None:
            return Path(self.output).expanduser()
        if trainer.ckpt_path is not None and (checkpoints := Path(trainer.ckpt_path).parent).name == "checkpoints":
            return checkpoints.parent / "test"
        return Path(log_dir or trainer.default_root_dir) / "test"

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """See, before anything is sampled, that nothing leaks, results can be written, and no extractor conditions.

        Raises:
            LeakError: a held-out photo is among its references, or a test person was trained on.
            OSError: the output folder cannot be made or written to.
            ValueError: an extractor's weights are the backbone's image encoder.
        """
        assert self.extractors is not None
        module: Any = pl_module
        for extractor in self.extractors:
            _refuse_if_it_conditions(extractor, module.backbone)
        self._output = self._output_folder(trainer)
        self._folder = self._output / UNFINISHED
        try:
            self._output.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._output):
                pass
        except OSError as error:
            raise OSError(
                f"cannot write test results to '{self._output}' ({error.strerror}): set ScoreTest's output to a folder "
                "that can be written to"
            ) from error
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self._audit = audit.audit_tasks(data.tasks, *audit.find_record(trainer, module.describe()))
        if trainer.is_global_zero:
            audit.warn(self._audit)
            self._alone.enter_context(only_writer(self._output))
        self._index: list[Tensor] = []
        self._rows: dict[str, list[Tensor]] = defaultdict(list)
        self._seconds = {"method": 0.0, "anchors": 0.0}

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Let go of the folder; what an earlier test wrote is still there."""
        self._alone.close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let go of the folder."""
        self._alone.close()

    # ---- per batch --------------------------------------------------------------------------------------------------

    def on_test_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any, **__: Any) -> None:
        """Start the clocks."""
        self._started, self._personalised = time.perf_counter(), pl_module.spent["personalise"]

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the method's images, and make those of the anchors."""
        module: Any = pl_module
        self._index.append(batch["task"].cpu())
        self._rows["method"].append(outputs.cpu())
        sampled = time.perf_counter()
        self._seconds["method"] += sampled - self._started - (module.spent["personalise"] - self._personalised)
        if self.anchors:
            # hooks lack the autocast that the steps have
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                for name, images in self._anchor_images(module, batch).items():
                    self._rows[name].append(images.cpu())
            self._seconds["anchors"] += time.perf_counter() - sampled

    @staticmethod
    def _anchor_images(module: Scored, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        mean = batch["moments"].chunk(2, dim=1)[0]  # (B, 2C, h, w) => (B, C, h, w)
        drawn = {row: module.generate(batch, given) for row, given in ANCHORS.items() if given in module.conditions}
        return {**drawn, "vae_round_trip": module.decode(mean)}

    # ---- afterwards -------------------------------------------------------------------------------------------------

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score and write on rank 0; log the method's scores as `test/<score>/<extractor>`."""
        index, rows = self._gathered(trainer)
        if trainer.is_global_zero:
            scores = self._score_and_write(trainer, pl_module, index, rows)
            values = {f"test/{key}": score.value for key, score in scores.items()}
            pl_module.log_dict(values, rank_zero_only=True)
        trainer.strategy.barrier("scores")
        self._index, self._rows = [], defaultdict(list)

    def _gathered(self, trainer: L.Trainer) -> tuple[list[int], dict[str, Tensor]]:
        """All ranks' images by row, (T, 3, H, W), in the order of their tasks, and these.

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
        self, trainer: L.Trainer, pl_module: Any, index: list[int], rows: dict[str, Tensor]
    ) -> dict[str, Score]:
        """Returns the method's scores."""
        assert self.extractors is not None
        started = time.perf_counter()
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        tasks: list[Task] = [data.tasks[i] for i in index]
        if len(tasks) < len(data.tasks):
            logger.warning("%d of %d test tasks were sampled: scores are of these", len(tasks), len(data.tasks))
        describe = pl_module.describe()
        method = str(describe["method"])
        rows = {method if name == "method" else name: images for name, images in rows.items()}
        shutil.rmtree(self._folder, ignore_errors=True)  # of a test that was stopped
        self._folder.mkdir()
        # first what took long to make: whatever goes wrong with the scores, it is there
        files = [image_files(data.tasks)[i] for i in index]
        self._write_images(rows[method], files)
        self._grid(tasks, rows, method, pl_module.image_side).save(self._folder / "grid.png")

        strangers = _photos_of_others(tasks, data.split.train, data.seed) if self.anchors else []
        shown = [photo for task in tasks for photo in (task.held_out, *task.references)]
        real = {photo: i for i, photo in enumerate(dict.fromkeys(shown + strangers))}
        pixels = _read_photos(list(real), pl_module.image_side)  # (M, 3, H, W)
        if self.anchors:
            rows["real_other_photo"] = pixels[[real[photo] for photo in _other_photos(tasks)]]
        scores: dict[str, dict[str, Score]] = defaultdict(dict)
        not_found: dict[str, dict[str, list[int]]] = {}
        cells: dict[str, list[dict[str, Any]]] = {name: [{} for _ in tasks] for name in rows}
        for extractor in self.extractors:
            device = trainer.strategy.root_device
            options: dict[str, Any] = {"groups": self.groups, "resamples": self.resamples}
            photos, _ = _look(extractor, pixels, device, "real photos")
            if photos.embedding is not None:
                not_found[extractor.name] = {"real_photos": _not_found(photos.embedding)}
            audit.audit_embeddings(self._audit, extractor.name, tasks, _direction(photos), real)
            held_out = _image_set(photos, list(dict.fromkeys(task.held_out for task in tasks)), real)
            for name, images in rows.items():
                made, prompt = _look(extractor, images, device, name, [task.prompt for task in tasks])
                per_image = {**_per_image(extractor, made, photos, real, tasks, name not in NO_SEEDS), "prompt": prompt}
                # all undefined is no score, but that no face was found is one to be told of
                silent = [score for score in ("prompt", "diversity") if np.isnan(per_image.get(score, np.nan)).all()]
                per_image = {score: values for score, values in per_image.items() if score not in silent}
                if made.embedding is not None:
                    not_found[extractor.name][name] = _not_found(made.embedding)
                generated = ImageSet(_people(tasks), made.features, made.logits, per_image)
                scores[name] |= summarise(extractor.name, generated, held_out, **options)
                if name == method:
                    report.write_features(self._folder / f"features_{extractor.name}.safetensors", generated, held_out)
                for score, values in per_image.items():
                    for cell, value in zip(cells[name], values.tolist(), strict=True):
                        cell[f"{score}/{extractor.name}"] = value
            if self.anchors:
                copied = _nearest_reference(photos, real, tasks, _direction(photos)[_held_out(tasks, real)])
                key = f"nearest_reference/{extractor.name}"
                if not np.isnan(copied).all():
                    scores["real_held_out"][key] = person_bootstrap(copied, _people(tasks), resamples=self.resamples)
                for cell, value in zip(
                    cells.setdefault("real_held_out", [{} for _ in tasks]), copied.tolist(), strict=True
                ):
                    cell[key] = value
            if strangers:
                others = _image_set(photos, strangers, real)
                scores["real_vs_real"] |= summarise(extractor.name, others, held_out, **options)

        lines = [
            {"row": name, "person": task.person, "held_out": task.held_out.name, "prompt": task.prompt}
            | {"seed": task.seed, "image": f"images/{file}" if name == method else "", **cell}
            for name in cells
            for task, file, cell in zip(tasks, files, cells[name], strict=True)
        ]
        report.write_csv(self._folder / "scores.csv", lines)
        seconds = {**pl_module.spent, **self._seconds, "scoring": time.perf_counter() - started}
        results = report.results(protocol(tasks), scores, _facts(self.extractors), describe, seconds)
        results["photos"] = _write_photos(self._folder, tasks, files, pixels, real)
        results["audit"] = self._audit
        results["faces_not_found"] = {
            name: counts for name, counts in not_found.items() if any(missing for missing, _ in counts.values())
        }
        table = report.table(results)
        (self._folder / "table.md").write_text(table, encoding="utf-8")
        report.write_json(self._folder / "metrics.json", results)
        move_into(self._folder, self._output)
        print(f"\n{table}\n{audit.summary(self._audit)}\n\nImages, scores and grid: {self._output}", flush=True)
        return scores[method]

    def _write_images(self, images: Tensor, files: Sequence[str]) -> None:
        folder = self._folder / "images"
        for image, file in zip(tqdm(images, "writing images", unit="image", delay=3), files, strict=True):
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            to_picture(image).save(path)

    def _grid(self, tasks: Sequence[Task], rows: dict[str, Tensor], method: str, side: int) -> Image.Image:
        first = {task.person: i for i, task in reversed(list(enumerate(tasks)))}  # each person's first task
        chosen = sorted(first.values())[: self.grid_people]
        made = [name for name in rows if name != "real_other_photo"]  # which is one of the references
        most = min(4, len(tasks[0].references))
        cells, labels = [], []
        for i in chosen:
            photos = [*tasks[i].references[:most], tasks[i].held_out]
            cells.append([*map(to_picture, _read_photos(photos, side)), *(to_picture(rows[name][i]) for name in made)])
            labels.append(f"{tasks[i].person}\n{tasks[i].prompt}")
        columns = [*(f"reference {i + 1}" for i in range(most)), "held-out photo"]
        names = [name.replace("_", " ") for name in made]
        title = f"{method}: made from the references and the held-out photo's prompt"
        return labelled_grid(cells, labels, columns + names, side, title)


def _write_photos(
    folder: Path, tasks: Sequence[Task], files: Sequence[str], pixels: Tensor, real: dict[Photo, int]
) -> dict[str, Any]:
    """Write the real photos of the first people, `photos/<person>/{reference_1.., held_out_<stem>}.png`.

    Args:
        folder: Of the test.
        tasks: What was tested.
        files: Each task's image, as `image_files` names it.
        pixels: Real photos, (M, 3, H, W) uint8.
        real: Where in `pixels` a photo is.

    Returns:
        By person: `references`, files in the order of their draw, and `held_out`, a file by the photo's name.
    """
    names: dict[str, Any] = {}
    for task, file in zip(tasks, files, strict=True):
        if task.person not in names and len(names) == PHOTO_PEOPLE:
            continue
        own = names.setdefault(task.person, {"references": [], "held_out": {}})
        place = Path("photos", task.person)
        written: list[tuple[Path, Photo]] = []
        if not own["references"]:
            written += [(place / f"reference_{i + 1}.png", photo) for i, photo in enumerate(task.references)]
            own["references"] = [path.as_posix() for path, _ in written]
        if task.held_out.name not in own["held_out"]:
            written.append((place / f"held_out_{Path(file).stem.rpartition('_s')[0]}.png", task.held_out))
            own["held_out"][task.held_out.name] = written[-1][0].as_posix()
        for path, photo in written:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            to_picture(pixels[real[photo]]).save(folder / path)
    return names


def _refuse_if_it_conditions(extractor: Extractor, backbone: Backbone) -> None:
    if extractor.source is None:
        return
    face = backbone.face_encoder
    if face is not None and (extractor.source == face.path or extractor.sha256 == face.sha256()):
        raise ValueError(
            f"extractor {extractor.name!r} is the face network that conditions ({face.path}), and would score its own "
            "work: take another extractor"
        )
    if not backbone.uses_clip:
        return
    encoder, weights = backbone.image_encoder_file()
    source = os.path.realpath(extractor.source)
    places = (backbone.path, backbone.place, encoder)
    same = [place for place in places if extractor.source == place or source == os.path.realpath(place)]
    if weights is not None and weights.is_file() and extractor.shares_weights(weights):
        same.append(encoder)
    if same or Path(source).is_relative_to(os.path.realpath(encoder)):
        raise ValueError(
            f"extractor {extractor.name!r} has the weights of the image encoder that conditions "
            f"({(same or [encoder])[0]}), and would score its own work: take another extractor"
        )


def _facts(extractors: Sequence[Extractor]) -> dict[str, dict[str, Any]]:
    names = ("num_features", "num_classes", "can_identify", "source")
    return {
        extractor.name: {name: getattr(extractor, name) for name in names}
        | ({} if extractor.sha256 is None else {"sha256": extractor.sha256})
        for extractor in extractors
    }


def _not_found(embedding: Tensor) -> list[int]:
    """How many of how many images have no face that was found, of embeddings (N, E)."""
    return [int(embedding.isnan().all(dim=1).sum()), len(embedding)]


def _people(tasks: Sequence[Task]) -> Any:
    return np.array([task.person for task in tasks])


def _photos_of_others(tasks: Sequence[Task], people: Sequence[Person], seed: int) -> list[Photo]:
    """As many photos of training people as there are tasks, drawn evenly from as many people as are tested."""
    rng = np.random.default_rng(seed)
    drawn = [[photos[j] for j in rng.permutation(len(photos))] for photos in (tuple(p.photos) for p in people)]
    drawn = [drawn[i] for i in rng.permutation(len(drawn))]
    n_people = len({task.person for task in tasks})
    order: list[Photo] = []
    for part in (drawn[:n_people], drawn[n_people:]):  # the second only where the first has too few photos
        depth = max(map(len, part), default=0)
        order += [photos[d] for d in range(depth) for photos in part if d < len(photos)]
    return order[: len(tasks)]


def _other_photos(tasks: Sequence[Task]) -> list[Photo]:
    """For each task one of its references, another for each task of a person as far as there are so many."""
    count: Counter[str] = Counter()
    photos = []
    for task in tasks:
        photos.append(task.references[count[task.person] % len(task.references)])
        count[task.person] += 1
    return photos


def _read_photos(photos: Sequence[Photo], side: int) -> Tensor:
    """Photos as squares, (M, 3, side, side) uint8."""
    from lit_multiip.pixels import square, to_tensor  # it loads the encoders' libraries

    bar = tqdm(photos, "reading real photos", unit="photo", delay=3)
    return torch.cat([to_tensor([square(photo.image(), side)]) for photo in bar])


def _look(
    extractor: Extractor, images: Tensor, device: torch.device, row: str, prompts: Sequence[str] | None = None
) -> tuple[Extraction, Any]:
    """What an extractor says of images (N, 3, H, W), and how well they follow prompts, (N,); all on the CPU."""
    extractor.to(device)
    parts, agreement = [], []
    for number in tqdm(range(0, len(images), BATCH), f"{extractor.name} looks at {row}", delay=3, leave=False):
        batch = images[number : number + BATCH].to(device)
        parts.append(extractor.extract(batch))
        if prompts is not None:
            agreement.append(extractor.prompt_agreement(batch, prompts[number : number + BATCH]).cpu())

    def joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
        present = [tensor.cpu() for tensor in tensors if tensor is not None]
        return torch.cat(present) if present else None

    seen = Extraction(*(joined([getattr(part, field.name) for part in parts]) for field in fields(Extraction)))
    return seen, torch.cat(agreement).double().numpy() if agreement else None


def _image_set(photos: Extraction, chosen: Sequence[Photo], real: dict[Photo, int]) -> ImageSet:
    """Some of the real photos, for the scores of sets."""
    at = [real[photo] for photo in chosen]
    people = np.array([photo.person for photo in chosen])
    features, logits = (None if values is None else values[at] for values in (photos.features, photos.logits))
    return ImageSet(people, features, logits)


def _per_image(
    extractor: Extractor,
    made: Extraction,
    photos: Extraction,
    real: dict[Photo, int],
    tasks: Sequence[Task],
    seeds: bool,
) -> dict[str, Any]:
    """Copying; identity, where the extractor can tell people apart; and diversity over seeds; (T,) each."""
    scores: dict[str, Any] = {"nearest_reference": _nearest_reference(photos, real, tasks, _direction(made))}
    if extractor.can_identify and made.embedding is not None and photos.embedding is not None:
        held_out = photos.embedding[_held_out(tasks, real)]  # (T, E)
        references = photos.embedding[_references(tasks, real)]  # (T, R, E)
        identity = identity_scores(made.embedding, held_out, references, _people(tasks))
        scores |= {f"{extractor.likeness}_{name}": values for name, values in identity.items()}
    if seeds and made.features is not None:
        scores["diversity"] = diversity(made.features, _held_out(tasks, real))
    return scores


def _direction(seen: Extraction) -> Tensor:
    """What photos are compared by: embeddings of identity (N, E), else features (N, D)."""
    direction = seen.features if seen.embedding is None else seen.embedding
    if direction is None:
        raise ValueError("an extractor gave neither features nor an embedding: give one of them in its `compute`")
    return direction


def _nearest_reference(photos: Extraction, real: dict[Photo, int], tasks: Sequence[Task], images: Tensor) -> Any:
    return nearest_reference(images, _direction(photos)[_references(tasks, real)])  # (T,)


def _held_out(tasks: Sequence[Task], real: dict[Photo, int]) -> list[int]:
    return [real[task.held_out] for task in tasks]


def _references(tasks: Sequence[Task], real: dict[Photo, int]) -> Tensor:
    """Where the references of each task are, (T, R)."""
    return torch.tensor([[real[photo] for photo in task.references] for task in tasks])
