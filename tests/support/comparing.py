"""A folder of tests as `compare` leaves it, with pictures and features made of random numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lit_multiip.evaluation import results as report
from lit_multiip.evaluation.summaries import ImageSet, summarise

PAPER = {"ip_adapter": "IP-Adapter", "avg_pool": "Average Pooling", "self_attn": "Self-Attention"}


def write_test(
    folder: Path,
    method: str,
    shift: float = 0.0,
    seed: int = 0,
    people: int = 6,
    held_out: int = 2,
    extractors: Sequence[str] = ("critic",),
    width: int = 4,
    sha256: str = "a" * 64,
    side: int = 8,
    anchors: bool = False,
    missing_faces: int = 0,
    **facts: Any,
) -> None:
    """One test of random images; `shift` is added to identity and to all features, and `seed` is the training's."""
    folder.mkdir(parents=True)
    rng, training = np.random.default_rng(0), np.random.default_rng(seed + 1)
    tasks = [(f"p{i}", f"photo_{j}.jpg") for i in range(people) for j in range(held_out)]
    names, n = np.array([person for person, _ in tasks]), len(tasks)
    rows: dict[str, Any] = {method: {}}
    cells: list[dict[str, Any]] = [{} for _ in tasks]
    for extractor in extractors:
        real = ImageSet(names, rng.normal(size=(n, width)))
        noise = training.normal(scale=0.1, size=n)
        identity, prompt = rng.random(n) + shift + noise, rng.random(n)
        identity[:missing_faces] = np.nan
        scores = {"identity_held_out": identity, "identity_references": identity / 2, "prompt": prompt}
        features = rng.normal(size=(n, width)) + 0.5 * shift + 0.1 * training.normal(size=(n, width))
        made = ImageSet(names, features, rng.normal(size=(n, 5)) + noise[:, None], scores)
        report.write_features(folder / f"features_{extractor}.safetensors", made, real)
        rows[method] |= _dicts(summarise(extractor, made, real, groups=3, resamples=20, left_out={}))
        if anchors:
            for anchor in ("no_references", "vae_round_trip"):
                rows.setdefault(anchor, {}).update(rows[method])
        for cell, value in zip(cells, identity, strict=True):
            cell[f"identity_held_out/{extractor}"] = float(value)
    lines, photos = [], {}
    for (person, photo), cell in zip(tasks, cells, strict=True):
        image = f"images/{person}/{Path(photo).stem}_s0.png"
        place = f"photos/{person}"
        own = photos.setdefault(
            person, {"references": [f"{place}/reference_{i + 1}.png" for i in range(4)], "held_out": {}}
        )
        own["held_out"][photo] = f"{place}/held_out_{Path(photo).stem}.png"
        for file in (image, *own["references"], own["held_out"][photo]):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, size=(side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / file)
        scene = {"person": person, "held_out": photo, "prompt": "a photo of a person, in a red shirt", "seed": 1}
        lines.append({"row": method, **scene, "image": image, **cell})
    report.write_csv(folder / "scores.csv", lines)
    protocol = {"people": people, "tasks": n, "held_out": n, "references": 4, "seeds": 1, "sha256": sha256}
    describe = {"method": method, "backbone": "mini", "image_side": side, "trained_parameters": 1234567}
    kinds = {name: {"num_features": width, "num_classes": 5, "source": f"weights/{name}"} for name in extractors}
    seconds = {"method": 2.0 * n, "anchors": 0.0, "scoring": 1.0}
    content = {"protocol": protocol, "rows": rows, "extractors": kinds, "describe": describe, "seconds": seconds}
    content |= {"versions": {"torch": "2"}, "commit": "c" * 40, "photos": photos}
    content["seconds"] |= facts.pop("seconds", {})
    report.write_json(folder / "metrics.json", content | facts)


def write_plan(folder: Path, versions: Mapping[str, Sequence[str]], **changes: Any) -> None:
    """A plan of rows by key; the paper's are of PAPER, others are controls."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "key": key,
            "title": PAPER.get(key, f"Control {key}"),
            "group": "paper" if key in PAPER else "control",
            "trained": key not in ("ip_adapter", "avg_pool"),
            "paper": {"is": 15.37, "fid": 8.92} if key in PAPER else None,
            "versions": list(names),
        }
        for key, names in versions.items()
    ]
    plan = {"title": "Five methods & their controls", "reference": "self_attn", "rows": rows}
    contrast = {"title": "more photos", "minus": ["avg_pool", "ip_adapter"], "text": "Nine against one."}
    (folder / "plan.json").write_text(json.dumps(plan | {"contrasts": [contrast]} | changes))


def write_comparison(folder: Path, **options: Any) -> Path:
    """Three rows of the paper's, Self-Attention trained twice, and a control."""
    versions = {"ip_adapter": ["version_0"], "avg_pool": ["version_0"], "self_attn": ["version_0", "version_1"]}
    write_plan(folder, versions | {"avg_pool_trained": ["version_0"]})
    write_test(folder / "ip_adapter/version_0/test", "First", 0.0, **options)
    write_test(folder / "avg_pool/version_0/test", "AvgPool", 0.1, **options)
    write_test(folder / "avg_pool_trained/version_0/test", "AvgPool", 0.2, **options)
    for seed in (0, 1):
        write_test(folder / f"self_attn/version_{seed}/test", "SelfAttention", 0.4, seed, anchors=seed == 0, **options)
    return folder


def _dicts(scores: Mapping[str, Any]) -> dict[str, Any]:
    return {key: score._asdict() for key, score in scores.items()}
