"""The frozen backbone: any diffusers Stable Diffusion folder or hub id, with the IP-Adapter's modules installed.

A backbone is what diffusers calls a pipeline: unet/, vae/, text_encoder/, tokenizer/, scheduler/ and model_index.json,
plus image_encoder/ and, optionally, feature_extractor/ and ip_adapter/. All sizes come from the loaded weights.
Backbones that were published before their adapter have no image_encoder/: it is then named apart, by a folder or by
hub id and subfolder, such as ``h94/IP-Adapter/models/image_encoder``; an adapter's file likewise.

The IP-Adapter's modules are diffusers' own and go in through its public ``load_ip_adapter``. Their published names,
used throughout, are ``image_proj.proj.{weight,bias}`` (Linear), ``image_proj.norm.{weight,bias}`` (LayerNorm) and
``ip_adapter.{1,3,5,...}.to_{k,v}_ip.weight`` (K', V'), the odd numbers being the cross-attention layers' places among
all of ``unet.attn_processors``.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import logging
import math
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import diffusers
import torch
import transformers
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

if TYPE_CHECKING:  # diffusers and transformers load a class when it is first used: a command line is parsed without any
    from diffusers.models import UNet2DConditionModel
    from diffusers.models.embeddings import ImageProjection

RECORD = "lit_multiip"  # key of a safetensors file's metadata
TOKENS = 4  # image tokens per embedding; diffusers' loader knows no other number for this layout
TEXT_COMPONENTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
COMPONENTS = ("unet", "vae", *TEXT_COMPONENTS, "scheduler", "image_encoder", "feature_extractor")

# Pipelines published before their IP-Adapter do not list these two in model_index.json.
_UNLISTED = {
    "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
    "feature_extractor": ("transformers", "CLIPImageProcessor"),
}
ATTENTION = "sdpa"  # of transformers' models, whatever their configuration says: it could name code of the hub's
_RENAMED = {"CLIPFeatureExtractor": "CLIPImageProcessor"}  # transformers 5 dropped the name that SD1.5 was saved with

# A key that only the image projection of another adapter family has -> that family's name. The order matters.
_OTHER_LAYOUTS = {
    "latents": "IP-Adapter Plus (resampler)",
    "perceiver_resampler.proj_in.weight": "IP-Adapter FaceID Plus",
    "proj.3.weight": "IP-Adapter Full Face",
    "proj.0.weight": "IP-Adapter FaceID",
}

State = dict[str, dict[str, Tensor]]


class BackboneError(ValueError):
    """A backbone or adapter that cannot be used; the message names it and the remedy."""


def _host(unet: UNet2DConditionModel) -> Any:
    """The least that diffusers' public adapter methods work on: a thing with a ``unet``.

    A whole pipeline would do the same and warn about the components it was not given.
    """
    from diffusers.loaders import IPAdapterMixin

    host: Any = IPAdapterMixin()
    host.unet = unet
    return host


# ---- components -------------------------------------------------------------------------------------------------


def resolve_backbone(backbone: str) -> str:
    """Find what a backbone's name stands for.

    Args:
        backbone: ``mini`` (the miniature in this package), an existing folder, or a hub id ``org/name``.

    Returns:
        The folder's path, or the hub id unchanged. Idempotent.

    Raises:
        BackboneError: it is none of the three, or the package lacks its miniature.
    """
    if backbone == "mini":
        mini = Path(str(resources.files("lit_multiip"))) / "mini" / "weights"
        if not mini.is_dir():
            raise BackboneError(f"the miniature's weights are not at '{mini}': reinstall the package")
        return str(mini)
    folder = Path(backbone).expanduser()
    if backbone and folder.is_dir():
        return str(folder)
    if backbone.count("/") == 1 and not folder.exists():
        try:
            validate_repo_id(backbone)
        except HFValidationError:
            pass
        else:
            return backbone
    raise BackboneError(f"backbone '{backbone}' is not an existing folder, a hub id such as 'org/name', or 'mini'")


def read_whole(cls: Any, place: str, **options: Any) -> Any:
    """A module's ``from_pretrained``, with all its weights from the files: others would be random.

    Raises:
        ValueError: the files lack some.
    """
    module, found = cls.from_pretrained(place, output_loading_info=True, **options)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{len(missing)} weights are missing, such as {missing[0]}")
    return module


def safe_config(place: str) -> Any:
    """Configuration of any model for transformers' Auto classes, which ignore ``ATTENTION`` where it names another.

    With eager attention, which all models have.
    """
    config = transformers.AutoConfig.from_pretrained(place)
    config._attn_implementation = "eager"
    return config


def load_component(backbone: str, name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Load one component of a pipeline; modules come frozen and in eval mode.

    Weights are read from safetensors only, and no code from the backbone is run.

    Args:
        backbone: anything ``resolve_backbone`` takes.
        name: one of ``COMPONENTS``. Without feature_extractor/, CLIP's preprocessing at the image encoder's own side is
            returned, as diffusers does.
        dtype: of the weights.

    Raises:
        BackboneError: the backbone is not a pipeline, lacks the component, or the component cannot be read.
    """
    if name not in COMPONENTS:
        raise BackboneError(f"a backbone has no component '{name}': choose one of {', '.join(COMPONENTS)}")
    backbone = resolve_backbone(backbone)
    index = _read_index(backbone)
    library, class_name = index.get(name) or (None, None)
    local = Path(backbone).is_dir()
    if not (Path(backbone, name).is_dir() if local else class_name or name == "image_encoder"):
        if name == "feature_extractor":
            side = load_image_side(backbone)
            size = {"shortest_edge": side}
            return transformers.CLIPImageProcessor(size=size, crop_size={"height": side, "width": side})
        raise BackboneError(_lacks(backbone, name))
    if class_name is None:
        library, class_name = _UNLISTED.get(name, (None, None))
    if library is None or class_name is None:
        raise BackboneError(_lacks(backbone, name))
    cls = _component_class(library, class_name, backbone)

    options: dict[str, Any] = {"subfolder": name}
    if issubclass(cls, nn.Module):
        own = {"torch_dtype": dtype} if library == "diffusers" else {"dtype": dtype, "attn_implementation": ATTENTION}
        options |= {"use_safetensors": True, **own}
    try:
        read = partial(read_whole, cls) if issubclass(cls, nn.Module) else cls.from_pretrained
        component = read(backbone, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, OSError) and not local:
            raise BackboneError(_not_fetched(backbone, f"{name}/", "--backbone", error)) from error
        raise BackboneError(
            f"component '{name}' of backbone '{backbone}' cannot be read ({_first_line(error)}): "
            "it needs its configuration and whole safetensors weights; convert .bin weights, or fetch the folder again"
        ) from error
    return component.requires_grad_(False).eval() if isinstance(component, nn.Module) else component


def _read_index(backbone: str) -> dict[str, Any]:
    try:
        index: Any = diffusers.DiffusionPipeline.load_config(backbone)
    except (OSError, ValueError) as error:
        if not Path(backbone).is_dir():
            raise BackboneError(_not_fetched(backbone, "model_index.json", "--backbone", error)) from error
        raise BackboneError(
            f"backbone '{backbone}' has no readable model_index.json ({_first_line(error)}): "
            "give a folder written by a diffusers pipeline's save_pretrained, or a hub id that can be reached"
        ) from error
    return index


def load_pipeline(backbone: str, **components: Any) -> Any:
    """Make the backbone's own kind of diffusers pipeline around some of its components; the others are None.

    Args:
        backbone: anything ``resolve_backbone`` takes.
        components: by their names in the pipeline.

    Raises:
        BackboneError: the backbone is not a pipeline of diffusers' own.
    """
    backbone = resolve_backbone(backbone)
    index, expected = _read_index(backbone), _pipeline_parameters(backbone)
    settings = {name: value for name, value in index.items() if not isinstance(value, (list, tuple))}
    settings |= {"requires_safety_checker": False, "add_watermarker": False}
    given = dict.fromkeys(index) | settings | components
    cls = _component_class("diffusers", index["_class_name"], backbone)
    return cls(**{name: value for name, value in given.items() if name in expected})


def text_components(backbone: str) -> list[str]:
    """Names of the tokenizers and text encoders that the backbone's pipeline has: one pair, or SDXL's two."""
    backbone = resolve_backbone(backbone)
    index, expected = _read_index(backbone), _pipeline_parameters(backbone)
    return [name for name in TEXT_COMPONENTS if name in expected and (index.get(name) or [None])[0] is not None]


def _pipeline_parameters(backbone: str) -> Mapping[str, Any]:
    cls = _component_class("diffusers", _read_index(backbone).get("_class_name", ""), backbone)
    return inspect.signature(cls.__init__).parameters


def load_text_pipeline(backbone: str, dtype: torch.dtype = torch.float32) -> Any:
    """Load tokenizers and text encoders, frozen, in a pipeline of the backbone's kind, for its ``encode_prompt``."""
    return load_pipeline(
        backbone, **{name: load_component(backbone, name, dtype) for name in text_components(backbone)}
    )


def load_image_encoder(
    backbone: str, image_encoder: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """Load what makes an embedding of a photo: the preprocessing, and the image encoder, frozen and in eval mode.

    Args:
        backbone: anything ``resolve_backbone`` takes.
        image_encoder: None takes the backbone's image_encoder/ and feature_extractor/. Else a folder, or a hub id with
            or without a subfolder; the preprocessing is then CLIP's at the encoder's own side.
        dtype: of the weights.

    Returns:
        Processor and encoder.

    Raises:
        BackboneError: there is no such encoder, or it cannot be read.
    """
    if image_encoder is None:
        return load_component(backbone, "feature_extractor"), load_component(backbone, "image_encoder", dtype)
    root, subfolder = _image_encoder_place(backbone, image_encoder)
    side = load_image_side(backbone, image_encoder)
    try:
        encoder: Any = read_whole(
            transformers.CLIPVisionModelWithProjection,
            root,
            subfolder=subfolder,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation=ATTENTION,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, OSError) and not Path(root).is_dir():
            wanted = f"{subfolder}/model.safetensors".lstrip("/")
            raise BackboneError(_not_fetched(root, wanted, "--image_encoder", error)) from error
        raise BackboneError(
            f"image encoder '{image_encoder}' cannot be read ({_first_line(error)}): "
            "it needs config.json and whole safetensors weights of a CLIPVisionModelWithProjection"
        ) from error
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return processor, encoder.requires_grad_(False).eval()


def load_image_side(backbone: str, image_encoder: str | None = None) -> int:
    """Side in pixels of the square photo that the image encoder sees."""
    return int(_image_encoder_config(backbone, image_encoder).image_size)


def load_embed_dim(backbone: str, image_encoder: str | None = None) -> int:
    """Width D of the image encoder's embeddings."""
    return int(_image_encoder_config(backbone, image_encoder).projection_dim)


def find_image_encoder(backbone: str, image_encoder: str | None = None) -> tuple[str, Path | None]:
    """Name the place of the image encoder, and its weights' file where that is on this disk."""
    root, subfolder = _image_encoder_place(backbone, image_encoder)
    if Path(root).is_dir():
        return str(Path(root, subfolder)), Path(root, subfolder, "model.safetensors")
    found = try_to_load_from_cache(root, f"{subfolder}/model.safetensors".lstrip("/"))
    return f"{root}/{subfolder}".rstrip("/"), Path(found) if isinstance(found, str) else None


def _image_encoder_place(backbone: str, image_encoder: str | None) -> tuple[str, str]:
    """Folder or hub id, and the subfolder in it, that hold the image encoder."""
    if image_encoder is None:
        return resolve_backbone(backbone), "image_encoder"
    folder = Path(image_encoder).expanduser()
    if folder.is_dir():
        return str(folder), ""
    place = _hub_place(image_encoder)
    if place is None:
        raise BackboneError(
            f"image encoder '{image_encoder}' is not an existing folder, nor a hub id with or without a subfolder, "
            "such as 'h94/IP-Adapter/models/image_encoder'"
        )
    return place


def _image_encoder_config(backbone: str, image_encoder: str | None) -> Any:
    root, subfolder = _image_encoder_place(backbone, image_encoder)
    try:
        values, _ = transformers.CLIPVisionConfig.get_config_dict(root, subfolder=subfolder)
        if "model_type" not in values:  # where there is no file, transformers has its defaults to offer
            raise OSError("there is no such file")
        return transformers.CLIPVisionConfig.from_pretrained(root, subfolder=subfolder)
    except (OSError, ValueError) as error:
        if not Path(root).is_dir():
            wanted = f"{subfolder}/config.json".lstrip("/")
            also = f"{_lacks(backbone, 'image_encoder')}; else " if image_encoder is None else ""
            raise BackboneError(also + _not_fetched(root, wanted, "--image_encoder", error)) from error
        if image_encoder is None:
            raise BackboneError(_lacks(backbone, "image_encoder")) from error
        raise BackboneError(
            f"image encoder '{image_encoder}' has no readable config.json ({_first_line(error)}): give the folder of a "
            "CLIPVisionModelWithProjection"
        ) from error


def _hub_place(name: str) -> tuple[str, str] | None:
    """Split ``org/name/some/thing`` into hub id and the rest; None for what is local or cannot be a hub id."""
    org, _, rest = name.partition("/")
    repository, _, inside = rest.partition("/")
    hub_id = f"{org}/{repository}"
    if Path(hub_id).expanduser().exists() or Path(name).is_absolute() or ".." in name.split("/"):
        return None
    try:
        validate_repo_id(hub_id)
    except HFValidationError:
        return None
    return (hub_id, inside.strip("/")) if org and repository else None


def load_vae_facts(backbone: str) -> tuple[int, float]:
    """How many pixels a latent spans, and the factor that gives latents unit variance."""
    config: Any = _read_config(diffusers.AutoencoderKL, backbone, "vae")
    return 2 ** (len(config["block_out_channels"]) - 1), float(config.get("scaling_factor", 0.18215))


def takes_text_time(backbone: str) -> bool:
    """Whether the UNet takes, as SDXL's, a pooled text embedding and the photo's sizes and crop besides the text."""
    unet: Any = _read_config(diffusers.UNet2DConditionModel, backbone, "unet")
    return unet.get("addition_embed_type") == "text_time"


def load_native_side(backbone: str) -> int:
    """Side in pixels of the images that the UNet and the VAE were made for."""
    unet: Any = _read_config(diffusers.UNet2DConditionModel, backbone, "unet")
    return int(unet["sample_size"]) * load_vae_facts(backbone)[0]


def load_feature_shapes(backbone: str, image_side: int) -> dict[str, tuple[int, ...]]:
    """Shapes of what the VAE and the text encoders make of one photo or prompt, by their configurations."""
    vae: Any = _read_config(diffusers.AutoencoderKL, backbone, "vae")
    unet: Any = _read_config(diffusers.UNet2DConditionModel, backbone, "unet")
    folder, side = resolve_backbone(backbone), image_side // load_vae_facts(backbone)[0]
    text = transformers.CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder")
    shapes: dict[str, tuple[int, ...]] = {
        "latent": (2 * int(vae["latent_channels"]), side, side),
        "text": (int(text.max_position_embeddings), int(unet["cross_attention_dim"])),
    }
    if takes_text_time(backbone):
        second = transformers.CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder_2")
        shapes |= {"pooled": (int(second.projection_dim or 0),), "frame": (4,)}
    return shapes


def _read_config(cls: Any, backbone: str, name: str) -> Any:
    try:
        return cls.load_config(resolve_backbone(backbone), subfolder=name)
    except OSError as error:
        if not Path(resolve_backbone(backbone)).is_dir():
            raise BackboneError(_not_fetched(backbone, f"{name}/config.json", "--backbone", error)) from error
        raise BackboneError(_lacks(backbone, name)) from error


def fingerprint(backbone: str, component: str) -> str:
    """Name a component by its content, for use in cache keys.

    A local component is named by its files (configuration and weights); one on the hub by its id and the commit that
    the local hub cache holds, or by the id alone where it was never fetched and cannot be. A feature_extractor that
    the folder lacks is named after the image encoder, which then determines it.

    Returns:
        16 hexadecimal digits.
    """
    backbone = resolve_backbone(backbone)
    if not Path(backbone).is_dir():
        return _hub_fingerprint(backbone, "model_index.json", component)
    folder = Path(backbone) / component
    if component == "feature_extractor" and not folder.is_dir():
        return fingerprint(backbone, "image_encoder")
    return _folder_fingerprint(folder) or _refuse(_lacks(backbone, component))


def fingerprint_image_encoder(backbone: str, image_encoder: str | None = None) -> str:
    """Name image encoder and preprocessing by their content, as ``fingerprint`` does; 32 hexadecimal digits."""
    if image_encoder is None:
        return fingerprint(backbone, "image_encoder") + fingerprint(backbone, "feature_extractor")
    root, subfolder = _image_encoder_place(backbone, image_encoder)
    if Path(root).is_dir():
        found = _folder_fingerprint(Path(root)) or _refuse(f"image encoder '{image_encoder}' is an empty folder")
    else:
        found = _hub_fingerprint(root, f"{subfolder}/config.json".lstrip("/"), subfolder)
    return 2 * found  # the encoder determines its preprocessing


def _folder_fingerprint(folder: Path) -> str | None:
    stats = [(path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
    return _files_fingerprint(folder, tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats))


@lru_cache(maxsize=64)  # every checkpoint names its backbone, and a UNet has gigabytes
def _files_fingerprint(folder: Path, files: tuple[tuple[Path, int, int], ...]) -> str | None:
    digest = hashlib.sha256()
    for path, size, _ in files:
        digest.update(f"{path.relative_to(folder).as_posix()}\0{size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()[:16] if files else None


def _hub_fingerprint(hub_id: str, probe: str, component: str) -> str:
    found = try_to_load_from_cache(hub_id, probe)
    file = found if isinstance(found, str) else _fetched(hub_id, probe)
    commit = "unresolved" if file is None else Path(file.removesuffix(probe)).name
    return hashlib.sha256(f"{hub_id}@{commit}/{component}".encode()).hexdigest()[:16]


@lru_cache
def _fetched(hub_id: str, file: str) -> str | None:
    """Fetch a small file, or the first run would know a repository by another name than the second; once a process."""
    try:
        return hf_hub_download(hub_id, file)
    except (OSError, ValueError):
        return None


def _refuse(message: str) -> NoReturn:
    raise BackboneError(message)


def _component_class(library: str, class_name: str, backbone: str) -> Any:
    cls = None
    if library in ("diffusers", "transformers") and isinstance(class_name, str):
        cls = getattr(importlib.import_module(library), _RENAMED.get(class_name, class_name), None)
    if not isinstance(cls, type):
        raise BackboneError(
            f"backbone '{backbone}' wants the class '{library}.{class_name}', which is not one that the installed "
            "diffusers or transformers has: use a pipeline made of their own classes"
        )
    return cls


def _not_fetched(hub_id: str, file: str, option: str, error: Exception) -> str:
    return (
        f"'{file}' of the hub's '{hub_id}' cannot be fetched ({_first_line(error)}): check its name and the network, "
        f"or run `hf download {hub_id} --local-dir <folder>` where there is one, and give your copy, {option} <folder>"
    )


def _lacks(backbone: str, name: str) -> str:
    remedy = f"add {name}/"
    if name == "image_encoder":
        remedy = (
            "name the CLIP vision model that the IP-Adapter was trained with, such as "
            "--image_encoder h94/IP-Adapter/models/image_encoder, or put it into a local copy's image_encoder/"
        )
    return (
        f"backbone '{backbone}' lacks the component '{name}': {remedy} (a backbone has model_index.json, unet/, vae/, "
        "text_encoder/, tokenizer/, scheduler/ and image_encoder/)"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# ---- IP-Adapter: states -----------------------------------------------------------------------------------------


def ip_adapter_from_text(unet: UNet2DConditionModel, embed_dim: int, *, seed: int = 0) -> State:
    """Make a fresh IP-Adapter as published: K' and V' copy the text K and V, Linear and LayerNorm start at random.

    Args:
        unet: the UNet whose text projections are copied.
        embed_dim: width D of an image embedding.
        seed: of the Linear's initialisation. The global random state is left as it was.

    Returns:
        ``{"image_proj": {...}, "ip_adapter": {...}}`` in float32 on the CPU, ready for ``install_ip_adapter``.
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
        path: a file, or hub id and file, such as ``h94/IP-Adapter/models/ip-adapter_sd15.safetensors``.

    Returns:
        ``{"image_proj": {...}, "ip_adapter": {...}}`` and any other sections, such as ``aggregator``.

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
        raise BackboneError(f"IP-Adapter file '{path}' is broken ({_first_line(error)}): fetch it again") from error
    _check_layout(state, f"IP-Adapter file '{path}'")
    return state


def find_adapter_file(path: str) -> Path:
    """Find an adapter's file on this machine, or fetch it from the hub.

    Raises:
        BackboneError: it is neither here nor to be had; the message says what was looked for.
    """
    file = Path(path).expanduser()
    if file.is_file():
        return file
    place = _hub_place(path)
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
            f"be fetched ({_first_line(error)}): fetch it where there is a network, and give your copy's path, "
            "--model.ip_adapter <file>"
        ) from error


def read_adapter_record(path: str) -> dict[str, Any]:
    """What an exported adapter says of itself, such as its ``aggregator``; empty for one that others published."""
    file = find_adapter_file(path)
    if file.suffix != ".safetensors":
        return {}
    try:
        with safe_open(file, framework="pt") as opened:
            record = json.loads((opened.metadata() or {}).get(RECORD, "{}"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise BackboneError(f"IP-Adapter file '{path}' is broken ({_first_line(error)}): fetch it again") from error
    return record if isinstance(record, dict) else {}


def find_ip_adapter(backbone: str) -> str | None:
    """Path of the one .safetensors file in a local backbone's ip_adapter/; None if there is none (or for a hub id).

    Raises:
        BackboneError: there are several to choose from.
    """
    found = sorted(Path(resolve_backbone(backbone), "ip_adapter").glob("*.safetensors"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise BackboneError(
            f"backbone '{backbone}' has several adapters in ip_adapter/ ({names}): name one by its path"
        )
    return str(found[0]) if found else None


def ip_adapter_state(unet: UNet2DConditionModel) -> State:
    """Copy the installed IP-Adapter out, float32 on the CPU: the inverse of ``install_ip_adapter``."""
    return _nested(ip_adapter_parameters(unet))


# ---- IP-Adapter: in the UNet ------------------------------------------------------------------------------------


def install_ip_adapter(unet: UNet2DConditionModel, state: Mapping[str, Any], embed_dim: int | None = None) -> None:
    """Install diffusers' IP-Adapter modules, Z + lambda * Attention(Q, K', V') (eq. 3/16/19), with lambda = 1.

    Afterwards the UNet is frozen but for the adapter, whose parameters are float32 whatever the UNet's own precision:
    under a half-precision UNet, run it in autocast. ``state`` is copied, never shared.

    Args:
        unet: of SD or SDXL. An adapter already there is replaced.
        state: ``{"image_proj": {...}, "ip_adapter": {...}}``; further sections are ignored.
        embed_dim: width of the image encoder's embeddings, to be checked against the adapter's.

    Raises:
        BackboneError: ``state`` is incomplete, of another family, or made for another UNet or image encoder.
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
    """The adapter's own parameters under their published keys: Linear, LayerNorm, then K' and V' layer by layer.

    Raises:
        BackboneError: no adapter of this kind is installed.
    """
    _require_installed(unet)
    parameters = _projection_parameters(unet.encoder_hid_proj.image_projection_layers[0])
    for number, attention in _cross_attention(unet).items():
        parameters[f"ip_adapter.{number}.to_k_ip.weight"] = attention.processor.to_k_ip[0].weight
        parameters[f"ip_adapter.{number}.to_v_ip.weight"] = attention.processor.to_v_ip[0].weight
    return parameters


def set_ip_scale(unet: UNet2DConditionModel, scale: float) -> None:
    """Set lambda of eq. (3)/(19), the weight of the image attention, in every layer; 0 gives the plain backbone.

    Raises:
        ValueError: ``scale`` is not finite.
        BackboneError: no adapter is installed.
    """
    if not math.isfinite(scale):
        raise ValueError(f"ip_scale must be finite, got {scale}: 0 ignores the photos, 1 is the published weight")
    _require_installed(unet)
    _host(unet).set_ip_adapter_scale(float(scale))


@contextmanager
def _quiet_cast() -> Iterator[None]:
    """Keep diffusers from warning that a cast may hurt the float32 layers ``[]``: there are none."""

    def harmful(record: logging.LogRecord) -> bool:
        return "should be kept in float32: []" not in record.getMessage()

    log = logging.getLogger("diffusers.models.modeling_utils")
    log.addFilter(harmful)
    try:
        yield
    finally:
        log.removeFilter(harmful)


def text_kv(unet: UNet2DConditionModel) -> dict[str, nn.Parameter]:
    """The text projections K and V under the published keys of the K' and V' that stand beside them."""
    layers = _cross_attention(unet).items()
    return {f"ip_adapter.{i}.to_{kv}_ip.weight": getattr(a, f"to_{kv}").weight for i, a in layers for kv in "kv"}


def _cross_attention(unet: UNet2DConditionModel) -> dict[int, Any]:
    """Cross-attention layers by their published numbers 1, 3, 5, ...; diffusers' rule: whatever is not ``attn1``."""
    names = [name for name in unet.attn_processors if not name.endswith("attn1.processor")]
    return {2 * i + 1: unet.get_submodule(name.removesuffix(".processor")) for i, name in enumerate(names)}


def _context_dim(unet: UNet2DConditionModel) -> int:
    return next(iter(text_kv(unet).values())).shape[1]


def _projection_parameters(projection: ImageProjection) -> dict[str, nn.Parameter]:
    """Diffusers calls the Linear ``image_embeds``, the published files call it ``proj``."""
    return {f"image_proj.{k.replace('image_embeds', 'proj')}": p for k, p in projection.named_parameters()}


def _require_installed(unet: UNet2DConditionModel) -> None:
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

    layers = getattr(unet, "encoder_hid_proj", None)
    if not isinstance(layers, MultiIPAdapterImageProjection) or not isinstance(
        layers.image_projection_layers[0], ImageProjection
    ):
        raise BackboneError("this UNet has no IP-Adapter of the plain kind: call install_ip_adapter first")


def _nested(flat: Mapping[str, Tensor], copy: bool = True) -> State:
    """``{"a.b.c": tensor} -> {"a": {"b.c": tensor}}``; a copy is float32 on the CPU and shares no memory."""
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
