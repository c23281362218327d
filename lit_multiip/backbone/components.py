"""Where a backbone's components lie, on this disk or on the hub, and how they are read and named by content.

Only diffusers' and transformers' own classes are made, weights come from safetensors alone, and no code of a backbone
is run.
"""

from __future__ import annotations

import hashlib
import importlib
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import SafetensorError
from torch import nn

from lit_multiip.files import LitMultiIPError, first_line, hash_text, package_file, read_pieces

TEXT_COMPONENTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
COMPONENTS = ("unet", "vae", *TEXT_COMPONENTS, "scheduler", "image_encoder", "feature_extractor")

# Pipelines published before their IP-Adapter do not list these two in model_index.json.
_UNLISTED = {
    "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
    "feature_extractor": ("transformers", "CLIPImageProcessor"),
}
ATTENTION = "sdpa"  # of transformers' models, whatever their configuration says: it could name code of the hub's
_RENAMED = {"CLIPFeatureExtractor": "CLIPImageProcessor"}  # transformers 5 dropped the name that SD1.5 was saved with
_UNREADABLE = (OSError, ValueError, RuntimeError, SafetensorError)


class BackboneError(LitMultiIPError):
    """A backbone or adapter that cannot be used; the message names it and the remedy."""


# ---- places -----------------------------------------------------------------------------------------------------


def resolve_backbone(backbone: str) -> str:
    """Find what a backbone's name stands for.

    Args:
        backbone: `mini` (the miniature in this package), an existing folder, or a hub id `org/name`.

    Returns:
        The folder's path, or the hub id unchanged. Idempotent.

    Raises:
        BackboneError: it is none of the three, or the package lacks its miniature.
    """
    if backbone == "mini":
        mini = package_file("mini/weights")
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


def hub_place(name: str) -> tuple[str, str] | None:
    """Split `org/name/some/thing` into hub id and the rest; None for what is local or cannot be a hub id."""
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


def find_image_encoder(image_encoder: str) -> tuple[str, str]:
    """Return the folder or hub id, and the subfolder in it, of an image encoder that lies apart from its backbone."""
    folder = Path(image_encoder).expanduser()
    if folder.is_dir():
        return str(folder), ""
    place = hub_place(image_encoder)
    if place is None:
        raise BackboneError(
            f"image encoder '{image_encoder}' is not an existing folder, nor a hub id with or without a subfolder, "
            "such as 'h94/IP-Adapter/models/image_encoder'"
        )
    return place


# ---- reading ----------------------------------------------------------------------------------------------------


def read_whole(cls: Any, place: str, **options: Any) -> Any:
    """Read a module by `from_pretrained`, with all its weights from the files: others would be random.

    Raises:
        ValueError: the files lack some.
    """
    module, found = cls.from_pretrained(place, output_loading_info=True, **options)
    if missing := sorted(found["missing_keys"]):
        raise LitMultiIPError(f"{len(missing)} weights are missing, such as {missing[0]}")
    return module


def safe_config(place: str) -> Any:
    """Read a model's configuration, with eager attention whatever it names, for transformers' Auto classes.

    They ignore `ATTENTION` where the configuration names another; all models have eager attention.
    """
    config = transformers.AutoConfig.from_pretrained(place)
    config._attn_implementation = "eager"
    return config


def read_index(place: str) -> dict[str, Any]:
    """Read the model_index.json of a pipeline in a folder or on the hub."""
    try:
        index: Any = diffusers.DiffusionPipeline.load_config(place)
    except (OSError, ValueError) as error:
        if not Path(place).is_dir():
            raise BackboneError(not_fetched(place, "model_index.json", "path", error)) from error
        raise BackboneError(
            f"backbone '{place}' has no readable model_index.json ({first_line(error)}): "
            "give a folder written by a diffusers pipeline's save_pretrained, or a hub id that can be reached"
        ) from error
    return index


def read_component(place: str, name: str, dtype: torch.dtype) -> Any:
    """Read one component of a pipeline; modules come frozen and in eval mode.

    Args:
        place: folder or hub id.
        name: one of `COMPONENTS`.
        dtype: of the weights.
    """
    library, class_name = read_index(place).get(name) or (None, None)
    if class_name is None:
        library, class_name = _UNLISTED.get(name, (None, None))
    local = Path(place).is_dir()
    if library is None or class_name is None or (local and not Path(place, name).is_dir()):
        raise BackboneError(lacks(place, name))
    cls = component_class(library, class_name, place)

    options: dict[str, Any] = {"subfolder": name}
    if issubclass(cls, nn.Module):
        own = {"torch_dtype": dtype} if library == "diffusers" else {"dtype": dtype, "attn_implementation": ATTENTION}
        options |= {"use_safetensors": True, **own}
    try:
        read = partial(read_whole, cls) if issubclass(cls, nn.Module) else cls.from_pretrained
        component = read(place, **options)
    except _UNREADABLE as error:
        if isinstance(error, OSError) and not local:
            raise BackboneError(not_fetched(place, f"{name}/", "path", error)) from error
        raise BackboneError(
            f"component '{name}' of backbone '{place}' cannot be read ({first_line(error)}): "
            "it needs its configuration and whole safetensors weights; convert .bin weights, or fetch the folder again"
        ) from error
    return component.requires_grad_(False).eval() if isinstance(component, nn.Module) else component


def lists_component(place: str, name: str) -> bool:
    """Return whether a pipeline has a component, by its folder or, on the hub, by its model_index.json."""
    if Path(place).is_dir():
        return Path(place, name).is_dir()
    return (read_index(place).get(name) or [None])[0] is not None


def read_image_encoder(image_encoder: str, dtype: torch.dtype) -> Any:
    """Read a CLIP vision model that lies apart from its backbone, frozen and in eval mode."""
    root, subfolder = find_image_encoder(image_encoder)
    cls = transformers.CLIPVisionModelWithProjection
    options = {"dtype": dtype, "use_safetensors": True, "attn_implementation": ATTENTION}
    try:
        encoder: Any = read_whole(cls, root, subfolder=subfolder, **options)
    except _UNREADABLE as error:
        if isinstance(error, OSError) and not Path(root).is_dir():
            wanted = f"{subfolder}/model.safetensors".lstrip("/")
            raise BackboneError(not_fetched(root, wanted, "image_encoder", error)) from error
        raise BackboneError(
            f"image encoder '{image_encoder}' cannot be read ({first_line(error)}): "
            "it needs config.json and whole safetensors weights of a CLIPVisionModelWithProjection"
        ) from error
    return encoder.requires_grad_(False).eval()


def clip_processor(side: int) -> Any:
    """Make CLIP's preprocessing for photos of a side in px."""
    return transformers.CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def component_class(library: str, class_name: str, place: str) -> Any:
    """Find a class of diffusers or transformers by its name; refuse any other library."""
    cls = None
    if library in ("diffusers", "transformers") and isinstance(class_name, str):
        cls = getattr(importlib.import_module(library), _RENAMED.get(class_name, class_name), None)
    if not isinstance(cls, type):
        raise BackboneError(
            f"backbone '{place}' wants the class '{library}.{class_name}', which is not one that the installed "
            "diffusers or transformers has: use a pipeline made of their own classes"
        )
    return cls


# ---- names by content -------------------------------------------------------------------------------------------


def fingerprint_folder(folder: Path) -> str | None:
    """Hash the names, sizes and contents of a folder's files to 16 hexadecimal digits; None where it has none."""
    stats = [(path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
    return _fingerprint_files(folder, tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats))


@lru_cache(maxsize=64)  # every checkpoint names its backbone, and a UNet has gigabytes
def _fingerprint_files(folder: Path, files: tuple[tuple[Path, int, int], ...]) -> str | None:
    digest = hashlib.sha256()
    for path, size, _ in files:
        digest.update(f"{path.relative_to(folder).as_posix()}\0{size}\0".encode())
        for piece in read_pieces(path):
            digest.update(piece)
    return digest.hexdigest()[:16] if files else None


def fingerprint_hub(hub_id: str, probe: str, component: str) -> str:
    """Name a component on the hub by its id and the commit in the local cache, or by the id alone, 16 digits.

    Args:
        hub_id: `org/name`.
        probe: a small file of it; fetched where the cache lacks it.
        component: its folder.
    """
    found = try_to_load_from_cache(hub_id, probe)
    file = found if isinstance(found, str) else _fetch(hub_id, probe)
    commit = "unresolved" if file is None else Path(file.removesuffix(probe)).name
    return hash_text(f"{hub_id}@{commit}/{component}")[:16]


@lru_cache
def _fetch(hub_id: str, file: str) -> str | None:
    """Fetch a small file once a process, so that the first run finds the same commit in the cache as the second."""
    try:
        return hf_hub_download(hub_id, file)
    except (OSError, ValueError):
        return None


# ---- messages ---------------------------------------------------------------------------------------------------


def not_fetched(hub_id: str, file: str, option: str, error: Exception) -> str:
    """Return the message for a file that the hub does not give; `option` is one of Backbone's arguments."""
    return (
        f"'{file}' of the hub's '{hub_id}' cannot be fetched ({first_line(error)}): check its name and the network, or "
        f"run `hf download {hub_id} --local-dir <folder>` where there is one, and give your copy, --backbone.{option} "
        "<folder>"
    )


def lacks(place: str, name: str) -> str:
    """Return the message for a component that a backbone lacks."""
    remedy = f"add {name}/"
    if name == "image_encoder":
        remedy = (
            "name the CLIP vision model that the IP-Adapter was trained with, such as --backbone.image_encoder "
            "h94/IP-Adapter/models/image_encoder, or put it into a local copy's image_encoder/"
        )
    return (
        f"backbone '{place}' lacks the component '{name}': {remedy} (a backbone has model_index.json, unet/, vae/, "
        "text_encoder/, tokenizer/, scheduler/ and image_encoder/)"
    )
