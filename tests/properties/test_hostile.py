"""Files from strangers are read, or refused by name; nothing in them is run, and nothing is fetched."""

import json
import os
import pickle
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import config_args, refusal
from resuming import METHOD, ROOT, run, score_by, write_config
from transformers import AutoModel

from lit_multiip.backbone.components import BackboneError
from lit_multiip.backbone.ip_adapter import read_ip_adapter
from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.backbone.sampler import Sampler, Sampling
from lit_multiip.backbone.store import Shards
from lit_multiip.data.photos import DataError
from lit_multiip.evaluation.vision import _load
from lit_multiip.resume import DurableCheckpointIO
from lit_multiip.runs import CheckpointError, read_checkpoint


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def harm(tmp_path):
    """What appears if anything is run."""
    return tmp_path / "harm"


def legacy(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def bare(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize("save", [torch.save, legacy, bare])
@pytest.mark.parametrize("read", [read_checkpoint, DurableCheckpointIO().load_checkpoint])
def test_a_checkpoint_with_a_payload_is_refused_without_running_it(save, read, harm, tmp_path):
    save({"state_dict": {}, "global_step": 1, "x": Payload(harm)}, tmp_path / "evil.ckpt")
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "evil.ckpt"))):
        read(tmp_path / "evil.ckpt")
    assert not harm.exists()


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_no_command_takes_a_payload_for_a_checkpoint(command, harm, tiny_backbone, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path / "tiny.yaml", tiny_backbone, tmp_path / "features")
    torch.save({"state_dict": {}, "x": Payload(harm)}, "evil.ckpt")
    for path in ("evil.ckpt", "https://example.org/evil.ckpt"):
        assert path in refusal(capsys, command, *config_args(METHOD, config), "--ckpt_path", path, code=None)
    assert not harm.exists()


@pytest.mark.parametrize(
    ("save", "said"), [(torch.save, r"' holds the pickled object '\w+\.mkdir'.*refused"), (legacy, ""), (bare, "")]
)
def test_an_adapter_with_a_payload_is_refused_without_running_it(save, said, harm, tmp_path):
    save({"image_proj": {}, "ip_adapter": {}, "x": Payload(harm)}, tmp_path / "evil.bin")
    with pytest.raises(BackboneError, match=rf"evil\.bin{said}"):
        read_ip_adapter(str(tmp_path / "evil.bin"))
    assert not harm.exists()


def test_a_feature_cache_with_a_payload_is_refused_without_running_it(harm, tmp_path):
    rows = np.empty(1, dtype=object)
    rows[0] = Payload(harm)
    np.save(tmp_path / "evil.npy", rows, allow_pickle=True)
    (tmp_path / "evil.json").write_text(json.dumps(["key"]))
    with pytest.raises(DataError, match=r"evil' is broken .*: delete it"):
        Shards(tmp_path).refresh()
    assert not harm.exists()


@pytest.mark.parametrize(
    "name", ["../outside.jpg", "/etc/passwd", "a/../../outside.jpg", "..\\outside.jpg", "C:\\x.jpg"]
)
@pytest.mark.parametrize("file", ["metadata.csv", "metadata.jsonl"])
def test_metadata_that_climbs_out_of_its_folder_is_refused(name, file, tmp_path, capsys):
    photos = tmp_path / "photos" / "Ann"
    photos.mkdir(parents=True)
    (photos / "1.jpg").write_bytes(b"")
    row = {"file_name": name, "text": "a photo"}
    text = json.dumps(row) if file.endswith("l") else f'file_name,text\n"{name}",a photo\n'
    (photos / file).write_text(text)
    assert "which lies outside" in refusal(capsys, "caption", "--photos", str(photos.parent))


EVIL = """
import os
os.mkdir({!r})
class Evil:
    pass
"""


def test_code_inside_a_backbone_is_never_run(tiny_backbone, harm, tmp_path):
    folder = tmp_path / "backbone"
    shutil.copytree(tiny_backbone, folder)
    for place in ("pipeline.py", "unet/evil.py", "image_encoder/evil.py", "evil.py"):
        (folder / place).write_text(EVIL.format(str(harm)))
    config = json.loads((folder / "image_encoder" / "config.json").read_text())
    kinds = dict.fromkeys(("AutoModel", "AutoConfig", "CLIPVisionModelWithProjection"), "evil.Evil")
    (folder / "image_encoder" / "config.json").write_text(json.dumps({**config, "auto_map": kinds}))
    index = json.loads((folder / "model_index.json").read_text())
    for change in ({"_class_name": ["pipeline", "Evil"]}, {"unet": ["evil", "Evil"]}, {"vae": ["evil", "Evil"]}):
        (folder / "model_index.json").write_text(json.dumps({**index, **change}))
        for name in ("unet", "image_encoder", "vae"):
            try:
                Backbone(str(folder)).load(name)
            except BackboneError as error:
                assert name in str(error) or str(folder) in str(error)
        with suppress(ValueError, OSError):
            Sampler(Backbone(str(folder)), Backbone(str(tiny_backbone)).load("unet"), Sampling())
    assert not harm.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def test_attention_that_a_model_names_on_the_hub_is_not_fetched(key, tiny_backbone, tmp_path):
    folder = tmp_path / "backbone"
    shutil.copytree(tiny_backbone, folder)
    for name in ("image_encoder", "text_encoder"):
        file = folder / name / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), key: "kernels-community/evil"}))
        assert Backbone(str(folder)).load(name).config._attn_implementation == "sdpa"
    _, encoder = Backbone(str(tiny_backbone), str(folder / "image_encoder")).load_image_encoder()
    assert encoder.config._attn_implementation == "sdpa"
    assert _load(AutoModel, str(folder / "image_encoder")).config._attn_implementation == "eager"


def test_code_of_strangers_is_trusted_nowhere():
    for file in (ROOT / "lit_multiip").rglob("*.py"):
        text = file.read_text()
        assert not re.search(r"trust_remote_code\s*=\s*True|weights_only\s*=\s*False|allow_pickle\s*=\s*True", text), (
            file
        )


def test_nothing_is_fetched_that_no_config_names(tiny_backbone, random_critic, tmp_path):
    """Neither ``fit`` nor ``test`` so much as looks up an address."""
    score = score_by(random_critic)
    config = write_config(tmp_path / "tiny.yaml", tiny_backbone, tmp_path / "features", score=score)
    work = tmp_path / "work"
    for args in (["fit", "--trainer.max_steps=1", "--config", str(METHOD), "--config", str(config)], ["test"]):
        command = run(work, *args, watched=True)
        assert command.code == 0, command.said()
        assert (work / "asked_0.txt").read_text() == ""
