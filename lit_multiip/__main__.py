"""`python -m lit_multiip`: Lightning's commands, and the project's own."""

from __future__ import annotations

import importlib
import sys
from argparse import RawDescriptionHelpFormatter
from typing import Any

from jsonargparse import DefaultHelpFormatter, Namespace, auto_cli
from lightning.pytorch.cli import LightningArgumentParser

from lit_multiip.callbacks import Trainer
from lit_multiip.cli import CLI
from lit_multiip.console import errors_in_one_line, set_up_logging
from lit_multiip.export.command import export
from lit_multiip.tools.inspection import inspect
from lit_multiip.tools.outside import score_images, write_tasks

PROGRAM = "python -m lit_multiip"
PLAIN = {  # functions that need no model and no data: where they are, and what they do
    "compare": ("lit_multiip.comparison.compare", "train and test every method of a plan, and write the report"),
    "sweep": ("lit_multiip.comparison.sweep", "score settings, numbers of photos and of training people"),
    "report": ("lit_multiip.comparison.report", "write the report of a comparison again"),
    "photos": ("lit_multiip.tools.photos", "check one person's photos: strangers, faces, copies, blur; which to take"),
    "caption": ("lit_multiip.tools.caption", "write a prompt beside every photo that has none"),
    "page": ("lit_multiip.tools.page", "serve a web page: draw one person from photos, tune, take the files"),
    "make-mini": ("lit_multiip.mini.make", "make a small backbone by a recipe, from photos or drawn portraits"),
    "measure-mini": ("lit_multiip.mini.measure", "print a small backbone's figures"),
}
DESCRIPTION = """Personalised images from several photos of a person.

test, predict, inspect and export take the newest run under runs/, or --run <folder>; so do tasks and score, for its
people alone, where there is one. Further commands:
""" + "\n".join(f"  {name:14}{line}" for name, (_, line) in PLAIN.items())


class Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Leaves the description's lines as they are."""


class CommandTrainer(Trainer):
    """The Trainer, with the commands that look at a run or take it away."""

    inspect, export = inspect, export
    tasks, score = write_tasks, score_images  # a function called score would clash with the options of `score`


class Commands(CLI):
    """The project's command line, with commands of its own beside Lightning's."""

    commands = CLI.commands | {
        "inspect": {"model", "datamodule"},
        "export": {"model", "datamodule", "photos", "overwrite", "public"},
        "tasks": {"model", "datamodule"},
        "score": {"model", "datamodule"},
    }
    without_run = ("tasks", "score")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what is typed as `--photos a b`, `--overwrite` and `--public`."""
        super().add_arguments_to_parser(parser)
        if getattr(parser, "command", None) == "export":
            folders = "folders with photos of one person each, whose embeddings are written"
            parser.add_argument("--photos", type=str, nargs="+", default=[], help=folders)
            parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
            parser.add_argument("--public", action="store_true", help="upload to a repository that everyone can see")

    def before_instantiate_classes(self) -> None:
        """Have one process do what shares no work."""
        if self.subcommand in ("inspect", "export", "tasks", "score"):
            self.options.trainer.update(Namespace(devices=1, num_nodes=1, strategy="auto"))
        if self.subcommand == "export":
            self.options.model.init_args.frozen_dtype = "float32"
        super().before_instantiate_classes()

    def export(self, **kwargs: Any) -> None:
        """Pass on what `add_arguments_to_parser` added."""
        options = self.options
        export(self.trainer, **kwargs, photos=options.photos, overwrite=options.overwrite, public=options.public)


def main(args: list[str] | None = None) -> None:
    """Run a command line, that of the process by default."""
    set_up_logging()
    with errors_in_one_line():
        given = sys.argv[1:] if args is None else args
        if given and given[0] in PLAIN:
            name = given[0]
            function = getattr(importlib.import_module(PLAIN[name][0]), name.replace("-", "_"))
            # a command of several, such as `photos check`, takes what it needs by its place
            by_place = isinstance(function, dict)
            auto_cli(function, args=given[1:], as_positional=by_place, prog=f"{PROGRAM} {name}", exit_on_error=False)
        else:
            Commands(
                args, trainer_class=CommandTrainer, prog=PROGRAM, description=DESCRIPTION, formatter_class=Formatter
            )


if __name__ == "__main__":
    main()
