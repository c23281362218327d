"""Export: a trained run as the files that plain diffusers loads, and images of it compared before they are called done.

The adapter goes out under the published keys (``image_proj.*``, ``ip_adapter.*``), which any diffusers pipeline takes
with ``load_ip_adapter``; the aggregator's weights lie beside them under ``aggregator.*``, which diffusers passes over
and ``--model.ip_adapter`` brings back. What the aggregator makes of one person's photos goes into a file of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_multiip.adapter import MultiIPAdapter
from lit_multiip.backbone import (
    RECORD,
    fingerprint_image_encoder,
    ip_adapter_parameters,
    load_component,
    load_image_encoder,
    load_pipeline,
    load_text_pipeline,
    text_components,
)
from lit_multiip.evaluation import report
from lit_multiip.evaluation.sampling import Sampler
from lit_multiip.features import encode_photos, encode_prompts

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


class ExportError(ValueError):
    """Nothing was exported; the message says why, and what to do."""


# ---- what is written --------------------------------------------------------------------------------------------


def round_weights(model: MultiIPAdapter, dtype: torch.dtype) -> None:
    """Round adapter and aggregator to what a file of ``dtype`` holds; the parameters stay float32.

    Raises:
        ExportError: a weight is beyond what ``dtype`` can hold.
    """
    named = {**ip_adapter_parameters(model.unet), **dict(model.aggregator.named_parameters(prefix="aggregator"))}
    for name, parameter in named.items():
        rounded = parameter.data.to(dtype).float()
        if not rounded.isfinite().all():
            raise ExportError(f"weight '{name}' does not fit into {dtype}: use --dtype float32")
        parameter.data = rounded


def adapter_tensors(model: MultiIPAdapter, dtype: torch.dtype) -> dict[str, Tensor]:
    """Adapter and aggregator under their keys in a file."""
    own = {**ip_adapter_parameters(model.unet)}
    tensors = {**own, **{f"aggregator.{name}": value for name, value in model.aggregator.state_dict().items()}}
    return {
        name: value.detach().to("cpu", dtype if value.is_floating_point() else None, copy=True).contiguous()
        for name, value in tensors.items()
    }


def with_negative(embeds: Tensor) -> Tensor:
    """As a pipeline takes them under guidance: zeros first, (1, M, D) -> (2, M, D) float32 on the CPU."""
    return torch.cat([torch.zeros_like(embeds), embeds]).detach().float().cpu().contiguous()


def record_of(model: MultiIPAdapter, step: int | None, run: str, dtype: str) -> dict[str, Any]:
    """Where an adapter comes from, JSON-able; ``aggregator`` is checked when the file is read back."""
    return {
        "method": model.method(),
        "aggregator": model.settings(),
        "backbone": _public(model.backbone),
        "unet": model.provenance()["unet"],
        "image_encoder": _public(model.image_encoder) or f"that of {_public(model.backbone)}",
        "image_encoder_content": fingerprint_image_encoder(model.backbone, model.image_encoder)[:16],
        "embedding_width": model.aggregator.dim,
        "image_side": model.image_side,
        "run": run,
        "step": step,
        "dtype": dtype,
        "exported_by_commit": report.commit(),
        "versions": report.versions(),
    }


def card(record: Mapping[str, Any], config: Mapping[str, Any], difference: int) -> str:
    """The README.md that stands beside an adapter."""
    backbone = record["backbone"]
    rows = [(key.replace("_", " "), value) for key, value in record.items() if key != "versions"]
    rows += [(f"{name} version", version) for name, version in record["versions"].items() if version]
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    front = {"library_name": "diffusers", "tags": ["ip-adapter", "personalization", "text-to-image"]}
    if "/" in backbone:
        front["base_model"] = backbone
    return f"""---
{yaml.safe_dump(front, sort_keys=True).strip()}
---

# IP-Adapter for several photos of a person: {record["method"]}

For `{backbone}` (or a fine-tuned copy of it) and its image embeddings of width {record["embedding_width"]}. Under the
licence of that backbone.

## Use

In plain diffusers, with the embeddings of a person that `python -m lit_multiip export --photos <folder>` writes;
img2img, inpainting and ControlNet pipelines take the same three lines. `guidance_scale` must be above 1.

```python
{snippet(backbone)}
```

With other photos, the aggregator is needed: `--model.ip_adapter {ADAPTER}` in lit_multiip, with the same
`model.aggregator`. Handed to diffusers as `ip_adapter_image`, photos go around it.

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


def snippet(backbone: str, folder: str = "exported", person: str = "my_photos") -> str:
    """Use in plain diffusers, as the card and the README show it."""
    return f"""from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

pipe = StableDiffusionPipeline.from_pretrained("{backbone}")
pipe.load_ip_adapter("{folder}", subfolder="", weight_name="{ADAPTER}", image_encoder_folder=None)
embeds = load_file("{folder}/embeds/{person}.safetensors")["{EMBEDS}"]
image = pipe("a photo of a person in a red shirt", ip_adapter_image_embeds=[embeds]).images[0]"""


# ---- the comparison ---------------------------------------------------------------------------------------------


@torch.no_grad()
def compare_with_diffusers(model: MultiIPAdapter, folder: Path, embeds: Tensor) -> int:
    """Draw one image by our sampler and by plain diffusers from the files in ``folder``.

    Args:
        model: whose weights were written.
        folder: holds ``ADAPTER``.
        embeds: of a person with negatives, (2, M, D), as read back.

    Returns:
        The largest difference, in grey levels of 255.
    """
    device, side = model.device, model.image_side
    guidance = model.sampling.guidance_scale if model.sampling.guidance_scale > 1 else 3.0
    sampling = replace(model.sampling, steps=min(CHECK_STEPS, model.sampling.steps), guidance_scale=guidance)
    texts = load_text_pipeline(model.backbone).to(device)
    own, empty = (
        {name: rows.to(device) for name, rows in encode_prompts(texts, [p]).items()} for p in (CHECK_PROMPT, "")
    )
    states: dict[str, Any] = {**own, **{f"negative_{name}": rows for name, rows in empty.items()}}
    sampler = Sampler(model.backbone, model.unet, sampling)
    ours = sampler(image_embeds=embeds[1:].to(device), seeds=[0], side=side, **states)[0].permute(1, 2, 0).cpu()

    scheduler = type(sampler.pipe.scheduler).from_config(load_component(model.backbone, "scheduler").config)
    parts = {name: load_component(model.backbone, name) for name in ("unet", "vae", *text_components(model.backbone))}
    pipe = load_pipeline(model.backbone, **parts, scheduler=scheduler)
    pipe.load_ip_adapter(str(folder), subfolder="", weight_name=ADAPTER, image_encoder_folder=None)
    pipe.set_ip_adapter_scale(sampling.ip_scale)
    pipe.set_progress_bar_config(disable=True)
    [plain] = pipe.to(device)(
        CHECK_PROMPT,
        height=side,
        width=side,
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance_scale,
        ip_adapter_image_embeds=[embeds.to(device)],
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    pixels = (plain.float() * 255).round().permute(1, 2, 0).cpu()
    return int((ours.float() - pixels).abs().max())


# ---- the command ------------------------------------------------------------------------------------------------


def export(args: Sequence[str]) -> None:
    """Write a run's adapter for plain diffusers: bare, that of the newest run; see `export --help`."""
    parser = argparse.ArgumentParser(
        "lit_multiip export",
        description=f"Writes {ADAPTER}, which plain diffusers loads with load_ip_adapter, a model card, and with "
        "--photos the embeddings of people. Nothing is left behind unless plain diffusers draws the same image from it "
        f"as this package (at most {TOLERANCE} of 255 grey levels apart).",
        epilog="Bare, the newest run under runs/ is exported. All options of a config are taken, such as --backbone.",
        allow_abbrev=False,
    )
    parser.add_argument("--run", help="folder of a run, such as runs/self_attn/version_0")
    parser.add_argument("--output", default="exported", help="folder")
    parser.add_argument("--photos", nargs="+", default=[], help="folders with photos of one person each")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="of the file's weights")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    parser.add_argument("--push_to_hub", metavar="ORG/NAME", help="upload adapter and card; never embeddings")
    options, rest = parser.parse_known_args(args)

    output, names = Path(options.output), [Path(folder).resolve().name for folder in options.photos]
    if len(set(names)) < len(names):
        raise ExportError("two folders of --photos have one name, and their files would too: rename one")
    targets = [output / name for name in (ADAPTER, "README.md", *(f"embeds/{name}.safetensors" for name in names))]
    existing = [str(path) for path in targets if path.exists()]
    if existing and not options.overwrite and "--print_config" not in rest:
        raise ExportError(f"'{existing[0]}' exists: give another --output, or --overwrite")

    from lit_multiip.cli import build_run
    from lit_multiip.runs import load_trained

    cli, run, checkpoint = build_run("export", options.run, [], ["--model.frozen_dtype=float32", *rest])
    model, data = cli.model, cli.datamodule
    if not isinstance(model, MultiIPAdapter):
        raise ExportError(
            f"{type(model).__name__} has no IP-Adapter to export: export a run of MultiIPAdapter (self_attn, avg_pool, "
            "...); of this one, `predict --run <folder>` draws"
        )
    assert run is not None and checkpoint is not None
    model.configure_model()
    step = load_trained(model, checkpoint).get("global_step")
    model.to(cli.trainer.strategy.root_device).eval()
    dtype = getattr(torch, options.dtype)
    round_weights(model, dtype)

    output.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        record = record_of(model, step, f"{run.resolve().parent.name}/{run.resolve().name}", options.dtype)
        save_file(adapter_tensors(model, dtype), part / ADAPTER, {"format": "pt", RECORD: json.dumps(record)})
        people = _write_embeds(model, data, options.photos, names, part)
        if people:
            embeds = load_file(people[0])[EMBEDS]
        else:
            generator = torch.Generator().manual_seed(0)
            photos = torch.randn(1, data.references, model.aggregator.dim, generator=generator).to(model.device)
            with torch.no_grad():
                embeds = with_negative(model.condition(photos))
        difference = compare_with_diffusers(model, part, embeds)
        if difference > TOLERANCE:
            raise ExportError(
                f"plain diffusers draws another image from the exported files, up to {difference} of 255 grey levels "
                f"apart where {TOLERANCE} is allowed: nothing was written; please report it with your versions"
            )
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        (part / "README.md").write_text(card(record, config, difference), encoding="utf-8")
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(part / target.relative_to(output), target)
    finally:
        shutil.rmtree(part)
    print("\n".join(["exported, and the same in plain diffusers:", *(f"  {target}" for target in targets)]))
    if options.push_to_hub:
        _push(options.push_to_hub, targets[:2])


@torch.no_grad()
def _write_embeds(
    model: MultiIPAdapter, data: Any, folders: Sequence[str], names: Sequence[str], output: Path
) -> list[Path]:
    """Write a file for each person: their embeddings after the aggregator, zeros first, (2, M, D)."""
    if not folders:
        return []
    processor, encoder = load_image_encoder(model.backbone, model.image_encoder)
    encoder.to(model.device)
    (output / "embeds").mkdir()
    adapter = hashlib.sha256((output / ADAPTER).read_bytes()).hexdigest()[:16]
    files = []
    for folder, name in zip(folders, names, strict=True):
        _, references = data.read_references(folder)
        embeds = model.condition(encode_photos(processor, encoder, references)[None])  # (1, M, D)
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
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportError(
            f"the files were written, and not uploaded to '{repository}' ({reason}): check name and network, log in "
            "with `hf auth login`, and upload them by hand or export again with --overwrite"
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

    top = ("backbone", "image_encoder", "published_adapter", "image_side", "seed_everything", "model")
    shown = {key: config[key] for key in top if key in config}
    for section, keys in _SHOWN.items():
        values = config.get(section) or {}
        shown[section] = {key: values[key] for key in keys if key in values}
    source = (config.get("data") or {}).get("source") or {}
    if "class_path" in source:
        shown["data"]["source"] = source["class_path"]
    return clean(shown)
