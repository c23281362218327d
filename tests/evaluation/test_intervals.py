import numpy as np
import pytest
from scipy import stats

from lit_multiip.evaluation.intervals import delete_group_jackknife, paired_difference, paired_jackknife, person_mean
from lit_multiip.evaluation.scores import fid

PEOPLE = np.repeat(np.arange(12), 3)


def scores_of(people, rng):
    """Scores whose person effect is as large as the scatter within a person."""
    return rng.normal(size=people.max() + 1)[people] + rng.normal(size=len(people))


def test_bootstrap_covers_the_true_mean_of_40_people_about_95_percent_of_the_time():
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(500):
        people = np.repeat(np.arange(40), rng.integers(2, 6, 40))
        score = person_mean(scores_of(people, rng), people, seed=seed, resamples=500)
        hits += score.low <= 0 <= score.high
    assert 0.91 <= hits / 500 <= 0.97


@pytest.mark.parametrize("n_people", [6, 10, 20])
def test_the_interval_covers_the_true_mean_of_few_people_about_95_percent_of_the_time(n_people):
    """By the percentile bootstrap 85, 88 and 93 percent."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(3000):
        people = np.repeat(np.arange(n_people), rng.integers(2, 6, n_people))
        score = person_mean(scores_of(people, rng), people)
        hits += score.low <= 0 <= score.high
    assert 0.935 <= hits / 3000 <= 0.965


def test_the_interval_of_few_people_with_equally_many_images_is_the_t_interval_of_their_means():
    values = scores_of(PEOPLE, np.random.default_rng(0))
    means = values.reshape(12, 3).mean(axis=1)
    expected = stats.t.interval(0.9, 11, loc=means.mean(), scale=stats.sem(means))
    score = person_mean(values, PEOPLE, level=0.9)
    assert (score.low, score.high) == pytest.approx(expected, rel=1e-12)


def test_bootstrap_by_person_is_wider_than_by_image_where_images_of_a_person_agree():
    people = np.repeat(np.arange(30), 10)
    values = np.random.default_rng(0).normal(size=30)[people]
    by_person, by_image = person_mean(values, people), person_mean(values, np.arange(300))
    ratio = (by_person.high - by_person.low) / (by_image.high - by_image.low)
    assert ratio == pytest.approx(np.sqrt(10), rel=0.15)


def test_bootstrap_agrees_with_scipy():
    people = np.repeat(np.arange(30), np.arange(1, 31) % 5 + 1)
    values = scores_of(people, np.random.default_rng(1))
    sums, counts = np.bincount(people, weights=values), np.bincount(people)
    ratio = stats.bootstrap(
        (sums, counts),
        lambda s, c, axis: s.sum(axis) / c.sum(axis),
        paired=True,
        method="percentile",
        n_resamples=20000,
    ).confidence_interval
    score = person_mean(values, people, resamples=20000)
    assert (score.low, score.high) == pytest.approx((ratio.low, ratio.high), abs=0.02)


def test_bootstrap_ignores_undefined_images_and_counts_the_others():
    values = np.arange(36.0)
    values[PEOPLE == 3] = np.nan
    values[0] = np.nan
    score = person_mean(values, PEOPLE)
    assert (score.n, score.people) == (32, 11)
    assert score.value == np.nanmean(values)
    assert score == person_mean(values[~np.isnan(values)], PEOPLE[~np.isnan(values)])


def test_labels_may_be_names_and_rows_in_any_order():
    values, names = np.arange(36.0), np.array([f"person_{p:02d}" for p in PEOPLE])
    order = np.random.default_rng(0).permutation(36)
    assert person_mean(values[order], names[order]) == person_mean(values, PEOPLE)


def test_one_person_has_a_value_and_no_interval():
    assert person_mean([1.0, 3.0], ["a", "a"]) == (2.0, None, None, 2, 1)
    assert delete_group_jackknife(np.sum, ["a", "a"]) == (2.0, None, None, 2, 1)


def test_no_defined_image_gives_nan_of_none():
    score = person_mean([np.nan, np.nan], [0, 1])
    assert np.isnan(score.value)
    assert score[1:] == (None, None, 0, 0)


def test_a_paired_difference_cancels_what_two_methods_share():
    rng = np.random.default_rng(0)
    shared = 10 * rng.normal(size=36)
    a, b = shared + 0.5 + 0.1 * rng.normal(size=36), shared
    score = paired_difference(a, b, PEOPLE)
    assert 0.4 < score.low < 0.5 < score.high < 0.6
    b[5] = np.nan
    assert paired_difference(a, b, PEOPLE).n == 35


def test_leaving_out_one_person_each_gives_the_t_interval_of_a_mean():
    values = np.random.default_rng(0).normal(size=12)
    score = delete_group_jackknife(lambda keep: values[keep].mean(), np.arange(12), groups=20)
    expected = stats.t.interval(0.95, 11, loc=values.mean(), scale=stats.sem(values))
    assert (score.low, score.high) == pytest.approx(expected, rel=1e-12)


def test_every_person_is_left_out_once_as_a_whole():
    left_out = []

    def statistic(keep):
        left_out.append(sorted(set(PEOPLE[~keep])))
        assert not set(PEOPLE[keep]) & set(PEOPLE[~keep])
        return float(keep.sum())

    delete_group_jackknife(statistic, PEOPLE, groups=5)
    assert left_out[0] == []
    assert len(left_out) == 1 + 5
    assert sorted(person for people in left_out for person in people) == list(range(12))
    assert {len(people) for people in left_out[1:]} == {2, 3}


@pytest.mark.parametrize(("shift", "least"), [(0.0, 0.95), (0.5, 0.90)])
def test_jackknife_covers_the_expected_fid_of_clustered_images(shift, least):
    """Equal distributions: never too short (about 99% measured); different ones: about 95%."""
    rng, people = np.random.default_rng(0), np.repeat(np.arange(40), 4)
    scores = []
    for seed in range(150):
        person = rng.normal(size=(40, 4))[people]
        real, fake = person + rng.normal(size=(160, 4)), person + rng.normal(size=(160, 4)) + shift
        scores.append(delete_group_jackknife(lambda keep, r=real, f=fake: fid(r[keep], f[keep]), people, seed=seed))
    expected = np.mean([score.value for score in scores])
    assert np.mean([score.low <= expected <= score.high for score in scores]) >= least


def test_paired_jackknife_leaves_the_same_people_out_of_both():
    values = 10 * np.random.default_rng(0).normal(size=36)
    score = paired_jackknife(lambda keep: values[keep].mean() + 1, lambda keep: values[keep].mean(), PEOPLE)
    assert score[:3] == pytest.approx((1.0, 1.0, 1.0), abs=1e-9)


def test_a_statistic_undefined_without_a_group_has_no_interval():
    score = delete_group_jackknife(lambda keep: 1.0 if keep.all() else float("nan"), PEOPLE)
    assert score == (1.0, None, None, 36, 12)


def test_equal_seeds_give_equal_intervals_and_the_global_generator_is_left_alone():
    values = np.random.default_rng(0).normal(size=36)
    np.random.seed(7)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    scores = [person_mean(values, np.arange(36), seed=seed) for seed in (1, 1, 2)]
    deals = [delete_group_jackknife(lambda keep: values[keep].mean(), PEOPLE, 4, seed=seed) for seed in (1, 1, 2)]
    assert scores[0] == scores[1] != scores[2]
    assert deals[0] == deals[1] != deals[2]
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: person_mean([1.0, 2.0], [0]), r"values have shape \(2,\) and people \(1,\)"),
        (lambda: person_mean([1.0, np.inf], [0, 1]), "value of image 1 is infinite"),
        (lambda: person_mean([1.0, 2.0], [0, 1], resamples=0), "resamples is 0"),
        (lambda: person_mean([1.0, 2.0], [0, 1], level=95), "level is 95"),
        (lambda: delete_group_jackknife(np.sum, []), "at least one image"),
        (lambda: delete_group_jackknife(np.sum, [0, 1], groups=1), "groups is 1"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
