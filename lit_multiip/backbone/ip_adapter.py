"""The IP-Adapter's states: read, made, installed and taken out, by diffusers' own public `load_ip_adapter`.

Their published names, used throughout, are `image_proj.proj.{weight,bias}` (Linear), `image_proj.norm.{weight,bias}`
(LayerNorm) and `ip_adapter.{1,3,5,...}.to_{k,v}_ip.weight` (K', V'), the odd numbers being the cross-attention layers'
places among all of `unet.attn_processors`.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from lit_multiip.backbone.components import BackboneError, hub_place
from lit_multiip.files import first_line

if TYPE_CHECKING:  # diffusers loads a class when it is first used: a command line is parsed without any
    from diffusers.models import UNet2DConditionModel
    from diffusers.models.embeddings import ImageProjection

RECORD = "lit_multiip"  # key of a safetensors file's metadata
TOKENS = 4  # image tokens per embedding; diffusers' loader knows no other number for this layout

# A key that only the image projection of another adapter family has -> that family's name. The order matters.
_OTHER_LAYOUTS = {
    "latents": "IP-Adapter Plus (resampler)",
    "perceiver_resampler.proj_in.weight": "IP-Adapter FaceID Plus",
    "proj.3.weight": "IP-Adapter Full Face",
    "proj.0.weight": "IP-Adapter FaceID",
}

State = dict[str, dict[str, Tensor]]
Scale = float | dict[str, Any]  # lambda in every layer, or by block, as diffusers' `set_ip_adapter_scale` takes it


def _host(unet: UNet2DConditionModel) -> Any:
    """Make the least object that diffusers' adapter methods work on; a pipeline would warn of missing components."""
    from diffusers.loaders import IPAdapterMixin

    host: Any = IPAdapterMixin()
    host.unet = unet
    return host


def ip_adapter_from_text(unet: UNet2DConditionModel, embed_dim: int, *, seed: int = 0) -> State:
    """Make a fresh IP-Adapter as published: K' and V' copy the text K and V, Linear and LayerNorm start at random.

    Args:
        unet: the UNet whose text projections are copied.
        embed_dim: width D of an image embedding.
        seed: of the Linear's initialisation. The global random state is left as it was.

    Returns:
        `{"image_proj": {...}, "ip_adapter": {...}}` in float32 on the CPU, ready for `install_ip_adapter`.
    """
    from diffusers.models.embeddings import ImageProjection

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projection = ImageProjection(
            image_embed_dim=embed_dim, cross_attention_dim=_context_dim(unet), num_image_text_embeds=TOKENS
        )
    return _nested({**_projection_parameters(projection), **text_kv(unet)})


def read_ip_adapter(path: str) -> State:
    """Read adapter weights as published (.safetensors with flat keys, or .bin); nothing is unpickled.

    Args:
        path: a file, or hub id and file, such as `h94/IP-Adapter/models/ip-adapter_sd15.safetensors`.

    Returns:
        `{"image_proj": {...}, "ip_adapter": {...}}` and any other sections, such as `aggregator`.

    Raises:
        BackboneError: the file is missing or broken, holds a pickled object, or is of another adapter family.
    """
    file = find_adapter_file(path)
    try:
        if file.suffix == ".safetensors":
            state: Any = _nested(load_file(file), copy=False)
        elif file.suffix == ".bin":
            state = torch.load(file, map_location="cpu", weights_only=True)
        else:
            raise BackboneError(f"IP-Adapter file '{path}' is neither .safetensors nor .bin: convert it")
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"the pickled object '{found[1]}'" if found else "something other than tensors"
        raise BackboneError(
            f"IP-Adapter file '{path}' holds {what}, which could run code: refused; give it as .safetensors"
        ) from error
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise BackboneError(f"IP-Adapter file '{path}' is broken ({first_line(error)}): fetch it again") from error
    _check_layout(state, f"IP-Adapter file '{path}'")
    return state


def find_adapter_file(path: str) -> Path:
    """Find an adapter's file on this machine, or fetch it from the hub."""
    file = Path(path).expanduser()
    if file.is_file():
        return file
    place = hub_place(path)
    if place is None or Path(place[1]).suffix not in (".safetensors", ".bin"):
        raise BackboneError(
            f"there is no IP-Adapter file '{path}': give a .safetensors or .bin file, or hub id and file, such as "
            "'h94/IP-Adapter/models/ip-adapter_sd15.safetensors'"
        )
    try:
        return Path(hf_hub_download(*place))
    except (OSError, ValueError) as error:
        raise BackboneError(
            f"there is no IP-Adapter file '{path}' on this machine, and '{place[1]}' of the hub's '{place[0]}' cannot "
            f"be fetched ({first_line(error)}): fetch it where there is a network, and give your copy's path, "
            "--model.ip_adapter <file>"
        ) from error


def read_adapter_record(path: str) -> dict[str, Any]:
    """Read the facts in an exported adapter, such as its `aggregator`; empty for one that others published."""
    file = find_adapter_file(path)
    if file.suffix != ".safetensors":
        return {}
    try:
        with safe_open(file, framework="pt") as opened:
            record = json.loads((opened.metadata() or {}).get(RECORD, "{}"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise BackboneError(f"IP-Adapter file '{path}' is broken ({first_line(error)}): fetch it again") from error
    return record if isinstance(record, dict) else {}


def ip_adapter_state(unet: UNet2DConditionModel) -> State:
    """Copy the installed IP-Adapter out, float32 on the CPU: the inverse of `install_ip_adapter`."""
    return _nested(ip_adapter_parameters(unet))


def install_ip_adapter(unet: UNet2DConditionModel, state: Mapping[str, Any], embed_dim: int | None = None) -> None:
    """Install diffusers' IP-Adapter modules, Z + lambda * Attention(Q, K', V') (eq. 3/16/19), with lambda = 1.

    Afterwards the UNet is frozen but for the adapter, whose parameters are float32 whatever the UNet's own precision:
    under a half-precision UNet, run it in autocast. `state` is copied, never shared.

    Args:
        unet: of SD or SDXL. An adapter already there is replaced.
        state: `{"image_proj": {...}, "ip_adapter": {...}}`; further sections are ignored.
        embed_dim: width of the image encoder's embeddings, to be checked against the adapter's.

    Raises:
        BackboneError: `state` is incomplete, of another family, or made for another UNet or image encoder.
    """
    _check_layout(state, "the adapter")
    _check_fit(unet, state, embed_dim)
    own = _nested(_flat(state))
    weights: dict[str, Any] = {section: dict(tensors) for section, tensors in own.items()}
    with _quiet_cast():
        _host(unet).load_ip_adapter(weights, subfolder="", weight_name="", image_encoder_folder=None)
    unet.requires_grad_(False)
    for key, parameter in ip_adapter_parameters(unet).items():
        section, _, name = key.partition(".")
        # The loader cast the values to the UNet's dtype; the originals undo that without loss.
        parameter.data = own[section][name].to(unet.device)
        parameter.requires_grad_(True)


def ip_adapter_parameters(unet: UNet2DConditionModel) -> dict[str, nn.Parameter]:
    """Return the adapter's parameters under their published keys: Linear, LayerNorm, then K' and V' by layer."""
    _require_installed(unet)
    parameters = _projection_parameters(unet.encoder_hid_proj.image_projection_layers[0])
    for number, attention in _cross_attention(unet).items():
        parameters[f"ip_adapter.{number}.to_k_ip.weight"] = attention.processor.to_k_ip[0].weight
        parameters[f"ip_adapter.{number}.to_v_ip.weight"] = attention.processor.to_v_ip[0].weight
    return parameters


def set_ip_scale(unet: UNet2DConditionModel, scale: Scale) -> None:
    """Set lambda of eq. (3)/(19), the weight of the image attention; 0 gives the plain backbone.

    Args:
        unet: with an adapter.
        scale: one number for every layer, or by block as `check_ip_scale` says; 0 in blocks that are not named.
    """
    check_ip_scale(scale, unet)
    _require_installed(unet)
    try:
        _host(unet).set_ip_adapter_scale(copy.deepcopy(scale) if isinstance(scale, dict) else float(scale))
    except ValueError as error:
        raise BackboneError(f"ip_scale={scale} does not fit this UNet ({first_line(error)}): {_SCALES}") from error


def check_ip_scale(scale: Scale, unet: UNet2DConditionModel | None = None) -> None:
    """Refuse a scale that is not finite, or that names no block.

    Args:
        scale: a number, or a mapping of `down`, `mid` and `up` to a number, a list with a number a layer, or a mapping
            of `block_0`, `block_1`, ... to these.
        unet: whose blocks must be there; None checks the form alone.
    """
    for place, value in _scale_places(scale):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            where = f"ip_scale.{place}" if place else "ip_scale"
            raise BackboneError(f"{where}={value} is not finite: 0 ignores the photos, 1 is the published weight")
        if place and not re.fullmatch(r"mid|(down|up)(\.block_\d+)?", place):
            raise BackboneError(f"ip_scale names '{place}': {_SCALES}")
        if unet is not None and "." in place:
            side, block = place.split(".")
            blocks = unet.down_blocks if side == "down" else unet.up_blocks
            known = [f"block_{i}" for i, module in enumerate(blocks) if hasattr(module, "attentions")]
            if block not in known:
                raise BackboneError(f"ip_scale names '{place}', and in {side} this UNet attends in {', '.join(known)}")


_SCALES = "give a number, or numbers by block, such as {up: {block_0: [0, 1, 0]}}, of down, mid and up"


def _scale_places(scale: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every number of a scale with its place, such as `up.block_0`."""
    if isinstance(scale, Mapping):
        for key, value in scale.items():
            yield from _scale_places(value, f"{place}.{key}".lstrip("."))
    elif isinstance(scale, list) and place:
        for value in scale:
            yield place, value
    else:
        yield place, scale


@contextmanager
def _quiet_cast() -> Iterator[None]:
    """Keep diffusers from warning that a cast may hurt the float32 layers `[]`: there are none."""

    def harmful(record: logging.LogRecord) -> bool:
        return "should be kept in float32: []" not in record.getMessage()

    log = logging.getLogger("diffusers.models.modeling_utils")
    log.addFilter(harmful)
    try:
        yield
    finally:
        log.removeFilter(harmful)


def text_kv(unet: UNet2DConditionModel) -> dict[str, nn.Parameter]:
    """Return the text projections K and V under the published keys of the K' and V' that stand beside them."""
    layers = _cross_attention(unet).items()
    return {f"ip_adapter.{i}.to_{kv}_ip.weight": getattr(a, f"to_{kv}").weight for i, a in layers for kv in "kv"}


def _cross_attention(unet: UNet2DConditionModel) -> dict[int, Any]:
    """Return cross-attention layers, which are not `attn1` in diffusers, by their published numbers 1, 3, 5, ..."""
    names = [name for name in unet.attn_processors if not name.endswith("attn1.processor")]
    return {2 * i + 1: unet.get_submodule(name.removesuffix(".processor")) for i, name in enumerate(names)}


def _context_dim(unet: UNet2DConditionModel) -> int:
    return next(iter(text_kv(unet).values())).shape[1]


def _projection_parameters(projection: ImageProjection) -> dict[str, nn.Parameter]:
    """Return parameters by their published names: diffusers calls the Linear `image_embeds`, the files `proj`."""
    return {f"image_proj.{k.replace('image_embeds', 'proj')}": p for k, p in projection.named_parameters()}


def _require_installed(unet: UNet2DConditionModel) -> None:
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

    layers = getattr(unet, "encoder_hid_proj", None)
    if not isinstance(layers, MultiIPAdapterImageProjection) or not isinstance(
        layers.image_projection_layers[0], ImageProjection
    ):
        raise BackboneError("this UNet has no IP-Adapter of the plain kind: call install_ip_adapter first")


def _nested(flat: Mapping[str, Tensor], copy: bool = True) -> State:
    """`{"a.b.c": tensor} -> {"a": {"b.c": tensor}}`; a copy is float32 on the CPU and shares no memory."""
    state: State = {}
    for key, tensor in flat.items():
        section, _, name = key.partition(".")
        value = tensor.detach().to("cpu", torch.float32, copy=True) if copy else tensor
        state.setdefault(section, {})[name] = value
    return state


def _flat(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {f"{section}.{k}": v for section in ("image_proj", "ip_adapter") for k, v in state[section].items()}


def _check_layout(state: Any, what: str) -> None:
    """Refuse, by name, whatever is not the plain IP-Adapter."""
    projection, attention = (
        state.get(name) if isinstance(state, Mapping) else None for name in ("image_proj", "ip_adapter")
    )
    if not isinstance(projection, Mapping) or not isinstance(attention, Mapping):
        raise BackboneError(f"{what} lacks the sections 'image_proj' and 'ip_adapter': give IP-Adapter weights")
    odd = [key for key, value in (*projection.items(), *attention.items()) if not isinstance(value, Tensor)]
    if odd:
        raise BackboneError(f"{what} has something other than a tensor under '{odd[0]}': give IP-Adapter weights")
    family = next((name for key, name in _OTHER_LAYOUTS.items() if key in projection), None)
    if family is None and any("_lora." in key for key in attention):
        family = "IP-Adapter FaceID"
    if family is not None:
        raise BackboneError(f"{what} is an {family}: only the plain IP-Adapter (Linear and LayerNorm) can be used")


def _check_fit(unet: UNet2DConditionModel, state: Mapping[str, Any], embed_dim: int | None) -> None:
    """Refuse a state that does not fit this UNet and image encoder, naming the expected and the found."""
    found = _flat(state)
    found_dim = found["image_proj.proj.weight"].shape[-1] if "image_proj.proj.weight" in found else 0
    context = _context_dim(unet)
    expected = {
        "image_proj.proj.weight": (TOKENS * context, embed_dim or found_dim),
        "image_proj.proj.bias": (TOKENS * context,),
        "image_proj.norm.weight": (context,),
        "image_proj.norm.bias": (context,),
        **{key: tuple(weight.shape) for key, weight in text_kv(unet).items()},
    }
    # Widths first: they tell an adapter of another backbone apart better than a list of keys does.
    for key in expected.keys() & found.keys():
        if tuple(found[key].shape) != expected[key]:
            raise BackboneError(
                f"adapter weight '{key}' has the shape {tuple(found[key].shape)}, and this backbone (text width "
                f"{context}, image embedding width {embed_dim or 'unchecked'}) needs {expected[key]}: "
                "use the adapter that was trained for it"
            )
    for problem, keys in (
        ("lacks", expected.keys() - found.keys()),
        ("has, beyond what this UNet takes,", found.keys() - expected.keys()),
    ):
        if keys:
            raise BackboneError(
                f"the adapter {problem} {len(keys)} weights, such as '{min(keys)}' (this UNet takes {len(expected)}): "
                "use the adapter that was trained for this backbone"
            )
