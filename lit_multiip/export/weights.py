"""Export: a trained run as the files that plain diffusers loads, and images of it compared before they are called done.

The adapter goes out under the published keys (`image_proj.*`, `ip_adapter.*`), which any diffusers pipeline takes
with `load_ip_adapter`; the aggregator's weights lie beside them under `aggregator.*`, which diffusers passes over
and `--model.ip_adapter` brings back. What the aggregator makes of one person's photos goes into a file of its own.
LoRA, the adapter's or DreamBooth's, goes out as `load_lora_weights` reads it, and a wholly tuned DreamBooth as a
pipeline folder.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_multiip.backbone.encoders import PhotoEncoder
from lit_multiip.backbone.ip_adapter import RECORD, ip_adapter_parameters
from lit_multiip.backbone.layouts import PLAIN, join_kv, join_rows, split_rows
from lit_multiip.backbone.lora import LORA_FILE, lora_parameters, save_lora
from lit_multiip.backbone.sampler import Sampler, Sampling
from lit_multiip.data.photos import Photo
from lit_multiip.data.record import RECORD as TRAINED_ON
from lit_multiip.data.record import Record
from lit_multiip.export.card import (
    ADAPTER,
    CHECK_STEPS,
    CLIP_EMBEDS,
    COMFYUI,
    COMFYUI_NEGATIVE,
    EMBEDS,
    RECORD_FILE,
    TOLERANCE,
    ExportError,
    Written,
    card,
    dreambooth_snippet,
    snippet,
)
from lit_multiip.files import hash_file
from lit_multiip.methods.adapter import MultiIPAdapter
from lit_multiip.methods.dreambooth import DreamBooth
from lit_multiip.methods.method import Method

CHECK_PROMPT = "a photo of a person"


# ---- what is written --------------------------------------------------------------------------------------------


def round_weights(named: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Round weights in place to what a file of `dtype` holds; they stay float32."""
    for name, weight in named.items():
        rounded = weight.data.to(dtype).float()
        if not rounded.isfinite().all():
            raise ExportError(f"weight '{name}' does not fit into {dtype}: use --dtype float32")
        weight.data = rounded


def adapter_weights(model: MultiIPAdapter) -> dict[str, Tensor]:
    """Return adapter and aggregator under their keys in a file, but for a resampler's K and V, see `join_kv`."""
    aggregator = model.aggregator.state_dict(prefix="aggregator.", keep_vars=True)
    return {**ip_adapter_parameters(model.unet), **aggregator}


def adapter_tensors(model: MultiIPAdapter, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return copies of `adapter_weights` as a file holds them."""
    return {
        name: value.detach().to("cpu", dtype if value.is_floating_point() else None, copy=True).contiguous()
        for name, value in join_kv(adapter_weights(model)).items()
    }


def with_negative(embeds: Tensor, blank: Tensor | None = None) -> Tensor:
    """Put what stands for no photo first, as a pipeline takes embeddings under guidance.

    Args:
        embeds: of one person, (1, M, ...).
        blank: what stands for no photo, (...); None takes zeros.

    Returns:
        (2, M, ...) float32 on the CPU.
    """
    negative = torch.zeros_like(embeds) if blank is None else blank.to(embeds).expand_as(embeds)
    return torch.cat([negative, embeds]).detach().float().cpu().contiguous()


def embed_person(model: MultiIPAdapter, encoder: PhotoEncoder, photos: Sequence[Photo]) -> Tensor:
    """Return what the aggregator makes of a person's photos, as `with_negative` does."""
    blank = encoder.blank()
    embeds = model.condition(encoder(photos)[None], None if blank is None else blank[None])  # (1, M, ...)
    return with_negative(embeds, blank)


def diffusers_names(model: MultiIPAdapter, embeds: Tensor) -> dict[str, Tensor]:
    """Return embeddings of `with_negative` under the names by which plain diffusers takes them."""
    parts = split_rows(embeds, model.backbone.photo_shapes()).values()
    return {name: part.contiguous() for name, part in zip((EMBEDS, CLIP_EMBEDS), parts, strict=False)}


# ---- the comparison ---------------------------------------------------------------------------------------------


def check_sampling(model: Method) -> Sampling:
    """Return how both images of the comparison are drawn: the model's own way, in few steps, and with guidance."""
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
    """Load the backbone anew as plain diffusers has it, in float32."""
    names = ("unet", "vae", "scheduler", *model.backbone.text_components)
    return model.backbone.pipeline(**{name: model.backbone.load(name) for name in names})


@torch.no_grad()
def compare_adapter(model: MultiIPAdapter, folder: Path, embeds: Mapping[str, Tensor]) -> int:
    """Draw one image by our sampler and by plain diffusers from the adapter's files in `folder`.

    Args:
        model: whose weights were written.
        folder: holds `ADAPTER`, and `LORA_FILE` where the model has LoRA.
        embeds: of a person under `diffusers_names`, as read back.

    Returns:
        The largest difference, in grey levels of 255.
    """
    texts = model.backbone.text_pipeline().to(model.device)
    own, empty = (model.backbone.encode_prompts(texts, [prompt]) for prompt in (CHECK_PROMPT, ""))
    sampler = Sampler(model.backbone, model.unet, check_sampling(model))
    given = {name: value.to(model.device) for name, value in embeds.items()}
    parts = [given[name] for name in (EMBEDS, CLIP_EMBEDS) if name in given]
    negative, right = (join_rows([part[n : n + 1] for part in parts]) for n in (0, 1))
    [ours] = sampler(own, empty, right, [0], model.image_side, negative_embeds=negative).cpu()

    pipe = plain_pipeline(model)
    pipe.load_ip_adapter(str(folder), subfolder="", weight_name=ADAPTER, image_encoder_folder=None)
    if model.adds_lora:
        pipe.load_lora_weights(str(folder), weight_name=LORA_FILE)
    pipe.set_ip_adapter_scale(model.sampling.ip_scale)
    if CLIP_EMBEDS in given:
        layer = pipe.unet.encoder_hid_proj.image_projection_layers[0]
        layer.clip_embeds, layer.shortcut = given[CLIP_EMBEDS], True
    theirs = plain_image(model, pipe, CHECK_PROMPT, ip_adapter_image_embeds=[given[EMBEDS]])
    return int((ours.int() - theirs.int()).abs().max())


@torch.no_grad()
def compare_dreambooth(model: DreamBooth, folder: Path) -> int:
    """Draw one image by our sampler and by plain diffusers from DreamBooth's files in `folder`.

    Returns:
        The largest difference, in grey levels of 255.
    """
    prompt = model.personal_prompt(CHECK_PROMPT)
    model.sampler.sampling = check_sampling(model)
    [ours] = model.draw([prompt], [0]).cpu()
    if model.lora_rank is None:
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    else:
        pipe = plain_pipeline(model)
        pipe.load_lora_weights(str(folder))
    return int((ours.int() - plain_image(model, pipe, prompt).int()).abs().max())


# ---- writing ----------------------------------------------------------------------------------------------------


def write(
    model: Method,
    output: str | Path,
    record: Mapping[str, Any],
    config: Mapping[str, Any],
    trained_on: Record,
    people: Mapping[str, Sequence[Photo]] | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Write a method's weights for plain diffusers, its record, a model card, and the embeddings of people.

    Nothing is left behind unless plain diffusers draws the same image from them, at most `TOLERANCE` of 255 grey levels
    apart.

    Args:
        model: built, in float32, on its device; its weights are rounded to the record's `dtype`.
        output: folder.
        record: of `record_of`.
        config: of the run, for the card.
        trained_on: whom the weights know.
        people: the references of people whose embeddings are written, by the name of the file; of an adapter alone.
        overwrite: replace files that are there.

    Returns:
        The files.
    """
    folder = Path(output)
    with staged(folder, overwrite) as part:
        if isinstance(model, DreamBooth):
            written = write_dreambooth(model, record, part)
        elif isinstance(model, MultiIPAdapter):
            written = write_adapter(model, record, part, trained_on, people)
        else:
            raise ExportError(f"{type(model).__name__} cannot be exported: a MultiIPAdapter or a DreamBooth can")
        if written.difference > TOLERANCE:
            raise ExportError(
                f"plain diffusers draws another image from the exported files, up to {written.difference} of 255 grey "
                f"levels apart where {TOLERANCE} is allowed: nothing was written; please report it with your versions"
            )
        (part / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        (part / "README.md").write_text(card(record, config, written), encoding="utf-8")
        return [folder / file.relative_to(part) for file in sorted(part.rglob("*")) if file.is_file()]


def check_target(output: str | Path, people: Sequence[str], overwrite: bool) -> None:
    """Refuse before any work what could not be written after it; `people` are names of files."""
    if len(set(people)) < len(people):
        raise ExportError("two folders of --photos have one name, and their files would too: rename one")
    suffixes = (".safetensors", COMFYUI, COMFYUI_NEGATIVE)
    embeds = [f"embeds/{name}{suffix}" for name in people for suffix in suffixes]
    possible = (ADAPTER, LORA_FILE, "README.md", "model_index.json", *embeds)
    _refuse_existing(Path(output), possible, overwrite)


def _refuse_existing(output: Path, files: Iterable[str | Path], overwrite: bool) -> None:
    existing = [str(output / file) for file in files if (output / file).exists()]
    if existing and not overwrite:
        raise ExportError(f"'{existing[0]}' exists: give another --output, or --overwrite")


@contextmanager
def staged(output: Path, overwrite: bool) -> Iterator[Path]:
    """Give a folder beside `output`, whose files go there when all went well; otherwise nothing is left of them."""
    output.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        yield part
        files = [file.relative_to(part) for file in part.rglob("*") if file.is_file()]
        _refuse_existing(output, files, overwrite)
        for file in files:
            (output / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(part / file, output / file)
    finally:
        shutil.rmtree(part)


def write_adapter(
    model: MultiIPAdapter,
    record: Mapping[str, Any],
    part: Path,
    trained_on: Record,
    people: Mapping[str, Sequence[Photo]] | None = None,
) -> Written:
    """Write adapter, LoRA and people's embeddings, and compare.

    The digests of whom the weights were trained on go out with them, so that a test of what starts from them can tell.

    Args:
        model: whose weights, rounded to the record's `dtype`, go out.
        record: of `record_of`.
        part: the folder to write.
        trained_on: whom the weights know.
        people: the references of people, by the name of their file.
    """
    lora, dtype = model.adds_lora, getattr(torch, record["dtype"])
    round_weights({**adapter_weights(model), **(lora_parameters(model.unet) if lora else {})}, dtype)
    people_known = {f"{TRAINED_ON}.{key}": rows for key, rows in trained_on.items()}
    tensors = {**adapter_tensors(model, dtype), **people_known}
    save_file(tensors, part / ADAPTER, {"format": "pt", RECORD: json.dumps(record)})
    pipeline = type(model.sampler.pipe)
    if lora:
        save_lora(pipeline, part, {"unet": model.unet}, dtype)

    # one person's embeddings, or noise, are what the comparison draws from
    embeds = write_embeds(model, people or {}, part)
    if embeds is None:
        generator = torch.Generator().manual_seed(0)
        shapes = [(1, record["references"], *shape) for shape in model.backbone.photo_shapes().values()]
        noise = join_rows([torch.randn(shape, generator=generator) for shape in shapes]).to(model.device)
        with torch.no_grad():
            embeds = diffusers_names(model, with_negative(model.condition(noise)))
    use = (
        f"In plain diffusers, with the embeddings, of width {record['embedding_width']}, of a person that\n"
        "`python -m lit_multiip export --photos <folder>` writes; img2img, inpainting and ControlNet pipelines take\n"
        "the same lines. `guidance_scale` must be above 1.\n\n"
        f"With other photos, the aggregator is needed: `--model.ip_adapter {ADAPTER}` in lit_multiip, with the same\n"
        "`model.aggregator`. Handed to diffusers as `ip_adapter_image`, photos go around it."
    )
    both = len(model.backbone.layout.kinds) > 1
    lines = snippet(record["backbone"], pipeline=pipeline.__name__, lora=lora, clip_embeds=both)
    return Written(use, lines, compare_adapter(model, part, embeds))


def write_dreambooth(model: DreamBooth, record: Mapping[str, Any], part: Path) -> Written:
    """Write LoRA, or the whole pipeline, and compare; see `write_adapter`."""
    pipe, lora, dtype = model.sampler.pipe, model.lora_rank is not None, getattr(torch, record["dtype"])
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
    return Written(use, lines, compare_dreambooth(model, part))


@torch.no_grad()
def write_embeds(
    model: MultiIPAdapter, people: Mapping[str, Sequence[Photo]], output: Path
) -> dict[str, Tensor] | None:
    """Write the files of each person: what the aggregator makes of the references.

    Those of diffusers hold what stands for no photo first, (2, M, ...). For ComfyUI, of the plain layout alone, it is a
    file of its own, (M, D).

    Returns:
        The first person's, as read back; None where there is nobody.
    """
    if not people:
        return None
    encoder = model.photo_encoder()
    (output / "embeds").mkdir()
    adapter = hash_file(output / ADAPTER)[:16]
    files = []
    for name, references in people.items():
        files.append(output / "embeds" / f"{name}.safetensors")
        record = {"aggregator": model.settings(), "photos": len(references), "adapter": adapter}
        both = embed_person(model, encoder, references)
        save_file(diffusers_names(model, both), files[-1], {"format": "pt", RECORD: json.dumps(record)})
        if model.backbone.layout is not PLAIN:
            continue
        negative, positive = both
        for suffix, rows in ((COMFYUI, positive), (COMFYUI_NEGATIVE, negative)):  # (M, D) each
            torch.save(rows.clone(), files[-1].with_suffix(suffix))  # a view would take the other half with it
    return load_file(files[0])
