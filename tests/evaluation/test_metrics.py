"""The Metrics agree with the formulas, are means over images, and go into anybody's module."""

import math

import lightning as L
import pytest
import torch
from scoring import Thumbnail
from torch.nn import functional as F
from trainers import quiet_trainer

from lit_multiip.evaluation.metrics import CopyPaste, IdentitySimilarity, NearestReference
from lit_multiip.evaluation.scores import copy_paste


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_identity_is_the_cosine_to_the_mean_direction_of_the_photos():
    images, photos = draw(5, 8), draw(5, 3, 8, seed=1)
    expected = F.cosine_similarity(images, F.normalize(photos, dim=2).mean(dim=1)).mean()
    metric = IdentitySimilarity()
    for part in (slice(0, 2), slice(2, 5)):
        metric.update(images[part], photos[part])
    assert metric.compute().item() == pytest.approx(expected.item(), abs=1e-6)


def test_a_copy_is_nearest_and_an_image_without_a_face_is_in_no_mean():
    images, references = draw(3, 8), draw(3, 4, 8, seed=1)
    references[0, 2] = 5 * images[0]
    images[1:] = torch.nan
    metric = NearestReference()
    metric.update(images, references)
    assert metric.compute().item() == pytest.approx(1, abs=1e-6) and metric.count == 1
    metric.reset()
    assert math.isnan(metric.compute())


def test_copy_paste_is_the_published_formula_of_angles():
    generated, held_out, reference = (draw(1000, 16, seed=seed).double() for seed in range(3))

    def angle(a, b):
        return F.cosine_similarity(a, b).clamp(-1, 1).arccos()

    published = (angle(generated, held_out) - angle(generated, reference)) / angle(held_out, reference)
    found = copy_paste(generated, held_out, reference[:, None])
    assert abs(torch.from_numpy(found) - published).max() < 1e-6
    copies, originals = (copy_paste(one, held_out, reference[:, None]) for one in (reference, held_out))
    assert abs(copies - 1).max() < 1e-5 and abs(originals + 1).max() < 1e-5
    # of several references it is the nearest to the image that counts
    both = torch.stack([-generated, reference], dim=1)
    assert copy_paste(generated, held_out, both)[0] == pytest.approx(published[0].item(), abs=1e-6) or (
        F.cosine_similarity(generated[:1], reference[:1]).item() < -1
    )


class Anybody(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.identity, self.copies = IdentitySimilarity(Thumbnail()), CopyPaste(Thumbnail())

    def test_step(self, batch, index):
        images, held_out, references = batch
        self.identity.update(images, references)
        self.copies.update(images, held_out, references)
        self.log_dict({"identity": self.identity, "copies": self.copies})


def test_metrics_see_images_in_anybodys_module_and_no_checkpoint_holds_their_network():
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (4, 5, 3, 16, 16), generator=generator).to(torch.uint8)
    items = [(one[0], one[1], one[1:]) for one in pictures]  # the held-out photo is one of the "references"
    module = Anybody()
    [logged] = quiet_trainer().test(module, torch.utils.data.DataLoader(items, batch_size=2), verbose=False)
    features = F.normalize(Thumbnail().extract(pictures.flatten(0, 1)).embedding.unflatten(0, (4, 5)), dim=2)
    expected = F.cosine_similarity(features[:, 0], features[:, 1:].mean(dim=1)).mean().item()
    assert logged["identity"] == pytest.approx(expected, abs=1e-5) and -1 <= logged["copies"] <= 1
    assert module.state_dict() == {} and not list(module.parameters())
