"""DreamBooth's loss and gradient are those of diffusers' examples/dreambooth/train_dreambooth.py."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from tiny import make_tiny_backbone
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.methods.dreambooth import Draws, DreamBooth
from lit_multiip.methods.people import Who

BATCH, PRIOR_WEIGHT = 3, 0.7


@pytest.fixture(scope="module")
def tiny_v(tmp_path_factory):
    return make_tiny_backbone(tmp_path_factory.mktemp("v"), prediction_type="v_prediction")


class TrainDreambooth:
    """The example's step: instance and class samples in one batch, which the loss cuts in two again."""

    def __init__(self, folder: Path) -> None:
        self.unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
        self.text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
        self.noise_scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        self.scaling_factor = AutoencoderKL.load_config(folder, subfolder="vae")["scaling_factor"]

    def loss(self, moments: Tensor, draws: Draws, prompts: list[str], prior_weight: float) -> Tensor:
        """Return the loss of a batch.

        Args:
            moments: of the VAE's posteriors, (B, 2C, h, w).
            draws: timesteps and noise in place of the example's own.
            prompts: one a sample.
            prior_weight: of the second half of the batch; 0 has no such half.
        """
        posterior = DiagonalGaussianDistribution(moments)
        latents = (posterior.mean + posterior.std * draws.latent_noise) * self.scaling_factor
        ids = self.tokenizer(prompts, truncation=True, padding="max_length", return_tensors="pt").input_ids
        noisy = self.noise_scheduler.add_noise(latents, draws.eps, draws.t)
        predicted = self.unet(noisy, draws.t, self.text_encoder(ids)[0]).sample
        velocity = self.noise_scheduler.config.prediction_type == "v_prediction"
        target = self.noise_scheduler.get_velocity(latents, draws.eps, draws.t) if velocity else draws.eps
        if prior_weight == 0:
            return F.mse_loss(predicted, target)
        (own, prior), (own_target, prior_target) = predicted.chunk(2), target.chunk(2)
        return F.mse_loss(own, own_target) + prior_weight * F.mse_loss(prior, prior_target)


@pytest.mark.parametrize("prior_weight", [0.0, PRIOR_WEIGHT])
@pytest.mark.parametrize("tuned", ["unet", "unet+text"])
@pytest.mark.parametrize("kind", ["tiny_backbone", "tiny_v"])
def test_loss_and_gradients_are_those_of_train_dreambooth(kind, tuned, prior_weight, request):
    """Loss to 1e-6, the gradient of every weight to 1e-5 of the largest."""
    folder = request.getfixturevalue(kind)
    options: dict[str, Any] = {"tuned": tuned, "prior_weight": prior_weight, "batch_size": BATCH}
    module = DreamBooth(Backbone(str(folder)), **options)
    module.configure_model()
    own, of_class = torch.randn(2, 5, 8, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    module.prior.moments = of_class
    loss, prior = module.losses(Who("Ann", "set", own), step=7)
    (loss + prior_weight * prior).backward()

    terms = [("references", own, module.personal_prompt(module.class_prompt()))]
    terms += [("class", of_class, module.class_prompt())] if prior_weight else []
    draws = [module.draws("Ann", 7, term, 5) for term, *_ in terms]
    moments = torch.cat([photos[one.which] for one, (_, photos, _) in zip(draws, terms, strict=True)])
    prompts = [prompt for *_, prompt in terms for _ in range(BATCH)]
    reference = TrainDreambooth(folder)
    expected = reference.loss(moments, Draws(*map(torch.cat, zip(*draws, strict=True))), prompts, prior_weight)
    expected.backward()

    assert (loss + prior_weight * prior).item() == pytest.approx(expected.item(), rel=1e-6)
    theirs = {f"unet.{name}": weight.grad for name, weight in reference.unet.named_parameters()}
    if tuned == "unet+text":
        theirs |= {f"text_encoder.{name}": weight.grad for name, weight in reference.text_encoder.named_parameters()}
    ours = {name: weight.grad for name, weight in module.trained_parameters().items()}
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        if gradient is None:
            assert ours[name] is None
        else:
            assert (ours[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max() + 1e-9, name
