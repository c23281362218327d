"""What a user reads on the console: the package's messages, and errors in one line."""

from __future__ import annotations

import argparse
import inspect
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.data import PeopleSource
from lit_multiip.evaluation.extractors import Extractor
from lit_multiip.files import LitMultiIPError, UsageError, first_line
from lit_multiip.methods.aggregators import Aggregator
from lit_multiip.methods.method import Method

DEBUG = "LIT_MULTIIP_DEBUG"
BACKBONE = tuple(inspect.signature(Backbone).parameters)
BY_NAME = {
    "model": Method,
    "aggregator": Aggregator,
    "source": PeopleSource,
    "extractors": Extractor,
    "extractor": Extractor,
}


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """End the process with one line on stderr for what a user can mend; with `LIT_MULTIIP_DEBUG=1` the traceback too.

    The exit code is 2 where the command line is at fault, 143 after SIGTERM and 1 otherwise.
    """
    try:
        yield
    except SIGTERMException as stop:  # which is no success, whoever raised it
        raise SystemExit(stop.code or 128 + signal.SIGTERM) from None
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        if os.environ.get(DEBUG, "0") not in ("", "0"):
            traceback.print_exc()
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, (UsageError, argparse.ArgumentError)) else 1) from None


@contextmanager
def blame_config() -> Iterator[None]:
    """Report a config error that a library raised late, in one line.

    Raises:
        UsageError: in place of an error that `explain` has no words for.
    """
    try:
        yield
    except Exception as error:
        if explain(error) is not None:
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        raise UsageError(
            f"the config cannot be used ({reason}): see the option's help; {DEBUG}=1 shows where"
        ) from error


def explain(error: Exception) -> str | None:
    """Return one line about an error that a user can mend; None for a fault of the program."""
    causes = [error]
    while isinstance(cause := causes[-1].__cause__, Exception):
        causes.append(cause)
    if isinstance(error, (OSError, MisconfigurationException)):
        return str(error) or type(error).__name__
    if ours := [cause for cause in causes if isinstance(cause, LitMultiIPError)]:  # jsonargparse wraps a constructor's
        return str(ours[0])
    if isinstance(error, argparse.ArgumentError):
        return _explain_parsing(causes)
    if isinstance(error, (ValueError, ArithmeticError)):
        return f"{' '.join(str(causes[-1]).split())[:1000]}; {DEBUG}=1 shows where"
    if isinstance(error, RuntimeError) and torch.distributed.is_available() and torch.distributed.is_initialized():
        return (
            f"another rank has died or cannot be reached ({first_line(error)}): what it said tells why; --ckpt_path "
            "last goes on from the last checkpoint"
        )
    return None


def _explain_parsing(causes: Sequence[Exception]) -> str:
    """Return what jsonargparse says of the innermost option, after the keys that lead to it, and what may be given."""
    message, innermost = "", " ".join(str(causes[-1]).split())
    for text in (*(first_line(error) for error in causes if isinstance(error, argparse.ArgumentError)), innermost):
        message += f" {text}" if text not in message else ""
    named = [base for key, base in BY_NAME.items() if f'{key}":' in message]
    if named and "import path" in innermost:
        message += f"; by name: {', '.join(cls.__name__ for cls in subclasses(named[-1]))}"
    if any(name in message for name in ("backbone", *BACKBONE[1:])):
        message += f"; the backbone is set by {', '.join(f'--backbone.{name}' for name in BACKBONE)}"
    return f"{message.strip()}; see --help"


def subclasses(base: type) -> list[type]:
    """Return the concrete subclasses of this package, at any depth."""
    children: list[type] = base.__subclasses__()
    found = [cls for child in children for cls in (child, *subclasses(child))]
    return [cls for cls in found if cls.__module__.startswith("lit_multiip.") and not cls.__name__.startswith("_")]


def _leave_out(nag: str, record: logging.LogRecord) -> bool:
    return nag not in record.getMessage()


def set_up_logging() -> None:
    """Show the package's messages on stderr, once, on rank 0; leave out what a user of it cannot use."""
    package = logging.getLogger("lit_multiip")
    package.setLevel(logging.INFO if os.environ.get("LOCAL_RANK", "0") == "0" else logging.ERROR)
    if not package.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        package.addHandler(handler)
    for name, nag in (("lightning.pytorch.utilities.rank_zero", "Tip: "), ("diffusers", "kept in float32: []")):
        logging.getLogger(name).addFilter(partial(_leave_out, nag))
    for nag in (
        "does not have many workers",
        "in eval mode at the start",
        "not supported by the model summary",
        "treespec",
        "have no .validation_step",
        "You're using the WeightAveraging callback",  # a module is built in configure_model, and tested by its average
        "your dataloader is not resumable",  # the samplers are
        "(Checkpoint|Experiment logs) directory .* exists and is not empty",
        "LightningCLI's args parameter",  # of commands that build a run's objects, not their own line's
    ):
        warnings.filterwarnings("ignore", f".*{nag}")
