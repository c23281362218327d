"""Low-rank additions (LoRA) to attention, W + B A with A (r, in), B (out, r), by peft and as diffusers loads them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lit_multiip.files import LitMultiIPError

LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that load_lora_weights looks for
TEXT_ATTENTION = ["q_proj", "k_proj", "v_proj", "out_proj"]  # of CLIP's text encoders
UNET_ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]  # of diffusers' UNets, self- and cross-attention


def require_peft(rank: int | None) -> None:
    """Raise `ValueError` if a rank is below 1, or peft is not installed."""
    if rank is not None and rank < 1:
        raise LitMultiIPError(f"lora_rank={rank} must be at least 1, or null for no LoRA")
    if rank is not None and importlib.util.find_spec("peft") is None:
        raise LitMultiIPError(f"lora_rank={rank} needs peft: pip install 'lit_multiip[lora]'")


def add_lora(module: Any, rank: int, seed: int = 0) -> None:
    """Add float32 LoRA to all attention of a UNet or CLIP text encoder; with B = 0 it changes nothing until trained.

    All other parameters of `module` are frozen by it. The global random state is left as it was.
    """
    from peft import LoraConfig

    layers = UNET_ATTENTION if hasattr(module, "attn_processors") else TEXT_ATTENTION
    # a resampler's attention, which is a part of the adapter, has Linears of the same names
    inside = any(name.startswith("encoder_hid_proj.") and name.endswith(".to_q") for name, _ in module.named_modules())
    excluded = r"encoder_hid_proj\..*" if inside else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module.add_adapter(
            LoraConfig(
                r=rank,
                lora_alpha=rank,
                init_lora_weights="gaussian",
                target_modules=layers,
                exclude_modules=excluded,
            )
        )
    for parameter in lora_parameters(module).values():
        parameter.data = parameter.data.float()


def remove_lora(module: Any) -> None:
    """Take the LoRA of `add_lora` out again."""
    module.delete_adapters("default")


def lora_parameters(module: Any) -> dict[str, torch.nn.Parameter]:
    """Return the added parameters by name."""
    return {name: parameter for name, parameter in module.named_parameters() if ".lora_" in name}


@contextmanager
def lora_disabled(module: Any) -> Iterator[None]:
    """Switch a module's LoRA off meanwhile."""
    module.disable_adapters()
    try:
        yield
    finally:
        module.enable_adapters()


def read_lora(modules: Mapping[str, Any], file: Path) -> None:
    """Load a file of `save_lora` into modules that have LoRA."""
    from peft import set_peft_model_state_dict

    weights = load_file(file)
    for name, module in modules.items():
        own = {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
        names = {key.replace(".default.", ".") for key in lora_parameters(module)}
        if set(own) != names:
            raise LitMultiIPError(f"LoRA file '{file}' is of another {name}, such as '{min(set(own) ^ names)}'")
        set_peft_model_state_dict(module, own)


def save_lora(pipeline: Any, folder: Path, modules: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Write `LORA_FILE` as the pipeline's class does.

    Args:
        pipeline: a class of diffusers pipelines.
        folder: where to.
        modules: what has LoRA, by its name in the pipeline, such as `unet`.
        dtype: of the file's weights.
    """
    from peft import get_peft_model_state_dict

    def layers(module: Any) -> dict[str, Tensor]:
        weights = get_peft_model_state_dict(module)
        return {name: value.detach().to("cpu", dtype).contiguous() for name, value in weights.items()}

    parts = {f"{name}_lora_layers": layers(module) for name, module in modules.items()}
    pipeline.save_lora_weights(folder, weight_name=LORA_FILE, **parts)
