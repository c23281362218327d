"""The benchmarks run, on a tiny backbone; what they measure is for `python tests/benchmarks` to say."""

import importlib
import math
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "benchmarks"


@pytest.fixture
def cases(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.chdir(tmp_path)
    return importlib.import_module("cases")


@pytest.fixture
def tiny(cases, tiny_backbone, tmp_path):
    return cases.Size("tiny", str(tiny_backbone), 32, 4, "float32", 3, 2, 2, 2, 16, tmp_path / "cache")


def test_a_step_of_the_miniature_does_the_floors_arithmetic(cases, tmp_path):
    rows = cases.flops(cases.mini(tmp_path))
    work = {row["what"].removeprefix("GFLOP a sample, 64 px: "): row["gflop"] for row in rows}
    step, floor = work["step on stored features"], work["floor: UNet forward and backward"]
    assert floor < step < 1.001 * floor


def test_steps_and_batches_are_measured_beside_their_references(cases, tiny):
    rows = {row["what"]: row for case in (cases.training, cases.generation, cases.features) for row in case(tiny)}
    for name, repeats in {"step cached / floor": 3, "predict / diffusers by hand": 2}.items():
        row = rows[name]
        assert row["repeats"] == repeats and row["peak_mib"] > 100 and row["reference_peak_mib"] > 100
        assert math.isfinite(row["ratio"]) and row["quartiles"][0] <= row["ratio"] <= row["quartiles"][1]
    assert 0 < rows["the UNet's share of predict"]["ratio"] < 1
    assert rows["features of 4 photos / encoders alone"]["repeats"] == 3
