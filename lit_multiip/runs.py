"""Run folders, ``runs/<name>/version_k/``: which is the newest, and which of its checkpoints is the best."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import torch

from lit_multiip.method import CheckpointError

logger = logging.getLogger(__name__)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Open a checkpoint, memory-mapped; nothing but tensors and plain values is unpickled.

    Raises:
        CheckpointError: It is missing, torn, or holds more than that.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint '{path}': give one from a run's checkpoints/")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise CheckpointError(f"checkpoint '{path}' cannot be read ({reason}): give another one") from error


def load_trained(model: Any, path: Path) -> dict[str, Any]:
    """Give a built method the weights of a checkpoint of its kind, and return the checkpoint."""
    checkpoint = read_checkpoint(path)
    model.on_load_checkpoint(checkpoint)
    model.load_state_dict(checkpoint["state_dict"], strict=False)  # it holds what was trained alone
    return checkpoint


def best_checkpoint(run: Path) -> Path | None:
    """Find the loadable checkpoint of a run with the lowest validation loss, else its last; None if there is none."""
    scored = []
    for path in sorted((run / "checkpoints").glob("best-*.ckpt")):
        try:
            states = read_checkpoint(path).get("callbacks", {}).values()
        except CheckpointError as error:
            logger.warning("%s", error)
            continue
        scores = [float(s["current_score"]) for s in states if s.get("monitor") and s.get("current_score") is not None]
        scored.append((min(scores, default=float("inf")), path))
    if scored:
        return min(scored)[1]
    last = run / "checkpoints" / "last.ckpt"
    if not last.exists():
        return None
    try:
        read_checkpoint(last)
    except CheckpointError as error:
        logger.warning("%s", error)
        return None
    return last


def newest_run(root: Path = Path("runs")) -> tuple[Path, Path] | None:
    """Find the run that was saved to last, and its best checkpoint; None if no run has one that can be loaded."""

    def saved(run: Path) -> int:
        return max((path.stat().st_mtime_ns for path in run.glob("checkpoints/*.ckpt")), default=0)

    runs = [config.parent for config in root.glob("*/*/config.yaml")]
    for run in sorted(runs, key=saved, reverse=True):
        if (checkpoint := best_checkpoint(run)) is not None:
            return run, checkpoint
    return None
