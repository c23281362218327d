"""NaN and infinity are caught at the step that they appear in, by name, and the last good state is kept."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import refusal
from resuming import METHOD, run_of, state_of, write_config

from lit_multiip.__main__ import main
from lit_multiip.data import MiniFaces
from lit_multiip.methods.adapter import MultiIPAdapter

PERSON = "train_000001"


@pytest.fixture
def args(tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = {"val_check_interval": 1, "max_steps": 20}
    config = write_config(tmp_path / "tiny.yaml", tiny_backbone, tmp_path / "features", trainer=trainer)
    return ["fit", "--config", str(METHOD), "--config", str(config)]


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
def test_a_stored_feature_that_is_not_finite_is_named(kind, what, value, args, tmp_path, capsys):
    main([*args, "--trainer.max_steps=1"])
    person = next(one for one in MiniFaces(train=3, photos=11).people() if one.name == PERSON)
    for photo in person.photos:  # whichever is drawn
        spoil(tmp_path / "features", kind, photo.content_key(), value)
    message = refusal(capsys, *args, "--ckpt_path", "last")
    assert f"the stored {what} of {PERSON}/" in message and "delete data.cache_dir" in message
    step = int(message.split("at step ")[1].split(":")[0])
    kept = state_of(run_of(tmp_path))
    assert kept["global_step"] == step  # the very step before it
    assert all(weights.isfinite().all() for weights in kept["state_dict"].values())


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(accumulated, args, tmp_path, capsys, monkeypatch):
    plain, seen = MultiIPAdapter.training_step, []

    def broken(self, batch, batch_idx):
        seen.append(batch["photo"])
        loss = plain(self, batch, batch_idx)
        if self.global_step == 3:  # whose value is finite, and whose gradient is not
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    monkeypatch.setattr(MultiIPAdapter, "training_step", broken)
    message = refusal(capsys, *args, f"--trainer.accumulate_grad_batches={accumulated}")
    assert "is not finite at step 3, in a batch of " in message
    assert all(name in message for name in seen[3 * accumulated][:1])
    kept = state_of(run_of(tmp_path))
    assert kept["global_step"] == 3
    assert all(weights.isfinite().all() for weights in kept["state_dict"].values())


def test_a_loss_that_is_not_finite_names_its_sample(args, capsys, monkeypatch):
    plain, seen = MultiIPAdapter.prediction_error, []
    step = MultiIPAdapter.training_step

    def broken(self, *given):
        error = plain(self, *given)
        return torch.where(torch.arange(len(error)) == 2, float("nan"), error) if self.training else error

    def watched(self, batch, batch_idx):
        seen.append(batch["photo"])
        return step(self, batch, batch_idx)

    monkeypatch.setattr(MultiIPAdapter, "prediction_error", broken)
    monkeypatch.setattr(MultiIPAdapter, "training_step", watched)
    message = refusal(capsys, *args)
    assert f"the loss is nan at step 0, of {seen[0][2]}: lower the learning rate" in message
