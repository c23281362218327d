"""Anybody's images on this project's protocol: `tasks` writes what is to be drawn, `score` scores what was drawn.

Whatever draws is no part of this project: PhotoMaker, a LoRA of another trainer, an editing model. It is given the
references, the prompts and the seeds, never a held-out photo. Its images are scored by the code that scores a test.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lit_multiip.callbacks import Trainer, run_folder
from lit_multiip.data.names import normalise_name
from lit_multiip.data.people import is_photo
from lit_multiip.data.photos import DataError, FilePhoto, Photo
from lit_multiip.data.tasks import Task, image_files, protocol
from lit_multiip.evaluation.callback import ANCHORS, ScoreTest
from lit_multiip.evaluation.results import write_json
from lit_multiip.files import LitMultiIPError, UsageError
from lit_multiip.pixels import to_tensor
from lit_multiip.runs import next_run

TASKS = "tasks.json"
OF_A_TASK = re.compile(r".+_s\d+-[0-9a-f]{8}\.png")
RESERVED = {*ANCHORS, "vae_round_trip", "real_other_photo", "real_held_out", "real_vs_real"}  # names of rows


class ImagesError(LitMultiIPError):
    """A folder whose images are not those that the tasks ask for; the message names one and the remedy."""


# ---- what is to be drawn ------------------------------------------------------------------------------------------


def write_tasks(
    trainer: Trainer,
    model: Any,
    datamodule: Any,
    output: str = "tasks",
    ckpt_path: str | None = None,
    weights_only: bool | None = None,
) -> None:
    """Write what a test draws, for programs that are no part of this project: references, prompts, seeds, file names.

    Held-out photos stay out. `score` takes the images, given the same configs and options.

    Args:
        trainer: of one process.
        model: not built; any will do.
        datamodule: whose test people, and how many references and held-out photos.
        output: the folder to write.
        ckpt_path: stands in a run's config; no weights are loaded.
        weights_only: likewise.
    """
    folder = Path(output).expanduser()
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"'{output}' is not empty: delete it, or write elsewhere by --output")
    datamodule.prepare_data()
    drawn = datamodule.draw_tasks()
    references = write_references(folder, drawn)
    write_json(
        folder / TASKS,
        {
            "protocol": protocol(drawn),
            "image_side": datamodule.backbone.image_side,
            "tasks": [
                {"image": file, "person": task.person, "prompt": task.prompt, "seed": task.seed}
                | {"references": references[task.person]}
                for task, file in zip(drawn, name_images(drawn), strict=True)
            ],
        },
    )
    side = datamodule.backbone.image_side
    print(
        f"{len(drawn)} tasks: {folder / TASKS}. Draw each `image`, {side} x {side} px, into a folder; `score` takes it."
    )


def name_images(tasks: Sequence[Task]) -> list[str]:
    """Name each task's image: as a test does, with a fingerprint of the task's photos, prompt and seed behind it."""
    names = []
    for task, file in zip(tasks, image_files(tasks), strict=True):
        names.append(f"{file.removesuffix('.png')}-{protocol([task])['sha256'][:8]}.png")
    return names


def write_references(folder: Path, tasks: Sequence[Task]) -> dict[str, list[str]]:
    """Write each person's references, `references/<person>/<k>.png`, as whole as the source has them.

    Returns:
        The files of each person, in the order of their draw; a reference that was drawn twice is named twice.
    """
    drawn = {task.person: task.references for task in tasks}
    files: dict[str, list[str]] = {}
    for person, photos in tqdm(drawn.items(), "writing references", unit="person", delay=3):
        own: dict[Photo, str] = {}
        for photo in photos:
            if photo not in own:
                own[photo] = f"references/{person}/{len(own) + 1}.png"
                path = folder / own[photo]
                path.parent.mkdir(parents=True, exist_ok=True)
                photo.image().save(path)
        files[person] = [own[photo] for photo in photos]
    return files


# ---- what was drawn -----------------------------------------------------------------------------------------------


def score_images(
    trainer: Trainer,
    model: Any,
    datamodule: Any,
    images: str,
    name: str,
    ckpt_path: str | None = None,
    weights_only: bool | None = None,
) -> None:
    """Audit and score images that another program drew for the tasks that `tasks` wrote, as `test` scores its own.

    Writes what `test` writes, to `score.output`, or to `test/` in a new folder `<name>/version_k` beside other runs.

    Args:
        trainer: of one process.
        model: not built; any will do.
        datamodule: as `tasks` was given it.
        images: folder of the images, by the names in tasks.json.
        name: of the method that drew them, in tables.
        ckpt_path: stands in a run's config; no weights are loaded.
        weights_only: likewise.
    """
    if not name.strip() or name in RESERVED:
        raise UsageError(f"--name is {name!r}, which is empty or an anchor's: call the method that drew the images")
    folder = Path(images).expanduser()
    if not folder.is_dir():
        raise UsageError(f"--images '{images}' is not a folder: give the one that the images were drawn into")
    datamodule.prepare_data()
    drawn, side = datamodule.draw_tasks(), datamodule.backbone.image_side
    pixels = read_images(folder, drawn, side)
    slug = re.sub(r"[^\w.-]+", "_", name).strip("._") or "images"
    trainer.run_folder = next_run(run_folder(trainer).parent.parent / slug)
    *_, callback = (callback for callback in trainer.callbacks if isinstance(callback, ScoreTest))  # type: ignore[attr-defined]
    describe = {"method": name, "images": images, "image_side": side}
    callback.score_images(trainer, datamodule, pixels, name_images(drawn), describe)


def read_images(folder: Path, tasks: Sequence[Task], side: int) -> Tensor:
    """Read the images of a folder that the tasks ask for, and refuse a folder that lacks one or has another.

    Returns:
        One a task, (T, 3, side, side) uint8.

    Raises:
        ImagesError: an image is missing, of no task, of another size or cannot be read.
    """
    wanted = {normalise_name(name): name for name in name_images(tasks)}
    found = {
        normalise_name(path.relative_to(folder).as_posix()): path
        for path in sorted(folder.rglob("*"))
        if is_photo(path) and not path.name.startswith(".")
    }
    _check_names(folder, wanted, found)
    pictures, wrong = [], {}
    for name in tqdm(wanted, "reading images", unit="image", delay=3):
        try:
            picture = FilePhoto("", name, "", found[name]).image()
        except DataError as error:
            raise ImagesError(f"image {error}: draw it again") from error
        if picture.size != (side, side):
            wrong[name] = f"'{name}' with {picture.width} x {picture.height} px"
        else:
            pictures.append(to_tensor([picture]))
    if wrong:
        raise ImagesError(
            f"{len(wrong)} of {len(wanted)} images in '{folder}', such as {next(iter(wrong.values()))}, are not of the "
            f"{side} x {side} px that this protocol scores: draw or scale all of them to that, or set "
            "backbone.image_side to theirs for every row that they are compared with"
        )
    return torch.cat(pictures)


def _check_names(folder: Path, wanted: Mapping[str, str], found: Mapping[str, Path]) -> None:
    """Refuse a folder whose files are not those that are wanted."""
    missing, surplus = [name for name in wanted if name not in found], [name for name in found if name not in wanted]
    others = [name for name in surplus if OF_A_TASK.fullmatch(PurePath(name).name)]
    if others:
        raise ImagesError(
            f"{len(others)} of {len(found)} images in '{folder}', such as '{others[0]}', are of another protocol: "
            "their people, photos, prompts or seeds are not those of this config; give the configs and options that "
            "`tasks` was given, or draw what `tasks` writes with these"
        )
    if missing:
        has = f", and has {len(surplus)} of other names, such as '{surplus[0]}'" if surplus else ""
        raise ImagesError(
            f"'{folder}' lacks {len(missing)} of {len(wanted)} images, such as '{missing[0]}'{has}: draw every "
            "image of tasks.json under its name"
        )
    if surplus:
        raise ImagesError(
            f"'{folder}' has images that no task asks for ({len(surplus)}), such as '{surplus[0]}': move them elsewhere"
        )
