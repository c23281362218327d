"""``python tests/benchmarks/rank.py <test folder> ...``: whom of the test people dlib takes a generated image for.

A person is the mean embedding of their held-out photos, and an image shows the person of the highest cosine: rank-1
among the people of the test, by chance 1 / people. An image without a face is a miss.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lit_multiip.comparison.tables import format_score
from lit_multiip.evaluation.faces import Dlib
from lit_multiip.evaluation.intervals import person_mean
from lit_multiip.pixels import to_tensor


def main() -> None:
    """Print rank-1 and the share of images without a face, a line each folder that a test wrote."""
    parser = argparse.ArgumentParser(prog="python tests/benchmarks/rank.py", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="what a test wrote: its metrics.json, scores.csv, images")
    extractor = Dlib()
    for folder in parser.parse_args().folders:
        photos = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["photos"]
        people = list(photos)
        galleries = [[folder / file for file in photos[person]["held_out"].values()] for person in people]
        known = F.normalize(torch.stack([_embed(extractor, files).nanmean(dim=0) for files in galleries]), dim=1)
        with (folder / "scores.csv").open(encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["person"] in photos]
        for name in dict.fromkeys(row["row"] for row in rows):
            own = [row for row in rows if row["row"] == name]
            drawn = _embed(extractor, [folder / row["image"] for row in own])
            missing = drawn.isnan().any(dim=1)
            nearest = (drawn.nan_to_num() @ known.T).argmax(dim=1)
            shown = [row["person"] for row in own]
            right = [not gone and people[n] == who for gone, n, who in zip(missing, nearest, shown, strict=True)]
            score = person_mean(right, shown)
            print(f"{folder} {name}: rank-1 {format_score(score)} of {len(people)} people, N = {len(own)}, ", end="")
            print(f"without a face {float(missing.float().mean()):.3f}")


def _embed(extractor: Dlib, files: Sequence[Path]) -> Tensor:
    """Return the embeddings of images in files, (n, 128); rows of NaN where no face was found."""
    found = [extractor.extract(to_tensor([Image.open(file).convert("RGB")])).embedding for file in files]
    return torch.cat([one for one in found if one is not None])


if __name__ == "__main__":
    main()
