"""What the scores make of known faults: the worse the images, the worse the score, on real portraits and the critic."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_multiip.data import mini_faces
from lit_multiip.evaluation.critic import CriticExtractor, shipped_critic
from lit_multiip.evaluation.scores import fid, inception_score, kid
from lit_multiip.mini.measure import round_trip

PEOPLE, PHOTOS = 60, 2
pytestmark = pytest.mark.skipif(not shipped_critic().is_dir(), reason="the miniature's critic is not here")


def portraits(first: int) -> Tensor:
    role = mini_faces.ROLES["validation"][20_000:]
    images = [mini_faces.photo(0, role[first + p], n) for p in range(PEOPLE) for n in range(PHOTOS)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module")
def critic():
    return CriticExtractor()


@pytest.fixture(scope="module")
def real(critic):
    return critic.extract(portraits(0)).features


@pytest.fixture(scope="module")
def others():
    """Portraits of other people: from the same distribution as ``real``."""
    return portraits(PEOPLE)


def blurred(images: Tensor, sigma: float) -> Tensor:
    x = torch.arange(-6, 7, dtype=torch.float32)
    kernel = torch.exp(-x.square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    weight = (kernel[:, None] * kernel)[None, None].expand(3, 1, 13, 13)
    padded = F.pad(images.float(), (6, 6, 6, 6), mode="replicate")
    return F.conv2d(padded, weight, groups=3).round().clamp(0, 255).to(torch.uint8)


def noisy(images: Tensor, std: float) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + std * noise).round().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("score", [fid, kid])
def test_fid_and_kid_rise_with_blur_and_with_noise(score, critic, real, others):
    for fault, amounts in ((blurred, (1.7, 2.5, 4.0)), (noisy, (60.0, 100.0, 140.0))):
        values = [
            score(real, critic.extract(images).features) for images in (others, *(fault(others, a) for a in amounts))
        ]
        assert all(a < b for a, b in pairwise(values)), (fault.__name__, values)
        assert values[-1] > 3 * abs(values[0])


def test_fid_rises_with_what_the_autoencoder_loses(critic, real):
    """Of the same portraits; for other people's are as far off as round trips, which a critic is trained to forgive."""
    once = round_trip("mini", portraits(0))
    thrice = round_trip("mini", round_trip("mini", once))
    values = [fid(real, real), *(fid(real, critic.extract(images).features) for images in (once, thrice))]
    assert abs(values[0]) < 0.01 < values[1] and 1.5 * values[1] < values[2], values


def test_fid_rises_and_diversity_of_classes_falls_as_people_are_left_out(critic, real, others):
    looked = critic.extract(others)
    assert looked.logits is not None
    distances, marginal = [], []
    for kept in (60, 15, 5, 2):  # the rest are replaced by copies of these
        index = torch.arange(len(others)) % (kept * PHOTOS)
        distances.append(fid(real, looked.features[index]))
        marginal.append(inception_score(looked.logits[index]))
    assert all(a < b for a, b in pairwise(distances)), distances
    assert all(a > b for a, b in pairwise(marginal)), marginal
