"""The model card that stands beside exported weights, how to use them, and their upload to the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from lit_multiip.backbone.faces import FaceEncoder
from lit_multiip.backbone.layouts import PLAIN
from lit_multiip.backbone.lora import LORA_FILE
from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.evaluation.results import commit, versions
from lit_multiip.files import LitMultiIPError, first_line, package_file
from lit_multiip.methods.adapter import MultiIPAdapter
from lit_multiip.methods.dreambooth import DreamBooth
from lit_multiip.methods.method import Method

if TYPE_CHECKING:
    from lit_multiip.datamodule import MultiPhotoData

ADAPTER = "ip-adapter_multiip.safetensors"
RECORD_FILE = "lit_multiip.json"  # the record, by which `Personalizer.from_pretrained` builds the method again
EMBEDS = "ip_adapter_image_embeds"  # the argument of a diffusers pipeline that takes them
CLIP_EMBEDS = "clip_embeds"  # the attribute of FaceID Plus's projection that takes patch tokens
COMFYUI, COMFYUI_NEGATIVE = ".ipadpt", ".negative.ipadpt"  # a person's embeddings and their negative
TOLERANCE = 1  # grey levels of 255, at any pixel
CHECK_STEPS = 4  # of the sampler, in the comparison
LICENCES = {  # of weights that are made from these; others say that they have their backbone's
    "mini": "apache-2.0",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
}
# Of a run's config, what its card shows: nothing of who was photographed, or where the photos lie.
_SHOWN = {
    "trainer": ("precision", "max_steps", "accumulate_grad_batches", "devices"),
    "data": ("references", "min_photos", "training_people", "balance", "target", "drop", "batch_size", "seed"),
}


class ExportError(LitMultiIPError):
    """Nothing was exported; the message says why, and what to do."""


class Written(NamedTuple):
    """What was written of a run.

    Args:
        use: what to do with the files, in words.
        lines: the same in Python.
        difference: between the images that were compared, in grey levels.
    """

    use: str
    lines: str
    difference: int


def record_of(model: Method, data: MultiPhotoData, step: int | None, run: str, dtype: str) -> dict[str, Any]:
    """Return where weights come from and how they draw, JSON-able.

    An adapter's `aggregator` and `lora_rank` are checked when it is read back. `build` holds the options by which
    `Personalizer.from_pretrained` builds the method and its data again, as a config has them.
    """
    build: dict[str, Any] = {"data": {"seed": data.seed, "crop": _fields(data.crop, "detector")}}
    record: dict[str, Any] = {
        "method": model.method(),
        "backbone": _public(model.backbone.path),
        "unet": model.provenance()["unet"],
        "image_side": model.image_side,
        "run": run,
        "step": step,
        "dtype": dtype,
        "references": data.references,
        "sampling": model.sampling.describe(),
        "build": build,
        "exported_by_commit": commit(),
        "versions": versions(),
    }
    if isinstance(model, MultiIPAdapter):
        own = model.backbone
        image_encoder, face = _public(own.image_encoder) or None, _fields(own.face_encoder, "path", "detector")
        public = Backbone(_public(own.path), image_encoder, face_encoder=FaceEncoder(**face) if face else None)
        build["backbone"] = {"image_encoder": image_encoder, "face_encoder": face, "layout": own.layout.name}
        build["aggregator"] = _call(model.make_aggregator)
        record |= {
            "aggregator": model.settings(),
            "lora_rank": model.lora_rank,
            "identity_networks": model.identity_networks,
            "image_encoder": public.photo_encoder_name(),
            "image_encoder_content": model.provenance()["image_encoder_content"],
            "embedding_width": model.aggregator.dim,
            "layout": None if own.layout is PLAIN else own.layout.name,
        }
    if isinstance(model, DreamBooth):
        options = ("tuned", "lora_rank", "identifier", "class_noun")
        record |= {name: getattr(model, name) for name in options}
    return record


def _fields(options: Any, *files: str) -> dict[str, Any] | None:
    """Return the fields of a dataclass, `files` among them without their folders on this machine; None for None."""
    return options and asdict(options) | {name: _public(getattr(options, name)) or None for name in files}


def _call(make: Any) -> dict[str, Any] | None:
    """Return class and options of what makes an aggregator, as a config has them; None where a function makes it."""
    parts, options = ([make.func, *make.args], make.keywords) if isinstance(make, partial) else ([make], {})
    made = next((part for part in parts if isinstance(part, type)), None)
    try:
        init_args = json.loads(json.dumps(options))
    except TypeError:  # an option that is an object
        return None
    return None if made is None else {"class_path": made.__name__, "init_args": init_args}


def card(record: Mapping[str, Any], config: Mapping[str, Any], written: Written) -> str:
    """Return the README.md that stands beside exported weights, a model card of the hub.

    Args:
        record: of `record_of`.
        config: the run's.
        written: what the card is about.
    """
    from huggingface_hub import ModelCard, ModelCardData

    backbone = record["backbone"]
    rows = {key.replace("_", " "): value for key, value in record.items() if not isinstance(value, dict | None)}
    rows |= {f"{name} version": version for name, version in record["versions"].items() if version}
    licence = LICENCES.get(backbone)
    data = ModelCardData(
        license=licence or "other",
        license_name=None if licence else "that of the backbone",
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=backbone if "/" in backbone else None,
        tags=["ip-adapter" if "aggregator" in record else "dreambooth", "personalization"],
    )
    facts = {"method": record["method"], "backbone": backbone, "rows": rows, "written": written}
    facts |= {"steps": CHECK_STEPS, "tolerance": TOLERANCE}
    facts["comfyui"] = _comfyui(record["lora_rank"] is not None) if "aggregator" in record else ""
    facts["config"] = yaml.safe_dump(_public_config(config), sort_keys=True).strip()
    return str(ModelCard.from_template(data, template_path=str(package_file("export/card.md.jinja")), **facts))


def snippet(
    backbone: str,
    folder: str = "exported",
    person: str = "my_photos",
    pipeline: str = "StableDiffusionPipeline",
    lora: bool = False,
    clip_embeds: bool = False,
) -> str:
    """Return the use of an adapter in plain diffusers, as the card and the README show it."""
    load_lora = f'pipe.load_lora_weights("{folder}", weight_name="{LORA_FILE}")\n' if lora else ""
    imports, place, comment = _find_again(backbone)
    tokens = f"""layer = pipe.unet.encoder_hid_proj.image_projection_layers[0]
layer.{CLIP_EMBEDS}, layer.shortcut = load_file("{folder}/embeds/{person}.safetensors")["{CLIP_EMBEDS}"], True
"""
    tokens = tokens if clip_embeds else ""
    return f"""from diffusers import {pipeline}
{imports}from safetensors.torch import load_file

pipe = {pipeline}.from_pretrained({place}){comment}
pipe.load_ip_adapter("{folder}", subfolder="", weight_name="{ADAPTER}", image_encoder_folder=None)
{load_lora}embeds = load_file("{folder}/embeds/{person}.safetensors")["{EMBEDS}"]
{tokens}image = pipe("a photo of a person in a red shirt", ip_adapter_image_embeds=[embeds]).images[0]"""


def _comfyui(lora: bool) -> str:
    """Return where the files go in ComfyUI with ComfyUI_IPAdapter_plus, and which nodes take them."""
    extra = f"; `{LORA_FILE}` into `models/loras/`, for the node Load LoRA" if lora else ""
    return (
        f"In ComfyUI with ComfyUI_IPAdapter_plus: `{ADAPTER}` goes into `models/ipadapter/` (IPAdapter Model Loader)\n"
        f"and a person's `embeds/*{COMFYUI}` into `input/` (IPAdapter Load Embeds, twice){extra}. The node IPAdapter\n"
        f"Embeds takes them as `pos_embed` and, of `*{COMFYUI_NEGATIVE}`, `neg_embed`, with `weight_type` linear and\n"
        "`embeds_scaling` V only."
    )


def dreambooth_snippet(backbone: str, prompt: str, pipeline: str, lora: bool, folder: str = "exported") -> str:
    """Return the use of DreamBooth's weights in plain diffusers."""
    imports, place, comment = _find_again(backbone) if lora else ("", f'"{folder}"', "")
    load_lora = f'\npipe.load_lora_weights("{folder}")' if lora else ""
    return f"""from diffusers import {pipeline}
{imports}
pipe = {pipeline}.from_pretrained({place}){comment}{load_lora}
image = pipe("{prompt}").images[0]"""


def _find_again(backbone: str) -> tuple[str, str, str]:
    """Return how a snippet finds a backbone: a line of imports, the argument of `from_pretrained`, and a comment."""
    if backbone == "mini":
        # some of its parts are stored as float16, and diffusers would load each as it is stored
        imports = "import torch\nfrom lit_multiip.files import package_file\n"
        return imports, 'package_file("mini/weights"), torch_dtype=torch.float32', ""
    return "", f'"{backbone}"', "" if "/" in backbone else "  # the backbone's folder"


def upload(repository: str, folder: Path, files: Sequence[str], public: bool = False) -> None:
    """Upload files of a folder, which belong to no one person, to a repository that is private unless `public`."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        if not public and not api.repo_info(repository).private:
            raise ExportError(f"everyone can see '{repository}', nothing was uploaded: add --public, or give another")
        api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=list(files))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ExportError(
            f"the files were written, and not uploaded to '{repository}' ({first_line(error)}): check name and "
            "network, log in with `hf auth login`, and upload them by hand or export again with --overwrite"
        ) from error


def _public(name: str | None) -> str:
    """Return a hub id as it is; of a folder or file of this machine, its name alone."""
    if not name:
        return ""
    path = Path(name).expanduser()
    return path.resolve().name if path.is_absolute() or path.exists() else name


def _public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: clean(inner) for key, inner in value.items() if inner is not None}
        if isinstance(value, list):
            return [clean(inner) for inner in value]
        return _public(value) if isinstance(value, str) else value

    top = ("backbone", "seed_everything", "model")
    shown = {key: config[key] for key in top if key in config}
    for section, keys in _SHOWN.items():
        values = config.get(section) or {}
        shown[section] = {key: values[key] for key in keys if key in values}
    source = (config.get("data") or {}).get("source") or {}
    if "class_path" in source:
        shown["data"]["source"] = source["class_path"]
    return clean(shown)
