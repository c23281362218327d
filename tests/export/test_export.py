"""What leaves the project: plain diffusers draws the same from it, and it comes back as it was."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from commands import refusal
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from run_folder import PEOPLE, write_run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_multiip.__main__ import Commands, CommandTrainer
from lit_multiip.backbone.components import BackboneError
from lit_multiip.backbone.encoders import PhotoEncoder
from lit_multiip.backbone.ip_adapter import read_ip_adapter
from lit_multiip.backbone.lora import LORA_FILE
from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.backbone.sampler import Sampling
from lit_multiip.callbacks import RecordPeople
from lit_multiip.data.people import MiniFaces
from lit_multiip.data.record import RECORD as TRAINED_ON
from lit_multiip.data.record import digests_in, is_incomplete, training_record
from lit_multiip.data.tasks import make_tasks
from lit_multiip.evaluation.audit import LeakError, audit_tasks, find_record
from lit_multiip.export import card as cards
from lit_multiip.export import weights as exporting
from lit_multiip.export.card import ADAPTER, EMBEDS, RECORD_FILE, ExportError
from lit_multiip.methods.adapter import MultiIPAdapter
from lit_multiip.methods.aggregators import AvgPool, SelfAttention
from lit_multiip.methods.dreambooth import DreamBooth


def built(backbone: Path, **options: Any) -> MultiIPAdapter:
    model = MultiIPAdapter(Backbone(str(backbone)), **options)
    model.configure_model()
    return model.eval()


def export(args: list[str]) -> None:
    """The command, with its errors as they are raised."""
    Commands(["export", *args], trainer_class=CommandTrainer)


@pytest.fixture(scope="module")
def run(tiny_backbone, tmp_path_factory):
    """A run whose weights, of adapter and aggregator, all differ from where they start."""
    config = {
        "backbone": {"path": str(tiny_backbone)},
        "model": {"class_path": "lit_multiip.methods.adapter.MultiIPAdapter"},
        "data": {"person": "Ann_Lee", "references": 9},
    }
    return write_run(tmp_path_factory.mktemp("runs") / "self_attn" / "version_0", built(tiny_backbone), config)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("people") / "Ann_Lee"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (9, 40, 40, 3), dtype=np.uint8)
    for number, photo in enumerate(pixels):
        Image.fromarray(photo).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def exported(run, photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "exported"
    export(["--run", str(run), "--output", str(folder), "--photos", str(photos)])
    return folder


@pytest.fixture(scope="module")
def trained(run, tiny_backbone):
    """The run's model itself."""
    model = built(tiny_backbone)
    model.load_state_dict(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"], strict=False)
    return model


def plain(backbone: Path, exported: Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(backbone, safety_checker=None, requires_safety_checker=False)
    pipe.load_ip_adapter(str(exported), subfolder="", weight_name=ADAPTER, image_encoder_folder=None)
    return pipe


def drawn(pipe: Any, embeds: Tensor, **inputs: Any) -> Tensor:
    """One image, (H, W, 3) in grey levels."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "pt", "generator": generator}
    [image] = pipe("a person", ip_adapter_image_embeds=[embeds], **settings, **inputs).images
    return (image.float() * 255).round().permute(1, 2, 0)


def test_plain_diffusers_draws_the_same_image_from_a_persons_file(exported, trained, photos, tiny_backbone):
    from lit_multiip.data.people import read_person

    pipe = plain(tiny_backbone, exported)
    embeds = load_file(exported / "embeds" / "Ann_Lee.safetensors")[EMBEDS]
    assert embeds.shape == (2, 9, 24) and not embeds[0].any()
    people = PhotoEncoder(Backbone(str(tiny_backbone)))(read_person(photos).photos)
    with torch.no_grad():
        assert torch.allclose(trained.condition(people[None])[0].sort(0)[0], embeds[1].sort(0)[0], atol=1e-5)
        texts = [trained.backbone.encode_prompts(pipe, [text]) for text in ("a person", "")]
        sampler = trained.sampler
        sampler.sampling.steps, sampler.sampling.guidance_scale = 4, 3.0
        ours = sampler(texts[0], texts[1], embeds[1:], [3], 32)[0].permute(1, 2, 0)
    pipe.scheduler = type(sampler.pipe.scheduler).from_config(pipe.scheduler.config)
    theirs = drawn(pipe, embeds)
    assert (ours.float() - theirs).abs().max() <= 1
    assert (drawn(pipe, torch.zeros_like(embeds)) - theirs).abs().max() > 1  # the photos are seen


def test_comfyui_makes_the_same_tokens_of_a_persons_files(exported, trained):
    """Its nodes load a tensor (M, D) and project it by ComfyUI_IPAdapter_plus' `ImageProjModel`."""
    weights = load_file(exported / ADAPTER)
    [both] = load_file(exported / "embeds" / "Ann_Lee.safetensors").values()
    own = trained.unet.encoder_hid_proj.image_projection_layers[0]
    for file, expected in (("Ann_Lee.ipadpt", both[1]), ("Ann_Lee.negative.ipadpt", both[0])):
        embeds = torch.load(exported / "embeds" / file, weights_only=True)
        assert embeds.shape == (9, 24) and torch.equal(embeds, expected)
        assert (exported / "embeds" / file).stat().st_size < 4096  # the one half alone
        tokens = embeds @ weights["image_proj.proj.weight"].T + weights["image_proj.proj.bias"]
        tokens = tokens.reshape(-1, 4, 32)  # clip_extra_context_tokens, cross_attention_dim
        norm = weights["image_proj.norm.weight"], weights["image_proj.norm.bias"]
        tokens = torch.nn.functional.layer_norm(tokens, (32,), *norm)
        with torch.no_grad():
            assert (tokens - own(embeds)).abs().max() <= 1e-6  # (9, 4, 32)
    text = (exported / "README.md").read_text()
    assert "`embeds/*.ipadpt` into `input/`" in text and f"`{ADAPTER}` goes into `models/ipadapter/`" in text


@pytest.mark.parametrize("kind", ["img2img", "inpainting", "controlnet"])
def test_other_pipelines_take_the_same_files(kind, exported, trained, tiny_backbone):
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 8:24, 8:24] = 1
    embeds = load_file(exported / "embeds" / "Ann_Lee.safetensors")[EMBEDS]
    torch.manual_seed(0)
    control = ControlNetModel.from_unet(
        Backbone(str(tiny_backbone)).load("unet"), conditioning_embedding_out_channels=(8, 8, 16)
    )
    cls, extra, inputs = {
        "img2img": (StableDiffusionImg2ImgPipeline, {}, {"image": image, "strength": 0.8}),
        "inpainting": (
            StableDiffusionInpaintPipeline,
            {},
            {"image": image, "mask_image": mask, "height": 32, "width": 32},
        ),
        "controlnet": (StableDiffusionControlNetPipeline, {"controlnet": control.eval()}, {"image": image}),
    }[kind]
    parts = plain(tiny_backbone, exported).components
    theirs = drawn(cls(**parts, **extra, requires_safety_checker=False), embeds, **inputs)
    own = cls(**{**parts, "unet": trained.unet}, **extra, requires_safety_checker=False)
    assert (drawn(own, embeds, **inputs) - theirs).abs().max() <= 1
    assert (drawn(own, torch.zeros_like(embeds), **inputs) - theirs).abs().max() > 1


def test_it_comes_back_as_it_was(exported, trained, tiny_backbone):
    again = built(tiny_backbone, ip_adapter=str(exported / ADAPTER))
    for name, parameter in trained.trained_parameters().items():
        assert torch.equal(again.trained_parameters()[name], parameter), name
    embeds = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.condition(embeds), trained.condition(embeds))


def test_whom_it_was_trained_on_goes_out_and_comes_in_with_it(exported, tiny_backbone):
    again = built(tiny_backbone, ip_adapter=str(exported / ADAPTER))
    expected = training_record(PEOPLE)
    assert again.trained_on is not None and again.trained_on.keys() == expected.keys()
    assert all(torch.equal(again.trained_on[key], rows) for key, rows in expected.items())
    # a fit from it keeps them in its own checkpoints
    others = MiniFaces(train=2, validation=1, test=1, photos=2, seed=5).people()
    data = SimpleNamespace(split=SimpleNamespace(seen=(others, [])))
    RecordPeople().on_save_checkpoint(SimpleNamespace(datamodule=data), again, checkpoint := {})
    kept = digests_in(checkpoint[TRAINED_ON], "people")
    assert kept == digests_in(training_record([*PEOPLE, *others]), "people")
    # untrained, it is tested by its own record
    test = SimpleNamespace(ckpt_path=None, global_step=0, datamodule=None)
    status, record = find_record(test, again)
    assert status == "recorded"
    tasks = make_tasks([person for person in PEOPLE if person.split == "test"], 1, 1)
    with pytest.raises(LeakError, match="1 of 1 test people were trained or validated on"):
        audit_tasks(tasks, status, record)


def test_an_adapter_without_a_record_makes_the_answer_unknown(exported, tiny_backbone, tmp_path):
    tensors = {k: v for k, v in load_file(exported / ADAPTER).items() if not k.startswith(TRAINED_ON)}
    save_file(tensors, file := tmp_path / "published.safetensors")
    model = built(tiny_backbone, ip_adapter=str(file))
    assert model.trained_on is not None and is_incomplete(model.trained_on)
    assert built(tiny_backbone).trained_on is None  # the backbone's own adapter is a part of it


def test_half_precision_is_half_the_size_and_what_the_files_hold_is_compared(exported, run, trained, tmp_path):
    export(["--run", str(run), "--output", str(tmp_path / "half"), "--dtype", "float16"])
    state = read_ip_adapter(str(tmp_path / "half" / ADAPTER))
    weights = [tensor for name, tensors in state.items() if name != TRAINED_ON for tensor in tensors.values()]
    assert {tensor.dtype for tensor in weights} == {torch.float16}
    weight = trained.aggregator.to_q.weight
    assert (state["aggregator"]["to_q.weight"] - weight).abs().max() < 2**-10
    assert (tmp_path / "half" / ADAPTER).stat().st_size < 0.7 * (exported / ADAPTER).stat().st_size


def test_the_card_says_where_it_comes_from_and_names_no_person_and_no_path(exported, run):
    text = (exported / "README.md").read_text()
    for fact in (
        "self_attn/version_0",
        "SelfAttention(dim=24, heads=1, residual=False)",
        "| step | 7 |",
        "max_steps: 7",
    ):
        assert fact in text
    assert "Ann_Lee" not in text and str(run.parents[1]) not in text and "/tmp" not in text
    data = yaml.safe_load(text.split("---")[1])
    assert (data["library_name"], data["pipeline_tag"], data["license"]) == ("diffusers", "text-to-image", "other")
    assert data["tags"] == ["ip-adapter", "personalization"] and "base_model" not in data
    with safe_open(exported / ADAPTER, "pt") as file:
        record = json.loads(file.metadata()["lit_multiip"])
    assert record["aggregator"] == "SelfAttention(dim=24, heads=1, residual=False)" and record["step"] == 7


def test_nothing_is_left_of_files_that_diffusers_reads_otherwise(run, tmp_path, monkeypatch):
    whole = exporting.adapter_tensors

    def wrong(*args):
        return {name: 2 * value if "to_v_ip" in name else value for name, value in whole(*args).items()}

    monkeypatch.setattr(exporting, "adapter_tensors", wrong)
    with pytest.raises(ValueError, match="plain diffusers draws another image"):
        export(["--run", str(run), "--output", str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == []


def test_an_existing_target_is_refused_before_work_and_replaced_when_told(exported, run, tmp_path, capsys):
    (tmp_path / ADAPTER).write_text("mine")
    message = refusal(capsys, "export", "--run", str(run), "--output", str(tmp_path))
    assert f"{ADAPTER}' exists: give another --output, or --overwrite" in message
    (tmp_path / "other.txt").write_text("mine")
    export(["--run", str(run), "--output", str(tmp_path), "--overwrite"])
    assert (tmp_path / ADAPTER).read_bytes()[-64:] == (exported / ADAPTER).read_bytes()[-64:]
    assert (tmp_path / "other.txt").read_text() == "mine"


def test_another_aggregator_than_it_was_trained_with_is_refused(exported, tiny_backbone):
    path = str(exported / ADAPTER)
    with pytest.raises(BackboneError, match=r"was trained with SelfAttention\(dim=24.*, not AvgPool\(dim=24\)"):
        built(tiny_backbone, ip_adapter=path, aggregator=AvgPool)
    with pytest.raises(BackboneError, match=r"heads=1.*heads=2"):  # of equal shapes
        built(tiny_backbone, ip_adapter=path, aggregator=lambda dim: SelfAttention(dim, heads=2))


def test_an_adapter_for_embeddings_of_another_width_is_refused(exported, tmp_path):
    from tiny import make_tiny_backbone

    wide = make_tiny_backbone(tmp_path / "wide", projection_dim=16)
    with pytest.raises(BackboneError, match=r"\(128, 24\), and this backbone .*width 16"):
        built(wide, ip_adapter=str(exported / ADAPTER))


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_lora_goes_out_beside_the_adapter_and_comes_back_with_it(kind, request, tmp_path):
    """At scale 0 its images are LoRA's alone."""
    backbone = request.getfixturevalue({"sd": "tiny_backbone", "sdxl": "tiny_sdxl"}[kind])
    model = built(backbone, lora_rank=2, sampling=Sampling(steps=3, ip_scale=0.0))
    args = {"lora_rank": 2, "sampling": {"steps": 3, "ip_scale": 0.0}}
    config = {
        "backbone": {"path": str(backbone)},
        "model": {"class_path": "lit_multiip.methods.adapter.MultiIPAdapter", "init_args": args},
    }
    run = write_run(tmp_path / "lora" / "version_0", model, config)
    export(["--run", str(run), "--output", str(tmp_path / "out")])
    assert {file.name for file in (tmp_path / "out").iterdir()} == {ADAPTER, LORA_FILE, RECORD_FILE, "README.md"}
    cls = {"sd": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}[kind]
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"pipe = {cls}.from_pretrained" in text and f'weight_name="{LORA_FILE}"' in text
    again = built(backbone, lora_rank=2, ip_adapter=str(tmp_path / "out" / ADAPTER))
    for name, parameter in model.trained_parameters().items():
        assert torch.equal(again.trained_parameters()[name], parameter), name
    with pytest.raises(BackboneError, match=r"trained with LoRA of rank 2: set model.lora_rank=2, not None"):
        built(backbone, ip_adapter=str(tmp_path / "out" / ADAPTER))


def test_lora_that_is_left_out_is_noticed(tiny_backbone, tmp_path, monkeypatch):
    config = {
        "backbone": {"path": str(tiny_backbone)},
        "model": {"class_path": "lit_multiip.methods.adapter.MultiIPAdapter", "init_args": {"lora_rank": 2}},
    }
    run = write_run(tmp_path / "lora" / "version_0", built(tiny_backbone, lora_rank=2), config)
    monkeypatch.setattr(StableDiffusionPipeline, "load_lora_weights", lambda *_, **__: None)
    with pytest.raises(ValueError, match="plain diffusers draws another image"):
        export(["--run", str(run), "--output", str(tmp_path / "out")])


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize(("tuned", "lora_rank"), [("unet+text", 2), ("unet", None), ("unet+text", None)])
def test_dreambooth_goes_out_as_diffusers_loads_it(kind, tuned, lora_rank, request, tmp_path):
    backbone = request.getfixturevalue({"sd": "tiny_backbone", "sdxl": "tiny_sdxl"}[kind])
    args = {"tuned": tuned, "lora_rank": lora_rank, "identifier": "k"}
    model = DreamBooth(Backbone(str(backbone)), **args)
    model.configure_model()
    model.learnt = ("Ann_Lee", "0")
    config = {
        "backbone": {"path": str(backbone)},
        "model": {"class_path": "lit_multiip.methods.dreambooth.DreamBooth", "init_args": args},
    }
    run = write_run(tmp_path / "dreambooth" / "version_0", model, config)
    out = tmp_path / "out"
    export(["--run", str(run), "--output", str(out)])
    text = (out / "README.md").read_text()
    assert "Ann_Lee" not in text + (out / RECORD_FILE).read_text() and "a photo of k person in a red shirt" in text
    cls = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}[kind]
    if lora_rank:
        assert sorted(file.name for file in out.iterdir()) == ["README.md", RECORD_FILE, LORA_FILE]
        pipe = cls.from_pretrained(backbone)
        pipe.load_lora_weights(out)
    else:
        pipe = cls.from_pretrained(out)
    model.sampling.steps, model.sampling.guidance_scale = 4, 3.0
    pipe.scheduler = type(model.sampler.pipe.scheduler).from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 32, "width": 32}
    [theirs] = pipe("a k person", generator=generator, output_type="pt", **settings).images
    with torch.no_grad():
        [ours] = model.draw(["a k person"], [3])
        model.forget()
        [untuned] = model.draw(["a k person"], [3])
    assert (ours.int() - (255 * theirs).round().int()).abs().max() <= 1
    assert (ours.int() - untuned.int()).abs().max() > 1
    with pytest.raises(ValueError, match="exists: give another --output, or --overwrite"):
        export(["--run", str(run), "--output", str(out)])
    with pytest.raises(ValueError, match="of the one person they were tuned on"):
        export(["--run", str(run), "--output", str(tmp_path / "other"), "--push_to_hub", "org/name"])


def test_a_card_names_the_backbones_licence_and_hub_id():
    record = {"method": "M", "backbone": "stable-diffusion-v1-5/stable-diffusion-v1-5", "versions": {}}
    text = cards.card(record, {}, cards.Written("use", "lines", 0))
    data = yaml.safe_load(text.split("---")[1])
    assert data["base_model"] == record["backbone"] and data["license"] == "creativeml-openrail-m"
    assert "license_name" not in data and data["tags"] == ["dreambooth", "personalization"]


def test_the_cards_code_of_a_run_on_the_miniature_draws(photos, tmp_path, monkeypatch):
    model = MultiIPAdapter(Backbone())
    model.configure_model()
    config = {"model": {"class_path": "lit_multiip.methods.adapter.MultiIPAdapter"}, "data": {"references": 9}}
    run = write_run(tmp_path / "runs" / "self_attn" / "version_0", model.eval(), config)
    monkeypatch.chdir(tmp_path)
    export(["--run", str(run), "--photos", str(photos)])
    text = Path("exported/README.md").read_text()
    assert yaml.safe_load(text.split("---")[1])["license"] == "apache-2.0"
    code = text.split("```python\n")[1].split("```")[0].replace("my_photos", "Ann_Lee")
    names = {}
    exec(code, names)
    assert names["image"].size == (64, 64) and np.asarray(names["image"]).std() > 10


class Hub:
    """What is asked of the hub; `private` is what a repository is that was there before."""

    def __init__(self, private: bool | None = None) -> None:
        self.private, self.calls = private, []

    def create_repo(self, repository: str, private: bool, exist_ok: bool) -> None:
        self.calls.append(("create", repository, private))
        self.private = private if self.private is None else self.private

    def repo_info(self, repository: str) -> Any:
        return SimpleNamespace(private=self.private)

    def upload_folder(self, repo_id: str, folder_path: Path, allow_patterns: list[str]) -> None:
        self.calls.append(("upload", repo_id, sorted(allow_patterns)))


def test_an_upload_is_private_unless_asked_otherwise_and_takes_nothing_of_a_person(run, photos, tmp_path, monkeypatch):
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    export(["--run", str(run), "--output", str(tmp_path / "out"), "--photos", str(photos), "--push_to_hub", "org/name"])
    assert hub.calls == [("create", "org/name", True), ("upload", "org/name", ["README.md", ADAPTER, RECORD_FILE])]
    for public in (False, True):
        hub = Hub(private=False)
        monkeypatch.setattr("huggingface_hub.HfApi", lambda hub=hub: hub)
        with nullcontext() if public else pytest.raises(ExportError, match=r"everyone can see 'org/name'.*--public"):
            cards.upload("org/name", tmp_path / "out", [ADAPTER], public)
        assert [call[0] for call in hub.calls] == (["create", "upload"] if public else ["create"])


def test_readme_and_card_show_the_same_lines():
    readme = (Path(__file__).parents[2] / "lit_multiip" / "tools" / "README.md").read_text(encoding="utf-8")
    assert cards.snippet("stable-diffusion-v1-5/stable-diffusion-v1-5") in readme
