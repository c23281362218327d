"""``python -m lit_multiip compare``: every method of a plan on one protocol, then the report.

A plan becomes steps, ``fit`` and ``test`` of its rows, which ``comparison.steps`` carries out; each has a key of all
that its result depends on: configs, options, code, weights, photos and prompts.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import PositiveInt

from lit_multiip.backbone.components import COMPONENTS, BackboneError
from lit_multiip.backbone.faces import FaceEncoder
from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.comparison.steps import Step, run_steps
from lit_multiip.evaluation.critic import shipped_critic
from lit_multiip.evaluation.results import write_json
from lit_multiip.files import LitMultiIPError, hash_file, hash_text
from lit_multiip.runs import best_checkpoint

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).parent.parent
# Modules that no number depends on: changing them leaves finished steps valid.
PRESENTATION = (
    "comparison",
    "tools",
    "mini/gate.py",
    "mini/make.py",
    "mini/measure.py",
    "mini/stages.py",
    "evaluation/pictures.py",
)


class CompareError(LitMultiIPError):
    """A plan that cannot be carried out; the message names the remedy."""


@dataclass
class Row:
    """A method of the comparison.

    Args:
        configs: method configs, laid over one another.
        title: its name in the report.
        group: ``paper`` for the paper's five, ``control`` for the others.
        fit: train it before it is tested; what is tested otherwise is the published adapter as it is, or a method that
            learns within the test.
        seeds: train it once per training seed; otherwise it has no training seed.
        seed_options: what a training seed is given to; data, split and test tasks have their own.
        run: a run that was trained before, to be tested in place of a fit of its own.
        options: of both commands, such as ``model.trained: aggregator``.
        paper: the paper's own figures.
    """

    configs: list[str]
    title: str
    group: Literal["paper", "control"] = "control"
    fit: bool = False
    seeds: bool = False
    seed_options: list[str] = field(default_factory=lambda: ["seed_everything", "data.training_seed"])
    run: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    paper: dict[str, float] | None = None


@dataclass
class Contrast:
    """A difference between two rows that tells one cause apart.

    Args:
        title: the cause.
        minus: the row with it, and the row without.
        text: what the two rows differ in.
    """

    title: str
    minus: tuple[str, str]
    text: str = ""


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
    output: str = "runs/compare/mini",
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
        options: of every command, such as ``data.held_out: 4``.
        test_options: of every test.
        seeds: training seeds of the rows that have them; [0] by default. Data, split and test tasks stay the same.
        only: run these rows; the report is of all that is there.
        output: the folder to write; finished steps in it are kept.
        processes: steps at a time, each with its share of the CPU cores and a log in its run's folder.
        dry_run: print the commands, and run none.
    """
    folder, seeds = Path(output), [0] if seeds is None else seeds
    _check_plan(rows, reference, contrasts or [], seeds, only)
    plan = {
        "title": title,
        "reference": reference,
        "seeds": seeds,
        "rows": [
            {"key": key, "title": row.title, "group": row.group, "trained": row.fit or row.seeds, "paper": row.paper}
            | {"versions": [f"version_{seed}" for seed in (seeds if row.seeds else seeds[:1])]}
            for key, row in rows.items()
        ],
        "contrasts": [asdict(contrast) for contrast in contrasts or []],
    }
    steps = list(make_steps(rows, reference, configs or [], options or {}, test_options or {}, seeds, folder))
    steps = [step for step in steps if only is None or step.row in only]
    if dry_run:
        for step in steps:
            state = "done" if step.is_done() else "to do"
            print(f"{state}: python -m lit_multiip {shlex.join([step.command, *step.arguments])}")
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "plan.json", plan)
    run_steps(steps, processes)

    from lit_multiip.comparison.report import report

    report(str(folder))


def make_steps(
    rows: Mapping[str, Row],
    reference: str,
    configs: Sequence[str],
    options: Mapping[str, Any],
    test_options: Mapping[str, Any],
    seeds: Sequence[int],
    folder: Path,
) -> Iterator[Step]:
    """Yield the commands of a plan: the fits and tests of the rows, in their order, by training seed.

    Anchor rows cost several tests' time, and are made once: by the reference row's first test.
    """
    code = code_fingerprint()
    for name, row in rows.items():
        files = [*row.configs, *configs]
        for seed in seeds if row.seeds else seeds[:1]:
            run = folder / name / f"version_{seed}"
            own = {**options, **row.options}
            if row.seeds:
                own |= dict.fromkeys(row.seed_options, seed)
            place = {"save_dir": str(folder), "name": name, "version": f"version_{seed}"}
            shared = [part for file in files for part in ("--config", file)]
            shared += [f"--{key}={_as_argument(value)}" for key, value in own.items()]
            trained = Path(row.run) if row.run is not None else run
            texts = [Path(file).read_text(encoding="utf-8") for file in files]
            source = {name: _as_argument(value) for name, value in own.items() if name.startswith("data.source")}
            photos = photos_fingerprint(tuple(configs), tuple(sorted(source.items())))
            key = combined_key(code, texts, own, _weights(files, own), photos)
            if row.run is not None:
                key = combined_key(key, _checkpoint_hash(trained))
            elif row.fit:
                logger_options = [f"--trainer.logger.init_args.{key}={value}" for key, value in place.items()]
                yield Step(name, seed, "fit", run, [*shared, *logger_options], key)
            anchors = name == reference and seed == seeds[0]
            final = {"score.anchors": anchors, **test_options, "score.output": str(run / "test")}
            last = [f"--{key}={_as_argument(value)}" for key, value in final.items()]
            chosen = shared
            if row.run is not None:
                chosen = ["--run", str(trained), *(f"--{key}={_as_argument(value)}" for key, value in own.items())]
            elif row.fit:
                chosen = ["--run", str(trained)]
            yield Step(name, seed, "test", run, [*chosen, *last], combined_key(key, final, _scorers(files, final)))


def code_fingerprint() -> str:
    """Hash of the package's modules that a number may depend on."""
    files = sorted(PACKAGE.rglob("*.py"))
    matters = [file for file in files if not file.relative_to(PACKAGE).as_posix().startswith(PRESENTATION)]
    return combined_key(*([str(file.relative_to(PACKAGE)), file.read_text(encoding="utf-8")] for file in matters))


@functools.cache
def photos_fingerprint(configs: tuple[str, ...], source: tuple[tuple[str, str], ...]) -> str:
    """Hash of all people, photos and prompts of a source.

    Args:
        configs: that name the source, laid over one another.
        source: options of it, and their values.
    """
    from lit_multiip.cli import CLI

    files = [part for config in configs for part in ("--config", config)]
    data: Any = CLI([*files, *(f"--{key}={value}" for key, value in source)], run=False).datamodule
    people = data.source.people()
    return combined_key(*sorted((p.name, x.name, x.content_key(), x.prompt) for p in people for x in p.photos))


def combined_key(*parts: Any) -> str:
    """Hash of what a step depends on, JSON-able."""
    return hash_text(json.dumps(parts, sort_keys=True))


def _weights(files: Sequence[str], options: Mapping[str, Any]) -> list[str]:
    """Fingerprints of the backbone, of its adapter, and of the user's own modules that the configs name."""
    import yaml

    given: dict[str, Any] = {}
    classes = set()
    for file in files:
        text = Path(file).read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        given |= (content or {}).get("backbone") or {}
        classes |= set(re.findall(r"class_path:\s*([\w.]+)", text))
    own = {key.removeprefix("backbone."): value for key, value in options.items() if key.startswith("backbone.")}
    face = (given.pop("face_encoder", None) or {}) | {
        key.partition(".")[2]: own.pop(key) for key in list(own) if key.startswith("face_encoder.")
    }
    backbone = Backbone(**given | own, face_encoder=FaceEncoder(**face) if face else None)
    found = [*_components(backbone.path)]
    if backbone.image_encoder is not None:
        found.append(backbone.fingerprint_image_encoder())
    if backbone.face_encoder is not None:
        found.append(backbone.face_encoder.fingerprint())
    if (adapter := backbone.adapter_file()) is not None:
        path = Path(adapter).expanduser()
        found.append(hash_file(path) if path.is_file() else adapter)  # else on the hub
    for module in sorted({name.rpartition(".")[0] for name in classes}):
        if module.split(".")[0] in ("lit_multiip", "torch", "lightning", "diffusers"):
            continue
        spec = importlib.util.find_spec(module) if module else None
        if spec is not None and spec.origin is not None and Path(spec.origin).is_file():
            found.append(hash_file(Path(spec.origin)))
    return found


def _scorers(files: Sequence[str], options: Mapping[str, Any]) -> list[str]:
    """Fingerprints of the networks that score: the package's critics, and the files that the scores' settings name."""
    import yaml

    named = [yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {} for file in files]
    texts = set(_strings([[config.get("score") for config in named], list(options.values())]))
    critics = [str(shipped_critic(name) / "model.safetensors") for name in ("critic", "critic_b")]
    paths = [*critics, *(os.path.expanduser(text) for text in sorted(texts))]
    return [hash_file(Path(path)) for path in paths if os.path.isfile(path)]


def _strings(value: Any) -> Iterator[str]:
    """Yield every string in nested lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


@functools.cache
def _components(backbone: str) -> tuple[str, ...]:
    """Fingerprints of a backbone's components; gigabytes are read, so once and not for every step."""
    found = []
    for component in COMPONENTS:
        try:
            found.append(Backbone(backbone).fingerprint(component))
        except BackboneError:  # not every pipeline has every component
            continue
    return tuple(found)


def _checkpoint_hash(run: Path) -> str:
    checkpoint = best_checkpoint(run)
    if checkpoint is None:
        raise CompareError(f"run '{run}' has no checkpoint that can be loaded: train it first")
    return hash_file(checkpoint)


def _check_plan(
    rows: Mapping[str, Row],
    reference: str,
    contrasts: Sequence[Contrast],
    seeds: Sequence[int],
    only: Sequence[str] | None,
) -> None:
    named = {reference, *(key for contrast in contrasts for key in contrast.minus), *(only or [])}
    for key in sorted(named - rows.keys()):
        raise CompareError(f"there is no row '{key}': the plan has {', '.join(rows)}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise CompareError(f"seeds are {list(seeds)}: give at least one, each once")
    for key, row in rows.items():
        if not re.fullmatch(r"\w[\w.-]*", key):
            raise CompareError(f"row '{key}' cannot be a folder: use letters, digits, '.', '_' and '-'")
        for config in row.configs:
            if not Path(config).is_file():
                raise CompareError(f"row '{key}' names the config '{config}', which is not a file")


def _as_argument(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
