"""`export`: the newest run, or another one, as files that plain diffusers loads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from lit_multiip.callbacks import Trainer
from lit_multiip.data.record import RECORD, training_record, unknown_record
from lit_multiip.export.card import ExportError, record_of, upload
from lit_multiip.export.weights import check_target, write
from lit_multiip.methods.dreambooth import DreamBooth
from lit_multiip.methods.method import Method
from lit_multiip.runs import load_trained


def export(
    trainer: Trainer,
    model: Method,
    datamodule: Any,
    ckpt_path: str | None = None,
    weights_only: bool | None = None,
    output: str = "exported",
    photos: Sequence[str] = (),
    dtype: Literal["float32", "float16"] = "float32",
    overwrite: bool = False,
    push_to_hub: str | None = None,
    public: bool = False,
) -> None:
    """Write a run's weights for plain diffusers, a model card, and with photos the embeddings of people.

    Nothing is left behind unless plain diffusers draws the same image from them.

    Args:
        trainer: of one process.
        model: whose weights are written; not built yet.
        datamodule: reads people's photos.
        ckpt_path: the weights.
        weights_only: as `fit` takes it.
        output: folder.
        photos: folders with photos of one person each; none takes those that a run of one person was tuned on.
        dtype: of the file's weights.
        overwrite: replace files that are there.
        push_to_hub: ORG/NAME; upload what is of no one person, and the card, privately.
        public: upload to a repository that everyone can see.
    """
    one = isinstance(model, DreamBooth) or datamodule.photos is not None
    if isinstance(model, DreamBooth) and photos:
        raise ExportError("DreamBooth's weights are of the one person they were tuned on: leave --photos out")
    if one and push_to_hub:
        raise ExportError(
            "these weights are of the one person they were tuned on: leave --push_to_hub out; upload them by hand if "
            "that person agrees"
        )
    names = [Path(folder).resolve().name for folder in photos]
    own = {} if not one or photos or isinstance(model, DreamBooth) else datamodule.own_references()
    check_target(output, [*names, *own], overwrite)
    if ckpt_path is None:
        raise ExportError("nothing was trained that could be exported: give --run, or --ckpt_path beside the config")
    run = Path(ckpt_path).resolve().parent.parent
    model.configure_model()
    loaded = load_trained(model, Path(ckpt_path))
    model.to(trainer.strategy.root_device).eval()
    people = own | {name: datamodule.read_references(folder)[1] for name, folder in zip(names, photos, strict=True)}
    record = record_of(model, datamodule, loaded.get("global_step"), f"{run.parent.name}/{run.name}", dtype)
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    trained_on = training_record([], loaded.get(RECORD, unknown_record()), model.trained_on)
    files = write(model, output, record | {"precision": str(trainer.precision)}, config, trained_on, people, overwrite)
    print("\n".join(["exported, and the same in plain diffusers:", *(f"  {file}" for file in files)]))
    if push_to_hub:
        folder = Path(output)
        upload(push_to_hub, folder, [file.name for file in files if file.parent == folder], public)
