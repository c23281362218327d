"""A run's folder without a fit: a checkpoint of weights that all differ from where they start, and a config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from lit_multiip.data.people import MiniFaces
from lit_multiip.data.record import RECORD as TRAINED_ON
from lit_multiip.data.record import training_record

PEOPLE = MiniFaces(train=3, validation=1, test=1, photos=2).people()


def write_run(folder: Path, model: Any, config: dict[str, Any], seed: int = 1, step: int = 7) -> Path:
    """A run, on record for 5 people, of a model whose trained weights all differ from where they start."""
    (folder / "checkpoints").mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.trained_parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    checkpoint = {"state_dict": model.state_dict(), "global_step": step, TRAINED_ON: training_record(PEOPLE)}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    trainer = {"accelerator": "cpu", "enable_progress_bar": False, "max_steps": 7}
    (folder / "config.yaml").write_text(yaml.safe_dump({"trainer": trainer, **config}))
    return folder
