"""The shipped configs of SDXL and SD2.1 train, test and export, on backbones of their kind."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from tiny import make_tiny_backbone

from lit_multiip.__main__ import main
from lit_multiip.backbone.ip_adapter import ip_adapter_parameters, read_ip_adapter
from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.methods.adapter import MultiIPAdapter

CONFIGS = Path(__file__).parents[2] / "configs"


def small(backbone: Path, **more: Any) -> dict[str, Any]:
    """What is smaller here than in the shipped config: people, sizes and steps."""
    people = {"train": 2, "validation": 2, "test": 2, "photos": 11}
    return {
        "backbone": {"path": str(backbone), "image_encoder": None, "published_adapter": None, "image_side": 32},
        "trainer": {"max_steps": 2, "val_check_interval": 2, "enable_progress_bar": False, "accelerator": "cpu"},
        "model": {"init_args": {"sampling": {"steps": 2}, **more}},
        "data": {
            "source": {"class_path": "lit_multiip.data.MiniFaces", "init_args": people},
            "batch_size": 4,
            "held_out": 1,
            "validation_held_out": 1,
        },
        "grid": {"people": 1},
    }


@pytest.mark.parametrize("kind", ["sdxl", pytest.param("sd21", marks=pytest.mark.slow)])
def test_fit_test_and_export_by_the_shipped_config(kind, tiny_sdxl, random_critic, tmp_path, monkeypatch):
    backbone = tiny_sdxl
    if kind == "sd21":
        backbone = make_tiny_backbone(tmp_path / "sd21", prediction_type="v_prediction")
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(yaml.safe_dump(small(backbone)))
    score = {"extractors": [{"class_path": "lit_multiip.evaluation.critic.CriticExtractor"}]}
    score["extractors"][0]["init_args"] = {"folder": str(random_critic)}
    anchors = kind == "sdxl"
    Path("score.yaml").write_text(yaml.safe_dump({"score": {**score, "anchors": anchors}}))
    configs = [CONFIGS / "self_attn.yaml", CONFIGS / "on" / f"{kind}.yaml", "small.yaml"]
    main(["fit", *(part for config in configs for part in ("--config", str(config)))])
    run = Path("runs/self_attn/version_0")
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["trainer"]["precision"] == "bf16-mixed" and saved["model"]["init_args"]["gradient_checkpointing"]
    assert list((run / "grids").glob("*.png"))
    weights = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert {value.dtype for value in weights.values()} == {torch.float32}

    main(["test", "--run", str(run), "--config", "score.yaml"])
    rows = json.loads((run / "test" / "metrics.json").read_text())["rows"]
    assert {"SelfAttention", *(["no_references", "vae_round_trip"] if anchors else [])} <= set(rows)

    main(["export", "--run", str(run), "--output", "out", "--model.sampling.steps", "2"])
    weights = load_file("out/ip-adapter_multiip.safetensors")
    assert weights["image_proj.proj.weight"].shape == (4 * 32, 24) and "aggregator.to_q.weight" in weights
    if kind == "sdxl":
        pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
        pipe.load_ip_adapter(
            "out", subfolder="", weight_name="ip-adapter_multiip.safetensors", image_encoder_folder=None
        )
        assert "StableDiffusionXLPipeline.from_pretrained" in Path("out/README.md").read_text()


@pytest.mark.parametrize("lora_rank", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_dreambooth_learns_a_person_and_draws_them_by_the_shipped_config(lora_rank, tiny_sdxl, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"steps": 2, "class_images": 2, "identifier": "k", "lora_rank": lora_rank, "tuned": "unet+text"}
    options |= {"lr_warmup_steps": 0}  # the backbone asks for 100
    Path("small.yaml").write_text(yaml.safe_dump(small(tiny_sdxl, **options)))
    configs = [CONFIGS / "dreambooth.yaml", CONFIGS / "on" / "sdxl.yaml", "small.yaml"]
    args = [part for config in configs for part in ("--config", str(config))]
    main(["fit", *args, "--data.person", "test_000000", "--trainer.max_steps", "-1", "--grid.people", "0"])
    run = Path("runs/dreambooth/version_0")
    weights = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert {name.split(".")[0] for name in weights} == {"unet", "text_encoder", "text_encoder_2"}
    main(["predict", "--run", str(run), "--prompts", "a person", "--seeds", "0"])
    assert len(list(run.glob("predict/*/*seed0.png"))) == 1


@pytest.mark.parametrize("file", ["ip-adapter_sdxl_vit-h.safetensors", "ip-adapter_sdxl_vit-h.bin"])
def test_a_published_adapter_of_sdxl_is_what_training_starts_from(file, tiny_sdxl, tmp_path):
    """In the layout of h94/IP-Adapter: flat keys in .safetensors, two dictionaries in .bin."""
    state = read_ip_adapter(str(tiny_sdxl / "ip_adapter" / "ip_adapter.safetensors"))
    generator = torch.Generator().manual_seed(0)
    state = {s: {k: torch.randn(v.shape, generator=generator) for k, v in part.items()} for s, part in state.items()}
    flat = {f"{section}.{key}": value for section, part in state.items() for key, value in part.items()}
    if file.endswith(".bin"):
        torch.save(state, tmp_path / file)
    else:
        save_file(flat, tmp_path / file)
    model = MultiIPAdapter(Backbone(str(tiny_sdxl), published_adapter=str(tmp_path / file)))
    model.configure_model()
    own = ip_adapter_parameters(model.unet)
    assert own.keys() == flat.keys() and all(torch.equal(own[key], value) for key, value in flat.items())
