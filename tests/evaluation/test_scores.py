import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from lit_multiip.evaluation.scores import (
    TooFewSamples,
    copy_paste,
    cosine,
    diversity,
    fid,
    identity_scores,
    inception_score,
    inception_score_uniform,
    kid,
    nearest_reference,
)
from lit_multiip.evaluation.summaries import ImageSet, summarise, summarise_difference


class Identity(nn.Identity):
    num_features = 6


def test_the_nearest_reference_is_the_most_similar_one_of_the_tasks_own():
    references = np.array([[[1.0, 0.0], [0.0, 3.0]], [[0.0, 1.0], [-2.0, 0.0]]])  # two tasks of two references
    assert nearest_reference([[3.0, 4.0], [5.0, 0.0]], references) == pytest.approx([0.8, 0.0])
    assert nearest_reference(2 * references[:, 1], references) == pytest.approx([1, 1])  # copied
    none = [float("nan")] * 2  # a face that is not found is no nearest reference
    nearest = nearest_reference([[1.0, 0.0], [1.0, 0.0], none], [[[0.0, 1.0], none], [none, none], [[1.0, 0.0], none]])
    assert nearest[0] == 0 and np.isnan(nearest[1:]).all()
    for wrong in (references[:1], references[..., :1] + 1.5, references[:, 0], references[:, :0]):
        with pytest.raises(ValueError, match="do not fit"):
            nearest_reference([[3.0, 4.0], [5.0, 0.0]], wrong)


def published_copy_paste(image, photo, reference):
    """(theta_gt - theta_gr) / theta_tr of one triplet, as WithAnyone has it (arXiv 2510.14975, eq. 2)."""

    def theta(a, b):
        return np.arccos(np.clip(np.dot(a / np.linalg.norm(a), b / np.linalg.norm(b)), -1, 1))

    return (theta(image, photo) - theta(image, reference)) / theta(photo, reference)


def test_a_thousand_random_triplets_have_the_published_score_of_copying():
    g, t, r = np.random.default_rng(0).normal(size=(3, 1000, 16)) * [[[1.0]], [[3.0]], [[0.2]]]
    g[:500] += 4 * t[:500] * np.linspace(0, 1, 500)[:, None]  # some near the held-out photo, some near the reference
    g[500:] += 20 * r[500:] * np.linspace(0, 1, 500)[:, None]
    ours = copy_paste(g, t, r[:, None])
    assert np.abs(ours - [published_copy_paste(*triplet) for triplet in zip(g, t, r, strict=True)]).max() < 1e-6
    assert ours.min() < -0.8 and ours.max() > 0.8 and np.abs(ours).max() <= 1  # the triangle of angles
    assert copy_paste(r, t, r[:, None]) == pytest.approx(np.ones(1000), abs=1e-6)
    assert copy_paste(t, t, r[:, None]) == pytest.approx(-np.ones(1000), abs=1e-6)
    assert copy_paste(t, t, t[:, None]).tolist() == [0.0] * 1000  # nothing to tell apart


def test_of_several_references_the_published_score_takes_the_one_that_is_copied():
    g, t, *r = np.random.default_rng(1).normal(size=(6, 20, 8))
    references = np.stack(r, axis=1)
    closest = [
        max(task, key=lambda x: image @ x / np.linalg.norm(x)) for image, task in zip(g, references, strict=True)
    ]
    expected = [published_copy_paste(*triplet) for triplet in zip(g, t, closest, strict=True)]
    assert copy_paste(g, t, references) == pytest.approx(expected, abs=1e-9)
    assert copy_paste(g, t, references[:, ::-1].copy()) == pytest.approx(expected, abs=1e-9)
    references[:, 1:] = np.nan  # faces that were not found
    alone = [published_copy_paste(*triplet) for triplet in zip(g, t, references[:, 0], strict=True)]
    assert copy_paste(g, t, references) == pytest.approx(alone, abs=1e-9)
    g[0], t[1], references[2] = np.nan, np.nan, np.nan
    assert np.isnan(copy_paste(g, t, references)).tolist() == [True] * 3 + [False] * 17
    with pytest.raises(ValueError, match="do not fit"):
        copy_paste(g, t, references[:, 0])


def normal(n, d=6, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d))


def with_moments(mean, deviations, rotation, n=200, seed=0):
    """Samples of exactly this empirical mean and covariance rotation diag(deviations^2) rotation^T."""
    x = normal(n, len(mean), seed)
    x = np.linalg.qr(x - x.mean(axis=0))[0] * np.sqrt(n - 1)
    return x * deviations @ rotation.T + mean


def test_fid_matches_the_closed_form_of_two_gaussians():
    """|m1 - m2|^2 + sum (s1 - s2)^2 where the covariances share their axes; the offset of 100 costs no digits."""
    rotation = np.linalg.qr(normal(6))[0]
    s1, s2 = np.linspace(0.5, 3, 6), np.linspace(2, 0.1, 6)
    m1, m2 = normal(1, seed=1)[0] + 100, normal(1, seed=2)[0] + 100
    expected = np.square(m1 - m2).sum() + np.square(s1 - s2).sum()
    assert fid(with_moments(m1, s1, rotation), with_moments(m2, s2, rotation, 300, 1)) == pytest.approx(expected, 1e-9)


def test_fid_matches_the_matrix_formula_of_the_empirical_moments():
    real, fake = normal(100) @ normal(6, seed=3), normal(80, seed=1) @ normal(6, seed=4) + 1
    s1, s2 = np.cov(real.T), np.cov(fake.T)
    expected = np.square(real.mean(0) - fake.mean(0)).sum() + np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2).real)
    assert fid(real, fake) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("width", [6, 300])
def test_fid_equals_torchmetrics_also_of_fewer_images_than_features(width):
    real, fake = torch.from_numpy(normal(60, width)), torch.from_numpy(normal(50, width, 1) * 1.5 + 0.3)
    extractor = Identity()
    extractor.num_features = width
    metric = FrechetInceptionDistance(extractor)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    assert fid(real, fake) == pytest.approx(float(metric.compute()), rel=1e-6)


def test_fid_of_a_set_with_itself_is_zero_and_rises_with_noise():
    real = normal(300)
    noisy = [fid(real, real + scale * normal(300, seed=1)) for scale in (0, 0.3, 1, 3)]
    assert abs(noisy[0]) < 1e-6
    assert noisy == sorted(noisy)
    assert noisy[-1] > 20


def test_kid_equals_torchmetrics_at_one_subset_of_all_images():
    real, fake = torch.from_numpy(normal(50)), torch.from_numpy(normal(50, seed=1) + 0.5)
    metric = KernelInceptionDistance(Identity(), subsets=1, subset_size=50)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    assert kid(real, fake) == pytest.approx(float(metric.compute()[0]), rel=1e-12)


@pytest.mark.parametrize("n_fake", [30, 90])
def test_kid_is_unbiased_for_equal_distributions_at_unequal_sizes(n_fake):
    values = [kid(normal(30, seed=2 * s), normal(n_fake, seed=2 * s + 1)) for s in range(400)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(400)
    assert kid(normal(30), normal(n_fake, seed=1) + 1) > 10 * np.std(values)


@pytest.mark.parametrize(
    ("logits", "marginal", "uniform"),
    [
        (1e4 * np.tile(np.eye(7), (5, 1)), 7, 7),  # certain, each class equally often
        (np.ones((20, 5)), 1, 1),  # undecided
        (1e4 * np.eye(7)[np.zeros(10, dtype=int)], 1, 7),  # certain, always of one class
    ],
)
def test_inception_scores_of_k_classes(logits, marginal, uniform):
    assert inception_score(logits) == pytest.approx(marginal, rel=1e-12)
    assert inception_score_uniform(logits) == pytest.approx(uniform, rel=1e-12)


def test_inception_score_equals_torchmetrics():
    logits = 3 * torch.from_numpy(normal(40))
    metric = InceptionScore(nn.Identity(), splits=1)
    metric.update(logits)
    assert inception_score(logits) == pytest.approx(float(metric.compute()[0]), rel=1e-12)


def test_set_scores_are_deterministic_and_leave_the_global_generator_alone():
    real, fake = normal(40), normal(40, seed=1)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append((fid(real, fake), kid(real, fake), inception_score(fake), inception_score_uniform(fake)))
        assert torch.equal(before, torch.get_rng_state())
    assert results[0] == results[1]


def test_half_precision_tensors_are_scored_in_double():
    real, fake = torch.from_numpy(normal(40)).bfloat16(), torch.from_numpy(normal(40, seed=1)).bfloat16()
    assert fid(real, fake) == fid(real.double(), fake.double())
    assert kid(real, fake) == kid(real.double(), fake.double())


def test_identity_scores_of_known_angles():
    """Person 0's two held-out photos stand 90 degrees apart, so their mean lies 45 degrees from each."""
    x, y, z = np.eye(3)
    generated, held_out = np.stack([5 * x, y, z]), np.stack([2 * x, 7 * y, y])
    held_out[:2] = [x, y]
    references = np.stack([[x, z], [y, y], [-z, -z]])
    scores = identity_scores(generated, held_out, references, np.array(["a", "a", "b"]))
    assert scores["held_out"] == pytest.approx([1, 1, 0])
    assert scores["held_out_mean"] == pytest.approx([np.sqrt(0.5), np.sqrt(0.5), 0])
    assert scores["references"] == pytest.approx([np.sqrt(0.5), 1, -1])


def test_faces_that_are_not_found_are_undefined_or_left_out_of_means():
    x, y, none = [1.0, 0.0], [0.0, 1.0], [np.nan, np.nan]
    generated = np.array([x, none, x, x])
    held_out = np.array([x, x, none, y])
    references = np.array([[x, none], [x, x], [y, y], [none, none]])
    scores = identity_scores(generated, held_out, references, np.array(["a", "a", "b", "b"]))
    assert np.array_equal(scores["held_out"], [1, np.nan, np.nan, 0], equal_nan=True)
    assert np.array_equal(scores["held_out_mean"], [1, np.nan, 0, 0], equal_nan=True)
    assert np.array_equal(scores["references"], [1, np.nan, 0, np.nan], equal_nan=True)
    with pytest.raises(ValueError, match="zero or not finite"):
        identity_scores(generated, np.array([x, x, [np.nan, 1.0], y]), references, np.array(["a", "a", "b", "b"]))


def test_identity_scores_ignore_the_length_of_embeddings():
    arrays = normal(6), normal(6, seed=1), normal(24, seed=2).reshape(6, 4, 6)
    lengths = np.linspace(0.1, 9, 6)[:, None]
    people = np.arange(6) // 2
    plain = identity_scores(*arrays, people)
    scaled = identity_scores(arrays[0] * lengths, arrays[1] * lengths, arrays[2] * lengths[:, :, None], people)
    for name, values in plain.items():
        assert scaled[name] == pytest.approx(values)


def test_diversity_is_the_mean_pairwise_cosine_distance_of_a_task():
    features, groups = normal(7), np.array(["a", "b", "a", "c", "a", "b", "a"])
    scores = diversity(features, groups)
    rows = np.flatnonzero(groups == "a")
    pairs = [1 - cosine(features[i], features[j]) for i in rows for j in rows if i < j]
    assert scores[rows].mean() == pytest.approx(np.mean(pairs))
    assert scores[[1, 5]] == pytest.approx(np.full(2, 1 - cosine(features[1], features[5])))
    assert np.isnan(scores[3])


def test_diversity_of_equal_images_is_zero():
    assert diversity(np.tile(normal(1), (4, 1)), np.zeros(4)) == pytest.approx(np.zeros(4), abs=1e-12)


def image_set(shift=0.0, seed=0, people=15, each=4):
    """One method's images; the person effect is shared by all methods."""
    labels = np.repeat(np.arange(people), each)
    features = normal(people, 4, 99)[labels] + normal(len(labels), 4, seed) + shift
    per_image = {"identity_held_out": features[:, 0], "diversity": np.full(len(labels), np.nan)}
    return ImageSet(labels, features, logits=3 * features, per_image=per_image)


def test_every_key_names_its_extractor_and_every_score_lies_in_its_interval():
    scores = summarise("critic", image_set(0.5, 1), image_set(), resamples=200)
    assert set(scores) == {"fid/critic", "kid/critic", "is/critic", "is_uniform/critic", "identity_held_out/critic"}
    for score in scores.values():
        assert score.low < score.value < score.high
        assert (score.n, score.people) == (60, 15)
    assert scores["fid/critic"].value == fid(image_set().features, image_set(0.5, 1).features)


def test_the_number_of_images_is_that_of_the_generated_ones():
    score = summarise("inception-2048", image_set(0.5, 1), image_set(each=2))["fid/inception-2048"]
    assert (score.n, score.people) == (60, 15)


def test_differences_are_differences_of_the_scores_and_find_the_better_method():
    good, poor, real = image_set(0.2, 1), image_set(1.5, 2), image_set()
    differences = summarise_difference("critic", good, poor, real)
    a, b = summarise("critic", good, real), summarise("critic", poor, real)
    assert set(differences) == set(a)
    for key, difference in differences.items():
        assert difference.value == pytest.approx(a[key].value - b[key].value)
    assert differences["fid/critic"].high < 0
    assert differences["kid/critic"].high < 0
    assert differences["identity_held_out/critic"].high < 0


def test_an_extractor_without_classes_or_features_gives_what_it_can():
    real = image_set()
    faces = ImageSet(real.people, per_image={"identity_held_out": np.ones(60)})
    assert set(summarise("facenet", faces, real)) == {"identity_held_out/facenet"}


def test_one_image_is_summarised_without_the_scores_of_sets():
    one = image_set(people=1, each=1)
    with pytest.warns(UserWarning, match="FID of 1 real and 1 generated images is undefined"):
        scores = summarise("critic", one, one)
    assert set(scores) == {"is_uniform/critic", "identity_held_out/critic"}
    assert scores["identity_held_out/critic"].low is None


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fid(normal(1), normal(9)), TooFewSamples, "FID of 1 real and 9 generated images"),
        (lambda: kid(normal(9), normal(1)), TooFewSamples, "KID of 9 real and 1 generated images"),
        (lambda: inception_score(normal(1)), TooFewSamples, "IS of 1 images"),
        (lambda: inception_score_uniform(normal(0)), TooFewSamples, "of 0 images"),
        (lambda: fid(normal(9), normal(9, 5)), ValueError, "6-d and generated ones 5-d"),
        (
            lambda: fid(normal(9), np.full((9, 6), np.nan)),
            ValueError,
            r"generated features of images \[0, 1, 2, 3, 4\]",
        ),
        (lambda: kid(normal(9)[0], normal(9)), ValueError, r"real features have shape \(6,\)"),
        (lambda: inception_score(np.array([[1.0, np.inf], [0, 0]])), ValueError, r"logits of images \[0\]"),
        (lambda: cosine(normal(2), normal(3)), ValueError, r"shapes \(2, 6\) and \(3, 6\)"),
        (lambda: cosine(normal(2), np.zeros((2, 6))), ValueError, r"embeddings at \[\[0\], \[1\]\]"),
        (lambda: identity_scores(normal(3), normal(3), normal(3), np.arange(3)), ValueError, "do not fit"),
        (lambda: diversity(normal(3), np.arange(2)), ValueError, "do not fit"),
        (lambda: ImageSet(np.arange(3), normal(2)), ValueError, "'features' has 2 rows and people 3"),
        (lambda: summarise_difference("x", image_set(), image_set(people=14), image_set()), ValueError, "same tasks"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
