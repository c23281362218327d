"""The command line: Lightning's fit, validate, test and predict, and the project's own commands before them."""

from __future__ import annotations

import argparse
import copy
import glob
import importlib
import json
import logging
import math
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lit_multiip.files import LitMultiIPError, first_line

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningCLI

logger = logging.getLogger(__name__)

DEBUG = "LIT_MULTIIP_DEBUG"
COMMANDS = {  # dispatched before LightningCLI
    "compare": "lit_multiip.comparison.compare:compare",
    "sweep": "lit_multiip.comparison.sweep:sweep",
    "caption": "lit_multiip.tools.caption:caption",
    "report": "lit_multiip.comparison.report:report",
    "inspect": "lit_multiip.tools.inspection:inspect",
    "export": "lit_multiip.tools.export:export",
    "make-mini": "lit_multiip.mini.make:make_mini",
    "measure-mini": "lit_multiip.mini.measure:measure_mini",
}
SECTIONS = {"trainer", "data", "checkpoint", "grid", "score"}  # of a config
BACKBONE_TARGETS = ("model.init_args.backbone", "data.backbone")  # given the one backbone of the top-level key
OWN_PARSER = ("inspect", "export")  # these also take the options of a config, and parse the command line themselves
DESCRIPTION = """Personalised images from several photos of a person.

fit trains the method of a config; bare test scores the newest run under runs/, bare predict draws with it; --run
<folder> chooses another one. Further commands, each with its own --help: {}.

predict and test also take --ip_scale X, --guidance_scale X and --steps N; predict takes --photos FOLDER,
--prompts "A" "B" and --seeds 0 1 2.""".format(", ".join(COMMANDS))
START = "python -m lit_multiip fit --config configs/self_attn.yaml"

# Short forms of options, by the command that takes them.
_SAMPLING = {name: f"model.sampling.{name}" for name in ("ip_scale", "guidance_scale", "steps")}
_PREDICT = {name: f"data.predict.{name}" for name in ("photos", "prompts", "seeds")}
ALIASES = {"test": _SAMPLING, "validate": {}, "predict": _SAMPLING | _PREDICT}


class UsageError(LitMultiIPError):
    """A command line that cannot be carried out; the message names the remedy."""


def main(args: list[str] | None = None) -> None:
    """Run a command line, that of the process by default.

    What a user can mend ends as one line on stderr and exit code 1 (2 where the command line itself is at fault); with
    ``LIT_MULTIIP_DEBUG=1`` the traceback comes too.
    """
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    args = sys.argv[1:] if args is None else list(args)
    _set_up_logging()
    try:
        if args and args[0] in COMMANDS:
            _run_command(*args)
        else:
            # Ranks that Lightning starts inherit argv, and must not look for the newest run again.
            sys.argv[1:] = _backbones_last(expand(args))
            make_cli()
    except SIGTERMException as stop:  # which is no success, whoever raised it
        raise SystemExit(stop.code or 128 + signal.SIGTERM) from None
    except Exception as error:
        message = _explain(error)
        if message is None:
            raise
        if os.environ.get(DEBUG, "0") not in ("", "0"):
            traceback.print_exc()
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, UsageError) else 1) from None


def expand(args: list[str]) -> list[str]:
    """Write a command line out in LightningCLI's own terms: short forms, and the run that is meant.

    Raises:
        UsageError: There is no such run, or none at all.
    """
    if args[:1] == ["fit"]:
        return _fit_again(args)
    if not args or args[0] not in ALIASES:
        return args
    command, aliases = args[0], ALIASES[args[0]]
    parser = argparse.ArgumentParser(prog=f"lit_multiip {command}", add_help=False, allow_abbrev=False)
    parser.add_argument("--run")
    for name in aliases.keys() - {"prompts", "seeds"}:
        parser.add_argument(f"--{name}", type={"photos": str, "steps": int}.get(name, float))
    if "prompts" in aliases:
        parser.add_argument("--prompts", "--prompt", nargs="+", action="extend")
        parser.add_argument("--seeds", "--seed", nargs="+", action="extend", type=int)
    known, rest = parser.parse_known_args(args[1:])
    for name, key in aliases.items():
        value = getattr(known, name)
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"--{name} {value} is not finite: give a number such as 1.0")
        if value is not None:
            rest.append(f"--{key}={json.dumps(value) if isinstance(value, list) else value}")

    given = {arg.split("=")[0] for arg in rest}
    if known.run is None and given & {"-c", "--config", "--ckpt_path", "-h", "--help", "--print_config"}:
        return [command, *rest]
    run, checkpoint = _choose_run(command, known.run)
    logger.info("%s of run %s, checkpoint %s", command, run, checkpoint.name)
    chosen = ["--config", str(run / "config.yaml")]
    if "--ckpt_path" not in given:
        chosen += ["--ckpt_path", str(checkpoint)]
    return [command, *chosen, *rest]


def _fit_again(args: list[str]) -> list[str]:
    """Give ``fit --ckpt_path last`` the newest run's config where none is named."""
    from lit_multiip.runs import run_to_continue

    joined = " ".join(args)
    if not re.search(r"--ckpt_path[ =]last\b", joined) or re.search(r"(^| )(-c|--config)[ =]", joined):
        return args
    run, _ = run_to_continue(Path("runs"), "*/*")
    return ["fit", "--config", str(run / "config.yaml"), *args[1:]]


def _backbones_last(args: list[str]) -> list[str]:
    """Move configs that name a backbone and no method behind the others, so that the order they are typed in is free.

    Steps and learning rate go with the backbone's size, and the method files hold those of the miniature.

    Raises:
        UsageError: where a config should have a section of options, it has a value, which jsonargparse would ignore.
    """
    options = ("-c", "--config")
    slots = [i for i, arg in enumerate(args) if arg.startswith("--config=") or (i > 0 and args[i - 1] in options)]
    names = [args[i].removeprefix("--config=") for i in slots]
    contents = {name: _config_of(name) for name in names}
    for name, values in contents.items():
        for key in SECTIONS & values.keys():
            if not isinstance(values[key], (dict, type(None))):
                raise UsageError(f"'{key}' in {name} is {values[key]!r}: write its options below it, one a line")

    def is_backbone(name: str) -> bool:
        model = contents[name].get("model")
        return "backbone" in contents[name] and not (isinstance(model, dict) and "class_path" in model)

    result = list(args)
    for i, config in zip(slots, sorted(names, key=is_backbone), strict=True):
        result[i] = f"--config={config}" if args[i].startswith("--config=") else config
    return result


def _config_of(name: str) -> dict[str, Any]:
    """What a config file holds; empty where it is none, of which the parser will say what is wrong with it."""
    import yaml

    try:
        values = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _choose_run(command: str, folder: str | None) -> tuple[Path, Path]:
    from lit_multiip.runs import best_checkpoint, newest_run

    if folder is None:
        found = newest_run()
        if found is None:
            raise UsageError(f"no run under {Path('runs').resolve()} has a checkpoint to {command}: first {START}")
        return found
    run = Path(folder)
    if not (run / "config.yaml").is_file():
        raise UsageError(f"'{folder}' is not a run: give a folder with config.yaml, such as runs/self_attn/version_0")
    checkpoint = best_checkpoint(run)
    if checkpoint is None:
        raise UsageError(f"run '{folder}' has no checkpoint that can be loaded: give another run, or {START}")
    return run, checkpoint


def _run_command(name: str, *args: str) -> None:
    from jsonargparse import auto_cli

    module, function = COMMANDS[name].split(":")
    component = getattr(importlib.import_module(module), function)
    if name in OWN_PARSER:
        component(list(args))
        return
    auto_cli(component, args=list(args), as_positional=False, prog=f"lit_multiip {name}")


def build_run(
    command: str, run: str | None, configs: Sequence[str], options: Sequence[str]
) -> tuple[LightningCLI, Path | None, Path | None]:
    """Build, for one process, the objects of a run or of configs; nothing is run.

    Args:
        command: who asks, for messages.
        run: a folder; None takes the newest, or, where there are configs, a method of which nothing is trained.
        configs: laid over the run's own.
        options: as on the command line, laid over all.

    Returns:
        The objects, the run's folder and its best checkpoint; None and None where there is no run.
    """
    import yaml

    folder, checkpoint, given = None, None, []
    if run is not None or not (configs or {"--print_config", "--help"} & set(options)):
        folder, checkpoint = _choose_run(command, run)
        logger.info("%s of run %s, checkpoint %s", command, folder, checkpoint.name)
        values = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        for key in ("ckpt_path", "weights_only"):  # of fit alone
            values.pop(key, None)
        given = ["--config", json.dumps(values)]
    for config in configs:
        given += ["--config", config]
    one_process = ["--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto"]
    return make_cli([*given, *one_process, *options], execute=False), folder, checkpoint


def make_cli(args: list[str] | None = None, execute: bool = True) -> LightningCLI:
    """Parse ``sys.argv`` and run it; or, not to ``execute``, parse ``args`` without a subcommand and build the objects.

    The model is a ``Method`` by its ``class_path``, the data a fixed class; both are given the one ``Backbone`` of the
    top-level key ``backbone``. A config of a backbone is laid over the others (``_backbones_last``). A config may set
    ``model.init_args`` without a ``class_path``: they are those of the method that another config names, or of
    MultiIPAdapter, so that configs may be laid over one another in any order.
    The callbacks ``checkpoint``, ``grid`` and ``score`` are set by keys of those names; ``trainer.callbacks`` is
    the user's own.
    """
    from jsonargparse import dict_to_namespace
    from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

    from lit_multiip.backbone.pipeline import Backbone
    from lit_multiip.callbacks import (
        AverageTrained,
        DescribeRun,
        ProgressBar,
        RecordPeople,
        SampleGrid,
        SavePredictions,
        Trainer,
        ValidateAtEnd,
    )
    from lit_multiip.datamodule import MultiPhotoData
    from lit_multiip.evaluation.callback import ScoreTest
    from lit_multiip.files import only_writer, write_durably
    from lit_multiip.finite import RequireFinite
    from lit_multiip.methods.adapter import MultiIPAdapter
    from lit_multiip.methods.aggregators import Aggregator
    from lit_multiip.methods.dreambooth import DreamBooth
    from lit_multiip.methods.method import Method
    from lit_multiip.resume import DurableCheckpointIO, ExactResume
    from lit_multiip.runs import (
        best_checkpoint,
        home_of_runs,
        next_run,
        place_loggers,
        read_checkpoint,
        run_to_continue,
    )

    methods = (MultiIPAdapter, DreamBooth)  # that can be named without their modules

    class Parser(LightningArgumentParser):
        """Raises in place of a screenful of usage."""

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            if not self.exit_on_error:  # one of several types that are being tried
                super().error(message, ex)
            message = _told(message)
            if '"aggregator"' in message:
                message += f"; aggregators are {', '.join(cls.__name__ for cls in Aggregator.__subclasses__())}"
            elif re.search(r'"(model.|data.)?backbone"', message):
                message += "; the backbone is set by --backbone.path and what stands beside it"
            elif '"model"' in message and "import path" in message:
                message += f"; methods are {', '.join(cls.__name__ for cls in methods)}"
            raise UsageError(f"{message}; all options: {self.prog} --help") from ex

    class SaveFitConfig(SaveConfigCallback):
        """Only fit's config makes a folder a run."""

        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            path = Path(trainer.log_dir or trainer.default_root_dir) / "config.yaml"  # a collective call
            if stage == "fit" and trainer.strategy.broadcast(path.exists() and not self.overwrite):
                raise FileExistsError(
                    f"'{path.parent}' holds another run: go on with it by --ckpt_path last, or write elsewhere by "
                    "--trainer.logger.init_args.version"
                )
            if stage == "fit" and trainer.is_global_zero:
                text = self.parser.dump(self.config, skip_none=False)
                write_durably(path, lambda file: file.write(text.encode()))

    class CLI(LightningCLI):
        run_folder: Path  # into which all is written, whatever the logger
        continued: Path | None = None  # the run that fit goes on with, in its own folder

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_subclass_arguments(Backbone, "backbone", help="the frozen pipeline and its encoders")
            parser.set_defaults({"backbone": {"class_path": "lit_multiip.backbone.pipeline.Backbone"}})
            for target in BACKBONE_TARGETS:
                parser.link_arguments("backbone", target, apply_on="instantiate")
            parser.set_defaults({"model": {"class_path": f"{methods[0].__module__}.{methods[0].__name__}"}})
            parser.set_defaults({"data.source": {"class_path": "lit_multiip.data.MiniFaces"}})
            parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
            best = {"monitor": "val/loss", "mode": "min", "save_top_k": 1, "filename": "best-{step}"}
            parser.set_defaults({f"checkpoint.{key}": value for key, value in best.items()})
            parser.add_lightning_class_args(SampleGrid, "grid")
            parser.add_lightning_class_args(ScoreTest, "score")

        def instantiate_classes(self) -> None:
            with _config_to_blame():
                super().instantiate_classes()

        def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
            with _config_to_blame():
                super().parse_arguments(parser, args)
            config = self.config[self.config.subcommand] if execute else self.config
            for key in BACKBONE_TARGETS:  # which the link would replace without a word
                if config.get(key) is not None:
                    raise UsageError(f"{key} is set, and model and data share one backbone: set backbone.path instead")
            if not execute:
                return
            path = config.get("ckpt_path")
            if path in ("last", "best"):
                home, version = home_of_runs(config.trainer, config.model)
                for given in (Path(str(file)) for file in config.config or []):
                    if given.name == "config.yaml" and (given.parent / "checkpoints").is_dir():  # a run's own
                        home, version = given.parent.parent, given.parent.name
                run, checkpoint = run_to_continue(home, "*" if version is None else glob.escape(version))
                if path == "best":
                    checkpoint = best_checkpoint(run) or checkpoint
                config.ckpt_path = str(checkpoint)
                logger.info("%s of run %s, checkpoint %s", self.config.subcommand, run, checkpoint.name)
                if self.config.subcommand == "fit" and path == "last":
                    self.continued = run
                    self.save_config_kwargs["overwrite"] = True
            elif path is not None and path not in ("hpc", "registry"):
                if "://" in path:
                    raise UsageError(f"ckpt_path '{path}' is no file: fetch it from whom you trust, and give its path")
                read_checkpoint(Path(path))  # a broken one is told before work is lost

        def before_instantiate_classes(self) -> None:
            config = self.config[self.config.subcommand] if execute else self.config
            if config.trainer.enable_progress_bar is not False:
                self.trainer_defaults["callbacks"].append(ProgressBar())
            if self.config.get("subcommand") == "test":
                config.verbose = False  # ScoreTest prints a better table
            path = config.get("ckpt_path")
            if path is not None:
                config.weights_only = True  # nothing is unpickled
            self.run_folder = self._choose_folder(config, path)
            self.logger_given = copy.deepcopy(config.trainer.get("logger"))
            if self.logger_given in (None, True):
                config.trainer.logger = dict_to_namespace(trainer_defaults["logger"])
            if config.trainer.logger:
                self.trainer_defaults["callbacks"].append(LearningRateMonitor("step"))
            place_loggers(config.trainer, self.run_folder)

        def _choose_folder(self, config: Any, checkpoint: str | None) -> Path:
            """What fit goes on with, or what is made of a run, lies in that run's folder; else in a new one."""
            if self.continued is not None:
                return self.continued
            if checkpoint is not None and self.config.get("subcommand") != "fit":
                run = Path(checkpoint).parent.parent
                run = run if run.parent.name else run.resolve()
                if (run / "config.yaml").is_file():
                    return run
            home, version = home_of_runs(config.trainer, config.model)
            return next_run(home) if version is None else home / version

        def instantiate_trainer(self, **kwargs: Any) -> Any:
            trainer: Any = super().instantiate_trainer(**kwargs)
            trainer.strategy.checkpoint_io = DurableCheckpointIO()
            trainer.write_into(self.run_folder)
            config = self.config[self.config.subcommand] if execute else self.config
            config.trainer.logger = self.logger_given  # a saved config may be the start of other runs
            if self.continued is not None:
                config.ckpt_path = config.weights_only = None
            return trainer

        def fit(self, **kwargs: Any) -> None:
            alone = self.trainer.is_global_zero and not getattr(self.trainer, "fast_dev_run", False)
            with only_writer(self.run_folder) if alone else nullcontext():
                try:
                    self.trainer.fit(**kwargs)
                except Exception:
                    if self.trainer.global_step > 0:
                        raise
                    with _config_to_blame():  # it never got going
                        raise

    trainer_defaults = {
        "accelerator": "auto",
        "precision": "bf16-mixed",
        "use_distributed_sampler": False,  # the DataModule's own samplers serve all ranks
        "inference_mode": False,
        "check_val_every_n_epoch": None,  # val_check_interval counts steps
        "num_sanity_val_steps": 1,
        "log_every_n_steps": 10,
        "logger": {
            "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
            "init_args": {"save_dir": "runs", "name": "multiip", "default_hp_metric": False},
        },
        "callbacks": [  # Lightning adds these to those of the config
            RequireFinite(),
            ExactResume(),
            ValidateAtEnd(),
            ModelCheckpoint(filename="last", monitor=None, save_top_k=1, enable_version_counter=False),
            SavePredictions(),
            RecordPeople(),
            AverageTrained(),
            DescribeRun(),
        ],
    }
    return CLI(
        Method,
        MultiPhotoData,
        subclass_mode_model=True,
        save_config_callback=SaveFitConfig,
        trainer_class=Trainer,
        trainer_defaults=trainer_defaults,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        parser_class=Parser,
        parser_kwargs={"description": DESCRIPTION},
        args=None if args is None else _backbones_last(args),
        run=execute,
    )


def _set_up_logging() -> None:
    """Show the package's messages on stderr, once, on rank 0."""
    package = logging.getLogger("lit_multiip")
    package.setLevel(logging.INFO if os.environ.get("LOCAL_RANK", "0") == "0" else logging.ERROR)
    if not package.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        package.addHandler(handler)
    for nag in (
        "does not have many workers",
        "in eval mode at the start",
        "not supported by the model summary",
        "treespec",
        "have no .validation_step",
        "You're using the WeightAveraging callback",  # a module is built in configure_model, and tested by its average
        "your dataloader is not resumable",  # the samplers are
        "(Checkpoint|Experiment logs) directory .* exists and is not empty",
        "LightningCLI's args parameter",  # of commands that parse a run's config, not their own line
    ):
        warnings.filterwarnings("ignore", f".*{nag}")


def _explain(error: Exception) -> str | None:
    """Say in one line what the user can mend; None for a fault of the program.

    That is what this package raises on purpose, what the file system refuses, and a Trainer set up wrongly.
    """
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    if isinstance(error, (UsageError, OSError, MisconfigurationException)):
        return str(error) or type(error).__name__
    if isinstance(error, RuntimeError) and re.search(r"gloo|NCCL|[Cc]onnection (closed|reset)|TCPStore", str(error)):
        reason = first_line(error).split(". ")[0]
        return (
            f"another rank has died or cannot be reached ({reason}): what it said tells why; --ckpt_path last goes on "
            "from the last checkpoint"
        )
    if not isinstance(error, (ValueError, ArithmeticError)):
        return None
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    if raised_in.is_relative_to(Path(__file__).parent):
        return str(error)
    if "jsonargparse" in raised_in.parts:  # which wraps what a constructor of this package refuses
        return _told(str(error))
    return None


@contextmanager
def _config_to_blame() -> Iterator[None]:
    """Say in one line what a config does to libraries that do not look at it before they use it.

    Raises:
        UsageError: something that this package has nothing to say of.
    """
    try:
        yield
    except Exception as error:
        if _explain(error) is not None:
            raise
        raise UsageError(
            f"the config cannot be used ({type(error).__name__}: {_told(str(error))[:500]}): see the option's help; "
            f"{DEBUG}=1 shows where"
        ) from error


def _told(message: str) -> str:
    """What jsonargparse has to say in one line, less what it says of types that may also be null."""
    message = " ".join(message.split()).split(" - Expected a <class 'NoneType'>")[0]
    return re.sub(r"Does not validate against any of the Union subtypes Subtypes: \[[^]]*\] Errors: - ", "", message)
