"""NaN and infinity are caught at the step that they appear in, by name, and the last good state is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from resuming import METHOD, run_of, state_of, write_config

from lit_multiip.__main__ import main
from lit_multiip.data import MiniFaces
from lit_multiip.methods.adapter import MultiIPAdapter

PERSON = "train_000001"


@pytest.fixture
def args(tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    trainer = {"val_check_interval": 1, "max_steps": 20}
    config = write_config(tmp_path / "tiny.yaml", tiny_backbone, tmp_path / "features", trainer=trainer)
    return ["fit", "--config", str(METHOD), "--config", str(config)]


def error_of(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(args)
    assert exit_.value.code == 1
    return capsys.readouterr().err.strip().splitlines()[-1]


def spoil(features: Path, kind: str, key: str, value: float) -> None:
    """Write ``value`` into a stored row."""
    for index in features.glob(f"{kind}-*/*.json"):
        keys = json.loads(index.read_text())
        if key in keys:
            rows = np.load(index.with_suffix(".npy"))
            rows[keys.index(key)].flat[3] = value
            np.save(index.with_suffix(".npy"), rows)
            return
    raise AssertionError(key)


@pytest.mark.parametrize(("kind", "what", "value"), [("latent", "moments", np.nan), ("embeds", "references", np.inf)])
def test_a_stored_feature_that_is_not_finite_is_named(
    kind: str, what: str, value: float, args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*args, "--trainer.max_steps=1"])
    person = next(one for one in MiniFaces(train=3, photos=11).people() if one.name == PERSON)
    for photo in person.photos:  # whichever is drawn
        spoil(tmp_path / "features", kind, photo.content_key(), value)
    message = error_of([*args, "--ckpt_path", "last"], capsys)
    assert f"the stored {what} of {PERSON}/" in message and "delete data.cache_dir" in message
    step = int(message.split("at step ")[1].split(":")[0])
    kept = state_of(run_of(tmp_path))
    assert kept["global_step"] == step  # the very step before it
    assert all(weights.isfinite().all() for weights in kept["state_dict"].values())


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(
    accumulated: int, args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    plain, seen = MultiIPAdapter.training_step, []

    def broken(self: MultiIPAdapter, batch: Any, batch_idx: int) -> torch.Tensor:
        seen.append(batch["photo"])
        loss = plain(self, batch, batch_idx)
        if self.global_step == 3:  # whose value is finite, and whose gradient is not
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    monkeypatch.setattr(MultiIPAdapter, "training_step", broken)
    message = error_of([*args, f"--trainer.accumulate_grad_batches={accumulated}"], capsys)
    assert "is not finite at step 3, in a batch of " in message
    assert all(name in message for name in seen[3 * accumulated][:1])
    kept = state_of(run_of(tmp_path))
    assert kept["global_step"] == 3
    assert all(weights.isfinite().all() for weights in kept["state_dict"].values())


def test_a_loss_that_is_not_finite_names_its_sample(args: list[str], capsys: Any, monkeypatch: Any) -> None:
    plain, seen = MultiIPAdapter.denoising_loss, []
    step = MultiIPAdapter.training_step

    def broken(self: MultiIPAdapter, *given: Any) -> torch.Tensor:
        error = plain(self, *given)
        return torch.where(torch.arange(len(error)) == 2, float("nan"), error) if self.training else error

    def watched(self: MultiIPAdapter, batch: Any, batch_idx: int) -> torch.Tensor:
        seen.append(batch["photo"])
        return step(self, batch, batch_idx)

    monkeypatch.setattr(MultiIPAdapter, "denoising_loss", broken)
    monkeypatch.setattr(MultiIPAdapter, "training_step", watched)
    message = error_of(args, capsys)
    assert f"the loss is nan at step 0, of {seen[0][2]}: lower the learning rate" in message
