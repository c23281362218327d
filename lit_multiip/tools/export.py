"""Export: a trained run as the files that plain diffusers loads, and images of it compared before they are called done.

The adapter goes out under the published keys (``image_proj.*``, ``ip_adapter.*``), which any diffusers pipeline takes
with ``load_ip_adapter``; the aggregator's weights lie beside them under ``aggregator.*``, which diffusers passes over
and ``--model.ip_adapter`` brings back. What the aggregator makes of one person's photos goes into a file of its own.
LoRA, the adapter's or DreamBooth's, goes out as ``load_lora_weights`` reads it, and a wholly tuned DreamBooth as a
pipeline folder.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
import yaml
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_multiip.backbone.ip_adapter import RECORD, ip_adapter_parameters
from lit_multiip.backbone.lora import LORA_FILE, lora_parameters, save_lora
from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.backbone.sampler import Sampler, Sampling
from lit_multiip.evaluation import results as report
from lit_multiip.files import LitMultiIPError, first_line, hash_file
from lit_multiip.methods.adapter import MultiIPAdapter
from lit_multiip.methods.dreambooth import DreamBooth
from lit_multiip.methods.method import Method
from lit_multiip.runs import load_trained

logger = logging.getLogger(__name__)

ADAPTER = "ip-adapter_multiip.safetensors"
EMBEDS = "ip_adapter_image_embeds"  # the argument of a diffusers pipeline that takes them
TOLERANCE = 1  # grey levels of 255, at any pixel
CHECK_STEPS = 4  # of the sampler, in the comparison
CHECK_PROMPT = "a photo of a person"
# Of a run's config, what its card shows: nothing of who was photographed, or where the photos lie.
_SHOWN = {
    "trainer": ("precision", "max_steps", "accumulate_grad_batches", "devices"),
    "data": ("references", "min_photos", "training_people", "balance", "target", "drop", "batch_size", "seed"),
}


class ExportError(LitMultiIPError):
    """Nothing was exported; the message says why, and what to do."""


# ---- what is written --------------------------------------------------------------------------------------------


def round_weights(named: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Round weights in place to what a file of ``dtype`` holds; they stay float32.

    Raises:
        ExportError: a weight is beyond what ``dtype`` can hold.
    """
    for name, weight in named.items():
        rounded = weight.data.to(dtype).float()
        if not rounded.isfinite().all():
            raise ExportError(f"weight '{name}' does not fit into {dtype}: use --dtype float32")
        weight.data = rounded


def adapter_weights(model: MultiIPAdapter) -> dict[str, Tensor]:
    """Adapter and aggregator under their keys in a file."""
    aggregator = model.aggregator.state_dict(prefix="aggregator.", keep_vars=True)
    return {**ip_adapter_parameters(model.unet), **aggregator}


def adapter_tensors(model: MultiIPAdapter, dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies of ``adapter_weights`` as a file holds them."""
    return {
        name: value.detach().to("cpu", dtype if value.is_floating_point() else None, copy=True).contiguous()
        for name, value in adapter_weights(model).items()
    }


def with_negative(embeds: Tensor) -> Tensor:
    """As a pipeline takes them under guidance: zeros first, (1, M, D) -> (2, M, D) float32 on the CPU."""
    return torch.cat([torch.zeros_like(embeds), embeds]).detach().float().cpu().contiguous()


def record_of(model: Method, step: int | None, run: str, dtype: str) -> dict[str, Any]:
    """Where weights come from, JSON-able; an adapter's ``aggregator`` and ``lora_rank`` are checked when read back."""
    record: dict[str, Any] = {
        "method": model.method(),
        "backbone": _public(model.backbone.path),
        "unet": model.provenance()["unet"],
        "image_side": model.image_side,
        "run": run,
        "step": step,
        "dtype": dtype,
        "exported_by_commit": report.commit(),
        "versions": report.versions(),
    }
    if isinstance(model, MultiIPAdapter):
        own = model.backbone
        face = own.face_encoder and replace(own.face_encoder, path=_public(own.face_encoder.path))
        public = Backbone(_public(own.path), _public(own.image_encoder) or None, face_encoder=face)
        record |= {
            "aggregator": model.settings(),
            "lora_rank": model.lora_rank,
            "image_encoder": public.photo_encoder_name(),
            "image_encoder_content": model.provenance()["image_encoder_content"],
            "embedding_width": model.aggregator.dim,
        }
    return record


def card(record: Mapping[str, Any], config: Mapping[str, Any], use: str, lines: str, difference: int) -> str:
    """The README.md that stands beside exported weights.

    Args:
        record: of ``record_of``.
        config: the run's.
        use: what to do with the files, in words.
        lines: the same in Python.
        difference: between the images that were compared.
    """
    backbone = record["backbone"]
    rows = [(key.replace("_", " "), value) for key, value in record.items() if key != "versions" and value is not None]
    rows += [(f"{name} version", version) for name, version in record["versions"].items() if version]
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    tags = ["ip-adapter"] if "aggregator" in record else ["dreambooth"]
    front = {"library_name": "diffusers", "tags": [*tags, "personalization", "text-to-image"]}
    if "/" in backbone:
        front["base_model"] = backbone
    return f"""---
{yaml.safe_dump(front, sort_keys=True).strip()}
---

# Stable Diffusion personalised: {record["method"]}

For `{backbone}`, or a fine-tuned copy of it. Under the licence of that backbone.

## Use

{use}

```python
{lines}
```

## Provenance

| | |
|---|---|
{table}

Before it was written, an image drawn from it by plain diffusers was compared with that of the training code's sampler
({CHECK_STEPS} steps, float32, one seed): they differ by at most {difference} of 255 grey levels (allowed: {TOLERANCE}).

Trained with:

```yaml
{yaml.safe_dump(_public_config(config), sort_keys=True).strip()}
```
"""


def snippet(
    backbone: str,
    folder: str = "exported",
    person: str = "my_photos",
    pipeline: str = "StableDiffusionPipeline",
    lora: bool = False,
) -> str:
    """Use of an adapter in plain diffusers, as the card and the README show it."""
    load_lora = f'pipe.load_lora_weights("{folder}", weight_name="{LORA_FILE}")\n' if lora else ""
    return f"""from diffusers import {pipeline}
from safetensors.torch import load_file

pipe = {pipeline}.from_pretrained("{backbone}")
pipe.load_ip_adapter("{folder}", subfolder="", weight_name="{ADAPTER}", image_encoder_folder=None)
{load_lora}embeds = load_file("{folder}/embeds/{person}.safetensors")["{EMBEDS}"]
image = pipe("a photo of a person in a red shirt", ip_adapter_image_embeds=[embeds]).images[0]"""


def dreambooth_snippet(backbone: str, prompt: str, pipeline: str, lora: bool, folder: str = "exported") -> str:
    """Use of DreamBooth's weights in plain diffusers."""
    load_lora = f'\npipe.load_lora_weights("{folder}")' if lora else ""
    return f"""from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained("{backbone if lora else folder}"){load_lora}
image = pipe("{prompt}").images[0]"""


# ---- the comparison ---------------------------------------------------------------------------------------------


def check_sampling(model: Method) -> Sampling:
    """How both images of the comparison are drawn: the model's own way, in few steps, and with guidance."""
    own = model.sampling
    return replace(own, steps=min(CHECK_STEPS, own.steps), guidance_scale=max(own.guidance_scale, 1.5))


def plain_image(model: Method, pipe: Any, prompt: str, **conditions: Any) -> Tensor:
    """Draw one image by a plain diffusers pipeline, (3, H, W) uint8."""
    sampling, side = check_sampling(model), model.image_side
    scheduler = model.backbone.load("scheduler")
    pipe.scheduler = getattr(diffusers, sampling.scheduler).from_config(scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    [image] = pipe.to(model.device)(
        prompt,
        height=side,
        width=side,
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance_scale,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **conditions,
    ).images
    return (image.float() * 255).round().to(torch.uint8).cpu()


def plain_pipeline(model: Method) -> Any:
    """The backbone as plain diffusers has it, loaded anew in float32."""
    names = ("unet", "vae", "scheduler", *model.backbone.text_components)
    return model.backbone.pipeline(**{name: model.backbone.load(name) for name in names})


@torch.no_grad()
def compare_adapter(model: MultiIPAdapter, folder: Path, embeds: Tensor) -> int:
    """Draw one image by our sampler and by plain diffusers from the adapter's files in ``folder``.

    Args:
        model: whose weights were written.
        folder: holds ``ADAPTER``, and ``LORA_FILE`` where the model has LoRA.
        embeds: of a person with negatives, (2, M, D), as read back.

    Returns:
        The largest difference, in grey levels of 255.
    """
    texts = model.backbone.text_pipeline().to(model.device)
    own, empty = (model.backbone.encode_prompts(texts, [prompt]) for prompt in (CHECK_PROMPT, ""))
    sampler = Sampler(model.backbone, model.unet, check_sampling(model))
    [ours] = sampler(own, empty, embeds[1:].to(model.device), [0], model.image_side).cpu()

    pipe = plain_pipeline(model)
    pipe.load_ip_adapter(str(folder), subfolder="", weight_name=ADAPTER, image_encoder_folder=None)
    if model.lora_rank is not None:
        pipe.load_lora_weights(str(folder), weight_name=LORA_FILE)
    pipe.set_ip_adapter_scale(model.sampling.ip_scale)
    theirs = plain_image(model, pipe, CHECK_PROMPT, ip_adapter_image_embeds=[embeds.to(model.device)])
    return int((ours.int() - theirs.int()).abs().max())


@torch.no_grad()
def compare_dreambooth(model: DreamBooth, folder: Path) -> int:
    """Draw one image by our sampler and by plain diffusers from DreamBooth's files in ``folder``.

    Returns:
        The largest difference, in grey levels of 255.
    """
    prompt = model.personal_prompt(CHECK_PROMPT)
    model.sampler.sampling = check_sampling(model)
    [ours] = model.draw([prompt], [0]).cpu()
    if model.lora_rank is None:
        pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    else:
        pipe = plain_pipeline(model)
        pipe.load_lora_weights(str(folder))
    return int((ours.int() - plain_image(model, pipe, prompt).int()).abs().max())


# ---- the command ------------------------------------------------------------------------------------------------


def export(
    trainer: Any,
    model: Any,
    data: Any,
    checkpoint: str | None,
    output: str = "exported",
    photos: Sequence[str] = (),
    dtype: Literal["float32", "float16"] = "float32",
    overwrite: bool = False,
    push_to_hub: str | None = None,
) -> None:
    """Write a run's weights for plain diffusers, a model card, and with photos the embeddings of people.

    Nothing is left behind unless plain diffusers draws the same image from them, at most `TOLERANCE` of 255 grey levels
    apart.

    Args:
        trainer: of one process.
        model: not built yet.
        data: reads people's photos.
        checkpoint: file of the model's weights.
        output: folder.
        photos: folders with photos of one person each.
        dtype: of the file's weights.
        overwrite: replace files that are there.
        push_to_hub: `ORG/NAME`; upload what is of no one person, and the card.
    """
    folder, names = Path(output), [Path(person).resolve().name for person in photos]
    if len(set(names)) < len(names):
        raise ExportError("two folders of --photos have one name, and their files would too: rename one")
    possible = (ADAPTER, LORA_FILE, "README.md", "model_index.json", *(f"embeds/{name}.safetensors" for name in names))
    existing = [str(folder / name) for name in possible if (folder / name).exists()]
    if existing and not overwrite:
        raise ExportError(f"'{existing[0]}' exists: give another --output, or --overwrite")
    if checkpoint is None:
        raise ExportError("nothing was trained that could be exported: give --run, or --ckpt_path beside the config")
    if isinstance(model, DreamBooth) and (photos or push_to_hub):
        raise ExportError(
            "DreamBooth's weights are of the one person they were tuned on: leave --photos and --push_to_hub out; "
            "upload them by hand if that person agrees"
        )
    run = Path(checkpoint).resolve().parent.parent
    model.configure_model()
    step = load_trained(model, Path(checkpoint)).get("global_step")
    model.to(trainer.strategy.root_device).eval()

    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        record = record_of(model, step, f"{run.parent.name}/{run.name}", dtype)
        kept = getattr(torch, dtype)
        if isinstance(model, DreamBooth):
            use, lines, difference = _write_dreambooth(model, record, kept, part)
        else:
            people = list(zip(photos, names, strict=True))
            use, lines, difference = _write_adapter(model, data, people, record, kept, part)
        if difference > TOLERANCE:
            raise ExportError(
                f"plain diffusers draws another image from the exported files, up to {difference} of 255 grey levels "
                f"apart where {TOLERANCE} is allowed: nothing was written; please report it with your versions"
            )
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        (part / "README.md").write_text(card(record, config, use, lines, difference), encoding="utf-8")
        files = sorted(file.relative_to(part) for file in part.rglob("*") if file.is_file())
        taken = [str(folder / file) for file in files if (folder / file).exists()]
        if taken and not overwrite:
            raise ExportError(f"'{taken[0]}' exists: give another --output, or --overwrite")
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(part / file, folder / file)
    finally:
        shutil.rmtree(part)
    print("\n".join(["exported, and the same in plain diffusers:", *(f"  {folder / file}" for file in files)]))
    if push_to_hub:
        _push(push_to_hub, [folder / file for file in files if file.parent == Path()])


def _write_adapter(
    model: MultiIPAdapter,
    data: Any,
    people: Sequence[tuple[str, str]],
    record: Mapping[str, Any],
    dtype: torch.dtype,
    part: Path,
) -> tuple[str, str, int]:
    """Write adapter, LoRA and people's embeddings, and compare.

    Returns:
        What to do with the files, in words and in Python, and how far off an image of them is, in grey levels.
    """
    lora = model.lora_rank is not None
    round_weights({**adapter_weights(model), **(lora_parameters(model.unet) if lora else {})}, dtype)
    save_file(adapter_tensors(model, dtype), part / ADAPTER, {"format": "pt", RECORD: json.dumps(record)})
    pipeline = type(model.sampler.pipe)
    if lora:
        save_lora(pipeline, part, {"unet": model.unet}, dtype)
    written = _write_embeds(model, data, people, part)
    if written:
        embeds = load_file(written[0])[EMBEDS]
    else:
        generator = torch.Generator().manual_seed(0)
        photos = torch.randn(1, data.references, model.aggregator.dim, generator=generator).to(model.device)
        with torch.no_grad():
            embeds = with_negative(model.condition(photos))
    use = (
        f"In plain diffusers, with the embeddings, of width {record['embedding_width']}, of a person that\n"
        "`python -m lit_multiip export --photos <folder>` writes; img2img, inpainting and ControlNet pipelines take\n"
        "the same lines. `guidance_scale` must be above 1.\n\n"
        f"With other photos, the aggregator is needed: `--model.ip_adapter {ADAPTER}` in lit_multiip, with the same\n"
        "`model.aggregator`. Handed to diffusers as `ip_adapter_image`, photos go around it."
    )
    lines = snippet(record["backbone"], pipeline=pipeline.__name__, lora=lora)
    return use, lines, compare_adapter(model, part, embeds)


def _write_dreambooth(
    model: DreamBooth, record: Mapping[str, Any], dtype: torch.dtype, part: Path
) -> tuple[str, str, int]:
    """Write LoRA, or the whole pipeline, and compare; see ``_write_adapter``."""
    pipe, lora = model.sampler.pipe, model.lora_rank is not None
    pipeline = type(pipe)
    if lora:
        tuned = {name: getattr(model, name) for name in model.tuned_modules()}
        round_weights({k: v for module in tuned.values() for k, v in lora_parameters(module).items()}, dtype)
        save_lora(pipeline, part, tuned, dtype)
    else:
        names = [name for name in model.backbone.text_components if name not in model.text_encoders()]
        parts = {name: model.backbone.load(name) for name in ("scheduler", *names)}
        modules = {name: getattr(model, name) for name in ("unet", *model.text_encoders())} | {"vae": pipe.vae}
        for name, module in modules.items():
            round_weights({f"{name}.{key}": weight for key, weight in module.named_parameters()}, dtype)
        if dtype != torch.float32:  # the model itself stays float32
            modules = copy.deepcopy(modules)
        whole = model.backbone.pipeline(**parts, **modules).to(dtype=dtype)
        whole.save_pretrained(part)
    prompt = model.personal_prompt("a photo of a person in a red shirt")
    use = (
        f"In plain diffusers; `{model.identifier}` before `{model.class_noun}` means the person that the weights were\n"
        "tuned on. They draw that person: share them only if the person agrees."
    )
    lines = dreambooth_snippet(record["backbone"], prompt, pipeline.__name__, lora)
    return use, lines, compare_dreambooth(model, part)


@torch.no_grad()
def _write_embeds(model: MultiIPAdapter, data: Any, people: Sequence[tuple[str, str]], output: Path) -> list[Path]:
    """Write a file for each person, (folder, name): their embeddings after the aggregator, zeros first, (2, M, D)."""
    if not people:
        return []
    encoder = model.photo_encoder()
    (output / "embeds").mkdir()
    adapter = hash_file(output / ADAPTER)[:16]
    files = []
    for folder, name in people:
        _, references = data.read_references(folder)
        embeds = model.condition(encoder(references)[None])  # (1, M, D)
        files.append(output / "embeds" / f"{name}.safetensors")
        record = {"aggregator": model.settings(), "photos": len(references), "adapter": adapter}
        save_file({EMBEDS: with_negative(embeds)}, files[-1], {"format": "pt", RECORD: json.dumps(record)})
    return files


def _push(repository: str, files: Sequence[Path]) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        for file in files:
            api.upload_file(path_or_fileobj=file, path_in_repo=file.name, repo_id=repository)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ExportError(
            f"the files were written, and not uploaded to '{repository}' ({first_line(error)}): check name and "
            "network, log in with `hf auth login`, and upload them by hand or export again with --overwrite"
        ) from error


def _public(name: str | None) -> str:
    """A hub id as it is; of a folder or file of this machine, its name alone."""
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
