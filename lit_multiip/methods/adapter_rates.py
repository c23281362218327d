"""Learning rates apart: K' and V' of an adapter at a rate of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import nn

from lit_multiip.files import LitMultiIPError


def check_kv_factor(factor: float, trained: str) -> None:
    """Refuse a factor that is out of range, or that nothing would feel."""
    if not 0 < factor < math.inf:
        raise LitMultiIPError(f"model.kv_lr_factor={factor} must be above 0: 1 is one rate for all")
    if factor != 1 and trained != "adapter":
        raise LitMultiIPError(
            f"model.kv_lr_factor={factor} has no effect, as model.trained={trained} leaves K' and V' as they are: "
            "leave it at 1"
        )


def build_with_kv_factor(
    make_optimizer: OptimizerCallable, named: Mapping[str, nn.Parameter], factor: float
) -> torch.optim.Optimizer:
    """Build an optimiser in which K' and V' are a group of their own, at the learning rate times `factor`.

    Args:
        make_optimizer: of groups of parameters.
        named: what is trained, by name.
        factor: of the rate.
    """
    kv = [parameter for name, parameter in named.items() if ".to_k_ip." in name or ".to_v_ip." in name]
    others = [parameter for parameter in named.values() if not any(parameter is one for one in kv)]
    optimizer = make_optimizer([{"params": others, "name": "others"}, {"params": kv, "name": "kv"}])
    *_, group = optimizer.param_groups
    if group.get("lr") is None:
        raise LitMultiIPError(
            f"model.kv_lr_factor={factor} needs an optimiser with a learning rate, and {type(optimizer).__name__} has "
            "none: set its lr, or leave the factor at 1"
        )
    group["lr"] = group["lr"] * factor
    return optimizer
