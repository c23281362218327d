"""Outputs of the frozen encoders, computed once per photo or prompt and kept on disk.

On disk, ``<cache>/<kind>-<fingerprint>/`` holds shards: ``<name>.npy`` is one array, a row per key, and ``<name>.json``
its list of keys. The fingerprint covers the encoder's weights and the preprocessing, a key the content of a photo or
the text of a prompt, so that a stale row cannot be found by mistake. A shard appears by one rename of a finished file,
is never changed, and is read memory-mapped without pickle: several processes may build and read at once.

| kind   | key                    | row                                                       |
|--------|------------------------|-----------------------------------------------------------|
| embeds | sha256 of the photo    | CLIP image embedding, (D,) float32                        |
| latent | sha256 of the photo    | VAE posterior mean and logvar, (2C, h, w) float16         |
| text   | sha256 of the prompt   | text states that the UNet attends to, (L, E) float16      |
| pooled | sha256 of the prompt   | SDXL alone: pooled text embedding, (P,) float16           |
| frame  | sha256 of the photo    | SDXL alone: height, width, top and left of its square     |
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
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
    load_component,
    load_native_side,
    load_text_pipeline,
    takes_text_time,
    text_components,
)
from lit_multiip.data.people import DataError, Photo
from lit_multiip.files import write_durably
from lit_multiip.photo_encoder import FaceEncoder, PhotoEncoder, fingerprint_photo_encoder

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


def encode_prompts(pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """What a pipeline's own ``encode_prompt`` makes of prompts, under its own names; what is too long is cut, and told.

    Args:
        pipe: of ``load_text_pipeline``.
        prompts: B of them.

    Returns:
        ``prompt_embeds``, text states (B, L, E), and of SDXL ``pooled_prompt_embeds`` (B, P).
    """
    length = pipe.tokenizer.model_max_length
    cut = [prompt for prompt in prompts if len(pipe.tokenizer(prompt, verbose=False).input_ids) > length]
    if cut:
        logger.warning("%d prompts are cut to %d tokens, such as '%s'", len(cut), length, cut[0])
    options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    with _without_warnings():  # of each cut prompt
        states = pipe.encode_prompt(list(prompts), device=pipe.text_encoder.device, **options)
    return {"prompt_embeds": states[0]} | ({"pooled_prompt_embeds": states[2]} if len(states) == 4 else {})


@contextmanager
def _without_warnings() -> Iterator[None]:
    log = logging.getLogger("diffusers")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


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
        face_encoder: a face-recognition network in its place, or beside it.
    """

    def __init__(
        self,
        backbone: str,
        cache: str | Path,
        image_side: int | None = None,
        device: torch.device | str = "cpu",
        batch_size: int = 32,
        image_encoder: str | None = None,
        face_encoder: FaceEncoder | None = None,
    ) -> None:
        self.backbone, self.device, self.batch_size = backbone, device, batch_size
        self.image_encoder, self.face_encoder = image_encoder, face_encoder
        self.image_side = image_side or load_native_side(backbone)
        text = "".join(fingerprint(backbone, name) for name in text_components(backbone))
        names = {
            "embeds": fingerprint_photo_encoder(backbone, image_encoder, face_encoder),
            "latent": f"{fingerprint(backbone, 'vae')}-{self.image_side}px",
            "text": text,
        }
        self.text_time = takes_text_time(backbone)
        if self.text_time:
            names |= {"pooled": text, "frame": f"{self.image_side}px"}
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
        self._fill("text", texts, lambda: self._text_encoder("prompt_embeds"), rank, world)
        if self.text_time:
            self._fill("pooled", texts, lambda: self._text_encoder("pooled_prompt_embeds"), rank, world)
            self._fill("frame", by_key, lambda: self._frames, rank, world)

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

    def text(self, prompt: str) -> dict[str, Tensor]:
        """A prompt's ``prompt_embeds``, text states (L, E), and of SDXL ``pooled_prompt_embeds`` (P,); float32."""
        kinds = {"prompt_embeds": "text"} | ({"pooled_prompt_embeds": "pooled"} if self.text_time else {})
        return {name: self.store[kind].get([prompt_key(prompt)])[0].float() for name, kind in kinds.items()}

    def negative_text(self) -> dict[str, Tensor]:
        """``text`` of the empty prompt, under the pipeline's names of what guidance leads away from."""
        return {f"negative_{name}": value for name, value in self.text("").items()}

    def time_ids(self, photo: Photo) -> dict[str, Tensor]:
        """Of SDXL, ``time_ids`` (6,) float32: the photo's height and width, its square's top and left, and side twice.

        As published: height and width are the file's, top and left those in the photo once its shorter side is the
        square's.
        """
        if not self.text_time:
            return {}
        frame = self.store["frame"].get([content_key(photo)])[0].float()  # (4,)
        return {"time_ids": torch.cat([frame, torch.full((2,), float(self.image_side))])}

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
        encoder = PhotoEncoder(self.backbone, self.image_encoder, self.face_encoder, self.device)

        def encode(photos: list[Photo]) -> Tensor:
            before = len(encoder.without_face)
            embeds = encoder(photos)  # (B, D)
            for photo in encoder.without_face[before:]:
                logger.warning("%s of %s: no face is found, so that no face conditions", photo.name, photo.person)
            return embeds

        return encode

    def _latent_encoder(self) -> Callable[[list[Photo]], Tensor]:
        vae = load_component(self.backbone, "vae").to(self.device)

        def encode(photos: list[Photo]) -> Tensor:
            pixels = to_tensor(square(photo.image(), self.image_side) for photo in photos)  # (B, 3, H, W)
            posterior = vae.encode(to_signal(pixels.to(self.device))).latent_dist
            return torch.cat([posterior.mean, posterior.logvar], dim=1).half()  # (B, 2C, h, w)

        return encode

    def _text_encoder(self, part: str) -> Callable[[list[str]], Tensor]:
        pipe = load_text_pipeline(self.backbone).to(self.device)

        def encode(prompts: list[str]) -> Tensor:
            return encode_prompts(pipe, prompts)[part].half()  # (B, L, E) or (B, P)

        return encode

    def _frames(self, photos: list[Photo]) -> Tensor:
        rows = []
        for photo in photos:
            width, height = photo.image().size
            top, left = (
                (edge * self.image_side // min(width, height) - self.image_side) // 2 for edge in (height, width)
            )
            rows.append([height, width, top, left])
        return torch.tensor(rows, dtype=torch.float32)  # (B, 4)


_content_keys: dict[Photo, str] = {}


def content_key(photo: Photo) -> str:
    """``photo.content_key()``, read once per process."""
    key = _content_keys.get(photo)
    if key is None:
        key = _content_keys[photo] = photo.content_key()
    return key
