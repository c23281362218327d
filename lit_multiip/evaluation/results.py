"""What a test leaves behind: images, pictures, metrics.json, scores.csv and a table, and who made them."""

from __future__ import annotations

import csv
import json
import math
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from lit_multiip.data.photos import Photo
from lit_multiip.data.tasks import Task
from lit_multiip.evaluation.extractors import Extractor
from lit_multiip.evaluation.pictures import to_picture
from lit_multiip.evaluation.summaries import ImageSet
from lit_multiip.files import write_durably

PHOTO_PEOPLE = 12  # whose photos are written beside the images
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
    "copy_paste": "copying, published",  # WithAnyone's; low also where nobody is met
    "prompt": "prompt ↑",
    "fid": "FID ↓",
    "kid": "KID ↓",
    "is": "IS ↑",
    "is_uniform": "IS, uniform p(y) ↑",
    "diversity": "diversity ↑",
}


# ---- pictures ---------------------------------------------------------------------------------------------------


def write_images(folder: Path, images: Tensor, files: Sequence[str], show_progress: bool = True) -> None:
    """Write images (T, 3, H, W) uint8 as `images/<file>`, T files as `image_files` names them."""
    bar = tqdm(images, "writing images", unit="image", delay=3, disable=not show_progress)
    for image, file in zip(bar, files, strict=True):
        path = folder / "images" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        to_picture(image).save(path)


def write_photos(
    folder: Path, tasks: Sequence[Task], files: Sequence[str], read: Callable[[Photo], Tensor]
) -> dict[str, Any]:
    """Write the real photos of the first 12 people, `photos/<person>/{reference_1.., held_out_<stem>}.png`.

    Args:
        folder: of the test.
        tasks: what was tested.
        files: each task's image, as `image_files` names it.
        read: gives a photo's pixels, (3, H, W) uint8.

    Returns:
        By person: `references`, files in the order of their draw, and `held_out`, a file by the photo's name.
    """
    names: dict[str, Any] = {}
    for task, file in zip(tasks, files, strict=True):
        if task.person not in names and len(names) == PHOTO_PEOPLE:
            continue
        own = names.setdefault(task.person, {"references": [], "held_out": {}})
        place = Path("photos", task.person)
        written: list[tuple[Path, Photo]] = []
        if not own["references"]:
            written += [(place / f"reference_{i + 1}.png", photo) for i, photo in enumerate(task.references)]
            own["references"] = [path.as_posix() for path, _ in written]
        if task.held_out.name not in own["held_out"]:
            written.append((place / f"held_out_{Path(file).stem.rpartition('_s')[0]}.png", task.held_out))
            own["held_out"][task.held_out.name] = written[-1][0].as_posix()
        for path, photo in written:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            to_picture(read(photo)).save(folder / path)
    return names


# ---- scores -----------------------------------------------------------------------------------------------------


def describe_extractors(extractors: Sequence[Extractor]) -> dict[str, dict[str, Any]]:
    """What is to be known of each extractor, by name."""
    names = ("num_features", "num_classes", "can_identify", "source")
    return {
        extractor.name: {name: getattr(extractor, name) for name in names}
        | ({} if extractor.sha256 is None else {"sha256": extractor.sha256})
        for extractor in extractors
    }


def write_scores(
    path: Path,
    tasks: Sequence[Task],
    files: Sequence[str],
    cells: Mapping[str, Sequence[Mapping[str, float]]],
    method: str,
) -> None:
    """Write scores.csv, a line a row and task, with the scores of its image.

    Args:
        path: of the file.
        tasks: what was tested.
        files: the method's images of these, as `image_files` names them.
        cells: by row, the scores of each task's image.
        method: the row whose images are written.
    """
    lines = [
        {"row": row, "person": task.person, "held_out": task.held_out.name, "prompt": task.prompt}
        | {"seed": task.seed, "image": f"images/{file}" if row == method else "", **cell}
        for row, scores in cells.items()
        for task, file, cell in zip(tasks, files, scores, strict=True)
    ]
    write_csv(path, lines)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write strict JSON at once or not at all; numbers that are not finite become null."""
    text = json.dumps(_null_if_not_finite(content), indent=2, allow_nan=False) + "\n"
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

    Keys: `generated.features` (T, D), `generated.logits` (T, K), `held_out.features` (P, D), `person` and
    `held_out.person` (numbers of people), and `score.<name>` (T,) for the scores of images.
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
    """Read what `write_features` wrote: the generated images and the held-out photos."""
    arrays = load_file(path)
    scores = {key.removeprefix("score."): v.numpy() for key, v in arrays.items() if key.startswith("score.")}
    generated = ImageSet(
        arrays["person"].numpy(), arrays.get("generated.features"), arrays.get("generated.logits"), scores
    )
    return generated, ImageSet(arrays["held_out.person"].numpy(), arrays.get("held_out.features"))


def table(test: Mapping[str, Any]) -> str:
    """Write the scores of a test in Markdown, a table an extractor: the method first, then the anchors.

    Args:
        test: content of metrics.json.
    """
    counts = test["protocol"]
    parts = [
        f"{counts['people']} people, {counts['held_out']} held-out photos x {counts['seeds']} seeds, "
        f"{counts['references']} references. 95% intervals by person. Protocol {counts['sha256'][:12]}."
    ]
    for name, facts in test["extractors"].items():
        columns = order_scores(test["rows"].values(), name)
        body = []
        for row, scores in test["rows"].items():
            own = [scores.get(f"{column}/{name}") for column in columns]
            if any(own):
                most = max((score for score in own if score), key=lambda score: score["n"])
                body.append([row.replace("_", " "), f"{most['n']} / {most['people']}", *map(cell, own)])
        classes = f" (IS over K = {facts['num_classes']} classes)" if facts.get("num_classes") else ""
        header = ["", "images / people", *(TITLES.get(column, column) for column in columns)]
        parts.append(f"### by {name}{classes}\n\n{markdown([header, *body])}")
        parts += [f"- {line}" for line in _report_missing_faces(test, name)]
    return "\n\n".join(parts) + "\n"


def order_scores(rows: Iterable[Iterable[str]], extractor: str) -> list[str]:
    """Return the scores that any row has by an extractor, without its name: those of TITLES first, in that order."""
    present = {key.removesuffix(f"/{extractor}") for row in rows for key in row if key.endswith(f"/{extractor}")}
    return [name for name in TITLES if name in present] + sorted(present - TITLES.keys())


def _report_missing_faces(test: Mapping[str, Any], extractor: str) -> list[str]:
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

    def git(*command: str) -> str:
        whole = ["git", "-C", str(Path(__file__).parent), *command]
        return subprocess.run(whole, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # an environment inside of another repository is not ours
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or None
    except (OSError, subprocess.SubprocessError):
        return None


def cell(score: Mapping[str, Any] | None) -> str:
    """A value and its interval, to two digits of the interval's half-width, but to no more than 3 or 4 decimals."""
    if score is None or score["value"] is None:
        return ""
    value, low, high = score["value"], score["low"], score["high"]
    most = 3 if abs(value) >= 0.1 else 4
    if low is None or high is None:
        return _format_fixed(value, most)
    half_width = (high - low) / 2
    decimals = min(max(1 - math.floor(math.log10(half_width)), 0), most) if half_width > 0 else most
    return f"{_format_fixed(value, decimals)} [{_format_fixed(low, decimals)}, {_format_fixed(high, decimals)}]"


def _format_fixed(value: float, decimals: int) -> str:
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


def _null_if_not_finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _null_if_not_finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_null_if_not_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
