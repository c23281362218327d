"""What the command line starts from: the Trainer's defaults, and short options for what is typed often."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_multiip import callbacks
from lit_multiip.backbone.ip_adapter import Scale
from lit_multiip.backbone.sampler import Sampling
from lit_multiip.datamodule import PredictArgs
from lit_multiip.evaluation.person import ScorePerson
from lit_multiip.finite import RequireFinite
from lit_multiip.resume import ExactResume

# Short options: where their values go, which class stands there, the commands that take them, and how each is typed.
SHORT: dict[str, tuple[type[Any], tuple[str, ...], dict[str, dict[str, Any]]]] = {
    "model.init_args.sampling": (
        Sampling,
        ("test", "predict"),
        {
            "ip_scale": {"type": Scale, "help": "weight of the photos, or weights by block"},
            "guidance_scale": {"type": float, "help": "weight of the text"},
            "steps": {"type": int, "help": "denoising steps"},
            "ip_start": {"type": float, "help": "share of the steps after which photos begin to act"},
            "ip_end": {"type": float, "help": "share of the steps after which they no longer do"},
        },
    ),
    "data.predict": (
        PredictArgs,
        ("predict",),
        {
            "photos": {"type": str, "nargs": "+", "help": "folder with photos of one person, or several with masks"},
            "prompts": {"type": str, "nargs": "+", "help": "what to draw"},
            "seeds": {"type": int, "nargs": "+", "help": "an image each per prompt"},
            "weights": {"type": float, "nargs": "+", "help": "one a photo, in the order of their names"},
            "negatives": {"type": str, "help": "folder with photos to draw away from"},
            "masks": {"type": str, "nargs": "+", "help": "a picture a person, white where their photos act"},
        },
    ),
}


def choose_precision() -> str:
    """Return `bf16-mixed` where this machine multiplies 16-bit matrices in hardware, and `32-true` elsewhere.

    On CPUs with AVX-512 BF16 and no such unit (AMX) a training step in bf16-mixed took 0.85 to 1.7 times as long.
    """
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # of newer versions of torch
    return "bf16-mixed" if capabilities.get("amx_bf16") else "32-true"


def trainer_defaults() -> dict[str, Any]:
    """Return the Trainer's defaults: the miniature's steps, and the callbacks that every run has."""
    return {
        "accelerator": "auto",
        "precision": choose_precision(),
        "max_steps": 2000,
        "val_check_interval": 500,  # optimiser steps, see ValidateBySteps
        "check_val_every_n_epoch": None,
        "use_distributed_sampler": False,  # the DataModule's own samplers serve all ranks
        "inference_mode": False,
        "num_sanity_val_steps": 1,
        "log_every_n_steps": 10,
        "logger": {
            "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
            "init_args": {"save_dir": "runs", "name": "multiip", "default_hp_metric": False},
        },
        "callbacks": [  # Lightning adds these to those of the config
            RequireFinite(),
            ExactResume(),
            callbacks.ValidateBySteps(),
            ModelCheckpoint(filename="last", monitor=None, save_top_k=1, enable_version_counter=False),
            ScorePerson(),
            callbacks.SavePredictions(),
            callbacks.RecordPeople(),
            callbacks.AverageTrained(),
            callbacks.DescribeRun(),
        ],
    }
