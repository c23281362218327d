"""The same numbers as those who published: diffusers' sampling, IP-Adapter's training step, torch-fidelity's scores."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from tiny import make_tiny_backbone
from torch import Tensor, nn

from lit_multiip.backbone.components import BackboneError
from lit_multiip.backbone.ip_adapter import read_ip_adapter, text_kv
from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.backbone.sampler import Sampling
from lit_multiip.data.people import MiniFaces
from lit_multiip.datamodule import MultiPhotoData
from lit_multiip.evaluation.extractors import Inception
from lit_multiip.evaluation.scores import fid, kid
from lit_multiip.export.weights import adapter_tensors, with_negative
from lit_multiip.methods.adapter import MultiIPAdapter
from lit_multiip.methods.aggregators import First
from lit_multiip.methods.dreambooth import DreamBooth
from lit_multiip.pixels import square, to_signal, to_tensor

FIXTURES = {"sd": "tiny_backbone", "sdxl": "tiny_sdxl", "v_prediction": "tiny_v"}
PROMPTS = ["a person", "a person, in red"]


@pytest.fixture(scope="module")
def tiny_v(tmp_path_factory):
    """As Stable Diffusion 2.1, it predicts v."""
    return make_tiny_backbone(tmp_path_factory.mktemp("v"), prediction_type="v_prediction", ip_adapter=True)


def shaken(backbone: Path, **options: Any) -> MultiIPAdapter:
    """A model whose adapter and aggregator all differ from where they start."""
    model = MultiIPAdapter(Backbone(str(backbone)), **options)
    model.configure_model()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.trained_parameters().values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


# ---- sampling ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("kind", ["sd", "sdxl", "v_prediction"])
def test_a_batch_is_drawn_as_plain_diffusers_draws_each_of_its_images(kind, guidance, request, tmp_path):
    folder = request.getfixturevalue(FIXTURES[kind])
    model = shaken(folder, sampling=Sampling(steps=4, guidance_scale=guidance, ip_scale=0.7))
    texts = Backbone(str(folder)).text_pipeline()
    own, empty = (Backbone(str(folder)).encode_prompts(texts, prompts) for prompts in (PROMPTS, ["", ""]))
    references = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(0))
    batch = {"text": own, "negative_text": empty, "references": references}
    with torch.no_grad():
        ours = model.generate({**batch, "seed": torch.tensor([3, 4])})
        embeds = model.condition(references)

    save_file(adapter_tensors(model, torch.float32), tmp_path / "adapter.safetensors")
    cls = StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline
    pipe = cls.from_pretrained(folder)
    pipe.load_ip_adapter(str(tmp_path), subfolder="", weight_name="adapter.safetensors", image_encoder_folder=None)
    pipe.set_ip_adapter_scale(0.7)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = type(model.sampler.pipe.scheduler).from_config(pipe.scheduler.config)
    for row, prompt in enumerate(PROMPTS):
        one = with_negative(embeds[row : row + 1])
        [image] = pipe(
            prompt,
            height=32,
            width=32,
            num_inference_steps=4,
            guidance_scale=guidance,
            ip_adapter_image_embeds=[one if guidance > 1 else one[1:]],
            generator=torch.Generator().manual_seed(3 + row),
            output_type="pt",
        ).images
        theirs = (image * 255).round().to(torch.uint8)
        assert (ours[row].int() - theirs.int()).abs().max() <= 1  # a batch and one image may round apart
        assert (ours[row] != theirs).float().mean() < 1e-3
    assert (ours[0].int() - ours[1].int()).abs().max() > 1


# ---- the training step ------------------------------------------------------------------------------------------


class PublishedAttention(nn.Module):
    """Cross-attention of tutorial_train*.py: the last 4 tokens are the image's, and have K' and V' of their own."""

    def __init__(self, to_k_ip: Tensor, to_v_ip: Tensor) -> None:
        super().__init__()
        self.to_k_ip, self.to_v_ip = nn.Parameter(to_k_ip.clone()), nn.Parameter(to_v_ip.clone())

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        text, image = encoder_hidden_states[:, :-4], encoder_hidden_states[:, -4:]

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        q = heads(attn.to_q(hidden_states))
        z = F.scaled_dot_product_attention(q, heads(attn.to_k(text)), heads(attn.to_v(text)))
        z = z + F.scaled_dot_product_attention(
            q, heads(F.linear(image, self.to_k_ip)), heads(F.linear(image, self.to_v_ip))
        )
        return attn.to_out[0](z.transpose(1, 2).flatten(2))


class Published(nn.Module):
    """UNet, Linear and LayerNorm, and the attention above, as tutorial_train*.py put them together."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.unet: UNet2DConditionModel = Backbone(str(folder)).load("unet")
        state = read_ip_adapter(str(folder / "ip_adapter" / "ip_adapter.safetensors"))
        width, self.context = state["image_proj"]["proj.weight"].shape[1], self.unet.config.cross_attention_dim
        self.proj, self.norm = nn.Linear(width, 4 * self.context), nn.LayerNorm(self.context)
        for part, name in ((self.proj, "proj"), (self.norm, "norm")):
            part.load_state_dict({key: state["image_proj"][f"{name}.{key}"] for key in ("weight", "bias")})
        processors = dict(self.unet.attn_processors)
        for number, name in enumerate(processors):
            if not name.endswith("attn1.processor"):
                weights = (state["ip_adapter"][f"{number}.to_{kv}_ip.weight"] for kv in "kv")
                processors[name] = PublishedAttention(*weights)
        self.unet.set_attn_processor(processors)

    def forward(self, noisy: Tensor, t: Tensor, text: Tensor, added: Any, image_embeds: Tensor) -> Tensor:
        tokens = self.norm(self.proj(image_embeds).reshape(-1, 4, self.context))
        return self.unet(noisy, t, torch.cat([text, tokens], dim=1), added_cond_kwargs=added).sample


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_the_loss_and_its_gradient_are_those_of_the_published_training_step(kind, request, tmp_path):
    """One batch of photos, noise and timesteps; relative 1e-3, as features are kept in 16 bits."""
    folder = request.getfixturevalue(FIXTURES[kind])
    source = MiniFaces(train=3, validation=2, test=2, photos=11)
    options = {"references": 1, "target": "reference", "drop": (0.2, 0.2, 0.2), "batch_size": 6}
    data = MultiPhotoData(Backbone(str(folder)), source, cache_dir=str(tmp_path), **options)
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    groups, keys = loader.dataset, list(loader.sampler)[:6]
    batch = next(iter(loader))
    photos = [groups.draw(*key)[0] for key in keys]
    model = MultiIPAdapter(Backbone(str(folder)), First, snr_gamma=None)
    model.configure_model()
    model.log = lambda *_, **__: None
    model._trainer = None
    model.training_step(batch, 0).backward()

    # the published step: photos, captions and flags in; every encoder is run
    published = Published(folder)
    texts, vae = Backbone(str(folder)).text_pipeline(), Backbone(str(folder)).load("vae")
    noise_scheduler = DDPMScheduler.from_config(Backbone(str(folder)).load("scheduler").config)
    empty = Backbone(str(folder)).encode_prompts(texts, [""])["prompt_embeds"].half().float()
    dropped = [bool((row - empty).abs().max() == 0) for row in batch["text"]["prompt_embeds"]]
    assert any(dropped) and batch["drop_image"].any() and not all(dropped)
    captions = ["" if drop else photo.prompt for photo, drop in zip(photos, dropped, strict=True)]
    with torch.no_grad():
        posterior = vae.encode(to_signal(to_tensor(square(photo.image(), 32) for photo in photos))).latent_dist
        latents = (posterior.mean + posterior.std * batch["latent_noise"]) * vae.config.scaling_factor
        processor, encoder = Backbone(str(folder)).load_image_encoder()
        pixels = processor([photo.image() for photo in photos], return_tensors="pt").pixel_values
        image_embeds = encoder(pixels).image_embeds
        image_embeds = torch.where(batch["drop_image"][:, None], torch.zeros_like(image_embeds), image_embeds)

        def states(part):
            tokenizer, text_encoder = getattr(texts, f"tokenizer{part}"), getattr(texts, f"text_encoder{part}")
            tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
            return text_encoder(tokens, output_hidden_states=True)

        if kind == "sd":
            text, added = states("")[0], None
        else:
            second = states("_2")
            text = torch.cat([states("").hidden_states[-2], second.hidden_states[-2]], dim=-1)
            sizes = [[photo.image().height, photo.image().width, 0, 0, 32, 32] for photo in photos]
            added = {"text_embeds": second[0], "time_ids": torch.tensor(sizes, dtype=torch.float32)}
    timesteps = (batch["time"] * 1000).long()
    noisy = noise_scheduler.add_noise(latents, batch["eps"], timesteps)
    prediction = published(noisy, timesteps, text, added, image_embeds)
    loss = F.mse_loss(prediction.float(), batch["eps"].float(), reduction="mean")
    loss.backward()

    with torch.no_grad():
        again = model.training_step(batch, 0)
    assert float(again) == pytest.approx(loss.item(), rel=1e-3)
    ours = model.unet.encoder_hid_proj.image_projection_layers[0].image_embeds.weight.grad
    theirs = published.proj.weight.grad
    assert F.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.999
    assert float(ours.norm()) == pytest.approx(float(theirs.norm()), rel=1e-2)


def test_where_the_unet_predicts_v_the_target_is_v(tiny_v):
    """v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0 (Salimans and Ho 2022), of all methods."""
    g = torch.Generator().manual_seed(0)
    x, eps, text = torch.randn(3, 4, 8, 8, generator=g), torch.randn(3, 4, 8, 8, generator=g), torch.randn(3, 16, 32)
    t = torch.tensor([1, 500, 990])
    abar = torch.cumprod(1 - torch.linspace(0.0001**0.5, 0.02**0.5, 1000, dtype=torch.float64) ** 2, 0)
    abar = abar[t].float().view(-1, 1, 1, 1)
    noised = abar.sqrt() * x + (1 - abar).sqrt() * eps
    v = abar.sqrt() * eps - (1 - abar).sqrt() * x
    model = DreamBooth(Backbone(str(tiny_v)))
    model.configure_model()
    with torch.no_grad():
        ours = model.denoising_loss(x, eps, t, {"prompt_embeds": text})
        predicted = model.unet(noised, t, text).sample
    assert torch.allclose(ours, (predicted - v).square().mean(dim=(1, 2, 3)), rtol=1e-4)
    assert (ours - (predicted - eps).square().mean(dim=(1, 2, 3))).abs().max() > 0.01


def test_a_unet_that_predicts_neither_noise_nor_v_is_refused(tmp_path):
    model = MultiIPAdapter(Backbone(str(make_tiny_backbone(tmp_path, prediction_type="sample"))))
    with pytest.raises(BackboneError, match="predicts 'sample': give one that predicts epsilon or v_prediction"):
        model.configure_model()


def test_sdxl_is_told_the_size_of_the_file_and_the_crop_of_its_square(tiny_sdxl, tmp_path):
    from PIL import Image

    from lit_multiip.backbone.features import Features
    from lit_multiip.data.photos import FilePhoto

    Image.new("RGB", (100, 50)).save(tmp_path / "wide.png")
    photo = FilePhoto("p", "wide.png", "a", tmp_path / "wide.png")
    features = Features(Backbone(str(tiny_sdxl)), tmp_path / "cache")
    features.build([], [photo], ["a"])
    # at 32 px a side it is 64 x 32, of which the square begins at x = 16
    assert features.sizes(photo)["time_ids"].tolist() == [50, 100, 0, 16, 32, 32]
    assert {name: tuple(rows.shape) for name, rows in features.text("a").items()} == {
        "prompt_embeds": (16, 32),
        "pooled_prompt_embeds": (16,),
    }


def test_sdxl_has_140_attention_layers_70_of_them_cross_with_340_8_million_k_v_weights():
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 2, 10],
            attention_head_dim=[5, 10, 20],
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    weights = text_kv(unet)
    assert (len(unet.attn_processors), len(weights)) == (140, 2 * 70)
    assert sum(weight.numel() for weight in weights.values()) == 340_787_200
    assert sorted({int(key.split(".")[1]) for key in weights}) == list(range(1, 140, 2))


# ---- scores -----------------------------------------------------------------------------------------------------


class Pictures(torch.utils.data.Dataset):
    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Tensor:
        return self.pixels[index]


@pytest.mark.parametrize("width", [64, *(pytest.param(width, marks=pytest.mark.slow) for width in (192, 768, 2048))])
def test_fid_and_kid_of_images_are_torch_fidelitys(width, inception_weights):
    """Of 8 + 8 images through the same Inception. Torch-fidelity works in float32, where kernel values are about 1."""
    from torch_fidelity import calculate_metrics
    from torch_fidelity.metric_kid import kid_features_to_metric

    generator = torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, (8, 3, 48, 48), dtype=torch.uint8, generator=generator)
    fake = (torch.randint(0, 256, (8, 3, 48, 48), dtype=torch.uint8, generator=generator) // 2) + 20
    theirs = calculate_metrics(
        input1=Pictures(real),
        input2=Pictures(fake),
        fid=True,
        kid=True,
        kid_subsets=1,
        kid_subset_size=8,
        feature_layer_fid=str(width),
        feature_layer_kid=str(width),
        feature_extractor_weights_path=inception_weights,
        cuda=False,
        batch_size=8,
        cache=False,
        verbose=False,
        save_cpu_ram=True,
    )
    extractor = Inception(inception_weights, feature=width, antialias=False)  # which resizes as torch-fidelity does
    features = extractor.extract(real).features, extractor.extract(fake).features
    assert fid(*features) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert kid(*features) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3, abs=2e-6)
    exact = kid_features_to_metric(*(rows.double() for rows in features), kid_subsets=1, kid_subset_size=8)
    assert kid(*features) == pytest.approx(exact["kernel_inception_distance_mean"], rel=1e-6)
