import pickle

import pytest
import torch
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3 as fidelity
from torchmetrics.image.fid import FrechetInceptionDistance

from lit_multiip.evaluation.extractors import Extraction, Extractor, Inception
from lit_multiip.evaluation.scores import fid


class Tiny(Extractor):
    name = "tiny"
    num_features = 5
    can_identify = True

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 5), nn.Dropout(0.5))
        self.passes = 0
        self.freeze()

    def compute(self, images):
        self.passes += 1
        features = self.layer(images / 255)
        return Extraction(features, embedding=features)


def images_of(n, side=4, seed=0):
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_an_extractor_never_trains_and_passes_no_gradients():
    extractor = Tiny()
    nn.ModuleList([extractor]).train()
    features = extractor.extract(images_of(2)).features
    assert torch.equal(features, extractor.extract(images_of(2)).features)  # dropout is off
    assert not features.requires_grad
    assert not any(parameter.requires_grad for parameter in extractor.parameters())


def test_one_pass_gives_all_outputs_and_the_embedding_has_unit_norm():
    extractor = Tiny()
    extraction = extractor.extract(images_of(3))
    assert extractor.passes == 1
    assert extraction.features.shape == (3, 5)
    assert extraction.logits is None
    torch.testing.assert_close(extraction.embedding.norm(dim=-1), torch.ones(3))


def test_features_do_not_depend_on_a_surrounding_autocast():
    extractor = Tiny()
    with torch.autocast("cpu", torch.bfloat16):
        features = extractor.extract(images_of(3)).features
    assert torch.equal(features, extractor.extract(images_of(3)).features)


@pytest.mark.parametrize("images", [torch.rand(1, 3, 4, 4), images_of(1)[0], images_of(1)[:, :1]])
def test_images_of_another_type_or_shape_are_refused(images):
    with pytest.raises(ValueError, match="give uint8"):
        Tiny().extract(images)


def test_fid_of_inception_features_equals_torchmetrics_on_the_same_images(inception_weights):
    extractor = Inception(inception_weights, feature=64)
    real, fake = images_of(6, 32), images_of(5, 32, seed=1) // 2
    metric = FrechetInceptionDistance(feature=64, feature_extractor_weights_path=inception_weights)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    assert fid(extractor.extract(real).features, extractor.extract(fake).features) == pytest.approx(
        float(metric.compute()), rel=1e-4
    )


def test_inception_logits_are_those_without_the_bias_of_its_2048_features(inception_weights):
    extractor = Inception(inception_weights)
    extraction = extractor.extract(images_of(2, 32))
    assert (extractor.name, extractor.num_features, extractor.num_classes) == ("inception-2048", 2048, 1008)
    assert extraction.features.shape == (2, 2048)
    torch.testing.assert_close(extraction.logits, extraction.features @ extractor.network.fc.weight.T)
    assert not extractor.can_identify
    assert extraction.embedding is None


def test_resizing_as_tensorflow_does_gives_other_features_under_another_name(inception_weights):
    torchmetrics_like, tensorflow_like = (
        Inception(inception_weights, 64),
        Inception(inception_weights, 64, antialias=False),
    )
    images = images_of(2, 400)
    assert (torchmetrics_like.extract(images).features - tensorflow_like.extract(images).features).abs().max() > 1e-3
    assert tensorflow_like.name == "inception-64-tf1"


def test_missing_weights_are_reported_and_nothing_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: pytest.fail("downloads"))
    with pytest.raises(FileNotFoundError, match=r"no\.pth.*fetch https://github.com/toshas/torch-fidelity"):
        Inception(str(tmp_path / "no.pth"))
    with pytest.raises(ValueError, match="feature is 128"):
        Inception(str(tmp_path / "no.pth"), feature=128)


class Payload:
    """A pickle that runs code where it is loaded."""

    ran = False

    def __reduce__(self):
        return setattr, (Payload, "ran", True)


def test_a_file_that_holds_more_than_weights_is_refused_and_not_run(tmp_path):
    torch.save({"fc.weight": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(pickle.UnpicklingError):
        Inception(str(tmp_path / "evil.pth"))
    assert not Payload.ran
