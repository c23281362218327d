from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import equal
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import ColorJitter

from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.data.people import Folder, MiniFaces
from lit_multiip.data.photos import DataError
from lit_multiip.datamodule import MultiPhotoData, PredictArgs


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
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


def test_fit_batches_have_what_training_takes(tiny_backbone: Path, cache: str) -> None:
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


def test_training_batches_are_equal_with_no_and_two_workers(tiny_backbone: Path, cache: str) -> None:
    one, two = (list(made(tiny_backbone, cache, "fit", num_workers=n).train_dataloader()) for n in (0, 2))
    for a, b in zip(one, two, strict=True):
        assert equal(a, b)


@pytest.mark.parametrize("backbone", ["tiny_backbone", "tiny_sdxl"])
def test_online_batches_are_the_cached_ones_and_no_training_photo_is_stored(
    backbone: str, cache: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(backbone)
    cached = made(folder, cache, "fit")
    online = made(folder, str(tmp_path), "fit", online=True)
    assert online.split is not None and online.features is not None and not cached.encoders
    train = [photo.content_key() for person in online.split.train for photo in person.photos]
    assert online.features.store["latent"].missing(train) == train
    for expected, batch in zip(cached.train_dataloader(), online.train_dataloader(), strict=True):
        assert batch["references"].shape == (8, 9, 3, 32, 32) and batch["moments"].shape == (8, 3, 32, 32)
        batch = online.on_after_batch_transfer(batch, 0)
        assert set(batch) == set(expected) and batch.pop("photo") == expected["photo"]
        assert equal(batch.pop("text"), expected["text"])
        for name, values in batch.items():  # convolutions differ in the last bits by the size of a batch
            assert torch.allclose(values.float(), expected[name].float(), atol=2e-3 if name == "moments" else 1e-5)


def test_augmentation_is_a_function_of_seed_epoch_and_index(tiny_backbone: Path, cache: str) -> None:
    def pixels(workers: int, augment: Any) -> Tensor:
        data = made(tiny_backbone, cache, "fit", online=True, augment=augment, num_workers=workers)
        return torch.cat([batch["moments"] for batch in data.train_dataloader()])

    noise = ColorJitter(brightness=0.5)
    one, two = pixels(0, noise), pixels(2, noise)
    assert torch.equal(one, two) and not torch.equal(one, pixels(0, None))
    with pytest.raises(DataError, match=r"set data\.online"):
        made(tiny_backbone, cache, "fit", augment=noise)


def test_fit_encodes_no_photo_of_a_test_person(tiny_backbone: Path, tmp_path: Path) -> None:
    data = made(tiny_backbone, str(tmp_path), "fit")
    assert data.split is not None and data.features is not None
    for kind in ("embeds", "latent"):
        test = [photo.content_key() for person in data.split.test for photo in person.photos]
        assert data.features.store[kind].missing(test) == test
        train = [photo.content_key() for person in data.split.train for photo in person.photos]
        assert not data.features.store[kind].missing(train)


def test_tasks_show_a_person_from_others_references(tiny_backbone: Path, cache: str) -> None:
    data = made(tiny_backbone, cache, "test", held_out=2)
    assert len(data.tasks) == 2 * 2
    assert all(task.held_out not in task.references and len(task.references) == 9 for task in data.tasks)
    batch = next(iter(data.test_dataloader()))
    assert batch["task"].tolist() == [0, 1, 2, 3]
    assert torch.equal(batch["other_references"][:2], batch["references"][2:])
    assert torch.equal(batch["other_references"][2:], batch["references"][:2])
    assert len(set(batch["seed"].tolist())) == 4


def test_copies_of_a_photo_count_once(tiny_backbone: Path, cache: str, tmp_path: Path, caplog) -> None:
    folder = write_people(tmp_path / "people", 4, 5)
    shutil.copy(folder / "p0" / "1.png", folder / "p0" / "9.png")
    with caplog.at_level(logging.WARNING):
        data = made(tiny_backbone, cache, "fit", source=Folder(str(folder)), min_photos=5, batch_size=2)
    assert "p0: 1 photos are copies" in caplog.text
    assert data.split is not None
    people = [*data.split.train, *data.split.validation, *data.split.test]
    assert {len(person.photos) for person in people} == {5}


def test_an_unreadable_photo_is_named_before_anything_is_encoded(tiny_backbone: Path, tmp_path: Path) -> None:
    folder = write_people(tmp_path / "people", 6, 5)
    bad = folder / "p3" / "2.png"
    bad.write_text("no picture")
    options: dict[str, Any] = {"source": Folder(str(folder)), "min_photos": 4, "batch_size": 2}
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
def test_predict_takes_any_number_of_photos(
    tiny_backbone: Path, cache: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, photos: int, said: str | None
) -> None:
    folder = write_people(tmp_path, 1, photos) / "p0"
    with caplog.at_level(logging.WARNING):
        data = made(tiny_backbone, cache, "predict", predict=PredictArgs(str(folder), ["a", "b"], [3, 4, 5]))
    assert len(data.requests) == 2 * 3
    assert len(data.requests[0].references) == 9 and len(set(data.requests[0].references)) == min(photos, 9)
    assert said in caplog.text if said else "are used" not in caplog.text
    batch = next(iter(data.predict_dataloader()))
    assert batch["references"].shape == (6, 9, 24) and batch["seed"].tolist() == [3, 4, 5] * 2


def test_predict_without_photos_takes_a_test_person_and_their_prompts(tiny_backbone: Path, cache: str) -> None:
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
    ],
)
def test_impossible_data_is_refused(tiny_backbone: Path, cache: str, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        made(tiny_backbone, cache, "predict", **wrong)


def test_the_training_seed_moves_the_groups_and_nothing_else(tiny_backbone: Path, cache: str) -> None:
    own, other = (made(tiny_backbone, cache, "fit", training_seed=seed) for seed in (None, 1))
    assert own.split == other.split and own.validation_tasks == other.validation_tasks
    a, b = (next(iter(data.train_dataloader())) for data in (own, other))
    assert not torch.equal(a["eps"], b["eps"])
    zero = made(tiny_backbone, cache, "fit", training_seed=0)
    assert torch.equal(a["eps"], next(iter(zero.train_dataloader()))["eps"])


def test_fewer_training_people_leave_the_others_as_they_are(tiny_backbone: Path, cache: str) -> None:
    source = MiniFaces(train=6, validation=2, test=2, photos=11)
    splits = [made(tiny_backbone, cache, "test", source=source, training_people=n).split for n in (None, 4, 2)]
    names = [{person.name for person in split.train} for split in splits if split is not None]
    assert [len(group) for group in names] == [6, 4, 2] and names[2] < names[1] < names[0]
    assert all(split is not None and split.test == splits[0].test for split in splits if splits[0] is not None)


@pytest.mark.parametrize("side", ["test", "validation", "train"])
def test_any_side_can_be_tested(side: Any, tiny_backbone: Path, cache: str) -> None:
    data = made(tiny_backbone, cache, "test", tested=side, tested_people=1)
    [name] = {task.person for task in data.tasks}
    assert data.split is not None and name in {person.name for person in getattr(data.split, side)}
    assert len(data.tasks) == 2  # of eleven photos nine are references
