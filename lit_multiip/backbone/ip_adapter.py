"""The IP-Adapter's states: read, made, installed and taken out, by diffusers' own public `load_ip_adapter`.

Their published names, used throughout, are `image_proj.*`, whose names `layouts.py` has, and
`ip_adapter.{1,3,5,...}.to_{k,v}_ip.weight` (K', V'), the odd numbers being the cross-attention layers' places among all
of `unet.attn_processors`. FaceID's LoRA is `ip_adapter.{0,1,2,...}.to_{q,k,v,out}_lora.{down,up}.weight`.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from lit_multiip.backbone.components import BackboneError, hub_place
from lit_multiip.backbone.layouts import (
    LORA_PARTS,
    PLAIN,
    Layout,
    check_sections,
    join_kv,
    layout_of,
    recognise,
    refuse_version_1,
    split_kv,
)
from lit_multiip.backbone.lora import add_lora, remove_lora
from lit_multiip.files import first_line

if TYPE_CHECKING:  # diffusers loads a class when it is first used: a command line is parsed without any
    from diffusers.models import UNet2DConditionModel

RECORD = "lit_multiip"  # key of a safetensors file's metadata
LORA_RANK = 128  # of the published FaceID adapters

State = dict[str, dict[str, Tensor]]
Scale = float | dict[str, Any]  # lambda in every layer, or by block, as diffusers' `set_ip_adapter_scale` takes it


def _host(unet: UNet2DConditionModel) -> Any:
    """Make the least object that diffusers' adapter methods work on; a pipeline would warn of missing components."""
    from diffusers.loaders import IPAdapterMixin

    host: Any = IPAdapterMixin()
    host.unet = unet
    return host


def ip_adapter_from_text(
    unet: UNet2DConditionModel,
    embed_dim: int | Sequence[int],
    *,
    seed: int = 0,
    layout: Layout = PLAIN,
    lora_rank: int = LORA_RANK,
) -> State:
    """Make a fresh IP-Adapter as published: K' and V' copy the text K and V, the projection starts at random.

    LoRA, where the layout has it, starts as W + B A with B = 0, and A normal with a deviation of 1 / rank.

    Args:
        unet: the UNet whose text projections are copied.
        embed_dim: width D of an image embedding, or of each of the layout's `kinds`.
        seed: of the random weights. The global random state is left as it was.
        layout: which projection.
        lora_rank: of the LoRA.

    Returns:
        `{"image_proj": {...}, "ip_adapter": {...}}` in float32 on the CPU, ready for `install_ip_adapter`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projection = layout.build(_context_dim(unet), _widths(embed_dim))
        lora = {
            key: torch.randn(shape) / lora_rank if ".down." in key else torch.zeros(shape)
            for key, shape in _lora_shapes(unet, lora_rank).items()
            if layout.lora
        }
    return _nested(join_kv({**_projection_parameters(layout, projection), **text_kv(unet), **lora}))


def read_ip_adapter(path: str) -> State:
    """Read adapter weights as published (.safetensors with flat keys, or .bin); nothing is unpickled.

    Args:
        path: a file, or hub id and file, such as `h94/IP-Adapter/models/ip-adapter_sd15.safetensors`.

    Returns:
        `{"image_proj": {...}, "ip_adapter": {...}}` and any other sections, such as `aggregator`.

    Raises:
        BackboneError: the file is missing or broken, holds a pickled object, or no IP-Adapter.
    """
    return _read(path, "cpu")


def read_layout(path: str) -> tuple[Layout, State]:
    """Return an adapter file's layout, and its weights, of which only the shapes are read."""
    state = _read(path, "meta")
    return recognise(state["image_proj"]), state


def _read(path: str, device: str) -> State:
    """Read an adapter file; on the device `meta`, shapes alone."""
    file = find_adapter_file(path)
    try:
        if file.suffix == ".safetensors" and device == "meta":
            with safe_open(file, framework="pt") as opened:
                shapes = {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118
            state: Any = _nested({k: torch.empty(shape, device=device) for k, shape in shapes.items()}, copy=False)
        elif file.suffix == ".safetensors":
            state = _nested(load_file(file), copy=False)
        elif file.suffix == ".bin":
            state = torch.load(file, map_location=device, weights_only=True)
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
    check_sections(state, f"IP-Adapter file '{path}'")
    refuse_version_1(recognise(state["image_proj"]), file.name)
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
    return _nested(join_kv(ip_adapter_parameters(unet)))


def install_ip_adapter(
    unet: UNet2DConditionModel, state: Mapping[str, Any], embed_dim: int | Sequence[int] | None = None
) -> None:
    """Install diffusers' IP-Adapter modules, Z + lambda * Attention(Q, K', V') (eq. 3/16/19), with lambda = 1.

    Afterwards the UNet is frozen but for the adapter, whose parameters are float32 whatever the UNet's own precision:
    under a half-precision UNet, run it in autocast. `state` is copied, never shared.

    Args:
        unet: of SD or SDXL. An adapter already there is replaced.
        state: `{"image_proj": {...}, "ip_adapter": {...}}`; further sections are ignored.
        embed_dim: width of the image encoder's embeddings, or of each of the layout's `kinds`, to be checked against
            the adapter's.

    Raises:
        BackboneError: `state` is incomplete, or made for another UNet or image encoder.
    """
    check_sections(state, "the adapter")
    layout = _check_fit(unet, state, None if embed_dim is None else _widths(embed_dim))
    own = _nested(split_kv(_flat(state)))
    weights = _nested({key: value for key, value in _flat(state).items() if "_lora." not in key})
    if (before := _installed_layout(unet)) is not None and before.lora:
        remove_lora(unet)
    with _quiet_cast():
        _host(unet).load_ip_adapter(weights, subfolder="", weight_name="", image_encoder_folder=None)
    layout.prepare(unet.encoder_hid_proj.image_projection_layers[0])
    if layout.lora:
        add_lora(unet, require_lora(layout, state, "the adapter"))
    unet.requires_grad_(False)
    for key, parameter in ip_adapter_parameters(unet).items():
        section, _, name = key.partition(".")
        # The loader cast the values to the UNet's dtype; the originals undo that without loss.
        parameter.data = own[section][name].to(unet.device)
        parameter.requires_grad_(True)


def ip_adapter_parameters(unet: UNet2DConditionModel) -> dict[str, nn.Parameter]:
    """Return the adapter's parameters under their published keys: the projection, K' and V' by layer, FaceID's LoRA.

    A resampler's K and V have names of their own, `to_k` and `to_v`, which `layouts.join_kv` joins.
    """
    layout = _require_installed(unet)
    parameters = _projection_parameters(layout, unet.encoder_hid_proj.image_projection_layers[0])
    for number, attention in _cross_attention(unet).items():
        parameters[f"ip_adapter.{number}.to_k_ip.weight"] = attention.processor.to_k_ip[0].weight
        parameters[f"ip_adapter.{number}.to_v_ip.weight"] = attention.processor.to_v_ip[0].weight
    for name, layer in _attended(unet).items() if layout.lora else ():
        parameters[f"{name}.down.weight"] = layer.lora_A["default"].weight
        parameters[f"{name}.up.weight"] = layer.lora_B["default"].weight
    return parameters


def require_lora(layout: Layout, state: Mapping[str, Any], what: str) -> int:
    """Return the rank of the LoRA in weights of FaceID, or refuse them without it."""
    rank = next((len(value) for key, value in state["ip_adapter"].items() if "_lora.down." in key), None)
    if rank is None:
        raise BackboneError(
            f"{what} is {layout.title} without its LoRA, the weights ip_adapter.*.to_*_lora: give the published .bin "
            "file, which holds them; the *_lora.safetensors beside it is for other programs"
        )
    return rank


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


def _attention(unet: UNet2DConditionModel) -> list[str]:
    """Return the names of the processors of all attention of the UNet itself; a resampler has attention of its own."""
    return [name for name in unet.attn_processors if not name.startswith("encoder_hid_proj.")]


def _attended(unet: UNet2DConditionModel) -> dict[str, Any]:
    """Return the Linears of all attention, by the published names of their LoRA."""
    layers: dict[str, Any] = {}
    for number, name in enumerate(_attention(unet)):
        attention: Any = unet.get_submodule(name.removesuffix(".processor"))
        for part in LORA_PARTS:
            layer = attention.to_out[0] if part == "out" else getattr(attention, f"to_{part}")
            layers[f"ip_adapter.{number}.to_{part}_lora"] = layer
    return layers


def _lora_shapes(unet: UNet2DConditionModel, rank: int) -> dict[str, tuple[int, int]]:
    """Return the shapes of FaceID's LoRA: A is `down` (rank, in), B is `up` (out, rank)."""
    shapes = {name: layer.weight.shape for name, layer in _attended(unet).items()}
    down = {f"{name}.down.weight": (rank, shape[1]) for name, shape in shapes.items()}
    return down | {f"{name}.up.weight": (shape[0], rank) for name, shape in shapes.items()}


def _cross_attention(unet: UNet2DConditionModel) -> dict[int, Any]:
    """Return cross-attention layers, which are not `attn1` in diffusers, by their published numbers 1, 3, 5, ..."""
    names = [name for name in _attention(unet) if not name.endswith("attn1.processor")]
    return {2 * i + 1: unet.get_submodule(name.removesuffix(".processor")) for i, name in enumerate(names)}


def _context_dim(unet: UNet2DConditionModel) -> int:
    return next(iter(text_kv(unet).values())).shape[1]


def _widths(embed_dim: int | Sequence[int]) -> tuple[int, ...]:
    return (embed_dim,) if isinstance(embed_dim, int) else tuple(embed_dim)


def _projection_parameters(layout: Layout, projection: nn.Module) -> dict[str, nn.Parameter]:
    """Return parameters by their published names, which diffusers' are not."""
    return {f"image_proj.{layout.publish_name(name)}": p for name, p in projection.named_parameters()}


def _installed_layout(unet: UNet2DConditionModel) -> Layout | None:
    from diffusers.models.embeddings import MultiIPAdapterImageProjection

    layers = getattr(unet, "encoder_hid_proj", None)
    if not isinstance(layers, MultiIPAdapterImageProjection):
        return None
    return layout_of(layers.image_projection_layers[0])


def _require_installed(unet: UNet2DConditionModel) -> Layout:
    layout = _installed_layout(unet)
    if layout is None:
        raise BackboneError("this UNet has no IP-Adapter of a known layout: call install_ip_adapter first")
    return layout


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


def _check_fit(unet: UNet2DConditionModel, state: Mapping[str, Any], widths: tuple[int, ...] | None) -> Layout:
    """Refuse a state that does not fit this UNet and image encoder, naming the expected and the found."""
    found, layout, context = _flat(state), recognise(state["image_proj"]), _context_dim(unet)
    if widths is not None and layout.name != "plain":
        layout.check_widths(state["image_proj"], widths, "the adapter")
    with torch.device("meta"):
        projection = layout.build(context, widths or layout.widths(state["image_proj"]), state["image_proj"])
    published = join_kv(_projection_parameters(layout, projection))
    expected = {key: tuple(weight.shape) for key, weight in {**published, **text_kv(unet)}.items()}
    if layout.lora:
        expected |= _lora_shapes(unet, require_lora(layout, state, "the adapter"))
    # Widths first: they tell an adapter of another backbone apart better than a list of keys does.
    for key in expected.keys() & found.keys():
        if tuple(found[key].shape) != expected[key]:
            raise BackboneError(
                f"adapter weight '{key}' has the shape {tuple(found[key].shape)}, and this backbone (text width "
                f"{context}, image embedding width {', '.join(map(str, widths or ['unchecked']))}) needs "
                f"{expected[key]}: use the adapter that was trained for it"
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
    return layout
