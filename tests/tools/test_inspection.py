import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.data import mini_faces
from lit_multiip.data.people import MiniFaces
from lit_multiip.data.photos import FilePhoto
from lit_multiip.data.tasks import Task, make_tasks
from lit_multiip.evaluation.pictures import Bars, photos_with_bars
from lit_multiip.methods.adapter import MultiIPAdapter
from lit_multiip.methods.aggregators import Aggregator, AvgPool, Concat, First, MaxPool, SelfAttention
from lit_multiip.methods.method import VALIDATION_TIMES
from lit_multiip.tools.inspection import render_summary, summarise
from lit_multiip.tools.measures import (
    Inspected,
    effective_number,
    inspect_person,
    leave_one_out,
    rarity,
    restoration_losses,
    spearman,
    visible_regions,
    visible_traits,
)

PEOPLE = [person for person in MiniFaces(train=1, validation=1, test=2, photos=8).people() if person.split == "test"]
WIDTH = 24  # of the tiny backbone's image embeddings


def model(backbone: Path, aggregator: type[Aggregator]) -> MultiIPAdapter:
    made = MultiIPAdapter(Backbone(str(backbone)), aggregator)
    made.configure_model()
    return made.eval()


def tasks_and_items(embeds: Tensor | None = None, held_out: int = 2) -> tuple[list[Task], list[dict[str, Tensor]]]:
    """Two tasks of one person, with features of noise."""
    tasks = make_tasks(PEOPLE[:1], 5, held_out)
    g = torch.Generator().manual_seed(0)
    embeds = torch.randn(5, WIDTH, generator=g) if embeds is None else embeds
    shared = {"references": embeds, "text": {"prompt_embeds": torch.randn(16, 32, generator=g)}}
    return tasks, [
        {**shared, "moments": torch.randn(8, 8, 8, generator=g), "seed": torch.tensor(task.seed)} for task in tasks
    ]


def inspected(backbone: Path, aggregator: type[Aggregator], embeds: Tensor | None = None) -> Inspected:
    with torch.no_grad():
        return inspect_person(model(backbone, aggregator), *tasks_and_items(embeds))


# Leaving out


def test_leaving_out_takes_each_photo_once():
    left = leave_one_out(torch.arange(4.0)[:, None])
    assert left[..., 0].tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]


def test_leaving_out_one_of_two_equal_photos_changes_nothing_under_max_pooling(tiny_backbone):
    embeds = tasks_and_items()[1][0]["references"].clone()
    embeds[3] = embeds[1]
    found = inspected(tiny_backbone, MaxPool, embeds).values
    for name in ("loss_increase", "token_shift"):
        assert np.abs(found[name][[1, 3]]).max() < 1e-6
        assert np.abs(found[name][[0, 2, 4]]).min() > 1e-5
    assert found["weight"][1] == found["weight"][3] and found["weight"].sum() == pytest.approx(1)


def test_the_published_adapter_loses_by_its_one_photo_alone(tiny_backbone):
    found = inspected(tiny_backbone, First).values
    assert "weight" not in found
    assert abs(found["loss_increase"][0]) > 1e-5 and np.abs(found["loss_increase"][1:]).max() < 1e-7


def test_the_worth_is_the_change_of_the_loss_at_equal_noise(tiny_backbone):
    module, (tasks, items) = model(tiny_backbone, AvgPool), tasks_and_items()
    with torch.no_grad():
        found = inspect_person(module, tasks, items)
        changes = []
        for item in items:
            x = item["moments"].chunk(2)[0][None] * module.backbone.scaling_factor
            for number, time in enumerate(VALIDATION_TIMES):
                eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(int(item["seed"]) + number))
                at = (x, eps, torch.tensor([int(1000 * time)]), {"prompt_embeds": item["text"]["prompt_embeds"][None]})
                with_all = module.denoising_loss(*at, item["references"].mean(0)[None, None])
                without = module.denoising_loss(*at, item["references"][[0, 1, 3, 4]].mean(0)[None, None])
                changes.append(float(without - with_all))
    assert found.values["loss_increase"][2] == pytest.approx(np.mean(changes), abs=1e-6)


@pytest.mark.parametrize("aggregator", [Concat, partial(SelfAttention, query_scale=0)], ids=["concat", "self_attn"])
def test_methods_with_tokens_for_every_photo_are_inspected(tiny_backbone, aggregator):
    found = inspected(tiny_backbone, aggregator).values
    assert all(values.shape == (5,) for values in found.values())
    if aggregator is not Concat:
        assert found["weight"] == pytest.approx(np.full(5, 0.2))


def test_losses_do_not_depend_on_the_batch(tiny_backbone):
    module, (_, [item, _]) = model(tiny_backbone, AvgPool), tasks_and_items()
    conditions = torch.randn(5, 1, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        one, two = (restoration_losses(module, item, conditions, n) for n in (1, 16))
    torch.testing.assert_close(one, two)


def test_a_single_reference_cannot_be_left_out(tiny_backbone):
    tasks = make_tasks(PEOPLE[:1], 1, 1)
    with pytest.raises(ValueError, match=r"has a single reference.*set data\.references to 2"):
        inspect_person(None, tasks, [{"references": torch.zeros(1, WIDTH)}])


def test_a_row_of_attention_is_measured_apart_from_what_a_photo_receives(tiny_backbone):
    """A photo that attends to itself alone has a spread of 1, though all photos receive alike."""
    embeds = tasks_and_items()[1][0]["references"]
    even = inspected(tiny_backbone, partial(SelfAttention, query_scale=0)).values
    assert even["row_spread"] == pytest.approx(np.full(5, 5.0)) and even["own_weight"] == pytest.approx(np.full(5, 0.2))
    steep = inspected(tiny_backbone, partial(SelfAttention, query_scale=100.0), embeds).values
    assert steep["row_spread"] == pytest.approx(np.ones(5)) and steep["own_weight"] == pytest.approx(np.ones(5))
    assert steep["weight"] == pytest.approx(np.full(5, 0.2))
    assert not {"row_spread", "own_weight"} & inspected(tiny_backbone, MaxPool).values.keys()


def test_the_printout_has_the_rows_of_attention_beside_what_photos_receive():
    people = [person(name, [0.2, 0.3, 0.5], [1, 2, 3], [1, 1, 2]) for name in "ab"]
    assert "of a row" not in render_summary("SelfAttention", "attention", people, summarise(people))
    for one in people:
        one.values |= {"row_spread": np.array([1.0, 1.2, 1.4]), "own_weight": np.array([0.9, 0.95, 1.0])}
    text = render_summary("SelfAttention", "attention", people, summarise(people))
    row = "- attention of a row: spread over 1.20 [1.20, 1.20] photos (exp H), weight on itself 0.950 [0.950, 0.950]"
    assert row in text


# The truth


def test_what_the_others_hide_counts_most():
    shows = np.array([[1, 1, 0], [1, 0, 0], [1, 0, 0], [1, 1, 0]], bool)  # the third trait is never seen
    assert rarity(shows) == pytest.approx([0.25 + 0.5, 0.25, 0.25, 0.25 + 0.5])
    alone = np.array([[1, 1], [1, 0], [1, 0], [1, 0]], bool)
    assert rarity(alone) == pytest.approx([1.25, 0.25, 0.25, 0.25])
    assert rarity(alone).sum() == 2


def test_a_drawn_photo_shows_what_nothing_covers():
    traits = list(mini_faces.TRAITS)
    for photo in PEOPLE[0].photos:
        shows, scene = visible_traits(photo), mini_faces.scene(photo.seed, photo.index, photo.number)
        assert shows[traits.index("skin")] and shows[traits.index("lips")] == (not scene.scarf)
        assert visible_regions(shows[None]) == [3 - scene.hat - scene.scarf - scene.sunglasses]
    assert visible_traits(FilePhoto("Ann", "1.jpg", "a photo", Path("1.jpg"))) is None


# Over people


def test_rank_correlation_and_its_ties():
    assert spearman([1, 2, 3], [10, 20, 40]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert math.isnan(spearman([1, 1 + 1e-9, 1], [1, 2, 3]))
    assert spearman([0, 0, 1, 1], [1, 2, 3, 4]) == pytest.approx(0.894427, abs=1e-6)


def test_even_weights_are_shared_among_all():
    assert effective_number(np.full(9, 1 / 9)) == pytest.approx(9)
    assert effective_number([1, 0, 0]) == pytest.approx(1)


def test_only_what_the_held_out_photos_show_is_needed(tiny_backbone):
    found = inspected(tiny_backbone, MaxPool)
    shows = np.stack([visible_traits(photo) for photo in found.references])
    expected = np.zeros(5)
    for target in map(visible_traits, found.held_out):
        for n, t in np.argwhere(shows):
            expected[n] += target[t] / shows[:, t].sum() / len(found.held_out)
    assert found.values["needed"] == pytest.approx(expected)
    assert (found.values["needed"] <= found.values["rarity"] + 1e-9).all()


def person(name: str, weight: list[float], truth: list[float], regions: list[float]) -> Inspected:
    values = {"weight": weight, "loss_increase": weight, "token_shift": truth, "rarity": truth}
    values["visible_regions"] = regions
    arrays = {key: np.array(row) for key, row in values.items()}
    return Inspected(name, PEOPLE[0].photos[:3], PEOPLE[0].photos[3:4], 0.5, arrays)


def test_correlations_are_means_over_the_people_for_whom_both_vary():
    people = [
        person("a", [0.2, 0.3, 0.5], [1, 2, 3], [1, 1, 1]),
        person("b", [0.5, 0.3, 0.2], [1, 2, 3], [1, 1, 2]),
        person("c", [0.2, 0.3, 0.5], [1, 2, 3], [1, 1, 2]),
    ]
    scores = summarise(people)
    assert scores["spearman/weight/rarity"].value == pytest.approx(1 / 3)
    assert scores["spearman/weight/rarity"].low == pytest.approx(1 / 3 - 4.302653 * 2 / 3)  # t of 2 degrees of freedom
    assert scores["spearman/weight/rarity"].people == 3
    assert scores["spearman/weight/visible_regions"].people == 2  # all photos of a show one region
    assert scores["spearman/weight/loss_increase"].value == pytest.approx(1)
    assert scores["loss"].value == 0.5


def test_real_people_have_no_truth_to_be_held_against():
    real = person("a", [0.2, 0.3, 0.5], [1, 2, 3], [1, 1, 2])
    for name in ("rarity", "visible_regions"):
        del real.values[name]
    assert {name for name in summarise([real]) if "/" in name} == {"spearman/weight/loss_increase"}


# The picture


def test_bars_are_as_long_as_their_values():
    photos = [Image.new("RGB", (96, 96), "red")] * 3
    strip = Bars("loss", [0.5, 1.0, -0.5], ["a", "b", "c"])
    pixels = np.asarray(photos_with_bars(photos, [strip], {"held-out photo": photos[0]}, 96, "Ann"))

    def height(colour, column):
        middle = 144 + column * 100 + 48
        return int((pixels[:, middle] == colour).all(axis=-1).sum())

    blue, orange = (70, 130, 180), (255, 140, 0)
    tall, short, below = height(blue, 1), height(blue, 0), height(orange, 2)
    assert 28 <= tall <= 34 and abs(tall - 2 * short) <= 2 and abs(short - below) <= 2
    assert height(blue, 2) == height(orange, 0) == 0
