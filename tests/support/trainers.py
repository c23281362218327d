"""A trainer that writes and shows nothing."""

from __future__ import annotations

from typing import Any

import lightning as L


def quiet_trainer(**options: Any) -> L.Trainer:
    """Return a trainer on one CPU without logger, checkpoints, bar and summary."""
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return L.Trainer(**{"accelerator": "cpu", "devices": 1, **dict.fromkeys(silent, False), **options})
