"""What an adapter starts from: its file checked and fitted, and what stands in the place of no photo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_multiip.backbone.components import BackboneError
from lit_multiip.backbone.ip_adapter import find_adapter_file, read_adapter_record, read_layout, require_lora
from lit_multiip.backbone.layouts import PLAIN, recognise
from lit_multiip.backbone.lora import LORA_FILE, read_lora, require_peft
from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.methods.aggregators import Aggregator


def check_file(backbone: Backbone, path: str) -> None:
    """Refuse an adapter file of another layout, for another encoder of photos, or of FaceID without its LoRA.

    Only the shapes of its weights are read.
    """
    layout, what = backbone.layout, f"IP-Adapter file '{path}'"
    found, state = read_layout(path)
    if found is not layout:
        raise BackboneError(
            f"{what} is {found.title}, and photos are encoded for {layout.title}: set backbone.layout={found.name}, or "
            f"give an adapter of the layout {layout.name}"
        )
    if layout is not PLAIN:
        layout.check_widths(state["image_proj"], backbone.widths, what)
    if layout.lora:
        require_lora(layout, state, what)


def take_rank(state: Any, rank: int | None, path: str | None) -> int:
    """Return the rank of FaceID's own LoRA, or refuse another one that was asked for."""
    found = require_lora(recognise(state["image_proj"]), state, f"IP-Adapter file '{path}'")
    require_peft(found)
    if rank not in (None, found):
        raise BackboneError(
            f"IP-Adapter file '{path}' has LoRA of rank {found}, and model.lora_rank is {rank}: leave model.lora_rank "
            "out"
        )
    return found


def load_lora(unet: Any, rank: int | None, path: str) -> None:
    """Load the LoRA that an exported adapter was trained with, from beside the adapter's file."""
    found = read_adapter_record(path).get("lora_rank")
    if found is None:
        return
    if found != rank:
        raise BackboneError(
            f"adapter '{path}' was trained with LoRA of rank {found}: set model.lora_rank={found}, not {rank}"
        )
    read_lora({"unet": unet}, find_adapter_file(str(Path(path).with_name(LORA_FILE))))


def load_aggregator(aggregator: Aggregator, settings: str, weights: dict[str, Tensor], path: str) -> None:
    """Load the aggregator of an exported adapter, whose K' and V' were trained on its output.

    Args:
        aggregator: gets the weights.
        settings: its name and options.
        weights: of the file.
        path: of the file.
    """
    found, own_keys = read_adapter_record(path).get("aggregator", settings), set(aggregator.state_dict())
    if found != settings or own_keys != set(weights):
        what = found if found != settings else f"another aggregator (weights {', '.join(sorted(weights))})"
        raise BackboneError(f"adapter '{path}' was trained with {what}, not {settings}: set model.aggregator likewise")
    aggregator.load_state_dict(weights)


def over(flags: Tensor, embeds: Tensor) -> Tensor:
    """Give flags (B,) as many dimensions as embeddings have."""
    return flags.view(-1, *[1] * (embeds.ndim - 1))


def no_photo(embeds: Tensor, blank: Tensor | None) -> Tensor:
    """Return what stands for no photo, (B, ...), in the shape of conditions (B, M, ...); zeros where there is none."""
    return torch.zeros_like(embeds) if blank is None else blank[:, None].to(embeds).expand_as(embeds)


def widen(projection: dict[str, Tensor], clip: int, width: int) -> None:
    """Widen a Linear (4 E, clip) that was made for CLIP alone, with zeros for the face's embedding beside it."""
    weight = projection.get("proj.weight")
    if weight is not None and weight.ndim == 2 and weight.shape[1] == clip:
        projection["proj.weight"] = F.pad(weight, (0, width - clip))
