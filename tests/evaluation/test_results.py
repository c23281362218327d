import numpy as np

from lit_multiip.evaluation.results import read_features, write_features
from lit_multiip.evaluation.summaries import ImageSet


def images(shift: float) -> ImageSet:
    rng = np.random.default_rng(0)
    people = np.repeat([f"p{i}" for i in range(10)], 4)
    score = rng.random(40) + shift
    return ImageSet(people, rng.normal(size=(40, 4)), rng.normal(size=(40, 5)), {"identity_held_out": score})


def test_what_an_extractor_saw_reads_back_as_it_was(tmp_path):
    write_features(tmp_path / "f.safetensors", images(0.5), images(0))
    generated, held_out = read_features(tmp_path / "f.safetensors")
    assert np.array_equal(generated.features, images(0.5).features) and len(np.unique(held_out.people)) == 10
    assert np.array_equal(generated.per_image["identity_held_out"], images(0.5).per_image["identity_held_out"])
