import gc
import hashlib
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import make_tiny_backbone

from lit_multiip.backbone import features
from lit_multiip.backbone.features import Encoder, Features
from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.backbone.store import Shards
from lit_multiip.data.people import MiniFaces
from lit_multiip.data.photos import DataError, FilePhoto, Photo
from lit_multiip.pixels import square, to_tensor

PHOTOS = list(MiniFaces(train=1, validation=1, test=1, photos=5).people()[0].photos)


@pytest.fixture
def loads(monkeypatch):
    """Names of the components that are loaded."""
    names = []

    load = Backbone.load

    def counted(backbone, name, *args):
        names.append(name)
        return load(backbone, name, *args)

    monkeypatch.setattr(Backbone, "load", counted)
    return names


def build(backbone: Path, cache: Path, photos: list[Photo] = PHOTOS, prompts: tuple[str, ...] = ("a", "b")) -> Features:
    store = Features(Backbone(str(backbone)), cache)
    store.build(photos, photos, prompts)
    return store


def test_features_are_what_the_encoders_say(tiny_backbone, tmp_path):
    store = build(tiny_backbone, tmp_path)
    processor, encoder, vae, tokenizer, text = (
        Backbone(str(tiny_backbone)).load(name)
        for name in ("feature_extractor", "image_encoder", "vae", "tokenizer", "text_encoder")
    )
    with torch.inference_mode():
        pixels = processor(PHOTOS[3].image(), return_tensors="pt").pixel_values
        embed = encoder(pixel_values=pixels).image_embeds[0]
        signal = to_tensor([square(PHOTOS[3].image(), 32)]).float() / 127.5 - 1
        posterior = vae.encode(signal).latent_dist
        tokens = tokenizer("a", padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")
        states = text(tokens.input_ids).last_hidden_state[0]
    assert torch.allclose(store.embeds(PHOTOS[3:4])[0], embed, atol=1e-5)
    assert torch.allclose(store.moments(PHOTOS[3]), posterior.parameters[0], atol=2e-3)  # kept as float16
    assert torch.allclose(store.text("a")["prompt_embeds"], states, atol=2e-3)


def test_a_second_build_loads_no_encoder(tiny_backbone, tmp_path, loads):
    first = build(tiny_backbone, tmp_path)
    assert len(loads) == 5
    second = build(tiny_backbone, tmp_path)
    assert len(loads) == 5
    assert torch.equal(first.embeds(PHOTOS), second.embeds(PHOTOS))
    build(tiny_backbone, tmp_path, prompts=("a", "c"))
    assert loads[5:] == ["text_encoder", "tokenizer"]


def test_a_build_leaves_no_encoder_in_memory(tiny_backbone, tmp_path, monkeypatch):
    loaded = []

    load = Backbone.load

    def watched(backbone, name, *args):
        component = load(backbone, name, *args)
        if isinstance(component, torch.nn.Module):
            loaded.append(weakref.ref(component))
        return component

    monkeypatch.setattr(Backbone, "load", watched)
    gc.disable()  # they go at once, not when the collector comes round
    try:
        build(tiny_backbone, tmp_path)
        assert len(loaded) == 3 and all(component() is None for component in loaded)
    finally:
        gc.enable()


def test_a_photo_that_changed_is_encoded_again(tiny_backbone, tmp_path, loads):
    embeds = []
    for colour in ("red", "blue", "red"):
        photo = FilePhoto("p", "1.png", "a", tmp_path / "1.png")  # anew, as in a new process
        Image.new("RGB", (40, 40), colour).save(photo.path)
        embeds.append(build(tiny_backbone, tmp_path / "cache", [photo]).embeds([photo]))
    assert not torch.equal(embeds[0], embeds[1]) and torch.equal(embeds[0], embeds[2])
    assert loads.count("image_encoder") == 2  # the first picture is still known


def test_another_encoder_never_finds_stale_features(tiny_backbone, tmp_path, loads):
    other = make_tiny_backbone(tmp_path / "other", seed=1)
    first, second = build(tiny_backbone, tmp_path / "cache"), build(other, tmp_path / "cache")
    assert loads.count("image_encoder") == 2
    assert not torch.allclose(first.embeds(PHOTOS), second.embeds(PHOTOS), atol=1e-3)


@pytest.mark.parametrize("suffix", ["npy", "json"])
def test_a_broken_shard_is_named(tiny_backbone, tmp_path, suffix):
    build(tiny_backbone, tmp_path)
    shard = next(tmp_path.glob(f"embeds-*/*.{suffix}"))
    shard.write_bytes(shard.read_bytes()[:-40])
    with pytest.raises(DataError, match=rf"{shard.stem}.*delete"):
        Features(Backbone(str(tiny_backbone)), tmp_path)


def test_ranks_build_disjoint_shares(tiny_backbone, tmp_path):
    for rank in range(2):
        Features(Backbone(str(tiny_backbone)), tmp_path).build(PHOTOS, [], ["a", "b"], rank, 2)
        keys = (
            Features(Backbone(str(tiny_backbone)), tmp_path)
            .store["embeds"]
            .missing(photo.content_key() for photo in PHOTOS)
        )
        assert len(keys) == [2, 0][rank]  # rank 0 has encoded three of five


def test_an_encoder_that_makes_nan_is_refused(tiny_backbone, tmp_path, monkeypatch):
    def broken(self):
        def read(photos):
            return torch.tensor([[float("nan") if photo is PHOTOS[2] else 0.0] for photo in photos])

        return Encoder(read, lambda batch: batch)

    monkeypatch.setattr(Features, "_embedder", broken)
    with pytest.raises(DataError, match=PHOTOS[2].name):
        build(tiny_backbone, tmp_path)


def test_the_native_side_comes_from_the_weights(tiny_backbone, tmp_path):
    assert Backbone(str(tiny_backbone)).image_side == 32
    assert build(tiny_backbone, tmp_path).moments(PHOTOS[0]).shape == (8, 8, 8)


def test_the_centre_square_is_cut_out():
    wide = Image.new("RGB", (60, 20), "red")
    wide.paste("blue", (20, 0, 40, 20))
    assert set(square(wide, 10).getdata()) == {(0, 0, 255)}


def test_the_estimate_is_what_the_disk_then_holds(tiny_backbone, tmp_path):
    store = build(tiny_backbone, tmp_path)
    rows = {"embeds": len(PHOTOS), "latent": len(PHOTOS), "text": 3}  # with the empty prompt
    for kind, size in store.row_bytes().items():
        [array] = (np.load(file, mmap_mode="r") for file in store.store[kind].folder.glob("*.npy"))
        assert array.nbytes == rows[kind] * size


def test_an_interrupted_build_goes_on_where_it_was(tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "SHARD_SECONDS", 0.0)
    encoded = []
    whole = Features._embedder

    def stops_at_the_third(self):
        read, encode = whole(self)

        def counted(batch):
            if len(encoded) == 2:
                raise KeyboardInterrupt
            encoded.append(len(batch))
            return encode(batch)

        return Encoder(read, counted)

    store = Features(Backbone(str(tiny_backbone)), tmp_path, batch_size=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Features, "_embedder", stops_at_the_third)
        store.build(PHOTOS, [], [])
    left = (
        Features(Backbone(str(tiny_backbone)), tmp_path)
        .store["embeds"]
        .missing(photo.content_key() for photo in PHOTOS)
    )
    assert left == [photo.content_key() for photo in PHOTOS[2:]]
    again = build(tiny_backbone, tmp_path)
    assert torch.allclose(again.embeds(PHOTOS), build(tiny_backbone, tmp_path / "at_once").embeds(PHOTOS), atol=1e-6)


def test_a_large_store_is_found_by_24_bytes_a_row(tmp_path):
    count = 20_000
    keys = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(count)]
    shards = Shards(tmp_path)
    for first in range(0, count, 5_000):
        shards.add(keys[first : first + 5_000], np.arange(first, first + 5_000, dtype=np.float32)[:, None])
    shards.refresh()
    assert shards._digests.nbytes + shards._places.nbytes == 24 * count
    chosen = np.random.default_rng(0).permutation(count)[:500]
    assert shards.get([keys[i] for i in chosen])[:, 0].tolist() == chosen.tolist()
    unknown = hashlib.sha256(b"unknown").hexdigest()
    assert shards.missing([keys[7], unknown, unknown]) == [unknown]
    with pytest.raises(KeyError, match=unknown):
        shards.get([keys[7], unknown])
