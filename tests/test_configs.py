"""Every shipped config parses; overlays set keys of their own, and of two that set the same the later one wins."""

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import config_args, printed_config
from jsonargparse import ArgumentParser

from lit_multiip.data.captions import TEMPLATE
from lit_multiip.methods.adapter import MultiIPAdapter
from lit_multiip.methods.aggregators import Aggregator
from lit_multiip.methods.dreambooth import DreamBooth

ROOT = Path(__file__).parents[1]
METHODS = sorted((ROOT / "configs").glob("*.yaml"))
CHOSEN = ("dreambooth", "self_attn")
ADAPTERS = [path for path in METHODS if path.stem != "dreambooth"]
CLASSES = [MultiIPAdapter, DreamBooth]
DATA = sorted((ROOT / "configs" / "data").glob("*.yaml"))
ON = [path for path in sorted((ROOT / "configs" / "on").glob("*.yaml")) if "dreambooth" not in path.stem]
ON_DREAMBOOTH = sorted((ROOT / "configs" / "on").glob("*_dreambooth.yaml"))
SCORE = sorted((ROOT / "configs" / "score").glob("*.yaml"))
WITH = sorted((ROOT / "configs" / "with").glob("*.yaml"))
OTHERS = [ROOT / "lit_multiip" / "mini" / "ip_adapter.yaml"]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parsed(capsys: pytest.CaptureFixture[str], command: str, *configs: Path) -> dict[str, Any]:
    return printed_config(capsys, command, *config_args(*configs))


@pytest.mark.parametrize("config", [*METHODS, *DATA, *ON, *ON_DREAMBOOTH, *SCORE, *WITH, *OTHERS], ids=name)
def test_every_config_parses_for_a_test(config, capsys):
    """For a fit, tests/test_golden.py compares every value."""
    values = parsed(capsys, "test", config)
    assert config not in METHODS or values["trainer"]["logger"]["init_args"]["name"] == config.stem


@pytest.mark.parametrize("overlay", [*DATA, *ON, *SCORE, *WITH], ids=name)
def test_an_adapters_file_and_an_overlay_set_keys_of_their_own(overlay, capsys):
    one, two = (parsed(capsys, "fit", *order) for order in permutations([ROOT / "configs" / "max_pool.yaml", overlay]))
    assert one == two


def test_of_two_overlays_that_set_the_same_the_later_one_wins(tmp_path, capsys):
    mine, sd15 = tmp_path / "mine.yaml", ROOT / "configs" / "on" / "sd15.yaml"
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-5}}
    own = {
        "trainer": {"max_steps": 100, "precision": "32-true"},
        "model": {"init_args": {"optimizer": optimizer}},
        "data": {"batch_size": 2},
    }
    mine.write_text(yaml.safe_dump(own))

    def chosen(*configs):
        values = parsed(capsys, "fit", ROOT / "configs" / "self_attn.yaml", *configs)
        lr = values["model"]["init_args"]["optimizer"]["init_args"]["lr"]
        assert values["backbone"]["init_args"]["path"].startswith("stable-diffusion-v1-5/")
        return values["trainer"]["max_steps"], values["trainer"]["precision"], lr, values["data"]["batch_size"]

    assert chosen(sd15, mine) == (100, "32-true", 1e-5, 2)
    assert chosen(mine, sd15) == (20000, "bf16-mixed", 1e-4, 8)


@pytest.mark.parametrize("overlay", ON_DREAMBOOTH, ids=name)
def test_a_backbone_has_values_of_its_own_for_dreambooth(overlay, capsys):
    method, on = ROOT / "configs" / "dreambooth.yaml", overlay.with_name(overlay.name.replace("_dreambooth", ""))
    one, two = (parsed(capsys, "fit", *order, overlay) for order in permutations([method, on]))
    assert one == two
    args, text = one["model"]["init_args"], overlay.read_text()
    assert args["optimizer"]["init_args"]["lr"] == (1e-4 if args["lora_rank"] else 5e-6)
    assert all(line.startswith("# ") for line in text.splitlines()[:3])
    assert all(path.stem in text for path in (method, on, overlay))


def test_classes_are_called_by_their_names(tmp_path, capsys):
    written = "\n".join(path.read_text() for path in [*METHODS, *DATA, *ON, *SCORE, *WITH, *OTHERS])
    assert "class_path: lit_multiip" not in written
    values = parsed(capsys, "test", ROOT / "configs" / "self_attn.yaml", DATA[1], SCORE[0])
    classes = [values["model"], values["model"]["init_args"]["aggregator"], values["data"]["source"]]
    found = [value["class_path"].rpartition(".")[2] for value in (*classes, *values["score"]["extractors"])]
    assert found == ["MultiIPAdapter", "SelfAttention", "Folder", "Inception", "SFace", "CLIP", "DINO"]


@pytest.mark.parametrize("stem", CHOSEN)
def test_a_backbone_data_and_a_method_in_any_order(stem, tmp_path, capsys):
    backbone = tmp_path / "on.yaml"
    backbone.write_text(
        "backbone: {path: org/name, image_side: 512}\ntrainer: {precision: 16-mixed}\n"
        "model: {init_args: {frozen_dtype: bfloat16, gradient_checkpointing: true, sampling: {steps: 30}}}\n"
    )
    method = ROOT / "configs" / f"{stem}.yaml"
    orders = list(permutations([method, ROOT / "configs" / "data" / "folder.yaml", backbone]))
    results = [parsed(capsys, "fit", *order) for order in orders]
    assert all(result == results[0] for result in results)
    assert results[0]["backbone"]["init_args"]["path"] == "org/name" and results[0]["data"]["source"][
        "class_path"
    ].endswith("Folder")
    # no class is named there: whichever method it is takes them
    model, own = results[0]["model"], yaml.safe_load(method.read_text())["model"]
    assert model["class_path"].endswith(f".{own['class_path']}")
    assert model["init_args"]["frozen_dtype"] == "bfloat16" and model["init_args"]["gradient_checkpointing"]
    assert model["init_args"]["sampling"]["steps"] == 30
    for key, value in own["init_args"].items():
        assert isinstance(value, dict) or model["init_args"][key] == value


def test_a_config_of_a_method_writes_out_where_its_defaults_are_not_the_first_methods():
    """Or naming another class would silently keep the first one's values: jsonargparse does not reset them."""

    def defaults(cls):
        parser = ArgumentParser()
        parser.add_class_arguments(cls, "method")
        return {name: str(value) for name, value in parser.get_defaults().method.as_dict().items()}

    first, second = map(defaults, CLASSES)
    differing = {name for name in first.keys() & second.keys() if first[name] != second[name]}
    assert len(first.keys() & second.keys()) == 11 and differing == {"optimizer", "lr_schedule", "snr_gamma"}
    written = yaml.safe_load((ROOT / "configs" / "dreambooth.yaml").read_text())["model"]["init_args"]
    assert differing <= written.keys()


def test_a_method_without_its_config_has_its_own_defaults(capsys):
    options = ["--model", "DreamBooth", "--model.steps", "7", "--model.sampling.steps", "3"]
    args = printed_config(capsys, "test", *options)["model"]["init_args"]
    assert args["steps"] == 7 and args["sampling"]["steps"] == 3 and args["prior_weight"] == 0.0
    assert "aggregator" not in args


@pytest.mark.parametrize("config", [*METHODS, *DATA, *ON, *ON_DREAMBOOTH, *WITH, *OTHERS], ids=name)
def test_a_config_says_first_what_it_is_for(config):
    lines = config.read_text().splitlines()
    assert lines[0].startswith("# ") and len(lines) <= 35
    assert max(map(len, lines)) <= 130


def test_methods_differ_in_what_distinguishes_them_alone():
    for path in ADAPTERS:
        values = yaml.safe_load(path.read_text())
        aggregator = values["model"]["init_args"].pop("aggregator")
        rest = {"logger": {"init_args": {"name": path.stem}}}, {"class_path": "MultiIPAdapter", "init_args": {}}
        assert (values.pop("trainer"), values.pop("model")) == rest and values == {}
        assert aggregator["class_path"] in {cls.__name__ for cls in Aggregator.__subclasses__()}


def test_an_option_of_the_default_source_needs_no_class_path(capsys):
    def source(*args):
        return printed_config(capsys, "fit", *args)["data"]["source"]

    assert source()["class_path"] == "lit_multiip.MiniFaces"
    option = ("--data.source.init_args.train", "20")
    assert source(*option)["init_args"]["train"] == 20
    folder = source(*option, *config_args(ROOT / "configs" / "data" / "folder.yaml"))
    assert folder == {"class_path": "lit_multiip.Folder", "init_args": {"path": "photos", "template": TEMPLATE}}
