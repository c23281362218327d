from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Of this process and of those that it starts, before torch is imported: two processes of two threads on two cores are
# several times slower than two of one, and a number does not depend on how many workers there are.
os.environ.setdefault("OMP_NUM_THREADS", "1")
MOST_WORKERS = 8  # each has imported torch and all tests, and takes 1 to 2 GB


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A worker a core; none for the tests of one file, nor where one looks on: `-s`, `--trace` (`--pdb`: xdist)."""
    files = {arg.split("::")[0] for arg in config.args}
    if config.option.capture == "no" or config.option.trace or (len(files) == 1 and Path(*files).is_file()):
        return 0
    return min(count_cores(), MOST_WORKERS)


def count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.fixture(autouse=True)
def own_process_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command line sets argv, log handlers and Lightning's seeds; no test sees those of another."""
    monkeypatch.setattr(sys, "argv", ["pytest"])
    yield
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)
    package = logging.getLogger("lit_multiip")
    package.handlers.clear()  # they hold the stderr of this test
    package.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone of random weights at 32 px, with an adapter."""
    from tiny import make_tiny_backbone

    return make_tiny_backbone(tmp_path_factory.mktemp("tiny") / "backbone", ip_adapter=True)


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SDXL-like backbone of random weights at 32 px, with an adapter."""
    from tiny import make_tiny_backbone

    return make_tiny_backbone(tmp_path_factory.mktemp("tiny") / "sdxl", ip_adapter=True, sdxl=True)


@pytest.fixture(scope="session")
def random_critic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A critic that knows nothing."""
    import torch

    from lit_multiip.evaluation.critic import Critic

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Critic("convnet", 5).save(folder := tmp_path_factory.mktemp("tiny") / "critic")
    return folder


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Random weights in the layout of torch-fidelity's file."""
    import torch
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *_, **__: None)
        torch.save(fidelity.FeatureExtractorInceptionV3("random", ["2048"]).state_dict(), path)
    return str(path)
