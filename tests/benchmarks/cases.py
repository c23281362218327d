"""The cases. Each measures something against its reference in one run, and returns rows for the table."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import BarePipeline, Clock, Floor, LiveBytes, Reference, interleaved, now, ratios, timed
from one_person import write_person
from PIL import Image
from sd15 import write_sd15
from synthetic import PROMPTS, Strangers, fill
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lit_multiip.__main__ import main as lit_multiip
from lit_multiip.backbone.features import Encoder, Features
from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.data.people import MiniFaces
from lit_multiip.data.photos import FilePhoto, Photo
from lit_multiip.datamodule import MultiPhotoData
from lit_multiip.methods.adapter import MultiIPAdapter

Row = dict[str, Any]
CONFIGS = Path(__file__).parents[2] / "configs"


@dataclass
class Size:
    """What is measured at: a backbone, and how much of it a slow machine can bear."""

    name: str
    backbone: str
    side: int  # px
    batch_size: int
    frozen_dtype: str
    steps: int  # of training, measured
    images: int  # a batch of predict
    sampling_steps: int
    batches: int  # of predict, measured
    photos: int  # in (d)
    cache: Path
    warmup: int = 3  # steps

    def frozen(self) -> Backbone:
        """The backbone at this size."""
        return Backbone(self.backbone, image_side=self.side)

    def data(self, source: Any = None, **options: Any) -> MultiPhotoData:
        """The project's DataModule at this size."""
        return MultiPhotoData(
            self.frozen(), source or Strangers(), batch_size=self.batch_size, cache_dir=str(self.cache),
            validation_held_out=1, **options,
        )  # fmt: skip

    def model(self, **options: Any) -> MultiIPAdapter:
        """The project's model at this size."""
        options = {"frozen_dtype": self.frozen_dtype} | options
        model = MultiIPAdapter(self.frozen(), **options)
        model.configure_model()
        return model

    def filled(self, data: MultiPhotoData) -> MultiPhotoData:
        """Set ``data`` up for fit, with features that no encoder made."""
        photos = [photo for person in data.source.people() for photo in person.photos]
        fill(Features(self.frozen(), self.cache), photos)
        data.setup("fit")
        return data

    def command(self, name: str) -> list[str]:
        """The command line of this size, in the way a user would type it."""
        return [
            name, "--config", str(CONFIGS / "self_attn.yaml"), "--backbone.path", self.backbone,
            "--backbone.image_side", str(self.side), "--model.frozen_dtype", self.frozen_dtype,
            "--model.sampling.steps", str(self.sampling_steps),
            "--data.source", "synthetic.Strangers", "--data.cache_dir", str(self.cache),
            "--data.validation_held_out", "1", "--grid.people", "0",
        ]  # fmt: skip


def mini(work: Path) -> Size:
    """The miniature, as its config trains it; 40 steps."""
    return Size("mini", "mini", 64, 16, "float32", 40, 8, 15, 8, 1024, work / "mini")


def sd15(work: Path, side: int = 256) -> Size:
    """SD1.5 with random weights, bf16; a few steps of one sample."""
    return Size(
        "sd15", str(write_sd15(work / "sd15_random")), side, 1, "bfloat16", 5, 1, 3, 2, 4, work / "sd15", warmup=1
    )


# ---- (a) and (c): the step ------------------------------------------------------------------------------------------


def training(size: Size) -> list[Row]:
    """(a) A step of fit against the bare UNet forward and backward; (c) its memory."""
    size.filled(size.data())
    lit_multiip(
        [
            *size.command("fit"), "--data.batch_size", str(size.batch_size), "--trainer.max_steps",
            str(size.steps + size.warmup), "--trainer.limit_val_batches", "0", "--trainer.callbacks+=measure.Floor",
            "--trainer.callbacks.warmup", str(size.warmup),
        ]
    )  # fmt: skip
    row = _measured("step cached / floor", Floor)
    return [row | {"aim": "<= 1.05", "met": row["ratio"] <= 1.05}, *flops(size)]


def _measured(what: str, reference: type[Reference]) -> Row:
    peaks = {
        "peak_mib": float(np.median(reference.peaks)),
        "reference_peak_mib": float(np.median(reference.reference_peaks)),
    }
    row = {"what": what, **ratios(reference.times, reference.references), **peaks}
    print(f"\n{row}", flush=True)  # SD1.5 takes long enough to be interrupted
    return row


def flops(size: Size, references: int = 9) -> list[Row]:
    """Count what a sample's step costs on tensors without values, beside the bare UNet's forward and backward."""
    model = size.model(frozen_dtype="float32").to("meta")
    batch = _mapped(_empty_batch(model, 1, size.side, references), lambda values: values.to("meta"))
    model.log = lambda *_, **__: None  # type: ignore[method-assign]
    with FlopCounterMode(display=False) as step:
        model.training_step(batch, 0).backward()
    embeds = model.condition(batch["references"]).detach().requires_grad_()
    with FlopCounterMode(display=False) as floor:
        model.unet(
            batch["eps"], torch.zeros(1, device="meta"), batch["text"]["prompt_embeds"],
            added_cond_kwargs={"image_embeds": [embeds]},
        ).sample.sum().backward()  # fmt: skip
    counts = {"step on stored features": step, "floor: UNet forward and backward": floor}
    return [
        {"what": f"GFLOP a sample, {size.side} px: {name}", "gflop": counter.get_total_flops() / 1e9}
        for name, counter in counts.items()
    ]


def _mapped(batch: dict[str, Any], change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    return {
        name: _mapped(values, change) if isinstance(values, dict) else change(values) for name, values in batch.items()
    }


def _empty_batch(model: MultiIPAdapter, count: int, side: int, references: int = 9) -> dict[str, Any]:
    """A training batch without meaning."""
    config, edge = model.unet.config, side // model.backbone.vae_scale
    return {
        "moments": torch.empty(count, 2 * config.in_channels, edge, edge),
        "latent_noise": torch.empty(count, config.in_channels, edge, edge),
        "eps": torch.empty(count, config.in_channels, edge, edge),
        "references": torch.empty(count, references, model.aggregator.dim),
        "drop_image": torch.zeros(count, dtype=torch.bool),
        "time": torch.zeros(count, dtype=torch.float64),
        "text": {"prompt_embeds": torch.empty(count, 77, config.cross_attention_dim)},
    }


def tensors(size: Size) -> list[Row]:
    """(c) Bytes of the tensors of a training step in bf16-mixed: weights, activations, AdamW; and GFLOP.

    Both without values, at SD1.5's own side, which a CPU would take a minute a step for.
    """
    rows: list[Row] = []
    for checkpointing in (True, False):
        model = size.model(gradient_checkpointing=checkpointing).train()
        side = model.unet.config.sample_size * model.backbone.vae_scale
        fake = FakeTensorMode()
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    blank = fake.from_tensor(parameter.detach())
                    module._parameters[name] = torch.nn.Parameter(blank, parameter.requires_grad)
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[name] = fake.from_tensor(buffer)
        model.noise.alphas_cumprod = fake.from_tensor(model.noise.alphas_cumprod)
        model.log = lambda *_, **__: None  # type: ignore[method-assign]
        batch = _mapped(_empty_batch(model, size.batch_size, side), fake.from_tensor)
        optimizer = torch.optim.AdamW(list(model.trained_parameters().values()))
        with (
            fake,
            LiveBytes(
                [
                    *model.parameters(),
                    *model.buffers(),
                    *batch["text"].values(),
                    *(batch[key] for key in batch if key != "text"),
                ]
            ) as live,
        ):
            for _ in range(2):  # AdamW's moments are there from the second on
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model.training_step(batch, 0)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        what = f"tensors of a step, {side} px, batch {size.batch_size}{', checkpointing' if checkpointing else ''}"
        row = {"what": what, "gigabytes": live.peak / 1e9}
        aim = {"aim": "<= 4 GB", "met": live.peak <= 4e9} if size.name == "sd15" and checkpointing else {}
        rows.append(row | aim)
    return rows + (flops(replace(size, side=side)) if side != size.side else [])


# ---- (b) and (c): generation ----------------------------------------------------------------------------------------


def generation(size: Size) -> list[Row]:
    """(b) ``predict`` against diffusers' own pipeline called by hand, batch by batch; (c) their memory."""
    fill(Features(size.frozen(), size.cache), _photos(Strangers()))
    seeds = range(size.images * (size.batches + 1))  # a batch more, to warm up
    command = [
        *size.command("predict"), "--data.eval_batch_size", str(size.images), "--prompts", PROMPTS[0],
        "--seeds", *map(str, seeds), "--trainer.callbacks+=measure.BarePipeline",
    ]  # fmt: skip
    lit_multiip(command)
    row = _measured("predict / diffusers by hand", BarePipeline)
    row |= {"aim": "<= 1.02", "met": row["ratio"] <= 1.02}
    share = float(
        np.median([inside / spent.wall for inside, spent in zip(BarePipeline.inside, BarePipeline.times, strict=True)])
    )
    return [row, {"what": "the UNet's share of predict", "ratio": share}]


def _photos(source: Any) -> list[Photo]:
    return [photo for person in source.people() for photo in person.photos]


# ---- (d): features --------------------------------------------------------------------------------------------------


def features(size: Size) -> list[Row]:
    """(d) Storing features, from the JPEG to the disk, against the encoders alone on tensors that are ready."""
    folder = size.cache / "photos"
    folder.mkdir(parents=True, exist_ok=True)
    photos = []
    for number, drawn in enumerate(
        _photos(MiniFaces(train=size.photos // 14 + 1, validation=1, test=1))[: size.photos]
    ):
        path = folder / f"{number}.jpg"
        if not path.exists():
            drawn.image().resize((250, 250), Image.Resampling.LANCZOS).save(path, quality=92)
        photos.append(FilePhoto("p", path.name, PROMPTS[0], path))
    batch = min(32, size.photos // 4)
    together = size.photos // 4
    encoders: dict[str, Encoder] = {}
    build: list[Clock] = []
    alone: list[Clock] = []
    for first in range(0, len(photos), together):
        part = photos[first : first + together]
        with tempfile.TemporaryDirectory(dir=size.cache) as cache:
            store: Any = Features(size.frozen(), cache, "cpu", batch)
            # loaded once, as by a build of many photos
            encoders = encoders or {"embeds": store._embedder(), "latent": store._latent_encoder()}
            store._embedder, store._latent_encoder = (partial(encoders.__getitem__, kind) for kind in encoders)
            store.build([], [], [])
            build.append(timed(partial(store.build, part, part, [])))
        ready = [
            (encoders[kind], encoders[kind].read(part[at : at + batch]))
            for kind in ("embeds", "latent")
            for at in range(0, len(part), batch)
        ]

        def encode(ready: list[Any] = ready) -> None:
            with torch.inference_mode():
                for encoder, pixels in ready:
                    encoder.encode(pixels)

        alone.append(timed(encode))
    row = {"what": f"features of {together} photos / encoders alone", **ratios(build[1:], alone[1:])}
    row["seconds_a_photo"] = row["seconds"] / together
    return [row]


# ---- (e): flatness --------------------------------------------------------------------------------------------------


def flatness(size: Size) -> list[Row]:
    """(e) Loader and step by the number of references and of people; the memory of a fit, by that of people."""
    rows = []
    sources = {f"{n} references": size.data(Strangers(100), references=n) for n in (1, 3, 5, 9)}
    people = {f"{n} people": size.data(Strangers(n)) for n in (100, 1_000, 10_000, 100_000)}
    model = size.model()
    optimizer = torch.optim.AdamW(list(model.trained_parameters().values()), lr=0.0)
    model.log = lambda *_, **__: None  # type: ignore[method-assign]
    for group, first in ((sources, "1 references"), (people, "100 people")):
        steps = {name: _step(model, optimizer, size.filled(data)) for name, data in group.items()}
        times = interleaved(steps, max(5, size.steps // 2))
        for name in list(group)[1:]:
            row = {"what": f"step with {name} / {first}", **ratios(times[name], times[first])}
            rows.append(row | {"aim": "0.95 to 1.05", "met": abs(row["ratio"] - 1) <= 0.05})
    if size.name == "mini":
        held = {n: _memory_of_fit(n, size) for n in (100, 1_000, 10_000, 100_000)}
        for n, (anonymous, highest) in held.items():
            more = max(anonymous - held[100][0], highest - held[100][1]) * 2**20 / 1e6
            row = {"what": f"memory of fit, {n} people", "anonymous_mib": anonymous, "peak_mib": highest}
            rows.append(row | ({"more_mb": more, "aim": "<= 300 MB more", "met": more <= 300} if n > 100 else {}))
    return rows


def _step(model: MultiIPAdapter, optimizer: torch.optim.Optimizer, data: MultiPhotoData) -> Callable[[], None]:
    def batches() -> Any:
        while True:
            yield from data.train_dataloader()

    stream = batches()

    def step() -> None:
        batch = next(stream)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.training_step(batch, 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _memory_of_fit(people: int, size: Size) -> tuple[float, float]:
    """Run a fit of its own process: MiB at its last step without mapped files, and at most."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent), "--child", str(people), "--work", str(size.cache.parent)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    anonymous, highest = map(float, done.stdout.strip().splitlines()[-1].split())
    return anonymous, highest


def child(people: int, size: Size) -> None:
    """Fit on so many people, and print what memory it holds then."""
    command = [
        *size.command("fit"), "--data.source.init_args.train", str(people), "--trainer.max_steps", "3",
        "--trainer.limit_val_batches", "0", "--trainer.enable_progress_bar", "false",
        "--trainer.callbacks+=measure.PrintMemory",
    ]  # fmt: skip
    lit_multiip(command)


# ---- start-up -------------------------------------------------------------------------------------------------------


def startup(repeats: int = 5) -> list[Row]:
    """``fit --help`` against the import that every LightningCLI begins with."""
    commands = {
        "fit --help": [sys.executable, "-m", "lit_multiip", "fit", "--help"],
        "import lightning.pytorch.cli": [sys.executable, "-c", "import lightning.pytorch.cli"],
    }
    times: dict[str, list[Clock]] = {name: [] for name in commands}
    for number in range(repeats + 1):
        for name, command in commands.items():
            spent = run_process(command)
            if number:
                times[name].append(spent)
    row = {"what": "fit --help / import lightning.pytorch.cli", **ratios(*times.values())}
    return [row | {"aim": "<= 1.3", "met": row["ratio"] <= 1.3}]


def run_process(command: list[str]) -> Clock:
    """Run a process, and return its wall and CPU seconds."""
    before, start = os.times(), now()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    wall, after = (now() - start).wall, os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return Clock(wall, used)


API = """
import sys
from lit_multiip import Personalizer
me = Personalizer.from_pretrained("mini", "AvgPool").with_photos(sys.argv[1])
me("a photo of a smiling person", seeds=[0, 1])
me.save(sys.argv[2])
"""


def api(repeats: int = 3) -> list[Row]:
    """Processes that use the Python API, from their start to their end; the first run of each is not counted."""
    with tempfile.TemporaryDirectory() as work:
        folder = write_person(Path(work) / "photos", 10)
        rows = []
        for what, most, code in (
            ("API: load the miniature, ten photos, two images, save", 15.0, API),
            ("import lit_multiip", 0.3, "import lit_multiip"),
        ):
            targets = [str(folder), str(Path(work) / "saved")]
            spent = [
                run_process([sys.executable, "-c", code, targets[0], f"{targets[1]}_{number}"])
                for number in range(repeats + 1)
            ][1:]
            wall, cpu = (float(np.median(values)) for values in zip(*spent, strict=True))
            aim = {"aim": f"<= {most:g} CPU s", "met": cpu <= most}  # the clock of a busy machine says nothing
            rows.append({"what": what, "seconds": wall, "cpu_seconds": cpu, "repeats": repeats, **aim})
    return rows
