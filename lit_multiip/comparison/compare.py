"""`python -m lit_multiip compare`: every method of a plan on one protocol, then the report.

A plan becomes steps, `fit` and `test` of its rows, which `comparison.steps` carries out. A step is done anew when what
its result depends on has changed: the config that its command line is parsed to, and the content of files, photos,
prompts and weights that the config names. Another version of this package is told in the report, and is no reason.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt

from lit_multiip.backbone.components import COMPONENTS, BackboneError
from lit_multiip.comparison.plan import OUTPUT, CompareError, Contrast, Plan, Row
from lit_multiip.comparison.steps import Step, run_steps
from lit_multiip.evaluation.critic import shipped_critic
from lit_multiip.evaluation.results import write_json
from lit_multiip.files import hash_file, hash_text, quiet_logger
from lit_multiip.runs import best_checkpoint

if TYPE_CHECKING:
    from lit_multiip.backbone.pipeline import Backbone
    from lit_multiip.datamodule import MultiPhotoData

# Options that say where something is written or kept: no result depends on them.
PLACES = (
    "config",
    "trainer.logger",
    "trainer.default_root_dir",
    "checkpoint.dirpath",
    "data.cache_dir",
    "model.init_args.class_folder",
    "score.output",
    *(f"backbone.init_args.{name}" for name in ("path", "image_encoder", "published_adapter")),  # their content counts
)
LIBRARIES = ("lit_multiip", "torch", "torchvision", "lightning", "diffusers", "transformers")


def compare(
    rows: dict[str, Row],
    reference: str,
    title: str = "Methods of personalisation",
    contrasts: list[Contrast] | None = None,
    configs: list[str] | None = None,
    options: dict[str, Any] | None = None,
    test_options: dict[str, Any] | None = None,
    seeds: list[int] | None = None,
    only: list[str] | None = None,
    output: str = OUTPUT,
    trained: str | None = None,
    variables: dict[str, Any] | None = None,
    processes: PositiveInt = 1,
    dry_run: bool = False,
) -> None:
    """Train and test every row of a plan on one protocol, and write the report.

    Args:
        rows: the methods, by the key that their folder is called.
        reference: the row that the others are compared with, in pairs.
        title: of the report.
        contrasts: differences that tell causes apart.
        configs: laid over every row's own, such as configs/data/lfw.yaml or configs/on/sd15.yaml.
        options: of every command, such as `data.held_out: 4`.
        test_options: of every test.
        seeds: training seeds of the rows that have them; [0] by default. Data, split and test tasks stay the same.
        only: run these rows; the report is of all that is there.
        output: the folder to write; finished steps in it are kept.
        trained: folder of a finished comparison of these rows, whose runs are tested and not trained again.
        variables: values that stand for `$name` in options, such as paths of photos and networks.
        processes: steps at a time, each with its share of the CPU cores and a log in its run's folder.
        dry_run: print the commands, and run none.
    """
    seeds = [0] if seeds is None else seeds
    given = (contrasts or [], configs or [], options or {}, test_options or {}, seeds, output, trained, variables or {})
    plan = Plan(rows, reference, title, *given)
    plan.check(only)
    steps = make_steps(plan.expand(only), Inputs())
    if dry_run:
        print_steps(steps)
        return
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "plan.json", describe_plan(plan.expand()))
    run_steps(steps, processes)

    from lit_multiip.comparison.report import report

    report(output)


def print_steps(steps: Sequence[Step]) -> None:
    """Print each step's command, and whether it is done."""
    for step in steps:
        state = "done" if step.is_done() else "to do"
        print(f"{state}: python -m lit_multiip {shlex.join([step.command, *step.arguments])}")


def describe_plan(plan: Plan) -> dict[str, Any]:
    """Return what `report` must know of a plan without grids."""
    rows = [
        {"key": key, "title": row.title, "group": row.group, "trained": row.fit or row.seeds, "paper": row.paper}
        | {"versions": [f"version_{seed}" for seed in plan.seeds_of(row)]}
        for key, row in plan.rows.items()
    ]
    contrasts = [asdict(contrast) for contrast in plan.contrasts]
    return {
        "title": plan.title,
        "reference": plan.reference,
        "seeds": list(plan.seeds),
        "rows": rows,
        "contrasts": contrasts,
    }


def make_steps(plan: Plan, inputs: Inputs) -> list[Step]:
    """Return the fits and tests of a plan without grids, in the order of its rows, by training seed.

    Rows whose trainings do not differ share one. Anchor rows cost several tests' time, and are made once, by the
    reference row's first test.
    """
    steps: list[Step] = []
    fitted: dict[str, Path] = {}  # the run of each training, by what decides it
    for name, row in plan.rows.items():
        for seed in plan.seeds_of(row):
            run = Path(plan.output) / name / f"version_{seed}"
            configs = [part for file in row.lay(plan.configs) for part in ("--config", file)]
            options = plan.fill({**plan.options, **row.options})
            options |= dict.fromkeys(row.seed_options, seed) if row.seeds else {}
            given = _as_arguments(options)

            # what is trained, or was
            depends, begin = "", [*configs, *given]
            if (earlier := plan.run_of(name, row, seed)) is not None:
                configs, depends = inputs.read_run(earlier)
                begin = ["--run", earlier, *given]
            elif row.fit:
                depends = inputs.key("fit", begin)
                if depends not in fitted:
                    place = {"save_dir": plan.output, "name": name, "version": f"version_{seed}"}
                    logged = _as_arguments({f"trainer.logger.init_args.{key}": value for key, value in place.items()})
                    steps.append(Step(name, seed, "fit", run, [*begin, *logged], depends))
                begin = ["--run", str(fitted.setdefault(depends, run))]

            # what is tested, or scored as it is
            anchors = name == plan.reference and seed == plan.seeds[0]
            tested = plan.fill({"score.anchors": anchors, **plan.test_options, **row.test_options})
            command: Literal["test", "score"] = "test" if row.images is None else "score"
            if row.images is not None:
                depends = inputs.hash_images(row.images)
            untrained = row.run is None and row.images is None and not row.fit
            key = inputs.key("test", [*configs, *_as_arguments(options | tested)], depends, untrained)
            tested["score.output"] = str(run / "test")
            tested |= {} if row.images is None else {"images": row.images, "name": row.title}
            steps.append(Step(name, seed, command, run, [*begin, *_as_arguments(tested)], key))
    return steps


def _as_arguments(options: Mapping[str, Any]) -> list[str]:
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in options.items()]


class Inputs:
    """What the result of a step depends on: the config of its command line, and the content of all that it names.

    Sources, components and runs are read once; parsing takes a fifth of a second a command.
    """

    def __init__(self) -> None:
        self.parser = _parser()
        self._people: dict[str, str] = {}
        self._backbones: dict[str, list[str]] = {}
        self._runs: dict[str, tuple[list[str], str]] = {}

    def key(
        self, command: Literal["fit", "test"], arguments: Sequence[str], depends: str = "", untrained: bool = False
    ) -> str:
        """Return a hash of what the result of a command depends on.

        Args:
            command: how scores are made matters to `test` alone.
            arguments: configs and options.
            depends: hash of what it tests.
            untrained: whether a test is of the method as it is.
        """
        try:
            config = self.parser.parse_args(list(arguments), with_meta=False)
            values = config.as_dict()
            config.score.extractors = None  # which would read their weights
            with quiet_logger("lightning.pytorch"):
                built = self.parser.instantiate_classes(config)
            if untrained:
                built.model.check_untrained()
        except (ArgumentError, BackboneError) as error:
            said = f"{command} {shlex.join(arguments)}: {' '.join(str(error).split())}"
            raise CompareError(f"the plan cannot be carried out, {said}") from error
        facts = [depends, *self._fingerprint_backbone(config, built.data.backbone)]
        facts.append(self._fingerprint_people(config, built.data))
        facts.append(repr(built.model.sampling))  # in a config null stands for its defaults
        _drop(values, ["model", "init_args", "sampling"])
        for place in ("data.source", *PLACES):
            _drop(values, place.split("."))
        score = values.pop("score")
        if command == "test":
            critics = [shipped_critic(name) / "model.safetensors" for name in ("critic", "critic_b")]
            facts += [hash_file(file) for file in critics if file.is_file()]
            facts.append(json.dumps(_by_content(score, folders=True), sort_keys=True, default=str))
        text = json.dumps(_by_content(values), sort_keys=True, default=str)
        return hash_text(json.dumps([*facts, *_hash_own_modules(text), text]))

    def read_run(self, run: str) -> tuple[list[str], str]:
        """Return the config of a trained run as arguments, and the hash of its best checkpoint."""
        if run not in self._runs:
            checkpoint = best_checkpoint(Path(run))
            if checkpoint is None:
                raise CompareError(f"run '{run}' has no checkpoint that can be loaded: train it first")
            values = yaml.safe_load((Path(run) / "config.yaml").read_text(encoding="utf-8"))
            for of_fit in ("ckpt_path", "weights_only"):
                values.pop(of_fit, None)
            self._runs[run] = ["--config", json.dumps(values)], hash_file(checkpoint)
        return self._runs[run]

    def hash_images(self, folder: str) -> str:
        """Return a hash of the images that another program drew."""
        root = Path(folder).expanduser()
        files = sorted(file for file in root.rglob("*") if file.is_file())
        return hash_text(json.dumps([[str(file.relative_to(root)), hash_file(file)] for file in files]))

    def _fingerprint_people(self, config: Namespace, data: MultiPhotoData) -> str:
        """Hash all people, photos, prompts and roles of a source."""
        name = repr(config.data.source)
        if name not in self._people:
            people = data.source.people()
            photos = ((p.name, p.split or "", x.name, x.content_key(), x.prompt) for p in people for x in p.photos)
            self._people[name] = hash_text(json.dumps(sorted(photos)))
        return self._people[name]

    def _fingerprint_backbone(self, config: Namespace, backbone: Backbone) -> list[str]:
        """Name the content of a backbone's components, of what embeds photos, and of its adapter."""
        name = repr(config.backbone)
        if name not in self._backbones:
            found = []
            for component in COMPONENTS:
                with suppress(BackboneError):  # not every pipeline has every component
                    found.append(backbone.fingerprint(component))
            with suppress(BackboneError):
                found.append(backbone.fingerprint_photo_encoder())
            adapter = backbone.adapter_file()
            found += [] if adapter is None else [json.dumps(_by_content(adapter))]
            self._backbones[name] = found
        return self._backbones[name]


@cache
def _parser() -> Any:
    """Return what parses the options of a command; making it takes seconds."""
    from lit_multiip.cli import CLI

    with quiet_logger("lightning.pytorch"):
        return CLI([], run=False).parser


def _drop(values: dict[str, Any], path: Sequence[str]) -> None:
    """Remove what stands at a path of keys, where it is there."""
    for key in path[:-1]:
        values = values.get(key) or {}
    values.pop(path[-1], None)


def _by_content(value: Any, folders: bool = False) -> Any:
    """Return nested values with the content's hash in place of every name of a file, or of a folder too."""
    if isinstance(value, Mapping):
        return {key: _by_content(part, folders) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_by_content(part, folders) for part in value]
    if isinstance(value, str) and value:
        path = Path(os.path.expanduser(value))
        if os.path.isfile(path):  # unlike `Path.is_file` it takes any text
            return hash_file(path)
        if folders and os.path.isdir(path):
            return [hash_file(file) for file in sorted(path.rglob("*")) if file.is_file()]
    return value


def _hash_own_modules(text: str) -> list[str]:
    """Hash the user's own modules, those of the classes that a config in JSON names."""
    found = []
    for name in sorted(set(re.findall(r'"class_path": "([\w.]+)\.\w+"', text))):
        spec = None if name.split(".")[0] in LIBRARIES else importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None and Path(spec.origin).is_file():
            found.append(hash_file(Path(spec.origin)))
    return found
