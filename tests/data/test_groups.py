from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import equal
from torch.utils.data import BatchSampler

from lit_multiip.data.groups import draw_references
from lit_multiip.data.people import Person
from lit_multiip.data.photos import DataError, FilePhoto
from lit_multiip.datasets import EpochSampler, HeldOutGroups, ShareSampler


def person(name: str, photos: int) -> Person:
    return Person(
        name, tuple(FilePhoto(name, f"{i}.png", f"prompt {i}", Path(name, f"{i}.png")) for i in range(photos))
    )


class FakeFeatures:
    """A photo's embedding is its number; text says whether the prompt was dropped."""

    def embeds(self, photos) -> torch.Tensor:
        return torch.tensor([[float(photo.name.split(".")[0])] for photo in photos])

    def moments(self, photo) -> torch.Tensor:
        return torch.full((4, 2, 2), float(photo.name.split(".")[0]))

    def text(self, prompt: str) -> dict[str, torch.Tensor]:
        return {"prompt_embeds": torch.tensor([[float(prompt == "")]])}

    def blank(self) -> None:
        """Zeros stand for no photo."""

    def sizes(self, photo) -> dict[str, torch.Tensor]:
        return {}


def groups(*people: Person, **options) -> HeldOutGroups:
    return HeldOutGroups(people, FakeFeatures(), **options)


@pytest.mark.parametrize("balance", ["person", "photo"])
def test_the_target_is_never_among_its_references(balance):
    data = groups(person("a", 14), person("b", 10), person("c", 4), person("d", 2), balance=balance)
    for epoch in range(100):
        for index in range(len(data)):
            target, references = data.draw(epoch, index)
            assert target not in references and len(references) == 9
            assert {photo.person for photo in references} == {target.person}


def test_intruders_of_other_people_are_0_to_so_many_of_a_samples_references():
    people = [person(name, 12) for name in "abcd"]
    plain, mixed = groups(*people), groups(*people, intruders=3)
    counts, others = Counter(), Counter()
    for epoch in range(100):
        for index in range(len(plain)):
            (target, references), (same, changed) = plain.draw(epoch, index), mixed.draw(epoch, index)
            foreign = [photo.person for photo in changed if photo.person != target.person]
            assert target == same and target not in changed
            assert len(foreign) == sum(a != b for a, b in zip(references, changed, strict=True))
            counts[len(foreign)] += 1
            others.update((target.person, name) for name in foreign)
    assert counts.keys() == {0, 1, 2, 3} and min(counts.values()) > 0.22 * sum(counts.values())
    assert len(others) == 12 and min(others.values()) > 0.8 * max(others.values())
    for wrong, who in ((10, people), (-1, people), (1, people[:1])):
        with pytest.raises(DataError, match=f"data.intruders is {wrong}: give 0 to 9 .*and two people or more"):
            groups(*who, intruders=wrong)


def test_every_photo_of_a_group_is_held_out_once_an_epoch_and_the_others_are_its_references():
    data = groups(person("a", 14), person("b", 10))
    assert len(data) == 2 * 10
    seen = Counter()
    for epoch in range(50):
        draws = [data.draw(epoch, index) for index in range(10)]
        group = {target for target, _ in draws}
        assert len(group) == 10
        assert all({*references} == group - {target} for target, references in draws)
        seen.update(photo.name for photo in group)
    assert min(seen.values()) > 0 and len(seen) == 14  # over epochs, the group is a new one


def test_balanced_by_photo_every_photo_is_the_target_once_an_epoch():
    data = groups(person("a", 14), person("b", 3), balance="photo")
    targets = Counter(data.draw(5, index)[0] for index in range(len(data)))
    assert len(targets) == 17 and set(targets.values()) == {1}


def test_too_few_photos_are_all_kept_and_topped_up():
    data = groups(person("a", 4))
    for index in range(len(data)):
        target, references = data.draw(0, index)
        assert len(references) == 9 and len({*references, target}) == 4
    assert sorted(Counter(data.draw(0, index)[0] for index in range(10)).values()) == [2, 2, 3, 3]


def test_too_many_references_are_a_subset_without_repeats():
    chosen = draw_references(range(30), 9, np.random.default_rng(0))
    assert len(set(chosen)) == 9 and set(chosen) <= set(range(30))


def test_the_published_target_is_its_own_one_reference():
    data = groups(person("a", 14), references=1, target="reference")
    assert all(references == [target] for target, references in (data.draw(3, index) for index in range(len(data))))


def test_draws_are_a_function_of_seed_epoch_and_index():
    first, again = groups(person("a", 14), person("b", 12)), groups(person("a", 14), person("b", 12))
    for key in [(0, 3), (7, 19)]:
        one, two = first[key], again[key]
        assert equal(one, two)
    assert groups(person("b", 12)).draw(4, 2) == first.draw(4, 12)  # other people change nothing
    draws = {str(data.draw(epoch, 0)) for epoch in range(3) for data in (first, groups(person("a", 14), seed=1))}
    assert len(draws) == 6


def test_drop_rates_are_five_percent_each_within_three_sigma():
    data, draws = groups(person("a", 10)), 8000
    items = [data[epoch, index] for epoch in range(draws // 10) for index in range(10)]
    kinds = Counter((bool(item["drop_image"]), bool(item["text"]["prompt_embeds"])) for item in items)
    sigma = (0.05 * 0.95 / draws) ** 0.5
    for kind in [(True, False), (False, True), (True, True)]:
        assert abs(kinds[kind] / draws - 0.05) < 3 * sigma


def test_noise_is_standard_normal_and_time_uniform():
    data = groups(person("a", 10))
    items = [data[epoch, index] for epoch in range(100) for index in range(10)]
    noise = torch.stack([torch.stack([item["eps"], item["latent_noise"]]) for item in items])  # (1000, 2, 2, 2, 2)
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert abs(np.corrcoef(noise[:, 0].flatten(), noise[:, 1].flatten())[0, 1]) < 0.06
    counts = np.histogram([item["time"] for item in items], bins=4, range=(0, 1))[0]
    assert counts.sum() == 1000 and abs(counts - 250).max() < 4 * (1000 * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize(("size", "world", "batch"), [(23, 1, 4), (23, 2, 2), (24, 2, 3), (22, 4, 1), (23, 4, 2)])
def test_the_union_of_what_ranks_see_is_what_one_process_sees_and_none_is_seen_twice(size, world, batch):
    def batches(rank, world, batch):
        sampler = EpochSampler(size, 0, rank, world)
        sampler.set_epoch(3)
        return list(BatchSampler(sampler, batch, drop_last=True))

    ranks = [batches(rank, world, batch) for rank in range(world)]
    one = batches(0, 1, world * batch)
    assert {len(rank) for rank in ranks} == {len(one)}
    for number, whole in enumerate(one):  # every step has the same samples
        union = [sample for rank in ranks for sample in rank[number]]
        assert sorted(union) == sorted(whole) and len(set(union)) == len(union)


def test_an_epoch_is_gone_on_with_where_it_was_left_and_the_next_is_whole():
    whole, late = EpochSampler(23, 0), EpochSampler(23, 0, start=(2, 8))
    for sampler in (whole, late):
        sampler.set_epoch(2)
    assert list(late) == list(whole)[8:] and len(late) == len(whole)
    for sampler in (whole, late):
        sampler.set_epoch(3)
    assert list(late) == list(whole)


def test_epochs_have_different_orders():
    sampler = EpochSampler(50, 0)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert [index for _, index in first] != [index for _, index in second]
    assert {epoch for epoch, _ in first} == {0} and {epoch for epoch, _ in second} == {1}


@pytest.mark.parametrize(("size", "world"), [(12, 1), (12, 3), (13, 3), (5, 4), (1, 2), (0, 1)])
def test_ranks_take_runs_of_tasks_equally_long_and_together_all(size, world):
    shares = [list(ShareSampler(size, rank, world)) for rank in range(world)]
    assert {len(share) for share in shares} == {-(-size // world)}
    assert [index for share in shares for index in share][:size] == list(range(size))
    assert all(b - a == 1 for share in shares for a, b in pairwise(share))
