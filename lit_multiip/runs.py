"""Run folders, `runs/<name>/version_k/`: which one a config means, which is newest, and which checkpoint is best."""

from __future__ import annotations

import argparse
import logging
import os
import re
import zipfile
from collections.abc import Container, Sequence
from pathlib import Path
from pydoc import locate
from typing import Any

import torch
from jsonargparse import Namespace

from lit_multiip.files import LitMultiIPError, UsageError, first_line

logger = logging.getLogger(__name__)

LAST = "last.ckpt"
CHOSEN = "LIT_MULTIIP_RUN"  # how a process tells the ranks that it starts which run it chose
BACKBONE_TARGETS = ("model.init_args.backbone", "data.backbone")  # of a config, given its one backbone
START = "python -m lit_multiip fit --config configs/self_attn.yaml"


class CheckpointError(LitMultiIPError):
    """A checkpoint of another method or backbone; the message names both."""


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
            place = Namespace(save_dir=str(run.parent.parent), name=run.parent.name, version=run.name)
            log.init_args.update(place)


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


def choose_run(
    args: Sequence[str], commands: Container[str], without_run: Container[str] = ()
) -> tuple[str, Path, Path] | None:
    """Choose the run whose config a command line leaves out; None where it needs none.

    `fit --ckpt_path last` without a config takes the newest run, and `fit --run` starts at one. Another command takes
    `--run`, or the newest run where there is no config and no checkpoint either. Ranks that Lightning starts take what
    the process that started them took.

    Args:
        args: the command line, the command first.
        commands: those that take a run.
        without_run: those of them that need none.

    Returns:
        The subcommand, the run's folder and its checkpoint.
    """
    if not args or args[0] not in commands or {"-h", "--help", "--print_config"} & set(args):
        return None
    look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    look.add_argument("-c", "--config", nargs="?", action="append")
    for name in ("--run", "--ckpt_path"):
        look.add_argument(name, nargs="?", const="")
    command, (given, _) = args[0], look.parse_known_args(args[1:])
    if command == "fit":
        if given.run is None and (given.ckpt_path != "last" or given.config):
            return None
    elif given.run is None and (given.config or given.ckpt_path is not None):
        return None
    starter, _, folder = os.environ.get(CHOSEN, "").partition(":")
    if "LOCAL_RANK" not in os.environ or starter != str(os.getppid()):
        folder = given.run or ""
    if command == "fit" and given.ckpt_path == "last":
        run, checkpoint = (
            (Path(folder), newest_checkpoint(Path(folder))) if folder else run_to_continue(Path("runs"), "*/*")
        )
    elif not folder:
        run, checkpoint = newest_run() or (Path("runs"), None)
        if checkpoint is None and command in without_run:
            return None
    else:
        run, checkpoint = Path(folder), best_checkpoint(Path(folder))
        if not (run / "config.yaml").is_file():
            raise UsageError(f"'{run}' is not a run: give a folder with config.yaml, such as runs/self_attn/version_0")
    if checkpoint is None and folder:
        raise UsageError(f"run '{run}' has no checkpoint that can be loaded: give another run, or {START}")
    if checkpoint is None:
        raise UsageError(f"no run under {run.resolve()} has a checkpoint to {command}: first {START}")
    os.environ[CHOSEN] = f"{os.getpid()}:{run}"
    return command, run, checkpoint


# ---- which checkpoint -----------------------------------------------------------------------------------------------


def best_checkpoint(run: Path) -> Path | None:
    """Find the checkpoint that the run's `ModelCheckpoint` holds to be the best, else the newest; None if none loads.

    A checkpoint records which one was the best when it was written, so the newest that can be read is asked first.
    What makes one the best, `checkpoint.monitor` and `checkpoint.mode`, and what it is called are the callback's alone.
    """
    readable = _read_checkpoints(run)
    for states in readable.values():
        choosing = [state for state in states.values() if state.get("monitor")]
        state = choosing[-1] if choosing else {}  # the config's `checkpoint` stands behind those of `trainer.callbacks`
        if state.get("best_model_path"):
            # a run may have been moved since
            best = run / "checkpoints" / os.path.relpath(state["best_model_path"], state["dirpath"])
            if best in readable:
                return best
    return next(iter(readable), None)


def newest_checkpoint(run: Path) -> Path | None:
    """Find the checkpoint of a run that has come furthest, of equals `last`; its bytes are verified."""
    return next(iter(_read_checkpoints(run, verify=True)), None)


def _read_checkpoints(run: Path, verify: bool = False) -> dict[Path, dict[str, Any]]:
    """Return the callbacks' states of a run's checkpoints, the furthest one first; name those that cannot be read."""
    readable: list[tuple[int, bool, Path, dict[str, Any]]] = []
    for path in (run / "checkpoints").rglob("*.ckpt"):
        try:
            checkpoint = read_checkpoint(path, verify)
        except CheckpointError as error:
            logger.warning("passed over: %s", error)
            continue
        step, states = int(checkpoint.get("global_step", 0)), checkpoint.get("callbacks", {})
        readable.append((step, path.name == LAST, path, states))
    return {path: states for *_, path, states in sorted(readable, key=lambda found: found[:3], reverse=True)}
