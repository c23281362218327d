from pathlib import Path

import pytest
import torch
from tiny import MAX_TOKENS, make_tiny_backbone
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.evaluation.extractors import refuse_conditioning_network
from lit_multiip.evaluation.vision import CLIP, DINO

SIDE, WIDTH = 32, 24
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def write_clip(folder: Path, seed: int = 0) -> Path:
    tokenizer = CLIPTokenizer.from_pretrained(
        make_tiny_backbone(folder.parent / f"{folder.name}_backbone") / "tokenizer"
    )
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": MAX_TOKENS, "pad_token_id": tokenizer.pad_token_id}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vision = {**TOWER, "image_size": SIDE, "patch_size": 8, "projection_dim": WIDTH}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = CLIPConfig(text_config={**TOWER, **text, **ids}, vision_config=vision, projection_dim=WIDTH)
        CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("models") / "my clip")


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "vit"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ViTModel(ViTConfig(**TOWER, image_size=SIDE, patch_size=8)).save_pretrained(folder)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


def images_of(n, side=SIDE, seed=0):
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_clip_is_the_models_own_cosine_of_image_and_prompt(clip):
    extractor, images, prompts = CLIP(str(clip)), images_of(3), ["a red hat", "a dog", "a red hat"]
    model = CLIPModel.from_pretrained(clip).eval()
    mean, std = (
        torch.tensor(getattr(CLIPImageProcessor(), name)).view(3, 1, 1) for name in ("image_mean", "image_std")
    )
    tokens = CLIPTokenizer.from_pretrained(clip)(
        prompts, return_tensors="pt", padding="max_length", max_length=MAX_TOKENS
    )
    output = model(pixel_values=(images / 255 - mean) / std, **tokens)
    expected = (output.image_embeds * output.text_embeds).sum(dim=1)
    torch.testing.assert_close(extractor.prompt_agreement(images, prompts), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(extractor.extract(images).embedding, output.image_embeds, rtol=1e-4, atol=1e-5)
    assert (extractor.name, extractor.num_features, extractor.likeness) == ("my_clip", WIDTH, "similarity")


def test_a_prompt_that_is_too_long_is_cut_off(clip):
    extractor, image = CLIP(str(clip)), images_of(1)
    long = extractor.prompt_agreement(image, ["a red hat and a scarf and more of it than anyone would want"])
    assert long.isfinite().all() and not torch.equal(long, extractor.prompt_agreement(image, ["a"]))


@torch.no_grad()
def test_dino_is_the_class_token_and_its_cosine(dino):
    extractor, images = DINO(str(dino)), images_of(3)
    tokens = ViTModel.from_pretrained(dino).eval()(pixel_values=images / 127.5 - 1).last_hidden_state[:, 0]
    torch.testing.assert_close(extractor.extract(images).features, tokens, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(extractor.extract(images).embedding, F.normalize(tokens, dim=1), rtol=1e-4, atol=1e-5)
    assert (extractor.num_features, extractor.name) == (TOWER["hidden_size"], "vit")
    assert extractor.prompt_agreement(images, ["a"] * 3).isnan().all()
    assert extractor.extract(images_of(2, 57)).features.shape == (2, TOWER["hidden_size"])  # any size


def test_the_conditioning_encoder_is_recognised_by_its_weights(clip, tmp_path):
    CLIPVisionModelWithProjection.from_pretrained(clip).half().save_pretrained(tmp_path / "image_encoder")
    with pytest.raises(ValueError, match="'my_clip' has the weights of the image encoder that conditions"):
        refuse_conditioning_network(CLIP(str(clip)), Backbone(str(tmp_path)))
    refuse_conditioning_network(CLIP(str(write_clip(tmp_path / "other", seed=1))), Backbone(str(tmp_path)))


def test_what_cannot_be_loaded_or_read_is_refused(dino, tmp_path):
    with pytest.raises(OSError, match=r"cannot be loaded .*safetensors"):
        CLIP(str(tmp_path))
    with pytest.raises(ValueError, match="is a ViTModel, which has no embeddings of text"):
        CLIP(str(dino))
