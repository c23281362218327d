"""What a test leaves behind: metrics.json, scores.csv and a table, and who made them."""

from __future__ import annotations

import csv
import json
import math
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lit_multiip.evaluation.intervals import Score
from lit_multiip.evaluation.summaries import ImageSet, summarise_difference
from lit_multiip.files import write_durably

PACKAGES = ("torch", "lightning", "diffusers", "transformers", "torchmetrics", "lit_multiip")

# Score -> title in tables; the arrow says what is better. This is their order, too.
TITLES = {
    "identity_held_out": "identity ↑",
    "identity_held_out_mean": "identity, mean photo ↑",
    "identity_references": "identity, references",  # high also where a reference is merely copied
    "similarity_held_out": "similarity ↑",  # of the whole picture, which is not who is shown
    "similarity_held_out_mean": "similarity, mean photo ↑",
    "similarity_references": "similarity, references",
    "nearest_reference": "copying, nearest reference",  # to be read beside the row real held out
    "prompt": "prompt ↑",
    "fid": "FID ↓",
    "kid": "KID ↓",
    "is": "IS ↑",
    "is_uniform": "IS, uniform p(y) ↑",
    "diversity": "diversity ↑",
}


def results(
    protocol: Mapping[str, Any],
    rows: Mapping[str, Mapping[str, Score]],
    extractors: Mapping[str, Mapping[str, Any]],
    describe: Mapping[str, Any],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Content of metrics.json.

    Args:
        protocol: Of `tasks.protocol`.
        rows: Scores by row (the method's first, then the anchors') and key, as `scores.summarise` makes them.
        extractors: What is to be known of each, by name.
        describe: What the method says of itself; `method` is the name of its row.
        seconds: Wall time by part.
    """
    return {
        "protocol": dict(protocol),
        "rows": {row: {key: score._asdict() for key, score in scores.items()} for row, scores in rows.items()},
        "extractors": {name: dict(facts) for name, facts in extractors.items()},
        "describe": dict(describe),
        "seconds": dict(seconds),
        "versions": versions(),
        "commit": commit(),
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write strict JSON at once or not at all; numbers that are not finite become null."""
    text = json.dumps(_finite(content), indent=2, allow_nan=False) + "\n"
    write_durably(path, lambda file: file.write(text.encode()))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows under the columns of all of them, in the order of their appearance; NaN and absent cells are empty."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    # names of files may hold bytes that are no text
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows({column: "" if _is_nan(value) else value for column, value in row.items()} for row in rows)


def write_features(path: Path, generated: ImageSet, held_out: ImageSet) -> None:
    """Keep what an extractor saw, so that two tests can be compared in pairs without looking at their images again.

    Keys: ``generated.features`` (T, D), ``generated.logits`` (T, K), ``held_out.features`` (P, D), ``person`` and
    ``held_out.person`` (numbers of people), and ``score.<name>`` (T,) for the scores of images.
    """
    names = {name: i for i, name in enumerate(sorted({*generated.people.tolist(), *held_out.people.tolist()}))}
    arrays = {
        "generated.features": generated.features,
        "generated.logits": generated.logits,
        "held_out.features": held_out.features,
        "person": [names[name] for name in generated.people.tolist()],
        "held_out.person": [names[name] for name in held_out.people.tolist()],
        **{f"score.{name}": values for name, values in generated.per_image.items()},
    }
    save_file({k: torch.as_tensor(v).contiguous() for k, v in arrays.items() if v is not None}, path)


def read_features(path: Path) -> tuple[ImageSet, ImageSet]:
    """Read what ``write_features`` wrote: the generated images and the held-out photos."""
    arrays = load_file(path)
    scores = {key.removeprefix("score."): v.numpy() for key, v in arrays.items() if key.startswith("score.")}
    generated = ImageSet(
        arrays["person"].numpy(), arrays.get("generated.features"), arrays.get("generated.logits"), scores
    )
    return generated, ImageSet(arrays["held_out.person"].numpy(), arrays.get("held_out.features"))


def paired(test: str, baseline: str) -> None:
    """Print the differences of two tests on the same tasks, each with its paired 95% interval by person.

    Args:
        test: folder that ``test`` wrote, such as runs/self_attn/version_0/test.
        baseline: folder to subtract.
    """
    folders = Path(test), Path(baseline)
    for folder in folders:
        if not (folder / "metrics.json").is_file():
            raise FileNotFoundError(f"'{folder}' has no metrics.json: give a folder that `test` wrote")
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    table(*metrics)  # refuses tests of different protocols
    names = [f"{m['describe']['method']} ({folder})" for m, folder in zip(metrics, folders, strict=True)]
    print(f"{names[0]} minus {names[1]}, 95% intervals of paired differences by person")
    for path in sorted(folders[0].glob("features_*.safetensors")):
        (a, held_out), (b, _) = read_features(path), read_features(folders[1] / path.name)
        scores = summarise_difference(path.stem.removeprefix("features_"), a, b, held_out)
        body = [[key, cell(score._asdict())] for key, score in scores.items()]
        print("\n" + markdown([["score", "difference"], *body]))


def table(*tests: Mapping[str, Any]) -> str:
    """Scores of one or several tests in Markdown, a table an extractor: methods first, then the first test's anchors.

    Args:
        tests: Contents of metrics.json.

    Raises:
        ValueError: There are none, or they are of different protocols: their numbers cannot be compared.
    """
    if not tests:
        raise ValueError("there is no test to tabulate: give at least one metrics.json")
    first = tests[0]
    for test in tests[1:]:
        if test["protocol"] != first["protocol"]:
            names = f"{first['describe']['method']!r} and {test['describe']['method']!r}"
            raise ValueError(
                f"{names} were tested by different protocols, {first['protocol']} and {test['protocol']}: test both on "
                "the same people, photos, prompts and seeds"
            )
    methods = [test["describe"]["method"] for test in tests]
    rows = [(method, test["rows"][method]) for method, test in zip(methods, tests, strict=True)]
    rows += [(row, scores) for row, scores in first["rows"].items() if row != methods[0]]
    known = {name: facts for test in tests for name, facts in test["extractors"].items()}
    counts = first["protocol"]
    parts = [
        f"{counts['people']} people, {counts['held_out']} held-out photos x {counts['seeds']} seeds, "
        f"{counts['references']} references. 95% intervals by person. Protocol {counts['sha256'][:12]}."
    ]
    for name, facts in known.items():
        present = {key.removesuffix(f"/{name}") for _, scores in rows for key in scores if key.endswith(f"/{name}")}
        columns = [score for score in TITLES if score in present] + sorted(present - TITLES.keys())
        body = []
        for row, scores in rows:
            own = [scores.get(f"{column}/{name}") for column in columns]
            if any(own):
                most = max((score for score in own if score), key=lambda score: score["n"])
                cells = [cell(score) for score in own]
                body.append([row.replace("_", " "), f"{most['n']} / {most['people']}", *cells])
        classes = f" (IS over K = {facts['num_classes']} classes)" if facts.get("num_classes") else ""
        header = ["", "images / people", *(TITLES.get(column, str(column)) for column in columns)]
        parts.append(f"### by {name}{classes}\n\n{markdown([header, *body])}")
        parts += [f"- {line}" for test in tests for line in _not_found(test, name)]
    return "\n\n".join(parts) + "\n"


def _not_found(test: Mapping[str, Any], extractor: str) -> list[str]:
    """What a test says of faces that an extractor did not find, a line a row that lacks any."""
    counts: Mapping[str, Sequence[int]] = test.get("faces_not_found", {}).get(extractor, {})
    return [
        f"{row.replace('_', ' ')}: face not found in {missing} of {images} images ({missing / images:.1%}), "
        "which are in no mean"
        for row, (missing, images) in counts.items()
        if missing
    ]


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that scores depend on; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str | None:
    """Commit of the package's checkout, with `-dirty` where files differ from it; None outside of a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        # an environment inside of somebody else's repository is not ours
        for command in (["ls-files", "--error-unmatch", "__init__.py"], ["describe", "--always", "--dirty"]):
            options = ["--abbrev=40", "--exclude=*"] if command[0] == "describe" else []
            run = subprocess.run([*git, *command, *options], capture_output=True, text=True, check=True, timeout=30)
        return run.stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def cell(score: Mapping[str, Any] | None) -> str:
    """A value and its interval, to two digits of the interval's half-width, but to no more than 3 or 4 decimals."""
    if score is None or score["value"] is None:
        return ""
    value, low, high = score["value"], score["low"], score["high"]
    most = 3 if abs(value) >= 0.1 else 4
    if low is None or high is None:
        return _fixed(value, most)
    half_width = (high - low) / 2
    decimals = min(max(1 - math.floor(math.log10(half_width)), 0), most) if half_width > 0 else most
    return f"{_fixed(value, decimals)} [{_fixed(low, decimals)}, {_fixed(high, decimals)}]"


def _fixed(value: float, decimals: int) -> str:
    return f"{round(value, decimals) + 0.0:.{decimals}f}"  # the sum makes 0 of -0


def markdown(table: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first being the header, in aligned columns."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in table]
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    padded = [line(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([padded[0], line("-" * width for width in widths), *padded[1:]])


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
