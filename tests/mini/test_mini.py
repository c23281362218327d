import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from lit_multiip.backbone.components import resolve_backbone
from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.data import mini_faces
from lit_multiip.evaluation.critic import HEADS, WIDTH, Critic
from lit_multiip.files import package_file
from lit_multiip.mini.gate import clip_embed, critic_embed, rank_one
from lit_multiip.mini.measure import _portraits, accuracy, round_trip
from lit_multiip.mini.portraits import Portraits, all_phrases
from lit_multiip.mini.tokenizer import IDENTIFIERS, MAX_LENGTH, make_tokenizer, words_of
from lit_multiip.pixels import to_pixels, to_signal

MINI = Path(resolve_backbone("mini"))


class FakePortraits(Portraits):
    """Truth without images."""

    def __init__(self) -> None:
        pass

    def truth(self, index: int) -> tuple[mini_faces.Person, mini_faces.Scene]:
        return mini_faces.person(0, index), mini_faces.scene(0, index, 0)


def test_every_caption_word_and_identifier_is_one_token(tmp_path):
    tokenizer = make_tokenizer(tmp_path, all_phrases())
    assert all(len(tokenizer(word).input_ids) == 3 for word in words_of(all_phrases()))
    assert all(word not in " ".join(mini_faces.SCENE_ATTRIBUTES) for word in IDENTIFIERS)


def test_remaking_the_tokenizer_gives_the_shipped_one(tmp_path):
    make_tokenizer(tmp_path, all_phrases())
    made, shipped = (json.loads((folder / "vocab.json").read_text()) for folder in (tmp_path, MINI / "tokenizer"))
    assert made == shipped
    assert (tmp_path / "merges.txt").read_bytes() == (MINI / "tokenizer" / "merges.txt").read_bytes()


def test_no_caption_is_cut_nor_holds_an_identifier():
    tokenizer = make_tokenizer_shipped()
    rng = np.random.default_rng(0)
    kinds = yaml.safe_load(package_file("mini/portraits.yaml").read_text())["unet"]["captions"]
    captions = [FakePortraits().caption(i, rng, kinds) for i in range(2000)]
    assert max(len(tokenizer(text).input_ids) for text in captions) <= MAX_LENGTH
    assert not any(word in text.split() for text in captions for word in IDENTIFIERS)


def make_tokenizer_shipped():
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(MINI / "tokenizer")


def test_pixels_survive_the_signal_range():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_pixels(to_signal(pixels)), pixels)


@pytest.mark.parametrize("architecture", ["convnet", "patchnet"])
def test_a_critic_reloads_to_the_same_answers(architecture, tmp_path):
    critic = Critic(architecture, 7).eval()
    critic.load_state_dict(
        {k: v.half().float() if v.is_floating_point() else v for k, v in critic.state_dict().items()}
    )
    critic.save(tmp_path)
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    features, people, heads = critic(images)
    again = Critic.load(tmp_path)(images)
    assert features.shape == (4, WIDTH) and people.shape == (4, 7) and set(heads) == set(HEADS)
    assert torch.equal(features, again[0]) and torch.equal(people, again[1])


def test_the_shipped_folder_is_a_plain_pipeline_of_small_half_precision_files():
    pipe = StableDiffusionPipeline.from_pretrained(MINI)
    adapter = Backbone("mini").adapter_file()
    assert adapter is not None
    pipe.load_ip_adapter(str(MINI), subfolder="ip_adapter", weight_name=Path(adapter).name)
    assert len(pipe.unet.attn_processors) == 14 and pipe.vae.config.scaling_factor > 0
    zeros = torch.zeros(2, 1, Backbone("mini").embed_dim)  # without and with guidance
    options = {"num_inference_steps": 2, "output_type": "np", "ip_adapter_image_embeds": [zeros]}
    [image] = pipe("a photo of a person", **options).images  # it draws as it is: all of it is float32
    assert image.shape == (64, 64, 3) and image.std() > 0.05
    half = load_file(MINI / "text_encoder" / "model.safetensors")
    for name, weights in pipe.text_encoder.state_dict().items():
        assert torch.equal(weights, half[name if name in half else f"text_model.{name}"].float())
    for path in MINI.rglob("*.safetensors"):
        assert path.stat().st_size < 16 * 2**20, path
        with safe_open(path, "pt") as file:
            dtypes = {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
        assert torch.float32 not in dtypes, path
    assert json.loads((MINI / "unet" / "config.json").read_text())["sample_size"] == 16


def test_one_photo_does_not_show_a_critic_who_someone_is_and_nine_do():
    shares = rank_one(critic_embed(MINI / "critic"), seed=0)
    assert shares[1] <= 0.75 and shares[9] >= 0.95


def test_one_photo_does_not_show_clip_who_someone_is_and_nine_do():
    shares = rank_one(clip_embed(MINI), seed=0)
    assert shares[1] <= 0.75 and shares[9] >= 0.95


FADED = pytest.mark.xfail(strict=True, reason="beards of the skin's own colour fade: 5 points")


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("critic", marks=FADED), "critic_b"])
def test_critics_accuracy_on_vae_round_trips_is_within_three_points(name):
    images, labels, _ = _portraits(0, people=250, photos=10)  # fewer show most traits too seldom
    critic = Critic.load(MINI / name)
    before, after = accuracy(critic, images, labels), accuracy(critic, round_trip("mini", images), labels)
    assert max(before[k] - after[k] for k in HEADS) <= 0.03
