"""The identity loss: what it compares, which samples it decodes, what it trains, and that its network may not score."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scoring import Data, Perfect, read, run
from tiny import make_tiny_backbone
from torch import Tensor

from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.datamodule import MultiPhotoData
from lit_multiip.evaluation.critic import CriticExtractor
from lit_multiip.export.card import record_of
from lit_multiip.files import LitMultiIPError
from lit_multiip.methods.adapter import MultiIPAdapter
from lit_multiip.methods.aggregators import First
from lit_multiip.methods.identity_loss import IdentityLoss, IdentityNetwork, digest_weights

TIMES = (0.05, 0.2, 0.24, 0.26, 0.9, 0.1)
DECODED = [0, 1, 2]  # below 0.25, and not dropped as the last one


class Thumbnail(IdentityNetwork):
    """Colours of a 4 x 4 thumbnail, less their mean."""

    name = "thumbnail"

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def embed(self, images: Tensor) -> Tensor:
        pixels = F.adaptive_avg_pool2d(images, 4).flatten(1)
        return self.scale * (pixels - pixels.mean(dim=1, keepdim=True))


@pytest.fixture(scope="module")
def tiny_v(tmp_path_factory):
    return make_tiny_backbone(tmp_path_factory.mktemp("v"), prediction_type="v_prediction", ip_adapter=True)


def built(backbone: Any, **options: Any) -> MultiIPAdapter:
    module = MultiIPAdapter(Backbone(str(backbone)), First, **options)
    module.configure_model()
    module.log = lambda *_, **__: None
    return module


def batch_of() -> dict[str, Any]:
    g, n = torch.Generator().manual_seed(0), len(TIMES)
    mean, logvar = torch.randn(n, 4, 8, 8, generator=g), torch.full((n, 4, 8, 8), -20.0)
    return {
        "photo": [f"p/{i}" for i in range(n)],
        "references": torch.randn(n, 9, 24, generator=g),
        "moments": torch.cat([mean, logvar], dim=1),
        "text": {"prompt_embeds": torch.randn(n, 16, 32, generator=g)},
        "drop_image": torch.tensor([False] * (n - 1) + [True]),
        "time": torch.tensor(TIMES, dtype=torch.float64),
        "latent_noise": torch.randn(n, 4, 8, 8, generator=g),
        "eps": torch.randn(n, 4, 8, 8, generator=g),
    }


@pytest.mark.parametrize("kind", ["tiny_backbone", "tiny_v"])
def test_x0_follows_from_the_prediction_and_a_perfect_one_has_no_loss(kind, request, monkeypatch):
    module, batch = built(request.getfixturevalue(kind), identity_loss=IdentityLoss(Thumbnail())), batch_of()
    x, eps, t = module.latents(batch["moments"], batch["latent_noise"]), batch["eps"], torch.tensor([1, 100, 250, 400])
    x, eps = x[:4], eps[:4]
    perfect = module.noise.get_velocity(x, eps, t) if module.predicts_velocity else eps
    torch.testing.assert_close(module.predicted_x0(perfect, x, eps, t), x, rtol=1e-4, atol=1e-4)
    alpha = module.noise.alphas_cumprod[t].sqrt()[:, None, None, None]
    sigma = (1 - alpha**2).sqrt()
    off = sigma if module.predicts_velocity else sigma / alpha  # an error of 1 moves x_0 by -sigma, or -sigma / alpha
    torch.testing.assert_close(module.predicted_x0(perfect + 1, x, eps, t), x - off, rtol=1e-4, atol=1e-4)

    logged: dict[str, float] = {}
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.update({name: float(value.detach())}))
    perfectly = lambda x, eps, t, *_: module.noise.get_velocity(x, eps, t) if module.predicts_velocity else eps  # noqa: E731
    with torch.no_grad():
        module.training_step(batch, 0)
        wrong = logged["train/identity_loss"]
        monkeypatch.setattr(module, "denoise", perfectly)
        module.training_step(batch, 0)
    assert wrong > 1e-3 and abs(logged["train/identity_loss"]) < 1e-5


def test_only_samples_of_little_noise_with_photos_are_decoded(tiny_backbone, monkeypatch):
    loss = IdentityLoss(Thumbnail(), weight=0.5)
    module, plain, batch = built(tiny_backbone, identity_loss=loss), built(tiny_backbone), batch_of()
    decode, decoded = module.sampler.decode_signal, []
    monkeypatch.setattr(module.sampler, "decode_signal", lambda latents: decoded.append(latents) or decode(latents))
    with torch.no_grad():
        together, alone = module.training_step(batch, 0), plain.training_step(batch, 0)
        held_out, made = decoded
        assert torch.equal(held_out, batch["moments"][DECODED, :4]) and len(made) == len(DECODED)
        x, t = module.latents(batch["moments"], batch["latent_noise"]), (batch["time"] * 1000).long()
        embeds = module.condition(batch["references"]) * ~batch["drop_image"][:, None, None]
        x0 = module.predicted_x0(module.denoise(x, batch["eps"], t, batch["text"], embeds), x, batch["eps"], t)
        pairs = [module.sampler.decode(latents).float() for latents in (x0 / module.backbone.scaling_factor, held_out)]
        made, photo = (loss.network.embed(pixels) for pixels in (pairs[0][DECODED], pairs[1]))
        expected = (1 - F.cosine_similarity(made, photo)).sum() / len(TIMES)  # of images of 256 grey levels
    assert float(together - alone) == pytest.approx(0.5 * float(expected), abs=2e-3) and float(expected) > 0.01
    decoded.clear()
    batch["time"].clamp_(min=0.25)  # nobody is below
    with torch.no_grad():
        assert torch.equal(module.training_step(batch, 0), plain.training_step(batch, 0)) and not decoded


def test_it_trains_the_adapter_alone_and_a_step_down_its_gradient_lowers_it(tiny_backbone):
    module, batch = built(tiny_backbone, identity_loss=IdentityLoss(Thumbnail(), max_time=1.0)).train(), batch_of()
    assert not module.identity_network.training and not any("identity" in name for name in module.trained_parameters())
    x, t = module.latents(batch["moments"], batch["latent_noise"]), (batch["time"] * 1000).long()

    def distance() -> Tensor:
        embeds = module.condition(batch["references"]) * ~batch["drop_image"][:, None, None]
        predicted = module.denoise(x, batch["eps"], t, batch["text"], embeds)
        x0 = module.predicted_x0(predicted, x, batch["eps"], t)
        return module._identity_distance(module.identity_loss, x0, batch).mean()

    (before := distance()).backward()
    trained = list(module.trained_parameters().values())
    square = sum(float(p.grad.square().sum()) for p in trained)
    assert square > 0 and module.identity_network.scale.grad is None
    assert all(p.grad is None for p in module.sampler.pipe.vae.parameters())
    step = 0.01 * float(before.detach()) / square  # which lowers it by one in a hundred, were it linear
    with torch.no_grad():
        for p in trained:
            p -= step * p.grad
        fall = float(before - distance()) / float(before)
    assert 0.005 < fall < 0.015


def test_the_critics_embed_what_they_score(random_critic):
    critic = CriticExtractor(str(random_critic))
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = images.float().requires_grad_()
    embedding = critic.embed(pixels)
    torch.testing.assert_close(F.normalize(embedding, dim=1), critic.extract(images).embedding)
    embedding[0, 0].backward()
    assert pixels.grad is not None and pixels.grad[0].abs().sum() > 0 == pixels.grad[1:].abs().sum()


def test_a_checkpoint_and_an_export_say_which_network_trained(tiny_backbone, random_critic):
    critic = CriticExtractor(str(random_critic))
    module = built(tiny_backbone, identity_loss=IdentityLoss(critic, weight=0.2))
    assert module.identity_networks == {}
    module.on_train_start()
    assert module.identity_networks == {digest_weights(critic): "critic"}
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert not any("identity_network" in name for name in checkpoint["state_dict"])
    again = built(tiny_backbone)
    again.on_load_checkpoint(checkpoint)
    assert again.identity_networks == module.identity_networks
    record = record_of(again, MultiPhotoData(again.backbone), 1, "run", "float16")
    assert record["identity_networks"] == module.identity_networks
    assert module.describe()["identity_loss"] == {"network": "critic", "weight": 0.2, "max_time": 0.25}
    assert built(tiny_backbone).describe()["identity_loss"] is None


def trained_by(*critics: CriticExtractor) -> Perfect:
    module = Perfect()
    module.identity_networks = {digest_weights(critic): critic.name for critic in critics}
    return module


def test_the_critic_that_trained_is_left_out_and_where_it_is_named_refused(tmp_path, caplog):
    critics = [CriticExtractor(name) for name in ("critic", "critic_b")]
    assert digest_weights(critics[0]) != digest_weights(critics[1])
    options: dict[str, Any] = {"data": Data(test=2), "anchors": False}
    run(tmp_path / "left_out", extractors=None, module=trained_by(critics[1]), **options)
    assert list(read(tmp_path / "left_out")[0]["extractors"]) == ["critic"]
    assert "critic_b is left out: extractor 'critic_b' is the network of the identity loss" in caplog.text
    with pytest.raises(ValueError, match="'critic' is the network of the identity loss that trained the model"):
        run(tmp_path / "named", extractors=[critics[0]], module=trained_by(critics[0]), **options)
    with pytest.raises(ValueError, match="both critics trained the model"):
        run(tmp_path / "both", extractors=None, module=trained_by(*critics), **options)


@pytest.mark.parametrize("given", [{"weight": 0.0}, {"weight": float("nan")}, {"max_time": 0.0}, {"max_time": 1.5}])
def test_values_without_meaning_are_refused(given):
    [name] = given
    with pytest.raises(LitMultiIPError, match=rf"model\.identity_loss\.{name}="):
        IdentityLoss(Thumbnail(), **given)
