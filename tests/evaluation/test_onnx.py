"""FID and inception scores by a network in an ONNX file."""

from pathlib import Path

import numpy as np
import pytest
import torch
from onnx_file import write_pooling
from PIL import Image
from torch.nn import functional as F

from lit_multiip.evaluation.onnx import OnnxFeatures
from lit_multiip.evaluation.results import describe_extractors
from lit_multiip.evaluation.scores import fid, inception_score
from lit_multiip.files import LitMultiIPError, hash_file
from lit_multiip.pixels import square, to_tensor

pytest.importorskip("onnxruntime")
SHARED = Path(__file__).resolve().parents[2].parent / "shared"
NETWORK = SHARED / "models" / "efficientnet_lite0.onnx"


@pytest.fixture(scope="module")
def pooling(tmp_path_factory):
    return write_pooling(tmp_path_factory.mktemp("onnx") / "pooling.onnx", side=64)


def test_features_are_the_named_output_of_normalised_images(pooling):
    images = (torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 255).round().to(torch.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    extractor = OnnxFeatures(str(pooling), features="y", logits=None, mean=mean, std=std)
    values = (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    seen = extractor.extract(images)
    torch.testing.assert_close(seen.features, F.avg_pool2d(values, 16).flatten(1), rtol=1e-4, atol=1e-5)
    assert seen.logits is None and seen.embedding is None
    facts = {"num_features": 48, "num_classes": None, "can_identify": False, "source": str(pooling)}
    assert describe_extractors([extractor]) == {"pooling": {**facts, "sha256": hash_file(pooling)}}


def test_one_pass_gives_features_and_logits_of_images_of_any_size(pooling):
    extractor = OnnxFeatures(str(pooling), features="y", logits="y", name="mine")
    small = torch.full((2, 3, 32, 32), 128, dtype=torch.uint8)
    seen = extractor.extract(small)
    assert (extractor.name, extractor.num_features, extractor.num_classes) == ("mine", 48, 48)
    assert torch.equal(seen.features, seen.logits) and seen.features.shape == (2, 48)
    torch.testing.assert_close(seen.features, extractor.extract(F.interpolate(small, 64)).features)


def test_outputs_and_options_that_do_not_fit_are_refused(pooling):
    with pytest.raises(LitMultiIPError, match=r"pooling.onnx' has no output 'features': give one of y"):
        OnnxFeatures(str(pooling))
    with pytest.raises(LitMultiIPError, match="has no output 'z'"):
        OnnxFeatures(str(pooling), features="y", logits="z")
    for options in ({"side": 32}, {"colours": "hsv"}, {"std": (0, 1, 1)}):
        with pytest.raises(LitMultiIPError, match=next(iter(options))):
            OnnxFeatures(str(pooling), features="y", logits=None, **options)


@pytest.mark.slow
@pytest.mark.skipif(not NETWORK.is_file(), reason="needs ../shared/models")
def test_fid_of_real_photos_tells_sharp_ones_from_blurred_ones():
    """300 against 300 other real photos of LFW at 64 px, seed 0; prints the scores, run with -s."""
    files = sorted((SHARED / "lfw-deepfunneled").glob("*/*.jpg"))
    chosen = [files[i] for i in np.random.default_rng(0).permutation(len(files))[:600]]
    heads = [square(Image.open(file).convert("RGB").crop((50, 50, 200, 200)), 64) for file in chosen]
    blurred = [image.resize((24, 24), Image.Resampling.LANCZOS).resize((64, 64)) for image in heads[:300]]
    extractor = OnnxFeatures(str(NETWORK))
    parts = [to_tensor(images).split(50) for images in (heads[:300], heads[300:], blurred)]
    real, others, soft = ([extractor.extract(batch) for batch in batches] for batches in parts)
    features = [torch.cat([seen.features for seen in row]) for row in (real, others, soft)]
    sharp_fid, soft_fid = fid(features[1], features[0]), fid(features[1], features[2])
    score = inception_score(torch.cat([seen.logits for seen in real]))
    print(f"\nFID of real photos {sharp_fid:.1f}, of blurred ones {soft_fid:.1f}; IS of real photos {score:.2f}")
    assert 25 < sharp_fid < 40 and 80 < soft_fid < 115 and 1.5 < score < 3
