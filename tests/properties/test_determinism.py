"""The same config, seed and machine give the same bits; a task's image depends on its seed, not on its neighbours."""

import hashlib
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from resuming import METHOD, differences, logged, run, run_of, score_by, state_of, write_config
from torch.utils.data import default_collate

from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.backbone.sampler import Sampling
from lit_multiip.data import MiniFaces
from lit_multiip.data.groups import draw_references, held_out_group
from lit_multiip.datamodule import MultiPhotoData
from lit_multiip.datasets import EpochSampler, Position, ShareSampler
from lit_multiip.methods.adapter import MultiIPAdapter
from lit_multiip.methods.aggregators import SelfAttention

# A batch changes the order of some sums: measured 0 or 1 of 255 grey levels, in float32 on a CPU.
LEVELS = 1


def images(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.rglob("*.png"))}


def test_a_process_of_tests_has_the_threads_that_it_is_given():
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])


def test_two_fits_and_their_images_are_equal_bit_for_bit(tiny_backbone, random_critic, tmp_path):
    score = score_by(random_critic, anchors=True)
    options = {"trainer": {"max_steps": 4, "precision": "bf16-mixed"}, "score": score, "grid": {"people": 1}}
    for name in ("one", "two"):  # each with features of its own
        config = write_config(tmp_path / f"{name}.yaml", tiny_backbone, tmp_path / name / "features", **options)
        for args in (["fit", "--config", str(METHOD), "--config", str(config)], ["test"]):
            command = run(tmp_path / name, *args)
            assert command.code == 0, command.said()
    one, two = (run_of(tmp_path / name) for name in ("one", "two"))
    assert differences(state_of(one), state_of(two)) == []
    assert logged(one) == logged(two)
    assert images(one) == images(two) and len(images(one)) >= 3
    assert (one / "test" / "scores.csv").read_text() == (two / "test" / "scores.csv").read_text()


@pytest.fixture(scope="module")
def data(tiny_backbone, tmp_path_factory):
    source = MiniFaces(train=2, validation=1, test=4, photos=11)
    data = MultiPhotoData(
        Backbone(str(tiny_backbone)), source, held_out=2, cache_dir=str(tmp_path_factory.mktemp("features"))
    )
    data.setup("test")
    return data


def test_the_seed_of_a_task_and_not_its_batch_decides_its_image(tiny_backbone, data):
    module = MultiIPAdapter(Backbone(str(tiny_backbone)), SelfAttention, sampling=Sampling(steps=4))
    module.configure_model()
    items = [data.test_dataloader().dataset[i] for i in range(8)]

    def drawn(order, size):
        found = {}
        for start in range(0, len(order), size):
            part = order[start : start + size]
            with torch.no_grad():
                found |= dict(zip(part, module.generate(default_collate([items[i] for i in part])), strict=True))
        return found

    alone = drawn(list(range(8)), 1)
    for order, size in (([*range(8)], 8), ([5, 2, 7, 0, 1, 6, 3, 4], 8), ([*range(8)], 3)):
        together = drawn(order, size)
        for i, image in alone.items():
            assert (image.int() - together[i].int()).abs().max() <= LEVELS
    assert (alone[0].int() - alone[1].int()).abs().max() > LEVELS  # or nothing is said


# ---- for all values -------------------------------------------------------------------------------------------------


@given(st.integers(0, 500), st.integers(1, 60), st.integers(1, 9))
def test_every_step_has_one_position_and_every_position_one_step(step, batches, accumulate):
    position, per_epoch = Position.after(step, batches, accumulate), -(-batches // accumulate)
    assert position.epoch * per_epoch + position.steps == step
    assert 0 <= position.batch < batches and position.batch == position.steps * accumulate


@given(st.integers(1, 200), st.integers(1, 8), st.integers(0, 5), st.integers(0, 2**32))
def test_ranks_share_an_epoch_without_overlap(size, world, epoch, seed):
    shares = []
    for rank in range(world):
        sampler = EpochSampler(size, seed, rank, world)
        sampler.set_epoch(epoch)
        shares.append([index for _, index in sampler])
    union = [index for share in shares for index in share]
    assert len({len(share) for share in shares}) == 1
    assert len(set(union)) == len(union) == size // world * world


@given(st.integers(1, 200), st.integers(1, 8))
def test_ranks_share_tasks_in_order_and_repeat_only_behind_the_last(size, world):
    positions = [position for rank in range(world) for position in ShareSampler(size, rank, world)]
    assert positions == list(range(len(positions))) and size <= len(positions) < size + world


@settings(max_examples=200)
@given(st.integers(2, 40), st.integers(2, 12), st.integers(0, 50), st.integers(0, 2**32))
def test_the_target_is_never_a_reference(photos, size, number, seed):
    import numpy as np

    group = held_out_group(photos, size, number, np.random.default_rng(seed))
    assert group.target not in group.references and len(group.references) == size - 1
    assert {group.target, *group.references} <= set(range(photos))
    again = draw_references(group.references, size - 1, np.random.default_rng(seed))
    assert sorted(again) == sorted(group.references)
