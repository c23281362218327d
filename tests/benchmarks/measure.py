"""Clocks, memory, and the two callbacks that put a reference beside every step of a real ``fit`` and ``predict``."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import wait
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lit_multiip.callbacks import SavePredictions


class Clock(NamedTuple):
    """A moment, or what lies between two: wall seconds, and seconds of this process on all cores."""

    wall: float
    cpu: float

    def __sub__(self, other: Clock) -> Clock:
        return Clock(self.wall - other.wall, self.cpu - other.cpu)


def now() -> Clock:
    """The time when all that was asked of a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Clock(time.perf_counter(), time.process_time())


def timed(function: Callable[[], Any]) -> Clock:
    start = now()
    function()
    return now() - start


def interleaved(functions: dict[str, Callable[[], Any]], repeats: int, warmup: int = 1) -> dict[str, list[Clock]]:
    """Time functions in turn, ``repeats`` times."""
    times: dict[str, list[Clock]] = {name: [] for name in functions}
    for number in range(warmup + repeats):
        for name, function in functions.items():
            spent = timed(function)
            if number >= warmup:
                times[name].append(spent)
    return times


def ratios(times: Sequence[Clock], reference: Sequence[Clock]) -> dict[str, Any]:
    """Median seconds of both, and the median and quartiles of the ratio of neighbours in time."""
    clocks = {
        name: np.array([[getattr(a, name), getattr(b, name)] for a, b in zip(times, reference, strict=True)])
        for name in Clock._fields
    }
    low, middle, high = np.percentile(clocks["wall"][:, 0] / clocks["wall"][:, 1], [25, 50, 75])
    seconds, of_reference = np.median(clocks["wall"], axis=0)
    return {
        "seconds": float(seconds),
        "reference_seconds": float(of_reference),
        "ratio": float(middle),
        "quartiles": [float(low), float(high)],
        "ratio_cpu": float(np.median(clocks["cpu"][:, 0] / clocks["cpu"][:, 1])),
        "repeats": len(clocks["wall"]),
    }


# ---- memory ---------------------------------------------------------------------------------------------------------


def memory(field: str) -> float:
    """MiB of this process on Linux: ``VmHWM`` its peak, ``VmRSS`` now, ``RssAnon`` now and without mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def reset_peak() -> None:
    """Start a new peak."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """MiB at most since ``reset_peak``: of a GPU's tensors, else of this process, its libraries included."""
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else memory("VmHWM")


def trim() -> None:
    """Give freed memory back to the system, so that the next peak is not that of what came before."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that live, each storage once, and keeps the peak.

    With fake tensors (``FakeTensorMode``) a step of any size takes neither arithmetic nor memory. What kernels take
    beside their results, and what an allocator rounds up, is not in it.

    Args:
        tensors: those that live from the start.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0
        for tensor in tensors:
            self._meet(tensor)

    def _meet(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._part, storage._cdata)

    def _part(self, storage: int) -> None:
        self.now -= self.sizes.pop(storage)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        for result in tree_iter(results):
            if isinstance(result, torch.Tensor):
                self._meet(result)
        return results


# ---- references -----------------------------------------------------------------------------------------------------


class Reference(L.Callback):
    """Runs a reference after every batch, and measures both.

    A batch is everything between two visits of this callback: loader, transfer, hooks, optimiser, logs, files.

    Args:
        warmup: batches that are not measured.
    """

    times: ClassVar[list[Clock]]
    references: ClassVar[list[Clock]]
    peaks: ClassVar[list[float]]
    reference_peaks: ClassVar[list[float]]
    inside: ClassVar[list[float]]  # wall seconds of a batch in the UNet, where that is measured

    def __init__(self, warmup: int = 3) -> None:
        self.warmup, self.count = warmup, 0
        for name in ("times", "references", "peaks", "reference_peaks", "inside"):
            setattr(type(self), name, [])

    def start(self) -> None:
        """Begin to measure a batch."""
        reset_peak()
        self.left = now()

    def visit(self, reference: Callable[[], Callable[[], Any]], clean: Callable[[], Any]) -> None:
        """Take the time of the batch before; prepare, time and clean up after its reference."""
        spent, highest = now() - self.left, peak()
        run = reference()
        reset_peak()
        reference_spent, reference_highest = timed(run), peak()
        clean()
        if self.count >= self.warmup:
            self.times.append(spent)
            self.peaks.append(highest)
            self.references.append(reference_spent)
            self.reference_peaks.append(reference_highest)
        self.count += 1
        self.start()


class Floor(Reference):
    """After each step of ``fit``: the bare UNet, forward and backward, on the same batch in the same precision."""

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        trim()
        self.start()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        def prepared() -> Callable[[], Any]:
            with torch.no_grad():
                x = module.latents(batch["moments"], batch["latent_noise"])
                t = (batch["time"] * module.noise.config.num_train_timesteps).long()
                noised = module.noise.add_noise(x, batch["eps"], t).to(module.unet.dtype)
                text = batch["text"]["prompt_embeds"].to(module.unet.dtype)
                embeds = module.condition(batch["references"])
            conditions = {"image_embeds": [embeds]}

            def run() -> None:
                with trainer.precision_plugin.forward_context():
                    predicted = module.unet(noised, t, text, added_cond_kwargs=conditions).sample
                    loss = F.mse_loss(predicted.float(), batch["eps"])
                loss.backward()

            return run

        self.visit(prepared, module.zero_grad)


class BarePipeline(Reference):
    """After each batch of ``predict``: diffusers' pipeline by hand, same embeddings, noise, steps and precision."""

    def __init__(self, warmup: int = 1) -> None:
        super().__init__(warmup)

    def on_predict_start(self, trainer: L.Trainer, module: Any) -> None:
        self.seconds = 0.0
        module.unet.register_forward_pre_hook(self._enter)
        module.unet.register_forward_hook(self._leave)
        self.pipe = StableDiffusionPipeline.from_pretrained(
            module.backbone.place, unet=module.unet, text_encoder=None, tokenizer=None, image_encoder=None,
            feature_extractor=None, safety_checker=None, requires_safety_checker=False,
        ).to(module.device)  # fmt: skip
        self.pipe.scheduler = module.sampler.pipe.scheduler
        self.pipe.set_progress_bar_config(disable=True)
        trim()
        self.start()

    def _enter(self, *_: Any) -> None:
        self.entered = now().wall

    def _leave(self, *_: Any) -> None:
        self.seconds += now().wall - self.entered

    def on_predict_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        in_unet = self.seconds
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SavePredictions):  # its files are part of the batch, and none of the reference
                wait(callback._written)
        with torch.no_grad():
            embeds = module.condition(batch["references"][:1])  # of the one person

        def run() -> None:
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                self.pipe(
                    height=module.image_side,
                    width=module.image_side,
                    num_inference_steps=module.sampling.steps,
                    guidance_scale=module.sampling.guidance_scale,
                    prompt_embeds=batch["text"]["prompt_embeds"],
                    negative_prompt_embeds=batch["negative_text"]["prompt_embeds"],
                    ip_adapter_image_embeds=[torch.cat([torch.zeros_like(embeds), embeds])],
                    generator=[torch.Generator().manual_seed(int(seed)) for seed in batch["seed"]],
                    output_type="pt",
                )

        measured = len(self.times)
        self.visit(lambda: run, lambda: None)
        if len(self.times) > measured:
            self.inside.append(in_unet)
        self.seconds = 0.0


class PrintMemory(L.Callback):
    """Prints, at the end of a fit, MiB without mapped files, and the process's peak."""

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        gc.collect()
        print(f"\n{memory('RssAnon')} {memory('VmHWM')}", flush=True)
