"""From a run, exported files, or a backbone and the name of a method, to a method with its weights and its data."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from huggingface_hub import snapshot_download
from huggingface_hub.utils import HFValidationError
from jsonargparse import ArgumentParser

from lit_multiip.backbone.dlib_faces import DLIB
from lit_multiip.backbone.face_crop import FaceCrop
from lit_multiip.backbone.faces import FaceEncoder
from lit_multiip.backbone.lora import LORA_FILE, read_lora
from lit_multiip.backbone.onnx import weights_file
from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.backbone.sampler import Sampling
from lit_multiip.data.record import RECORD, Record, training_record, unknown_record
from lit_multiip.datamodule import MultiPhotoData
from lit_multiip.evaluation.callback import ScoreTest
from lit_multiip.evaluation.extractors import Extractor
from lit_multiip.export.card import ADAPTER, RECORD_FILE
from lit_multiip.files import LitMultiIPError, first_line, shorten
from lit_multiip.methods.adapter import MultiIPAdapter
from lit_multiip.methods.aggregators import Aggregator
from lit_multiip.methods.dreambooth import DreamBooth
from lit_multiip.methods.method import Dtype, Method
from lit_multiip.runs import BACKBONE_TARGETS, best_checkpoint, load_trained, read_checkpoint

PLAIN_PRECISION = "32-true"


class PretrainedError(LitMultiIPError):
    """Nothing can be loaded from there; the message says why, and what can be given."""


class Pretrained(NamedTuple):
    """A method with its weights, and what goes with it."""

    model: Method  # built
    data: MultiPhotoData
    name: str  # of the run, for a record
    config: Mapping[str, Any]  # of the run, as its config.yaml has it
    precision: str = PLAIN_PRECISION  # of the Trainer that drew with it
    step: int | None = None
    trained_on: Record | None = None  # whom the weights know; None: nobody, they are the published ones


def load_pretrained(
    source: str | Path | Backbone,
    method: str | Callable[[int], Aggregator] | type[Method] | None = None,
    backbone: Backbone | None = None,
    dtype: Dtype | None = None,
    **options: Any,
) -> Pretrained:
    """Load a run's best weights, exported files, or, with a method, a backbone and its published adapter.

    Args:
        source: folder of a run, an exported folder, or its hub id; with `method` a backbone, its name or its folder.
        method: name or class of an aggregator, or `DreamBooth`.
        backbone: of exported files, where their record does not say where it lies.
        dtype: of the frozen weights; None takes the run's, else float32.
        options: of the method, such as `lora_rank`; they overrule the run's. Exported files whose aggregator a function
            made take `aggregator`.
    """
    if dtype is not None:
        options["frozen_dtype"] = dtype
    if method is not None:
        return _untrained(source if isinstance(source, Backbone) else Backbone(str(source)), method, options)
    if isinstance(source, Backbone) or str(source) == "mini":
        raise PretrainedError(f"{source} is a backbone: give a method too, such as method='SelfAttention'")
    folder = Path(source).expanduser()
    if folder.is_dir() and (folder / "config.yaml").is_file():
        return _read_run(folder, options)
    if not folder.exists():
        folder = _fetch(str(source))
    if not (folder / RECORD_FILE).is_file():
        raise PretrainedError(
            f"'{source}' is no run (a folder with config.yaml and checkpoints/) and nothing that was exported (with "
            f"{RECORD_FILE}): give one of them, or a backbone and a method, such as method='SelfAttention'"
        )
    try:
        return _read_exported(folder, backbone, options)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise PretrainedError(f"'{folder / RECORD_FILE}' cannot be read ({error!r}): export the run again") from error


def read_extractors(config: Mapping[str, Any]) -> list[Extractor] | None:
    """Make the networks that a run's config scores by; None where it names none."""
    given = (config.get("score") or {}).get("extractors")
    if not given:
        return None
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ScoreTest, "score")
    made: ScoreTest = parser.instantiate_classes(parser.parse_object({"score": {"extractors": given}})).score
    return made.extractors


# ---- a run ------------------------------------------------------------------------------------------------------


def _read_run(run: Path, options: Mapping[str, Any]) -> Pretrained:
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    checkpoint = best_checkpoint(run)
    if checkpoint is None:
        raise PretrainedError(f"run '{run}' has no checkpoint that can be loaded: give another one")
    model, data = _build_objects(config, options)
    model.configure_model()
    loaded = read_checkpoint(checkpoint)
    lora = options.get("lora_rank")
    if isinstance(model, MultiIPAdapter) and lora and loaded.get("lit_multiip", {}).get("lora_rank") is None:
        model.load_start(loaded)  # with LoRA that is new
    else:
        load_trained(model, checkpoint)
    trained_on = training_record([], loaded.get(RECORD, unknown_record()), model.trained_on)
    precision = str((config.get("trainer") or {}).get("precision") or PLAIN_PRECISION)
    name = f"{run.resolve().parent.name}/{run.resolve().name}"
    return Pretrained(model, data, name, config, precision, loaded.get("global_step"), trained_on)


def _build_objects(config: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[Method, MultiPhotoData]:
    """Build method and data of a run's config, as the command line does."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Backbone, "backbone")
    parser.add_subclass_arguments(Method, "model")
    parser.add_class_arguments(MultiPhotoData, "data")
    for target in BACKBONE_TARGETS:
        parser.link_arguments("backbone", target, apply_on="instantiate")
    given = {key: config[key] for key in ("backbone", "model", "data") if key in config}
    given["model"] = given["model"] | {"init_args": (given["model"].get("init_args") or {}) | dict(options)}
    made = parser.instantiate_classes(parser.parse_object(given))
    return made.model, made.data


# ---- exported files ---------------------------------------------------------------------------------------------


def _fetch(hub_id: str) -> Path:
    """Fetch exported files from the hub; weights come from safetensors alone."""
    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.md", "*.txt"]))
    except (OSError, HFValidationError, ValueError) as error:
        raise PretrainedError(
            f"'{hub_id}' is no folder here, and cannot be fetched from the hub ({first_line(error)}): give a run, an "
            "exported folder, a hub id org/name, or a backbone and a method"
        ) from error


def _read_exported(folder: Path, backbone: Backbone | None, options: dict[str, Any]) -> Pretrained:
    record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    dreambooth, build = "identifier" in record, record.get("build", {})
    if not dreambooth and not build:
        raise PretrainedError(f"'{folder}' was exported by a version that recorded too little: export its run again")
    parts, crop = build.get("backbone", {}), build.get("data", {}).get("crop")
    if backbone is None:
        backbone = _recorded_backbone(folder, record["backbone"], parts.get("image_encoder"))
    face = parts.get("face_encoder") if backbone.face_encoder is None else None
    backbone = backbone.fill(
        face and FaceEncoder(**_located(folder, face, "path", "detector")), record["image_side"], parts.get("layout")
    )
    options = {"sampling": Sampling(**record["sampling"]), "lora_rank": record["lora_rank"]} | options
    model: Method
    if dreambooth:
        model = _exported_dreambooth(folder, record, backbone, options)
    else:
        aggregator = options.pop("aggregator", None) or _recorded_aggregator(folder, build["aggregator"])
        model = MultiIPAdapter(backbone, aggregator, (folder / ADAPTER).as_posix(), **options)
        model.configure_model()
        content = model.provenance()["image_encoder_content"]
        if content != record["image_encoder_content"]:
            raise PretrainedError(
                f"'{folder}' was exported for another image encoder, {record['image_encoder']}, than this one: give "
                "the one it was trained with, backbone=Backbone(...)"
            )
    data = MultiPhotoData(
        backbone,
        references=record["references"],
        seed=build.get("data", {}).get("seed", 0),
        crop=crop and FaceCrop(**(crop if crop["share"] else _located(folder, crop, "detector"))),
    )
    config = {"model": {"class_path": type(model).__name__}, "data": {"references": record["references"]}}
    precision, step = record.get("precision", PLAIN_PRECISION), record["step"]
    return Pretrained(model, data, record["run"], config, precision, step, model.trained_on or unknown_record())


def _recorded_backbone(folder: Path, name: str, image_encoder: str | None) -> Backbone:
    """Return the backbone of that name, with an image encoder that lies apart; of folders only the names are known."""
    if (name != "mini" and "/" not in name) or (image_encoder and "/" not in image_encoder):
        raise PretrainedError(
            f"'{folder}' was exported for a backbone of another folder, {name}: give it, backbone=Backbone(...)"
        )
    return Backbone(name, image_encoder)


def _located(folder: Path, options: Mapping[str, Any], *files: str) -> dict[str, Any]:
    """Return recorded options, their `files` as paths beside the record, paths from here, or on the hub."""
    found: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in options.items()}
    for name in files:
        if options[name] in (None, DLIB):
            continue
        beside = folder / options[name]
        found[name] = str(beside) if beside.is_file() else options[name]
        try:
            weights_file(found[name])
        except FileNotFoundError as error:
            raise PretrainedError(
                f"'{folder}' needs the face network '{options[name]}', which is not here: copy its file to '{beside}'"
            ) from error
    return found


def _recorded_aggregator(folder: Path, call: Mapping[str, Any] | None) -> Callable[[int], Aggregator]:
    if call is None:
        raise PretrainedError(
            f"'{folder}' does not say how its aggregator is made, as a function made it: give it, aggregator=..."
        )
    return partial(find_aggregator(call["class_path"]), **call["init_args"])


def _exported_dreambooth(
    folder: Path, record: Mapping[str, Any], backbone: Backbone, options: dict[str, Any]
) -> DreamBooth:
    """Load LoRA, or the whole of what was tuned, which draws the person as it is."""
    words = {name: record[name] for name in ("tuned", "identifier", "class_noun")}
    model = DreamBooth(backbone, **words, **options)
    model.configure_model()
    if model.lora_rank is not None:
        read_lora({name: getattr(model, name) for name in model.tuned_modules()}, folder / LORA_FILE)
    else:
        whole = Backbone(str(folder))
        for name in model.tuned_modules():
            getattr(model, name).load_state_dict(whole.load(name, torch.float32).state_dict())
    model.as_is = True
    return model


# ---- a backbone and a method ------------------------------------------------------------------------------------


def find_aggregator(name: str) -> type[Aggregator]:
    """Return the aggregator class of that name, of this package or of a module that is imported."""
    known: dict[str, type[Aggregator]] = {}
    left: list[type[Aggregator]] = Aggregator.__subclasses__()
    while left:
        found = left.pop()
        known[found.__name__] = found
        left += found.__subclasses__()
    if name not in known:
        raise PretrainedError(
            f"there is no aggregator '{name}': give one of {shorten(sorted(known), 10)}, or import the module of your "
            "own first"
        )
    return known[name]


def _untrained(
    backbone: Backbone, method: str | Callable[[int], Aggregator] | type[Method], options: Mapping[str, Any]
) -> Pretrained:
    if method in ("DreamBooth", DreamBooth):
        model: Method = DreamBooth(backbone, **options)
    else:
        aggregator: Any = find_aggregator(method) if isinstance(method, str) else method
        model = MultiIPAdapter(backbone, aggregator, **options)
    model.configure_model()
    return Pretrained(model, MultiPhotoData(backbone), "untrained", {}, trained_on=model.trained_on)
