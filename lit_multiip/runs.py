"""Run folders, `runs/<name>/version_k/`: which one a config means, which is newest, and which checkpoint is best."""

from __future__ import annotations

import logging
import os
import re
import zipfile
from pathlib import Path
from pydoc import locate
from typing import Any

import torch

from lit_multiip.files import LitMultiIPError, first_line

logger = logging.getLogger(__name__)

LAST = "last.ckpt"


def read_checkpoint(path: Path, verify: bool = False) -> dict[str, Any]:
    """Open a checkpoint; nothing but tensors and plain values is unpickled.

    Args:
        path: of the file.
        verify: read all of it, and compare its checksums; otherwise tensors are left on the disk until they are used.

    Raises:
        CheckpointError: It is missing, torn, or holds more than that.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint '{path}': give one from a run's checkpoints/")
    try:
        if verify:  # which torch.load does not
            with zipfile.ZipFile(path) as archive:
                if (damaged := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"bad checksum of {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=not verify)
    except Exception as error:  # damaged bytes raise nearly anything in the unpickler
        raise CheckpointError(f"checkpoint '{path}' cannot be read ({first_line(error)}): give another one") from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"'{path}' holds no checkpoint of a run: give one from a run's checkpoints/")
    return checkpoint


def load_trained(model: Any, path: Path) -> dict[str, Any]:
    """Give a built method the weights of a checkpoint of its kind, and return the checkpoint."""
    checkpoint = read_checkpoint(path)
    model.on_load_checkpoint(checkpoint)
    model.load_state_dict(checkpoint["state_dict"], strict=False)  # it holds what was trained alone
    return checkpoint


# ---- which folder ---------------------------------------------------------------------------------------------------


def home_of_runs(trainer: Any, model: Any) -> tuple[Path, str | None]:
    """Return the folder that holds the runs of a config, and the name of its own run where the config gives one.

    They are `save_dir/name` and `version` of the first logger that has a name. Without such a logger the folder is
    `trainer.default_root_dir` (default: `runs`) and the method's name.

    Args:
        trainer: the config's `trainer`, parsed and not built.
        model: the config's `model`, likewise.
    """
    root = trainer.get("default_root_dir") or "runs"
    for options in (log.init_args for log in loggers_of(trainer)):
        if options.get("name"):
            version = options.get("version")
            folder = Path(os.path.expandvars(options.get("save_dir") or root)).expanduser() / options["name"]
            return folder, f"version_{version}" if isinstance(version, int) else version
    aggregator = (model.get("init_args") or {}).get("aggregator") or model
    name = str(getattr(aggregator, "class_path", aggregator)).rpartition(".")[2]
    return Path(root) / re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower(), None


def loggers_of(trainer: Any) -> list[Any]:
    """Return those loggers of a config's `trainer` that have options."""
    given = trainer.get("logger")
    return [log for log in (given if isinstance(given, list) else [given]) if hasattr(log, "init_args")]


def place_loggers(trainer: Any, run: Path) -> None:
    """Have the loggers whose files lie in `save_dir/name/version` write into a run's folder."""
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    for log in loggers_of(trainer):
        kind = locate(log.class_path)
        if isinstance(kind, type) and issubclass(kind, (CSVLogger, TensorBoardLogger)):
            for key, value in {
                "save_dir": str(run.parent.parent),
                "name": run.parent.name,
                "version": run.name,
            }.items():
                log.init_args[key] = value


def next_run(home: Path) -> Path:
    """Return the first `version_k` below `home` that is higher than all that are there."""
    taken = [int(path.name[8:]) for path in home.glob("version_*") if path.name[8:].isdigit()]
    return home / f"version_{max(taken, default=-1) + 1}"


def run_to_continue(home: Path, pattern: str = "*") -> tuple[Path, Path]:
    """Find the newest run below `home` whose folder has that pattern, and its newest checkpoint.

    Raises:
        CheckpointError: There is no such run, or the newest has no checkpoint that can be read.
    """
    runs = [config.parent for config in home.glob(f"{pattern}/config.yaml")]
    if not runs:
        raise CheckpointError(f"there is no run to go on with in '{home / pattern}': start it without ckpt_path")

    def touched(run: Path) -> int:
        return max(file.stat().st_mtime_ns for file in [run / "config.yaml", *run.glob("checkpoints/*.ckpt")])

    run = max(runs, key=touched)
    checkpoint = newest_checkpoint(run)
    if checkpoint is None:
        raise CheckpointError(
            f"run '{run}', the newest, has no checkpoint to go on from: start anew without ckpt_path, or set ckpt_path "
            "to a file of an older run"
        )
    return run, checkpoint


def newest_run(root: Path = Path("runs")) -> tuple[Path, Path] | None:
    """Find the run that was saved to last, and its best checkpoint; None if no run has one that can be loaded."""

    def saved(run: Path) -> int:
        return max((path.stat().st_mtime_ns for path in run.glob("checkpoints/*.ckpt")), default=0)

    runs = [config.parent for config in root.glob("*/*/config.yaml")]
    for run in sorted(runs, key=saved, reverse=True):
        if (checkpoint := best_checkpoint(run)) is not None:
            return run, checkpoint
    return None


# ---- which checkpoint -----------------------------------------------------------------------------------------------


def best_checkpoint(run: Path) -> Path | None:
    """Find the checkpoint that the run's `ModelCheckpoint` holds to be the best, else the newest; None if none loads.

    A checkpoint records which one was the best when it was written, so the newest that can be read is asked first.
    What makes one the best, `checkpoint.monitor` and `checkpoint.mode`, and what it is called are the callback's alone.
    """
    readable: list[tuple[int, bool, Path, dict[str, Any]]] = []
    for path in sorted((run / "checkpoints").rglob("*.ckpt")):
        try:
            checkpoint = read_checkpoint(path)
        except CheckpointError as error:
            logger.warning("%s", error)
            continue
        step = int(checkpoint.get("global_step", 0))
        readable.append((step, path.name == LAST, path, checkpoint.get("callbacks", {})))
    readable.sort(key=lambda found: found[:3], reverse=True)
    paths = [path for _, _, path, _ in readable]
    for *_, states in readable:
        choosing = [state for state in states.values() if state.get("monitor")]
        state = choosing[-1] if choosing else {}  # the config's `checkpoint` stands behind those of `trainer.callbacks`
        if state.get("best_model_path"):
            # a run may have been moved since
            best = run / "checkpoints" / os.path.relpath(state["best_model_path"], state["dirpath"])
            if best in paths:
                return best
    return paths[0] if paths else None


def newest_checkpoint(run: Path) -> Path | None:
    """Find the checkpoint of a run that has come furthest, of equals ``last``; one that cannot be read is named."""
    readable = []
    for path in sorted((run / "checkpoints").glob("*.ckpt")):
        try:
            step = int(read_checkpoint(path, verify=True).get("global_step", 0))
            readable.append((step, path.name == LAST, path))
        except CheckpointError as error:
            logger.warning("passed over: %s", error)
    return max(readable)[2] if readable else None


class CheckpointError(LitMultiIPError):
    """A checkpoint of another method or backbone; the message names both."""
