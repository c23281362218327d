"""What a comparison consists of: rows, grids of their options, and contrasts between them.

A row is a method with its configs and options. A row with a `grid` stands for several rows, one for every combination
of the grid's values; the first of them is the row's default.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from lit_multiip.comparison.steps import read_stamp
from lit_multiip.files import LitMultiIPError

OUTPUT = "runs/compare/mini"


class CompareError(LitMultiIPError):
    """A plan that cannot be carried out; the message names the remedy."""


@dataclass
class Row:
    """A method of the comparison.

    Args:
        configs: method configs, laid over one another.
        title: its name in the report.
        group: `paper` for the paper's five, `control` for the others.
        fit: train it before it is tested; what is tested otherwise is the published adapter as it is, or a method that
            learns within the test.
        seeds: train it once per training seed; otherwise it has no training seed.
        seed_options: what a training seed is given to; data, split and test tasks have their own.
        run: a run that was trained before, to be tested in place of a fit of its own.
        images: folder of images that another program drew for what `tasks` wrote, to be scored as they are.
        options: of both commands, such as `model.trained: aggregator`.
        paper: the paper's own figures.
        test_options: of its tests alone.
        grid: options and their values; every combination is a row of its own, the first is the default.
        suffix: of the plan's configs, such as `on/sd15.yaml`, those that a file `on/sd15_<suffix>.yaml` stands beside
            have it laid over them.
    """

    configs: list[str]
    title: str
    group: Literal["paper", "control"] = "control"
    fit: bool = False
    seeds: bool = False
    seed_options: list[str] = field(default_factory=lambda: ["seed_everything", "data.training_seed"])
    run: str | None = None
    images: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    paper: dict[str, float] | None = None
    test_options: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    suffix: str | None = None

    def lay(self, configs: Sequence[str]) -> list[str]:
        """Return the configs of its command: its own, those of the plan, and what stands beside these for it."""
        beside = [Path(config).with_stem(f"{Path(config).stem}_{self.suffix}") for config in configs]
        own = [str(path) for path in beside if path.is_file()] if self.suffix is not None else []
        return [*self.configs, *configs, *own]


@dataclass(frozen=True)
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


@dataclass
class Plan:
    """The config of a comparison, less what concerns this one run of it; `compare` says what is what."""

    rows: dict[str, Row]
    reference: str
    title: str = "Methods of personalisation"
    contrasts: Sequence[Contrast] = ()
    configs: Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    test_options: Mapping[str, Any] = field(default_factory=dict)
    seeds: Sequence[int] = (0,)
    output: str = OUTPUT
    trained: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)

    def check(self, only: Sequence[str] | None = None) -> None:
        """Refuse what cannot work before anything is run."""
        named = {self.reference, *(key for contrast in self.contrasts for key in contrast.minus), *(only or [])}
        for key in sorted(named - self.rows.keys()):
            raise CompareError(f"there is no row '{key}': the plan has {', '.join(self.rows)}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise CompareError(f"seeds are {list(self.seeds)}: give at least one, each once")
        if self.trained is not None and not (Path(self.trained) / "plan.json").is_file():
            raise CompareError(f"'{self.trained}' is no comparison: give --trained a folder that `compare` wrote")
        if self.trained is not None and Path(self.trained).resolve() == Path(self.output).resolve():
            raise CompareError(f"--trained and --output are both '{self.output}': give --output a folder of its own")
        own = [[row.options, row.test_options, row.grid] for row in self.rows.values()]
        options = json.dumps([self.options, self.test_options, own], default=str)
        if idle := [name for name in self.variables if f'"${name}"' not in options]:
            used = ", ".join(name for name in self.variables if name not in idle) or "none"
            raise CompareError(f"variable '{idle[0]}' stands in no option of the plan, whose variables are: {used}")
        for key, row in self.rows.items():
            if not re.fullmatch(r"\w[\w.-]*", key):
                raise CompareError(f"row '{key}' cannot be a folder: use letters, digits, '.', '_' and '-'")
            for config in [*row.configs, *self.configs]:
                if not Path(config).is_file():
                    raise CompareError(f"row '{key}' names the config '{config}', which is not a file")
            if row.images is not None and not Path(row.images).expanduser().is_dir():
                raise CompareError(f"row '{key}' has images in '{row.images}', which is not a folder: draw them first")
            if row.images is not None and (row.fit or row.seeds or row.run is not None or row.grid):
                raise CompareError(
                    f"row '{key}' has images, which nothing here draws: leave out fit, seeds, run and grid"
                )
            for option, values in row.grid.items():
                if not values:
                    raise CompareError(f"row '{key}' has no value for '{option}' in its grid: give one or more")

    def expand(self, only: Sequence[str] | None = None) -> Plan:
        """Return the plan without grids: the default stands for its row in contrasts and as the reference.

        Args:
            only: keep these rows, with all of their grids.
        """
        combined = {key: expand_grid(key, row) for key, row in self.rows.items()}
        default = {key: next(iter(rows)) for key, rows in combined.items()}
        kept = {k: row for key, rows in combined.items() if only is None or key in only for k, row in rows.items()}
        contrasts = [replace(c, minus=(default[c.minus[0]], default[c.minus[1]])) for c in self.contrasts]
        return replace(self, rows=kept, reference=default[self.reference], contrasts=contrasts)

    def fill(self, value: Any) -> Any:
        """Return options with the value of each variable in the place of its name, such as `$photos`."""
        if isinstance(value, Mapping):
            return {key: self.fill(part) for key, part in value.items()}
        if isinstance(value, list):
            return [self.fill(part) for part in value]
        if not isinstance(value, str) or value[:1] != "$" or value[1:] not in self.variables:
            return value
        name = value[1:]
        if self.variables[name] is None:
            raise CompareError(
                f"the plan's variable '{name}' has no value: give --variables.{name} <value>, or write it there"
            )
        return self.variables[name]

    def run_of(self, key: str, row: Row, seed: int) -> str | None:
        """Return the run that a row tests in place of a fit of its own: its own `run`, or that of `trained`."""
        if row.run is not None or self.trained is None or not row.fit:
            return row.run
        place = Path(self.trained) / key / f"version_{seed}"
        if (place / "config.yaml").is_file():
            return str(place)
        # rows that are trained alike share one training, and the test says whose
        command = read_stamp(place / "test.json").get("command", [])
        if command[1:2] != ["--run"]:
            raise CompareError(f"'{place}' holds no finished run: finish the comparison '{self.trained}' first")
        return str(command[2])

    def seeds_of(self, row: Row) -> Sequence[int]:
        """Return the training seeds of a row; a row without any has the first in the names of its folders alone."""
        return self.seeds if row.seeds else self.seeds[:1]


def expand_grid(key: str, row: Row) -> dict[str, Row]:
    """Return a row for every combination of a row's grid, by keys that say the values; a row without one as it is."""
    if not row.grid:
        return {key: row}
    rows = {}
    for values in itertools.product(*row.grid.values()):
        setting = dict(zip(row.grid, values, strict=True))
        label = re.sub(r"[^\w.-]+", "-", "_".join(f"{short_name(option)}-{v}" for option, v in setting.items()))
        title = f"{row.title}, {describe_setting(setting)}"
        rows[f"{key}_{label}"] = replace(row, title=title, options=row.options | setting, grid={})
    return rows


def describe_setting(setting: Mapping[str, Any]) -> str:
    """Write a setting of a grid in words."""
    return ", ".join(f"{short_name(option)} {value}" for option, value in setting.items())


def short_name(option: str) -> str:
    """Return an option's name without the sections that it stands in."""
    return option.rpartition(".")[2]


def read_plan(path: str) -> Plan:
    """Read the config of a comparison."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        rows = {key: Row(**row) for key, row in content.pop("rows").items()}
        contrasts = [Contrast(**contrast) for contrast in content.pop("contrasts", None) or []]
        given = {key: value for key, value in content.items() if key in Plan.__annotations__ and value is not None}
        return Plan(rows=rows, contrasts=contrasts, **given)
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise CompareError(f"plan '{path}' is not the config of a comparison ({error}): see configs/plans") from error
