"""Options of a drawing: scales by block, steps in which photos act, weights, negative photos, masks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import default_collate

from lit_multiip.backbone.components import BackboneError
from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.backbone.sampler import Sampling
from lit_multiip.data.drawing import NOTHING, draw_together
from lit_multiip.data.people import MiniFaces, Person
from lit_multiip.datamodule import MultiPhotoData, PredictArgs
from lit_multiip.datasets import Request, TaskDataset
from lit_multiip.files import LitMultiIPError
from lit_multiip.methods.adapter import MultiIPAdapter
from lit_multiip.methods.aggregators import Aggregator, AvgPool, Concat, First, MaxPool, SelfAttention
from lit_multiip.methods.dreambooth import DreamBooth

PEOPLE = MiniFaces(train=2, validation=1, test=2, photos=9).people()
ANN, BOB, EVE = PEOPLE[0], PEOPLE[-2], PEOPLE[-1]
EVERYWHERE = {"down": 1.0, "mid": 1.0, "up": 1.0}


@pytest.fixture(scope="module")
def data(tiny_backbone, tmp_path_factory):
    """Features of all photos, and of two prompts."""
    return encoded(tiny_backbone, tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    return encoded("mini", tmp_path_factory.mktemp("mini"))


def encoded(backbone: Path | str, folder: Path) -> MultiPhotoData:
    data = MultiPhotoData(Backbone(str(backbone)), cache_dir=str(folder))
    data._build([photo for person in (ANN, BOB, EVE) for photo in person.photos], [], ["a person"])
    return data


def built(backbone: Path | str, aggregator: type[Aggregator] = AvgPool, **sampling: Any) -> MultiIPAdapter:
    module = MultiIPAdapter(Backbone(str(backbone)), aggregator, sampling=Sampling(**{"steps": 3, **sampling}))
    module.configure_model()
    return module.eval()


def asked(data: MultiPhotoData, *people: Person, prompt: str = "a person", **options: Any) -> dict[str, Any]:
    """A batch of two requests for a picture of these people."""
    first, drawing = draw_together(people, 9, 0, **options)
    requests = [Request(people[0].name, first, prompt, seed, drawing) for seed in (0, 1)]
    dataset = TaskDataset(requests, data.features)  # type: ignore[arg-type]
    return default_collate([dataset[0], dataset[1]])


@torch.no_grad()
def drawn(module: MultiIPAdapter, batch: dict[str, Any], **options: Any) -> Tensor:
    return module.generate(batch, **options).int()


def apart(a: Tensor, b: Tensor) -> int:
    return int((a - b).abs().max())


def scales(module: MultiIPAdapter) -> set[float]:
    return {processor.scale[0] for processor in module.unet.attn_processors.values() if hasattr(processor, "scale")}


# Scales by block


def test_a_scale_of_every_block_is_the_scale_and_0_in_all_is_the_plain_backbone(tiny_backbone, data):
    module, batch = built(tiny_backbone, SelfAttention), asked(data, ANN)
    usual, plain = drawn(module, batch), drawn(module, batch, references="none")
    assert torch.equal(drawn(module, batch, ip_scale=EVERYWHERE), usual)
    assert torch.equal(drawn(module, batch, ip_scale={"down": 0, "mid": 0, "up": 0}), plain)
    assert torch.equal(drawn(module, batch, ip_scale={}), plain)  # 0 in what is not named
    # two layers in the block of up that attends: one of them, both, and both by one number
    [one, both, number] = (drawn(module, batch, ip_scale={"up": {"block_0": x}}) for x in ([0, 1], [1, 1], 1))
    assert torch.equal(both, number)
    assert min(apart(one, plain), apart(one, both), apart(both, plain), apart(both, usual)) > 0
    assert scales(module) == {1.0}
    given = built(tiny_backbone, SelfAttention, ip_scale={"up": {"block_0": [0, 1]}})
    assert torch.equal(drawn(given, batch), one)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ({"up": float("nan")}, r"ip_scale\.up=nan is not finite"),
        ({"up": {"block_0": [0, float("inf")]}}, r"ip_scale\.up\.block_0=inf is not finite"),
        ({"up": "much"}, r"ip_scale\.up=much is not finite"),
        ({"style": 1.0}, "ip_scale names 'style': give a number, or numbers by block"),
        ({"up": {"0": 1.0}}, r"ip_scale names 'up\.0'"),
        ({"mid": {"block_0": 1.0}}, r"ip_scale names 'mid\.block_0'"),
    ],
)
def test_scales_that_mean_nothing_are_refused_by_name(scale, message):
    with pytest.raises(LitMultiIPError, match=message):
        Sampling(ip_scale=scale)


def test_blocks_that_the_unet_lacks_are_refused_when_it_is_built(tiny_backbone):
    with pytest.raises(BackboneError, match=r"names 'up\.block_1', and in up this UNet attends in block_0"):
        built(tiny_backbone, ip_scale={"up": {"block_1": 1.0}})
    with pytest.raises(BackboneError, match=r"does not fit this UNet .*Expected 2 scales for up\.block_0, got 3"):
        built(tiny_backbone, ip_scale={"up": {"block_0": [0, 1, 0]}})


# Steps in which the photos act


def test_photos_act_in_the_steps_between_start_and_end(tiny_backbone, data):
    batch = asked(data, ANN)
    usual = built(tiny_backbone)
    plain = drawn(usual, batch, references="none")
    seen: list[set[float]] = []
    for start, end, expected in (
        (0, 1 / 3, [1, 0, 0]),
        (2 / 3, 1, [0, 0, 1]),
        (0.5, 0.5, [0, 0, 0]),
        (0, 0.9, [1, 1, 0]),
    ):
        module = built(tiny_backbone, ip_start=start, ip_end=end)
        seen.clear()
        module.unet.register_forward_pre_hook(lambda *_, of=module: seen.append(scales(of)))
        image = drawn(module, batch)
        assert seen == [{float(scale)} for scale in expected]
        assert torch.equal(image, plain) == (not any(expected))
        assert scales(module) == {1.0}
    assert torch.equal(drawn(built(tiny_backbone, ip_start=0.0, ip_end=1.0), batch), drawn(usual, batch))


@pytest.mark.parametrize(("start", "end"), [(0.6, 0.5), (-0.1, 1.0), (0.0, 1.5), (float("nan"), 1.0)])
def test_steps_that_are_no_shares_are_refused(start, end):
    with pytest.raises(ValueError, match=r"ip_start=.* and ip_end=.*: give shares of the steps"):
        Sampling(ip_start=start, ip_end=end)


@pytest.mark.parametrize("option", [{"ip_start": 0.5}, {"ip_end": 0.5}, {"ip_scale": EVERYWHERE}])
def test_dreambooth_refuses_options_of_photos_that_it_does_not_look_at(option):
    with pytest.raises(ValueError, match=rf"sampling\.{next(iter(option))}=.* has no effect"):
        DreamBooth(sampling=Sampling(**option))


# Weights


@pytest.mark.parametrize("aggregator", [AvgPool, Concat, SelfAttention])
def test_a_photo_of_weight_0_is_as_if_it_were_not_there(tiny_backbone, data, aggregator):
    module = built(tiny_backbone, aggregator)
    fewer = Person(ANN.name, ANN.photos[1:])
    without = drawn(module, asked(data, fewer, weights=[1.0] * 8))
    assert torch.equal(drawn(module, asked(data, ANN, weights=[0.0, *[1.0] * 8])), without)
    assert torch.equal(drawn(module, asked(data, ANN, weights=[3.0] * 9)), drawn(module, asked(data, ANN)))
    assert apart(drawn(module, asked(data, ANN, weights=[9.0, *[1.0] * 8])), without) > 0


def test_weights_are_those_of_a_weighted_mean(tiny_backbone, data):
    weights = [4.0, 2.0, *[1.0] * 7]
    module, rows = built(tiny_backbone), data.features.embeds(ANN.photos)
    [mean] = module.condition(asked(data, ANN, weights=weights)["references"][:1])
    expected = (torch.tensor(weights)[:, None] * rows).sum(dim=0) / sum(weights)
    torch.testing.assert_close(mean[0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("aggregator", [First, MaxPool])
def test_an_aggregator_that_cannot_weigh_refuses_weights(tiny_backbone, data, aggregator):
    module = built(tiny_backbone, aggregator)
    with pytest.raises(LitMultiIPError, match=f"{aggregator.__name__} gives photos no weights"):
        module.check_drawing(draw_together([ANN], 9, 0, weights=[2.0, *[1.0] * 8])[1])
    module.check_drawing(draw_together([ANN], 9, 0, weights=[0.0, *[1.0] * 8])[1])
    drawn(module, asked(data, ANN, weights=[0.0, *[1.0] * 8]))


# Negative photos


@pytest.mark.parametrize("aggregator", [AvgPool, SelfAttention])
def test_negatives_equal_to_the_photos_cancel_them_in_guidance(tiny_backbone, data, aggregator):
    """With an empty prompt both halves of guidance are then one, and w no longer matters."""
    batch = asked(data, ANN, prompt="", negatives=[ANN])
    batch["negatives"] = [batch["references"]]  # in their order too
    images = [drawn(built(tiny_backbone, aggregator, guidance_scale=w), batch) for w in (1.5, 7.0)]
    plain = {name: value for name, value in batch.items() if name != "negatives"}
    images.append(drawn(built(tiny_backbone, aggregator, guidance_scale=1.0), plain))
    assert max(apart(images[0], image) for image in images[1:]) <= 1
    assert apart(drawn(built(tiny_backbone, aggregator, guidance_scale=7.0), plain), images[0]) > 1


def test_negatives_are_repeated_to_as_many_as_the_photos(tiny_backbone, data):
    module, few = built(tiny_backbone, Concat), Person("no", BOB.photos[:2])
    batch = asked(data, ANN, negatives=[few])
    rows = data.features.embeds(few.photos)
    assert torch.equal(batch["negatives"][0][0], rows[[0, 1] * 4 + [0]])
    assert apart(drawn(module, batch), drawn(module, asked(data, ANN))) > 0
    with pytest.raises(BackboneError, match=r"negative photos act through guidance, and .*guidance_scale=1"):
        drawn(built(tiny_backbone, Concat, guidance_scale=1), batch)


# Masks


def halves(side: int) -> tuple[np.ndarray, np.ndarray]:
    left = np.zeros((side, side), dtype=bool)
    left[:, : side // 2] = True
    return left, ~left


def test_a_mask_over_all_of_the_picture_is_none(tiny_backbone, data):
    module, all_of_it = built(tiny_backbone), np.ones((32, 32), dtype=bool)
    assert apart(drawn(module, asked(data, ANN, masks=[all_of_it])), drawn(module, asked(data, ANN))) <= 1


@pytest.mark.parametrize("aggregator", [AvgPool, SelfAttention])
def test_in_an_attention_layer_a_person_acts_inside_the_mask_alone(tiny_backbone, data, aggregator):
    module, out = built(tiny_backbone, aggregator, steps=1), []
    name, layer = next((n, m) for n, m in module.unet.named_modules() if n.endswith("attn2"))
    assert name.startswith("down_blocks.1")
    layer.register_forward_hook(lambda _, given, result: out.append(result))
    for right in (BOB, EVE):
        drawn(module, asked(data, ANN, right, masks=halves(32)))
    first, second = (rows.unflatten(1, (4, 4)) for rows in out)  # (2 B, 4, 4, C)
    assert torch.equal(first[:, :, 0], second[:, :, 0])  # the column beside the border is interpolated
    assert not torch.equal(first[:, :, 3], second[:, :, 3])


def test_people_may_change_places_with_their_masks(tiny_backbone, data):
    module, (left, right) = built(tiny_backbone, SelfAttention), halves(32)
    one = drawn(module, asked(data, ANN, BOB, masks=[left, right]))
    other = drawn(module, asked(data, BOB, ANN, masks=[right, left]))
    assert apart(one, other) <= 1
    assert apart(one, drawn(module, asked(data, ANN, BOB, masks=[right, left]))) > 1


def test_on_the_miniature_another_person_on_the_right_changes_the_right_most(mini):
    module = built("mini", AvgPool, steps=6)
    one, other = (drawn(module, asked(mini, ANN, right, masks=halves(64))) for right in (BOB, EVE))
    change = (one - other).abs().float().mean(dim=(0, 1, 2))  # (W,)
    assert change[48:].mean() > 2 * change[:16].mean()


# The whole command


def test_options_off_add_nothing_to_a_request(tiny_backbone, data):
    batch = asked(data, ANN)
    assert not {"beside", "negatives", "masks"} & batch.keys()
    assert draw_together([ANN], 9, 0)[1] == NOTHING


def test_a_method_that_tunes_on_one_person_refuses_options_of_photos(tiny_backbone):
    data = MultiPhotoData(Backbone(str(tiny_backbone)))
    data.per_person = True
    data.draw_together([ANN], weights=None, negatives=[], masks=())
    for people, options in (([ANN], {"weights": [1.0] * 9}), ([ANN], {"negatives": [BOB]}), ([ANN, BOB], {})):
        with pytest.raises(LitMultiIPError, match="takes no weights, negatives or masks"):
            data.draw_together(people, **options)


def test_options_of_photos_go_with_a_folder():
    for option in ({"weights": [1.0]}, {"negatives": "folder"}, {"masks": ["a.png"]}):
        with pytest.raises(LitMultiIPError, match="give --photos <folder>"):
            PredictArgs(**option)
