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
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import diffusers
import torch
import transformers
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import SafetensorError
from torch import nn

from lit_multiip.files import LitMultiIPError, first_line, hash_text, package_file, read_pieces

if TYPE_CHECKING:  # diffusers and transformers load a class when it is first used: a command line is parsed without any
    pass

TEXT_COMPONENTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
COMPONENTS = ("unet", "vae", *TEXT_COMPONENTS, "scheduler", "image_encoder", "feature_extractor")

# Pipelines published before their IP-Adapter do not list these two in model_index.json.
_UNLISTED = {
    "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
    "feature_extractor": ("transformers", "CLIPImageProcessor"),
}
ATTENTION = "sdpa"  # of transformers' models, whatever their configuration says: it could name code of the hub's
_RENAMED = {"CLIPFeatureExtractor": "CLIPImageProcessor"}  # transformers 5 dropped the name that SD1.5 was saved with


class BackboneError(LitMultiIPError):
    """A backbone or adapter that cannot be used; the message names it and the remedy."""


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
            f"component '{name}' of backbone '{backbone}' cannot be read ({first_line(error)}): "
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
            f"backbone '{backbone}' has no readable model_index.json ({first_line(error)}): "
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
            f"image encoder '{image_encoder}' cannot be read ({first_line(error)}): "
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
            f"image encoder '{image_encoder}' has no readable config.json ({first_line(error)}): give the folder of a "
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
        for piece in read_pieces(path):
            digest.update(piece)
    return digest.hexdigest()[:16] if files else None


def _hub_fingerprint(hub_id: str, probe: str, component: str) -> str:
    found = try_to_load_from_cache(hub_id, probe)
    file = found if isinstance(found, str) else _fetched(hub_id, probe)
    commit = "unresolved" if file is None else Path(file.removesuffix(probe)).name
    return hash_text(f"{hub_id}@{commit}/{component}")[:16]


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
        f"'{file}' of the hub's '{hub_id}' cannot be fetched ({first_line(error)}): check its name and the network, "
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


# ---- IP-Adapter: states -----------------------------------------------------------------------------------------


# ---- IP-Adapter: in the UNet ------------------------------------------------------------------------------------
