"""The command line: LightningCLI with this project's links, defaults and short options, and errors in one line."""

from __future__ import annotations

import argparse
import copy
import glob
import logging
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jsonargparse import Namespace, dict_to_namespace
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lit_multiip import callbacks, runs
from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.console import blame_config
from lit_multiip.datamodule import MultiPhotoData
from lit_multiip.defaults import SHORT, trainer_defaults
from lit_multiip.evaluation import faces, onnx, vision  # noqa: F401  so that a config may call their extractors by name
from lit_multiip.evaluation.callback import ScoreTest
from lit_multiip.files import UsageError, only_writer, package_file
from lit_multiip.methods.adapter import MultiIPAdapter
from lit_multiip.methods.dreambooth import DreamBooth  # noqa: F401  which a config names
from lit_multiip.methods.method import Method
from lit_multiip.resume import DurableCheckpointIO

logger = logging.getLogger(__name__)

SECTIONS = ("trainer", "data", "checkpoint", "grid", "score")  # of a config

WHICH_RUN = "folder of a run; without one, a config or a checkpoint the newest under runs/"
START_RUN = "folder of a run, whose config lies below all others, and at whose weights training starts"
ONE_PERSON = "folder with five photos or more of one person, whom fit learns; options as in lit_multiip/one_person.yaml"
LONG = 1000  # steps that are a slip for one person


class Parser(LightningArgumentParser):
    """Lightning's parser, which knows the subcommand that it belongs to, and raises where it would print its usage."""

    def __init__(self, *args: Any, command: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **{"exit_on_error": False} | kwargs)
        self.command = command


class CLI(LightningCLI):
    """LightningCLI for a `Method` and `MultiPhotoData`.

    The callbacks `checkpoint`, `grid` and `score` are set by keys of those names; `trainer.callbacks` are the user's.
    All commands but `fit` take `--run`, or the newest run where no config and no checkpoint is given: its config then
    lies below all others.

    Args:
        args: the command line; None takes that of the process.
        run: whether to run a subcommand; otherwise objects are built of a command line without one.
        trainer_class: a subclass may have further commands as methods, named in a subclass's `commands`.
        **parser_kwargs: of the top-level parser, such as `description`.
    """

    commands = LightningCLI.subcommands()  # by name, the arguments of the Trainer's method that are no options
    without_run: tuple[str, ...] = ()  # commands that take the newest run where there is one, and need none
    trainer: callbacks.Trainer
    run_folder: Path  # into which all is written, whatever the logger
    continued: Path | None = None  # the run that fit goes on with, in its own folder

    def __init__(
        self,
        args: list[str] | None = None,
        run: bool = True,
        trainer_class: type[callbacks.Trainer] = callbacks.Trainer,
        **parser_kwargs: Any,
    ) -> None:
        typed = sys.argv[1:] if args is None else args
        if typed and typed[0] in self.commands:  # a parser takes 0.3 s, so no other one is built
            self.commands = {typed[0]: self.commands[typed[0]]}
        kwargs: dict[str, Any] = parser_kwargs | {name: {"command": name} for name in self.commands}
        self.chosen = runs.choose_run(typed, self.commands, self.without_run) if run else None
        below = [] if self.chosen is None else [self.chosen[1] / "config.yaml"]
        if typed[:1] == ["fit"] and _tunes_on_one_person(typed):
            below.append(package_file("one_person.yaml"))
        if below:
            kwargs[typed[0]]["default_config_files"] = [glob.escape(str(file)) for file in below]
        super().__init__(
            Method,
            MultiPhotoData,
            subclass_mode_model=True,
            save_config_callback=callbacks.SaveFitConfig,
            trainer_class=trainer_class,
            trainer_defaults=trainer_defaults(),
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_class=Parser,
            parser_kwargs=kwargs,
            args=args,
            run=run,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Name the commands that parsers are built for."""
        return self.commands

    @property
    def options(self) -> Namespace:
        """The parsed config, of the subcommand where there is one."""
        return self.config[self.config.subcommand] if "subcommand" in self.config else self.config

    # ---- parsing --------------------------------------------------------------------------------------------------

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the backbone, the callbacks that have options, and the short options of the parser's subcommand."""
        parser.add_subclass_arguments(Backbone, "backbone", help="the frozen pipeline and its encoders")
        parser.set_defaults({"backbone": {"class_path": "lit_multiip.backbone.pipeline.Backbone"}})
        for target in runs.BACKBONE_TARGETS:
            parser.link_arguments("backbone", target, apply_on="instantiate")
        # a config may set options that methods share without naming a method: --config configs/on/sd15.yaml
        parser.set_defaults({"model": {"class_path": f"{MultiIPAdapter.__module__}.{MultiIPAdapter.__name__}"}})
        parser.set_defaults({"data.source": {"class_path": "lit_multiip.data.MiniFaces"}})
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        best = {"monitor": "val/loss", "mode": "min", "save_top_k": 1, "filename": "best-{step}"}
        parser.set_defaults({f"checkpoint.{key}": value for key, value in best.items()})
        parser.add_lightning_class_args(callbacks.SampleGrid, "grid")
        parser.add_lightning_class_args(ScoreTest, "score")

        command = getattr(parser, "command", None)
        if command is not None:
            help_of_run = START_RUN if command == "fit" else WHICH_RUN
            parser.add_argument("--run", type=str | None, default=None, help=help_of_run)
        if command == "fit":
            parser.add_argument("--photos", type=str | None, default=None, help=ONE_PERSON)
        for _, commands, short in SHORT.values():
            for name, details in short.items() if command in commands else ():
                parser.add_argument(f"--{name}", default=None, **details)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, set what the short options stand for, and find the checkpoint that is meant."""
        with blame_config():
            super().parse_arguments(parser, args)
            for section in SECTIONS:
                if not isinstance(value := self.options.get(section), Namespace):
                    raise UsageError(f"'{section}' in a config is {value!r}: write its options below it, one a line")
            for target in runs.BACKBONE_TARGETS:  # which the link would replace without a word
                if self.options.get(target) is not None:
                    raise UsageError(f"{target} is set, and model and data share one backbone: set backbone.path")
            for place, (cls, commands, short) in SHORT.items():
                given = {name: self.options[name] for name in short if self.options.get(name) is not None}
                if given and self.config.get("subcommand") in commands:
                    self.options[place] = Namespace({**asdict(cls()), **(self.options.get(place) or {}), **given})
        if self.config.get("subcommand") == "fit":
            self._settle_person()
        if "subcommand" in self.config:
            self._find_checkpoint(self.config.subcommand, self.options)

    def _settle_person(self) -> None:
        """Put `--photos` where a run's config keeps it; `--run` is in what it was the start of."""
        self.options.pop("run")
        photos = self.options.pop("photos")
        if photos is not None:
            self.options.data.photos = photos
        steps = self.options.trainer.max_steps
        if self.options.data.photos is not None and steps is not None and steps > LONG:
            logger.warning(
                "trainer.max_steps=%d is much for the photos of one person: lay lit_multiip/one_person.yaml over the "
                "other configs, or set it",
                steps,
            )

    def _find_checkpoint(self, command: str, config: Namespace) -> None:
        """Put a checkpoint's file where the run that was chosen, `last` or `best` stand for one."""
        path = config.get("ckpt_path")
        if self.chosen is not None and path in (None, "last"):
            _, run, checkpoint = self.chosen
            if command == "fit" and path is None:
                if "start" not in config.model.init_args:
                    kind = config.model.class_path.rpartition(".")[2]
                    raise UsageError(f"fit cannot start {kind} at run '{run}': only an adapter can; leave --run out")
                config.model.init_args.start = str(checkpoint)
                logger.info("fit starts at run %s, checkpoint %s", run, checkpoint.name)
                return
        elif path in ("last", "best"):
            home, version = runs.home_of_runs(config.trainer, config.model)
            for given in (Path(str(file)) for file in config.config or []):
                if given.name == "config.yaml" and (given.parent / "checkpoints").is_dir():  # a run's own
                    home, version = given.parent.parent, given.parent.name
            run, checkpoint = runs.run_to_continue(home, "*" if version is None else glob.escape(version))
            if path == "best":
                checkpoint = runs.best_checkpoint(run) or checkpoint
        else:
            if path is not None and "://" in path:
                raise UsageError(f"ckpt_path '{path}' is no file: fetch it from whom you trust, and give its path")
            if path is not None and path not in ("hpc", "registry"):
                runs.read_checkpoint(Path(path))  # refuse a broken one before work is lost
            return
        config.ckpt_path = str(checkpoint)
        logger.info("%s of run %s, checkpoint %s", command, run, checkpoint.name)
        if command == "fit" and path == "last":
            self.continued = run
            self.save_config_kwargs["overwrite"] = True

    # ---- building ---------------------------------------------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        """Settle where the run lies, and what the console and the loggers show."""
        config, always = self.options, self.trainer_defaults["callbacks"]
        if config.trainer.enable_progress_bar is not False:
            always.append(callbacks.ProgressBar())
        if config.trainer.enable_model_summary is not False:
            always.append(callbacks.Summary())
        if self.config.get("subcommand") == "test":
            config.verbose = False  # ScoreTest prints a better table
        path = config.get("ckpt_path")
        if path is not None:
            config.weights_only = True  # nothing is unpickled
        self.run_folder = self._choose_folder(config, path)
        self.logger_given = copy.deepcopy(config.trainer.get("logger"))
        if self.logger_given in (None, True):
            config.trainer.logger = dict_to_namespace(self.trainer_defaults["logger"])
        if config.trainer.logger:
            always.append(LearningRateMonitor("step"))
        runs.place_loggers(config.trainer, self.run_folder)

    def _choose_folder(self, config: Namespace, checkpoint: str | None) -> Path:
        """Return the run's folder that fit goes on in, or that holds the checkpoint; else a new one."""
        if self.continued is not None:
            return self.continued
        if checkpoint is not None and self.config.get("subcommand") != "fit":
            run = Path(checkpoint).parent.parent
            run = run if run.parent.name else run.resolve()
            if (run / "config.yaml").is_file():
                return run
        home, version = runs.home_of_runs(config.trainer, config.model)
        return runs.next_run(home) if version is None else home / version

    def instantiate_classes(self) -> None:
        """Build data, model and trainer."""
        with blame_config():
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> callbacks.Trainer:
        """Build the trainer, with this package's summary in place of Lightning's, and checkpoints that last."""
        trainer: Any = super().instantiate_trainer(enable_model_summary=False, **kwargs)
        trainer.strategy.checkpoint_io = DurableCheckpointIO()
        trainer.write_into(self.run_folder)
        self.options.trainer.logger = self.logger_given  # a saved config may be the start of other runs
        if self.continued is not None:
            self.options.ckpt_path = self.options.weights_only = None
        return trainer

    def fit(self, **kwargs: Any) -> None:
        """Train, as the only process that writes into the run's folder."""
        alone = self.trainer.is_global_zero and not getattr(self.trainer, "fast_dev_run", False)
        with only_writer(self.run_folder) if alone else nullcontext():
            try:
                self.trainer.fit(**kwargs)
            except Exception:
                if self.trainer.global_step > 0:
                    raise
                with blame_config():  # it never got going
                    raise


def _tunes_on_one_person(args: Sequence[str]) -> bool:
    """Return whether a command line names photos to start with; a run that goes on has its config."""
    look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--photos", "--data.photos", "--ckpt_path"):
        look.add_argument(name, nargs="?")
    given, _ = look.parse_known_args(list(args))
    return vars(given)["ckpt_path"] is None and any(vars(given)[name] for name in ("photos", "data.photos"))
