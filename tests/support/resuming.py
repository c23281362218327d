"""A short ``fit`` on a tiny backbone, in a process of its own, that can be killed and gone on with."""

from __future__ import annotations

import io
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[2]
METHOD = ROOT / "configs" / "self_attn.yaml"
STEPS = 13  # an epoch has 30 samples, so 7 batches of 4


def write_config(path: Path, backbone: Path, cache: Path, **options: Any) -> Path:
    """A config of 13 steps of 4 samples, validated every 3."""
    faces = {"train": 3, "validation": 1, "test": 1, "photos": 11}
    config = {
        "backbone": {"path": str(backbone)},
        "trainer": {
            "accelerator": "cpu",
            "precision": "32-true",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            "max_steps": STEPS,
            "val_check_interval": 3,
            **options.pop("trainer", {}),
        },
        "model": {"init_args": {"sampling": {"steps": 1}}},
        "data": {
            "source": {"class_path": "lit_multiip.data.MiniFaces", "init_args": faces},
            "batch_size": 4,
            "validation_held_out": 1,
            "cache_dir": str(cache),
            **options.pop("data", {}),
        },
        "grid": {"people": 0},
        "score": {"anchors": False},
        **options,
    }
    path.write_text(yaml.safe_dump(config))
    return path


def score_by(critic: Path, **options: Any) -> dict[str, Any]:
    """What a config says to score quickly by one critic."""
    extractor = {"class_path": "lit_multiip.evaluation.critic.CriticExtractor", "init_args": {"folder": str(critic)}}
    return {"extractors": [extractor], "anchors": False, "groups": 2, "resamples": 2, **options}


# Commands are run in children of a server that has imported everything, which takes a tenth of a second, not ten.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["lit_multiip.methods.adapter", "lit_multiip.cli", "lit_multiip.datamodule", "resuming"])


def _command(folder: Path, args: Sequence[str], stop: str | None, variables: dict[str, str]) -> None:
    """What a child does."""
    os.setsid()  # its workers can be killed with it
    multiprocessing.set_start_method("fork", force=True)  # of loaders' workers, as in any other process
    os.chdir(folder)
    with open(f"said_{variables.get('LOCAL_RANK', 0)}.txt", "w", buffering=1) as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    sys.argv = ["lit_multiip", *args]
    for name in [name for name in os.environ if name.startswith("PL_")]:
        del os.environ[name]
    os.environ.update(variables)
    torch.set_num_threads(1)
    if "WATCHED" in variables:
        _watch(*(folder / f"{what}_{variables.get('LOCAL_RANK', 0)}.txt" for what in ("written", "asked")))
    if "LARGEST_FILE" in variables:
        size = int(variables["LARGEST_FILE"])
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    if stop is not None:
        _arm(*stop.split(":"))
    from lit_multiip.__main__ import main

    main(list(args))


def _watch(written: Path, asked: Path) -> None:
    """Note every file that this process opens to write, every name that it gives one, and every address asked for."""
    file, network = (os.open(record, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for record in (written, asked))

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR) and isinstance(args[0], str):
            os.write(file, f"{os.path.abspath(args[0])}\n".encode())
        elif event == "os.rename":
            os.write(file, f"{os.path.abspath(args[1])}\n".encode())
        elif event in ("socket.connect", "socket.getaddrinfo") and not isinstance(args[1], str):
            os.write(network, f"{event} {args}\n".encode())

    sys.addaudithook(hook)


def _arm(where: str, count: str = "1", sign: str = "KILL") -> None:
    """Have this process send itself a signal at the ``count``-th time that it comes to a place.

    Args:
        where: ``features`` (made, nothing else), ``batch`` (its loss is computed), ``tuning`` (DreamBooth's),
            ``validation``, ``writing`` (half of a checkpoint), ``renaming`` (before a file takes its name), ``renamed``
            (just after a checkpoint has), and of a test ``drawing`` (a batch) and ``scores`` (of one extractor, when
            its images are written).
        count: how often it must have come there.
        sign: ``KILL``, ``TERM`` or ``INT``.
    """
    from lit_multiip import files, resume
    from lit_multiip.evaluation import scoring
    from lit_multiip.methods.adapter import MultiIPAdapter
    from lit_multiip.methods.dreambooth import DreamBooth

    left = [int(count)]
    if sign == "INT":  # which a shell's background jobs, and what they start, ignore
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def come() -> None:
        left[0] -= 1
        if left[0] == 0:
            if sign == "INT":
                os.killpg(0, signal.SIGINT)  # to its workers too, as a terminal does
            else:
                signal.raise_signal(getattr(signal, f"SIG{sign}"))  # to this very thread, at once

    def armed(owner: Any, name: str, after: bool = False) -> None:
        plain = getattr(owner, name)

        def patched(*args: Any, **kwargs: Any) -> Any:
            if not after:
                come()
            result = plain(*args, **kwargs)
            if after:
                come()
            return result

        setattr(owner, name, patched)

    if where == "features":
        armed(MultiIPAdapter, "configure_model")
    elif where == "batch":
        armed(MultiIPAdapter, "training_step", after=True)
    elif where == "tuning":
        armed(DreamBooth, "training_step", after=True)
    elif where == "drawing":
        armed(MultiIPAdapter, "generate")
    elif where == "scores":
        armed(scoring, "extract_all")
    elif where == "validation":
        armed(MultiIPAdapter, "validation_step")
    elif where == "writing":
        save = torch.save

        def half(checkpoint: Any, file: Any) -> None:
            whole = io.BytesIO()
            save(checkpoint, whole)
            file.write(whole.getvalue()[: whole.tell() // 2])
            file.flush()
            come()
            file.write(whole.getvalue()[whole.tell() // 2 :])

        resume.torch.save = half
    else:
        assert where in ("renaming", "renamed")
        armed(resume, "write_durably", after=True) if where == "renamed" else armed(files.os, "replace")


class Command:
    """A command line in a process of its own, or one a rank, and what became of it."""

    def __init__(
        self,
        folder: Path,
        *args: str,
        stop: str | None = None,
        ranks: int = 1,
        stopped_rank: int | None = None,
        watched: bool = False,
        largest_file: int | None = None,
    ) -> None:
        """Start it.

        Args:
            folder: to work in.
            args: the command line.
            stop: where to stop, see ``_arm``.
            ranks: 2 or more are started as by a cluster, not by Lightning.
            stopped_rank: which of them stops; None: all.
            watched: see ``_watch``.
            largest_file: bytes that it can write to one, as if the disk were full then.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        variables: list[dict[str, str]] = [{}]
        options = {"WATCHED": "1"} if watched else {}
        options |= {} if largest_file is None else {"LARGEST_FILE": str(largest_file)}
        if ranks > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "NODE_RANK": "0"}
            variables = [{**shared, "LOCAL_RANK": str(rank)} for rank in range(ranks)]
            args = (*args, f"--trainer.devices={ranks}", "--trainer.strategy=ddp")
        stops = [stop if stopped_rank in (None, rank) else None for rank in range(ranks)]
        self.processes = [
            _SERVER.Process(target=_command, args=(folder, args, stop, own | options))
            for stop, own in zip(stops, variables, strict=True)
        ]
        for process in self.processes:
            process.start()

    def wait(self, seconds: float = 120) -> int:
        """Wait for the end of all, and return the first one's exit code, or minus the signal that ended it."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        if any(process.exitcode is None for process in self.processes):
            self.kill()
            raise TimeoutError(f"{self.folder} did not end: {self.said()[-2000:]}")
        code = self.processes[0].exitcode
        assert code is not None
        return code

    def kill(self) -> None:
        """End it, and its ranks and workers, at once."""
        for process in self.processes:
            assert process.pid is not None
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()

    @property
    def code(self) -> int:
        """Exit code, or minus the signal that ended it."""
        return self.wait()

    def said(self, rank: int = 0) -> str:
        """All that it printed."""
        file = self.folder / f"said_{rank}.txt"
        return file.read_text(errors="replace") if file.exists() else ""


def run(folder: Path, *args: str, **options: Any) -> Command:
    """Run a command to its end."""
    command = Command(folder, *args, **options)
    command.wait()
    return command


def run_of(folder: Path) -> Path:
    return folder / "runs" / "self_attn" / "version_0"


def state_of(run: Path, name: str = "last.ckpt") -> dict[str, Any]:
    """What must be equal: weights, optimiser, schedule, loops and position."""
    checkpoint = torch.load(run / "checkpoints" / name, weights_only=True)
    kept = ("global_step", "epoch", "state_dict", "optimizer_states", "lr_schedulers", "loops", "MultiPhotoData")
    averaged = ("current_model_state", "averaging_state")
    return {key: checkpoint[key] for key in kept} | {key: checkpoint.get(key) for key in averaged}


def differences(a: Any, b: Any, place: str = "") -> list[str]:
    """Where two nested values differ in any bit."""
    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        return [] if same else [place]
    if isinstance(a, dict):
        keys = {*a, *(b if isinstance(b, dict) else ())}
        return [d for key in sorted(keys, key=str) for d in differences(a.get(key), b.get(key), f"{place}/{key}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [place]
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{place}/{i}")]
    return [] if a == b else [f"{place}: {a} != {b}"]


def logged(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of all that was logged, less what later starts have made void."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
