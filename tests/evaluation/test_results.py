import json
from pathlib import Path

import numpy as np
import pytest

from lit_multiip.evaluation.results import paired, read_features, write_features
from lit_multiip.evaluation.summaries import ImageSet


def images(shift: float) -> ImageSet:
    rng = np.random.default_rng(0)
    people = np.repeat([f"p{i}" for i in range(10)], 4)
    score = rng.random(40) + shift
    return ImageSet(people, rng.normal(size=(40, 4)), rng.normal(size=(40, 5)), {"identity_held_out": score})


def folder(path: Path, shift: float, sha256: str = "a") -> Path:
    path.mkdir()
    write_features(path / "features_critic.safetensors", images(shift), images(0))
    content = {"protocol": {"people": 10, "held_out": 40, "seeds": 1, "references": 9, "sha256": sha256}}
    content |= {"rows": {"SelfAttention": {}}, "extractors": {}, "describe": {"method": "SelfAttention"}}
    (path / "metrics.json").write_text(json.dumps(content))
    return path


def test_what_an_extractor_saw_reads_back_as_it_was(tmp_path: Path) -> None:
    write_features(tmp_path / "f.safetensors", images(0.5), images(0))
    generated, held_out = read_features(tmp_path / "f.safetensors")
    assert np.array_equal(generated.features, images(0.5).features) and len(np.unique(held_out.people)) == 10
    assert np.array_equal(generated.per_image["identity_held_out"], images(0.5).per_image["identity_held_out"])


def test_a_constant_shift_is_the_paired_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paired(str(folder(tmp_path / "a", 0.25)), str(folder(tmp_path / "b", 0.0)))
    [line] = [line for line in capsys.readouterr().out.splitlines() if "identity_held_out" in line]
    assert "0.250 [0.250, 0.250]" in line


def test_other_protocols_and_folders_without_a_test_are_refused(tmp_path: Path) -> None:
    a, b = folder(tmp_path / "a", 0.0), folder(tmp_path / "b", 0.0, sha256="b")
    with pytest.raises(ValueError, match="different protocols"):
        paired(str(a), str(b))
    with pytest.raises(FileNotFoundError, match=r"no metrics\.json"):
        paired(str(a), str(tmp_path))
