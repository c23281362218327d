import logging
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batches import equal
from PIL import Image
from torchvision.transforms.v2 import ColorJitter, RandomHorizontalFlip

from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.data.people import Folder, MiniFaces
from lit_multiip.data.photos import DataError
from lit_multiip.data.variants import vary
from lit_multiip.datamodule import MultiPhotoData, PredictArgs


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("features"))


def made(backbone: Path, cache: str, stage: str, **options: Any) -> MultiPhotoData:
    options = {"source": MiniFaces(train=3, validation=2, test=2, photos=11), "batch_size": 8} | options
    data = MultiPhotoData(Backbone(str(backbone)), cache_dir=cache, **options)
    data.prepare_data()
    data.setup(stage)
    return data


def write_people(folder: Path, people: int, photos: int) -> Path:
    for person in range(people):
        for number in range(photos):
            path = folder / f"p{person}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 24), (person * 20, number * 20, 99)).save(path)
    return folder


def test_fit_batches_have_what_training_takes(tiny_backbone, cache):
    data = made(tiny_backbone, cache, "fit")
    batches = list(data.train_dataloader())
    assert len(batches) == 3 * 10 // 8  # three people, ten targets each, and no part of a batch
    assert all(name.startswith("train_") and name.endswith(".png") for name in batches[0].pop("photo"))
    assert {name: tuple(values.shape) for name, values in batches[0].pop("text").items()} == {
        "prompt_embeds": (8, 16, 32)
    }
    shapes = {name: tuple(values.shape) for name, values in batches[0].items()}
    assert shapes == {
        "references": (8, 9, 24),
        "moments": (8, 8, 8, 8),
        "drop_image": (8,),
        "time": (8,),
        "latent_noise": (8, 4, 8, 8),
        "eps": (8, 4, 8, 8),
    }
    with pytest.raises(DataError, match=r"batch_size=31 is more than the 30"):
        made(tiny_backbone, cache, "fit", batch_size=31).train_dataloader()


def test_training_batches_are_equal_with_no_and_two_workers(tiny_backbone, cache):
    one, two = (list(made(tiny_backbone, cache, "fit", num_workers=n).train_dataloader()) for n in (0, 2))
    for a, b in zip(one, two, strict=True):
        assert equal(a, b)


def test_variants_are_stored_once_and_drawn_by_seed_epoch_and_index(tiny_backbone, tmp_path):
    source, flip = MiniFaces(train=1, validation=1, test=1, photos=11), RandomHorizontalFlip(p=1.0)
    varied = made(tiny_backbone, str(tmp_path), "fit", source=source, variants=3, augment=flip)
    assert varied.split is not None and varied.features is not None
    photos = varied.split.train[0].photos
    [rows] = (np.load(file) for file in tmp_path.glob("latent-*/*.npy"))
    assert len(rows) == 3 * 11 + len(varied.validation_tasks)  # no variant of a validation photo
    plain = {str(row.tolist()) for row in varied.features.store["latent"].get([p.content_key() for p in photos])}
    batches = [list(made(tiny_backbone, str(tmp_path), "fit", source=source, variants=3, augment=flip,
                         num_workers=workers).train_dataloader()) for workers in (0, 2)]  # fmt: skip
    assert all(equal(a, b) for a, b in zip(*batches, strict=True))
    assert len(list(tmp_path.glob("latent-*/*.npy"))) == 1
    groups = varied.train_dataloader().dataset
    moments = [str(groups[epoch, index]["moments"].half().tolist()) for epoch in range(9) for index in range(10)]
    assert 15 < sum(row in plain for row in moments) < 45  # a third of 90 is the photo itself
    assert 16 < len(set(moments)) <= 33
    embeds = groups[0, 0]["references"]
    single = made(tiny_backbone, str(tmp_path), "fit", source=source).train_dataloader().dataset
    assert not torch.equal(embeds, single[0, 0]["references"])
    assert torch.equal(groups[0, 0]["eps"], single[0, 0]["eps"])  # all other draws stay


def test_a_variant_is_a_photo_of_its_own():
    photo, jitter = MiniFaces(train=1, validation=1, test=1).people()[0].photos[0], ColorJitter(brightness=0.5)
    assert vary(photo, 0, jitter) is photo
    one, again, two = (vary(photo, number, jitter) for number in (1, 1, 2))
    state = torch.get_rng_state()
    pixels = [one.image().tobytes(), again.image().tobytes(), two.image().tobytes(), photo.image().tobytes()]
    assert torch.equal(state, torch.get_rng_state())
    assert pixels[0] == pixels[1] and len(set(pixels)) == 3
    keys = [each.content_key() for each in (one, two, photo, vary(photo, 1, ColorJitter(brightness=0.4)))]
    assert len(set(keys)) == 4 and again.content_key() == keys[0]
    assert one.original() is photo and pickle.loads(pickle.dumps(one)).content_key() == keys[0]
    with ThreadPoolExecutor(4) as pool:  # as features are built
        assert set(pool.map(lambda _: one.image().tobytes(), range(40))) == {pixels[0]}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"variants": 2}, r"data\.variants=2 and data\.augment=None"),
        ({"augment": ColorJitter()}, "at least 2 variants"),
        ({"variants": 0}, r"data\.variants=0"),
        ({"variants": 2, "augment": lambda image: image}, "does not name its settings"),
    ],
)
def test_half_an_augmentation_is_refused(wrong, message):
    with pytest.raises(DataError, match=message):
        MultiPhotoData(**wrong)


def test_fit_encodes_no_photo_of_a_test_person(tiny_backbone, tmp_path):
    data = made(tiny_backbone, str(tmp_path), "fit")
    assert data.split is not None and data.features is not None
    for kind in ("embeds", "latent"):
        test = [photo.content_key() for person in data.split.test for photo in person.photos]
        assert data.features.store[kind].missing(test) == test
        train = [photo.content_key() for person in data.split.train for photo in person.photos]
        assert not data.features.store[kind].missing(train)


def test_tasks_show_a_person_from_others_references(tiny_backbone, cache):
    data = made(tiny_backbone, cache, "test", held_out=2)
    assert len(data.tasks) == 2 * 2
    assert all(task.held_out not in task.references and len(task.references) == 9 for task in data.tasks)
    batch = next(iter(data.test_dataloader()))
    assert batch["task"].tolist() == [0, 1, 2, 3]
    assert torch.equal(batch["other_references"][:2], batch["references"][2:])
    assert torch.equal(batch["other_references"][2:], batch["references"][:2])
    assert len(set(batch["seed"].tolist())) == 4


def test_the_only_person_is_shown_by_a_training_persons_references(tiny_backbone, cache):
    source = MiniFaces(train=3, validation=1, test=1, photos=11)
    for stage in ("fit", "test"):
        data = made(tiny_backbone, cache, stage, source=source)
        assert data.split is not None and data.features is not None
        batch = next(iter(data.val_dataloader() if stage == "fit" else data.test_dataloader()))
        assert not torch.equal(batch["other_references"], batch["references"])
        borrowed = data.features.embeds(data.strangers[batch["photo"][0].split("/")[0]])
        assert torch.equal(batch["other_references"], borrowed.expand_as(batch["references"]))
        [stranger] = {photo.person for photos in data.strangers.values() for photo in photos}
        assert stranger in {person.name for person in data.split.train}


def test_where_nobody_can_be_borrowed_there_are_no_other_references_and_it_is_told(tiny_backbone, cache, caplog):
    source = MiniFaces(train=1, validation=1, test=1, photos=11)
    data = made(tiny_backbone, cache, "test", source=source, tested="train")
    assert "other_references" not in next(iter(data.test_dataloader()))
    assert "val/gap_shuffled and the row other_person are left out" in caplog.text


def test_copies_of_a_photo_count_once(tiny_backbone, cache, tmp_path, caplog):
    folder = write_people(tmp_path / "people", 4, 5)
    shutil.copy(folder / "p0" / "1.png", folder / "p0" / "9.png")
    with caplog.at_level(logging.WARNING):
        data = made(tiny_backbone, cache, "fit", source=Folder(str(folder)), min_photos=5, batch_size=2)
    assert "p0: 1 photos are copies" in caplog.text
    assert data.split is not None
    people = [*data.split.train, *data.split.validation, *data.split.test]
    assert {len(person.photos) for person in people} == {5}


def test_an_unreadable_photo_is_named_before_anything_is_encoded(tiny_backbone, tmp_path):
    folder = write_people(tmp_path / "people", 6, 5)
    bad = folder / "p3" / "2.png"
    bad.write_text("no picture")
    options = {"source": Folder(str(folder)), "min_photos": 4, "batch_size": 2}
    with pytest.raises(DataError, match=r"p3/2\.png"):
        made(tiny_backbone, str(tmp_path / "cache"), "fit", **options)
    assert not (tmp_path / "cache").exists()
    data = made(tiny_backbone, str(tmp_path / "cache"), "fit", on_unreadable="skip", **options)
    assert data.split is not None
    people = [*data.split.train, *data.split.validation, *data.split.test]
    assert sorted(len(person.photos) for person in people) == [4, 5, 5, 5, 5, 5]


@pytest.mark.parametrize(
    ("photos", "said"), [(3, "missing ones are drawn again"), (9, None), (14, "surplus is dropped")]
)
def test_predict_takes_any_number_of_photos(tiny_backbone, cache, tmp_path, caplog, photos, said):
    folder = write_people(tmp_path, 1, photos) / "p0"
    with caplog.at_level(logging.WARNING):
        data = made(tiny_backbone, cache, "predict", predict=PredictArgs(str(folder), ["a", "b"], [3, 4, 5]))
    assert len(data.requests) == 2 * 3
    assert len(data.requests[0].references) == 9 and len(set(data.requests[0].references)) == min(photos, 9)
    assert said in caplog.text if said else "are used" not in caplog.text
    batch = next(iter(data.predict_dataloader()))
    assert batch["references"].shape == (6, 9, 24) and batch["seed"].tolist() == [3, 4, 5] * 2


def test_predict_without_photos_takes_a_test_person_and_their_prompts(tiny_backbone, cache):
    data = made(tiny_backbone, cache, "predict")
    assert {request.person for request in data.requests} == {"test_000000"}
    assert len(data.requests) == 4 * 2 and len({request.prompt for request in data.requests}) == 4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"references": 0}, "at least 1"),
        ({"drop": (0.5, 0.5, 0.5)}, r"data\.drop=\(0\.5, 0\.5, 0\.5\)"),
        ({"drop": (-0.1, 0.0, 0.0)}, "no probabilities"),
        ({"source": Folder("nowhere/at/all")}, "nowhere"),
        ({"predict": PredictArgs(None, [""], [0])}, "prompts that are not empty"),
        ({"predict": PredictArgs(None, None, [])}, "at least one seed"),
        ({"min_photos": 12}, "min_photos = 12"),
        ({"intruders": 10}, "data.intruders is 10: give 0 to 9"),
    ],
)
def test_impossible_data_is_refused(tiny_backbone, cache, wrong, message):
    with pytest.raises(DataError, match=message):
        made(tiny_backbone, cache, "test" if "intruders" in wrong else "predict", **wrong)


def test_the_training_seed_moves_the_groups_and_nothing_else(tiny_backbone, cache):
    own, other = (made(tiny_backbone, cache, "fit", training_seed=seed) for seed in (None, 1))
    assert own.split == other.split and own.validation_tasks == other.validation_tasks
    a, b = (next(iter(data.train_dataloader())) for data in (own, other))
    assert not torch.equal(a["eps"], b["eps"])
    zero = made(tiny_backbone, cache, "fit", training_seed=0)
    assert torch.equal(a["eps"], next(iter(zero.train_dataloader()))["eps"])


def test_fewer_training_people_leave_the_others_as_they_are(tiny_backbone, cache):
    source = MiniFaces(train=6, validation=2, test=2, photos=11)
    splits = [made(tiny_backbone, cache, "test", source=source, training_people=n).split for n in (None, 4, 2)]
    names = [{person.name for person in split.train} for split in splits if split is not None]
    assert [len(group) for group in names] == [6, 4, 2] and names[2] < names[1] < names[0]
    assert all(split is not None and split.test == splits[0].test for split in splits if splits[0] is not None)


def test_intruders_are_in_training_and_in_tests_and_not_in_validation(tiny_backbone, cache):
    plain, mixed = (made(tiny_backbone, cache, "fit", intruders=count) for count in (0, 3))
    assert plain.validation_tasks == mixed.validation_tasks
    a, b = (next(iter(data.train_dataloader())) for data in (plain, mixed))
    changed = (a["references"] != b["references"]).any(dim=2).sum(dim=1)  # (B,)
    assert 0 < changed.max() <= 3 and torch.equal(a["eps"], b["eps"]) and a["photo"] == b["photo"]
    mixed.setup("test")
    assert all(sum(photo.person != task.person for photo in task.references) == 3 for task in mixed.tasks)


@pytest.mark.parametrize("side", ["test", "validation", "train"])
def test_any_side_can_be_tested(side, tiny_backbone, cache):
    data = made(tiny_backbone, cache, "test", tested=side, tested_people=1)
    [name] = {task.person for task in data.tasks}
    assert data.split is not None and name in {person.name for person in getattr(data.split, side)}
    assert len(data.tasks) == 2  # of eleven photos nine are references
