import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from comparing import write_comparison, write_plan, write_test
from scoring import Data, Perfect, run

from lit_multiip.comparison.figures import pictured_people
from lit_multiip.comparison.rows import ComparisonError, best_cells, find_leader
from lit_multiip.comparison.tests import load_comparison
from lit_multiip.evaluation.intervals import person_mean
from lit_multiip.evaluation.results import read_features
from lit_multiip.evaluation.scores import fid


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_comparison(tmp_path_factory.mktemp("comparison") / "mini")


@pytest.fixture
def own(folder, tmp_path):
    """A copy to spoil."""
    return Path(shutil.copytree(folder, tmp_path / "mini"))


@pytest.fixture(scope="module")
def loaded(folder):
    return load_comparison(folder)


def features(folder, row, version=0):
    return read_features(folder / row / f"version_{version}" / "test" / "features_critic.safetensors")


def test_a_row_of_two_trainings_has_the_mean_of_each_images_scores(folder, loaded):
    each = [features(folder, "self_attn", version)[0] for version in (0, 1)]
    values = np.mean([images.per_image["identity_held_out"] for images in each], axis=0)
    score = loaded.scores["self_attn"]["identity_held_out/critic"]
    assert score == person_mean(values, each[0].people)
    assert score.n == 12 and score.people == 6
    assert loaded.of_each["self_attn"]["identity_held_out/critic"] == pytest.approx(
        [images.per_image["identity_held_out"].mean() for images in each]
    )


def test_a_row_of_two_trainings_has_the_mean_fid_and_a_jackknife_of_the_mean(folder, loaded):
    sets = [features(folder, "self_attn", version) for version in (0, 1)]
    score = loaded.scores["self_attn"]["fid/critic"]
    assert score.value == pytest.approx(np.mean([fid(real.features, made.features) for made, real in sets]))
    left_out = []  # six people, so each is a group
    for person in range(6):
        kept = [(made.people != person, real.people != person, made, real) for made, real in sets]
        left_out.append(np.mean([fid(real.features[r], made.features[m]) for m, r, made, real in kept]))
    sigma = np.sqrt(5 / 6 * np.square(left_out - np.mean(left_out)).sum())
    assert score.high - score.value == pytest.approx(2.5705818 * sigma, rel=1e-6)  # t of 5 degrees of freedom


def test_a_row_minus_its_like_is_zero_with_an_interval_of_zero(own):
    shutil.rmtree(own / "avg_pool")
    shutil.copytree(own / "ip_adapter", own / "avg_pool")
    for score in load_comparison(own).difference("avg_pool", "ip_adapter").values():
        assert score[:3] == (0, 0, 0)


def test_differences_are_paired_by_image(folder, loaded):
    a = np.mean([features(folder, "self_attn", v)[0].per_image["identity_held_out"] for v in (0, 1)], axis=0)
    b = features(folder, "avg_pool")[0]
    expected = person_mean(a - b.per_image["identity_held_out"], b.people)
    assert loaded.difference("self_attn", "avg_pool")["identity_held_out/critic"] == expected
    swapped = loaded.difference("avg_pool", "self_attn")["fid/critic"]
    assert swapped.value == pytest.approx(-loaded.difference("self_attn", "avg_pool")["fid/critic"].value)


def test_the_best_is_marked_only_where_it_is_clear_of_the_runner_up(loaded):
    first, second, difference = find_leader(loaded, "identity_held_out/critic", loaded.rows)
    assert (first.key, second.key) == ("self_attn", "avg_pool_trained")
    assert difference == loaded.difference("self_attn", "avg_pool_trained")["identity_held_out/critic"]
    marked = best_cells(loaded, "critic")
    assert ("self_attn", "identity_held_out/critic") in marked
    assert not any(key.startswith("prompt") for _, key in marked)  # the same numbers in every row
    assert not any(row == "avg_pool_trained" for row, _ in marked)  # a block of one has no runner-up


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sha256": "b" * 64}, r"ip_adapter.*avg_pool.*different protocols, .*aaaa.*bbbb.*the same people"),
        ({"people": 7}, r"ip_adapter.*avg_pool.*different protocols, .*'people': 6.*'people': 7"),
        ({"side": 16}, r"ip_adapter.*avg_pool.*different image sizes, 8 and 16"),
        ({"width": 5}, r"ip_adapter.*avg_pool.*different extractors, .*'num_features': 4.*'num_features': 5"),
        ({"extractors": ("critic", "b")}, r"ip_adapter.*avg_pool.*different extractors.*'b'.*score.extractors"),
    ],
)
def test_rows_that_are_not_alike_are_refused_and_both_named(own, options, message):
    shutil.rmtree(own / "avg_pool")
    write_test(own / "avg_pool/version_0/test", "AvgPool", **options)
    with pytest.raises(ComparisonError, match=message):
        load_comparison(own)


def test_another_network_of_the_same_name_is_refused(own):
    path = own / "avg_pool/version_0/test/features_critic.safetensors"
    generated, held_out = read_features(path)
    held_out.features[:] *= 1.1
    from lit_multiip.evaluation.results import write_features

    write_features(path, generated, held_out)
    with pytest.raises(ComparisonError, match="different features of the same held-out photos by extractor 'critic'"):
        load_comparison(own)


@pytest.mark.parametrize(
    "name", ["metrics.json", "scores.csv", "features_critic.safetensors", "images/p3/photo_1_s0.png"]
)
@pytest.mark.parametrize("keep", [0.0, 0.6, 0.995])
def test_files_that_were_cut_off_are_named_with_the_remedy(own, name, keep):
    path = own / "avg_pool/version_0/test" / name
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(
        ComparisonError, match=rf"avg_pool/version_0/test/{name}' is missing or cut off .*run this test"
    ):
        load_comparison(own)


def test_all_broken_files_are_named_at_once(own):
    for row in ("avg_pool", "ip_adapter"):
        (own / row / "version_0/test/scores.csv").write_text("")
    with pytest.raises(ComparisonError, match=r"ip_adapter/version_0/test/scores\.csv.*; .*avg_pool/version_0/test/sc"):
        load_comparison(own)


def test_what_is_planned_and_not_there_is_shown_as_missing(own):
    (own / "self_attn/version_1/test/metrics.json").unlink()  # written last: a test that did not end
    shutil.rmtree(own / "avg_pool")
    comparison = load_comparison(own)
    assert [(row.key, len(row.tests), row.missing) for row in comparison.rows] == [
        ("ip_adapter", 1, []),
        ("avg_pool", 0, ["version_0"]),
        ("self_attn", 1, ["version_1"]),
        ("avg_pool_trained", 1, []),
    ]
    assert "Average Pooling: not run yet." in comparison.notes()
    assert "Self-Attention: 1 of 2 planned trainings; not run yet: version_1." in comparison.notes()


def test_faces_that_are_not_found_are_counted_and_not_averaged_in(own):
    shutil.rmtree(own / "avg_pool")
    write_test(own / "avg_pool/version_0/test", "AvgPool", 0.1, missing_faces=3)
    comparison = load_comparison(own)
    assert comparison.undefined["avg_pool"]["identity_held_out/critic"] == (3, 12)
    score = comparison.scores["avg_pool"]["identity_held_out/critic"]
    assert score.n == 9 and score.people == 5  # one of them has no face in either image
    keys = "identity_held_out/critic, identity_references/critic"
    assert (
        f"Average Pooling: {keys}: face not found in 3 of 12 images, which are not in the mean." in comparison.notes()
    )


def test_scores_of_too_few_images_are_left_out_with_the_reason(tmp_path):
    write_plan(tmp_path, {"self_attn": ["version_0"]}, contrasts=[])
    write_test(tmp_path / "self_attn/version_0/test", "SelfAttention", people=1, held_out=1)
    comparison = load_comparison(tmp_path)
    assert not {"fid/critic", "kid/critic", "is/critic"} & comparison.scores["self_attn"].keys()
    reasons = comparison.left_out["self_attn"]
    assert reasons["kid/critic"].startswith("KID of 1 real and 1 generated images is undefined: give at least 2")
    assert "IS of 1 images is undefined" in reasons["is/critic"]
    assert comparison.columns("critic") == [
        *("identity_held_out", "identity_references", "prompt"),
        *("fid", "kid", "is", "is_uniform"),
    ]


def test_anchors_are_the_reference_rows_and_name_the_method_that_drew_them(own):
    assert [anchor.title for anchor in load_comparison(own).anchors] == [
        "no references (Self-Attention)",
        "VAE round trip",
    ]
    shutil.rmtree(own / "self_attn")
    assert load_comparison(own).anchors == []


def test_costs_are_a_person_an_image_and_what_was_trained(own):
    shutil.rmtree(own / "avg_pool_trained")
    write_test(own / "avg_pool_trained/version_0/test", "DreamBooth", seconds={"personalise": 30.0})
    comparison = load_comparison(own)
    assert comparison.costs(comparison.row("avg_pool_trained")) == {"personalise": 5, "image": 2, "parameters": 1234567}
    assert comparison.costs(comparison.row("ip_adapter")) == {"personalise": None, "image": 2, "parameters": 0}


def test_what_is_tuned_a_person_counts_as_trained_without_a_seed_of_its_own(own):
    metrics = own / "ip_adapter" / "version_0" / "test" / "metrics.json"
    content = json.loads(metrics.read_text())
    content["describe"]["per_person"] = True
    metrics.write_text(json.dumps(content))
    comparison = load_comparison(own)
    assert comparison.costs(comparison.row("ip_adapter"))["parameters"] == 1234567


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": "dreambooth"}, "names rows that are not in it, or twice: dreambooth"),
        ({"contrasts": [{"title": "t", "minus": ["avg_pool", "x"]}]}, "not in it, or twice: x"),
        ({"rows": [{"key": "self_attn"}]}, "title, trained, versions of self_attn.*run `compare` again"),
    ],
)
def test_plans_that_do_not_fit_are_refused(own, change, message):
    plan = json.loads((own / "plan.json").read_text())
    (own / "plan.json").write_text(json.dumps(plan | change))
    with pytest.raises(ComparisonError, match=message):
        load_comparison(own)


def test_folders_without_a_plan_or_a_test_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no plan\.json: give a folder that `compare` wrote"):
        load_comparison(tmp_path)
    write_plan(tmp_path, {"self_attn": ["version_0"]}, contrasts=[])
    with pytest.raises(FileNotFoundError, match="was tested yet"):
        load_comparison(tmp_path)
    (tmp_path / "plan.json").write_text('{"title": "cut')
    with pytest.raises(ComparisonError, match="is cut off or no plan"):
        load_comparison(tmp_path)


def test_rows_of_another_commit_or_sampling_are_named(own):
    shutil.rmtree(own / "avg_pool")
    write_test(own / "avg_pool/version_0/test", "AvgPool", commit="d" * 40 + "-dirty")
    [note] = [note for note in load_comparison(own).notes() if "commit" in note]
    assert "cccccccccccc (IP-Adapter, Self-Attention, Control avg_pool_trained)" in note
    assert "dddddddddddd-dirty (Average Pooling)" in note


def test_what_a_test_writes_is_read_and_scores_the_same(tmp_path):
    write_plan(tmp_path, {"ip_adapter": ["version_0"], "self_attn": ["version_0"]}, contrasts=[])
    for key, module in (("ip_adapter", Perfect(name="First")), ("self_attn", Perfect(name="SelfAttention"))):
        run(tmp_path / key / "version_0" / "test", module=module, data=Data(seeds=2), anchors=key == "self_attn")
    comparison = load_comparison(tmp_path)
    written = comparison.first.metrics["rows"]["First"]
    scores = comparison.scores["ip_adapter"]
    assert {key: score.value for key, score in scores.items()} == {key: s["value"] for key, s in written.items()}
    assert {key: score.n for key, score in scores.items()} == {key: s["n"] for key, s in written.items()}
    assert len(comparison.anchors) == 7
    assert all(score.value == 0 for score in comparison.difference("self_attn", "ip_adapter").values())
    assert len(pictured_people(comparison)) == 3


def test_a_row_that_was_trained_by_other_code_is_named(own):
    stamp = {"key": "0", "commit": "e" * 40}
    (own / "self_attn" / "version_1" / "fit.json").write_text(json.dumps(stamp))
    (own / "avg_pool_trained" / "version_0" / "fit.json").write_text(json.dumps(stamp | {"commit": "c" * 40}))
    notes = [note for note in load_comparison(own).notes() if "trained by" in note]
    assert notes == ["Self-Attention: trained by commit eeeeeeeeeeee and tested by cccccccccccc of this package."]
