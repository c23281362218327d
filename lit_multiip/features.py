"""Outputs of the frozen encoders, computed once per photo or prompt and kept on disk.

On disk, ``<cache>/<kind>-<fingerprint>/`` holds shards: ``<name>.npy`` is one array, a row per key, and ``<name>.json``
its list of keys. The fingerprint covers the encoder's weights and the preprocessing, a key the content of a photo or
the text of a prompt, so that a stale row cannot be found by mistake. A shard appears by one rename of a finished file,
is never changed, and is read memory-mapped without pickle: several processes may build and read at once.

| kind   | key                    | row                                                       |
|--------|------------------------|-----------------------------------------------------------|
| embeds | sha256 of the photo    | CLIP image embedding, (D,) float32                        |
| latent | sha256 of the photo    | VAE posterior mean and logvar, (2C, h, w) float16         |
| text   | sha256 of the prompt   | text encoder's last hidden state, (L, E) float16          |
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from lit_multiip.backbone import (
    fingerprint,
    fingerprint_image_encoder,
    load_component,
    load_image_encoder,
    load_native_side,
)
from lit_multiip.data.people import DataError, Photo
from lit_multiip.files import write_durably

SHARD_ROWS = 1024  # an interrupted build loses at most this many rows
logger = logging.getLogger(__name__)


def square(image: Image.Image, side: int) -> Image.Image:
    """Cut the largest centred square out of ``image`` and scale it to ``side`` px."""
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    cut = image.crop((left, top, left + edge, top + edge))
    return cut if edge == side else cut.resize((side, side), Image.Resampling.LANCZOS)


def to_tensor(images: Iterable[Image.Image]) -> Tensor:
    """Stack RGB images of one size: (B, 3, H, W) uint8."""
    return torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images])).permute(0, 3, 1, 2)


def to_signal(pixels: Tensor) -> Tensor:
    """Map uint8 pixels to the VAE's [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_pixels(signal: Tensor) -> Tensor:
    """Map the VAE's [-1, 1] to uint8 pixels, rounding."""
    return ((signal.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def encode_photos(processor: Any, encoder: Any, photos: Sequence[Photo]) -> Tensor:
    """CLIP image embeddings of photos, (B, D) float32."""
    pixels = processor([photo.image() for photo in photos], return_tensors="pt").pixel_values
    return encoder(pixel_values=pixels.to(encoder.device)).image_embeds.float()


def encode_prompts(tokenizer: Any, encoder: Any, prompts: Sequence[str]) -> Tensor:
    """Last hidden states of the text encoder, (B, L, E); what is too long is cut, and told."""
    length = tokenizer.model_max_length
    cut = [prompt for prompt in prompts if len(tokenizer(prompt, verbose=False).input_ids) > length]
    if cut:
        logger.warning("%d prompts are cut to %d tokens, such as '%s'", len(cut), length, cut[0][:100])
    tokens = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return encoder(tokens.input_ids.to(encoder.device)).last_hidden_state


def prompt_key(prompt: str) -> str:
    """Key of a prompt's row: sha256 of its text."""
    return hashlib.sha256(prompt.encode()).hexdigest()


class Shards:
    """Rows by key in memory-mapped arrays; only ever grows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: set[str] = set()
        self._rows: dict[str, tuple[npt.NDArray[Any], int]] = {}

    def refresh(self) -> None:
        """Take in shards that appeared since the last look."""
        for index in sorted(self.folder.glob("*.json")):
            if index.name in self._known:
                continue
            try:
                keys = json.loads(index.read_text())
                array = np.load(index.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
                if len(array) != len(keys):
                    raise ValueError(f"{len(keys)} keys, {len(array)} rows")
            except (OSError, ValueError) as error:
                raise DataError(f"feature shard '{index.with_suffix('')}' is broken ({error}): delete it") from error
            self._known.add(index.name)
            for row, key in enumerate(keys):
                self._rows.setdefault(key, (array, row))

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Return the keys that have no row yet, each once, in order."""
        return [key for key in dict.fromkeys(keys) if key not in self._rows]

    def add(self, keys: Sequence[str], rows: npt.NDArray[Any]) -> None:
        """Write one shard, durable before it becomes visible."""
        name = self.folder / uuid.uuid4().hex
        rows = np.ascontiguousarray(rows)
        write_durably(name.with_suffix(".npy"), lambda file: np.lib.format.write_array(file, rows, allow_pickle=False))
        write_durably(name.with_suffix(".json"), lambda file: file.write(json.dumps(list(keys)).encode()))
        self.refresh()

    def get(self, keys: Sequence[str]) -> Tensor:
        """Return the rows of ``keys`` stacked, as stored."""
        rows = [self._rows[key] for key in keys]
        return torch.from_numpy(np.stack([array[row] for array, row in rows]))


class Features:
    """What the backbone's frozen encoders make of photos and prompts, from disk.

    Args:
        backbone: anything ``resolve_backbone`` takes.
        cache: folder of the store; shared by all methods, runs and processes.
        image_side: side of the square target image in px; None reads it from the UNet and VAE.
        device: where the encoders run.
        batch_size: photos a forward pass of an encoder.
        image_encoder: anything ``load_image_encoder`` takes; None is the backbone's own.
    """

    def __init__(
        self,
        backbone: str,
        cache: str | Path,
        image_side: int | None = None,
        device: torch.device | str = "cpu",
        batch_size: int = 32,
        image_encoder: str | None = None,
    ) -> None:
        self.backbone, self.device, self.batch_size = backbone, device, batch_size
        self.image_encoder = image_encoder
        self.image_side = image_side or load_native_side(backbone)
        text = fingerprint(backbone, "text_encoder") + fingerprint(backbone, "tokenizer")
        names = {
            "embeds": fingerprint_image_encoder(backbone, image_encoder),
            "latent": f"{fingerprint(backbone, 'vae')}-{self.image_side}px",
            "text": text,
        }
        self.store = {kind: Shards(Path(cache) / f"{kind}-{name}") for kind, name in names.items()}
        for shards in self.store.values():
            shards.refresh()

    def build(
        self, photos: Sequence[Photo], targets: Sequence[Photo], prompts: Iterable[str], rank: int = 0, world: int = 1
    ) -> None:
        """Encode whatever is not stored yet; of ``world`` ranks, this one does every world-th.

        Args:
            photos: whose image embeddings will be asked for.
            targets: whose latents will be asked for.
            prompts: whose text states will be asked for; that of the empty prompt is always built.
            rank: this process's number.
            world: number of processes that build together.
        """
        by_key = {key: photo for photo, key in zip(photos, map(content_key, photos), strict=True)}
        self._fill("embeds", by_key, self._embedder, rank, world)
        by_key = {key: photo for photo, key in zip(targets, map(content_key, targets), strict=True)}
        self._fill("latent", by_key, self._latent_encoder, rank, world)
        texts = {prompt_key(prompt): prompt for prompt in ["", *prompts]}
        self._fill("text", texts, self._text_encoder, rank, world)

    def refresh(self) -> None:
        """Take in what other processes have built."""
        for shards in self.store.values():
            shards.refresh()

    def embeds(self, photos: Sequence[Photo]) -> Tensor:
        """Image embeddings, (n, D) float32."""
        return self.store["embeds"].get([content_key(photo) for photo in photos])

    def moments(self, photo: Photo) -> Tensor:
        """Posterior mean and logvar of the VAE's unscaled latent, (2C, h, w) float32."""
        return self.store["latent"].get([content_key(photo)])[0].float()

    def text(self, prompt: str) -> Tensor:
        """Text states of a prompt, (L, E) float32."""
        return self.store["text"].get([prompt_key(prompt)])[0].float()

    def _fill(
        self,
        kind: str,
        items: dict[str, Any],
        load: Callable[[], Callable[[list[Any]], Tensor]],
        rank: int,
        world: int,
    ) -> None:
        shards = self.store[kind]
        keys = shards.missing(list(items)[rank::world])  # shares that do not depend on what others have stored by now
        if not keys:
            return
        encode = load()
        with tqdm(total=len(keys), desc=f"encoding {kind}", unit="item", disable=rank > 0) as bar:
            for start in range(0, len(keys), SHARD_ROWS):
                shard = keys[start : start + SHARD_ROWS]
                rows = []
                for first in range(0, len(shard), self.batch_size):
                    part = shard[first : first + self.batch_size]
                    with torch.inference_mode():
                        encoded = encode([items[key] for key in part]).cpu()
                    if not encoded.isfinite().all():
                        bad = next(k for k, row in zip(part, encoded, strict=True) if not row.isfinite().all())
                        raise DataError(f"the {kind} encoder makes NaN or infinity of {items[bad]!r}: leave it out")
                    rows.append(encoded.numpy())
                    bar.update(len(part))
                shards.add(shard, np.concatenate(rows))
        del encode
        gc.collect()  # fit keeps no encoder in memory

    def _embedder(self) -> Callable[[list[Photo]], Tensor]:
        processor, encoder = load_image_encoder(self.backbone, self.image_encoder)
        encoder.to(self.device)

        def encode(photos: list[Photo]) -> Tensor:
            return encode_photos(processor, encoder, photos)  # (B, D)

        return encode

    def _latent_encoder(self) -> Callable[[list[Photo]], Tensor]:
        vae = load_component(self.backbone, "vae").to(self.device)

        def encode(photos: list[Photo]) -> Tensor:
            pixels = to_tensor(square(photo.image(), self.image_side) for photo in photos)  # (B, 3, H, W)
            posterior = vae.encode(to_signal(pixels.to(self.device))).latent_dist
            return torch.cat([posterior.mean, posterior.logvar], dim=1).half()  # (B, 2C, h, w)

        return encode

    def _text_encoder(self) -> Callable[[list[str]], Tensor]:
        tokenizer = load_component(self.backbone, "tokenizer")
        encoder = load_component(self.backbone, "text_encoder").to(self.device)

        def encode(prompts: list[str]) -> Tensor:
            return encode_prompts(tokenizer, encoder, prompts).half()  # (B, L, E)

        return encode


_content_keys: dict[Photo, str] = {}


def content_key(photo: Photo) -> str:
    """``photo.content_key()``, read once per process."""
    key = _content_keys.get(photo)
    if key is None:
        key = _content_keys[photo] = photo.content_key()
    return key
