"""Outputs of the frozen encoders, computed once per photo or prompt and kept on disk.

On disk, `<cache>/<kind>-<fingerprint>/` holds shards: `<name>.npy` is one array, a row per key, and `<name>.json`
its list of keys. The fingerprint covers the encoder's weights and the preprocessing, a key the content of a photo or
the text of a prompt, so that a stale row cannot be found by mistake. A shard appears by one rename of a finished file,
is never changed, and is read memory-mapped without pickle: several processes may build and read at once.

| kind   | key                    | row                                                       |
|--------|------------------------|-----------------------------------------------------------|
| embeds | sha256 of the photo    | image embedding, (D,) float32; NaN: a photo without a face|
| tokens | sha256 of the photo    | CLIP's patch tokens before its last layer, (T, H) float16 |
| face   | sha256 of the photo    | face embedding of norm 1, (E,) float32; NaN: no face      |
| latent | sha256 of the photo    | VAE posterior mean and logvar, (2C, h, w) float16         |
| text   | sha256 of the prompt   | text states that the UNet attends to, (L, E) float16      |
| pooled | sha256 of the prompt   | SDXL alone: pooled text embedding, (P,) float16           |
| frame  | sha256 of the photo    | SDXL alone: height, width, top and left of its square     |

Of the first three there are those that the adapter's layout takes.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from operator import methodcaller
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm.auto import tqdm

from lit_multiip.backbone.encoders import BLANK, Encoder, blank_row, load_latent_encoder, load_photo_encoder
from lit_multiip.backbone.layouts import join_rows
from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.backbone.store import SHARD_ROWS, SHARD_SECONDS, Shards
from lit_multiip.data.photos import DataError, Photo
from lit_multiip.files import hash_text

FLOAT32 = ("embeds", "face", "frame")  # kinds whose rows are not float16
BLANK_KEY = hash_text("no photo")  # of the row of patch tokens that stands for no photo
Item = TypeVar("Item")
logger = logging.getLogger(__name__)


def prompt_key(prompt: str) -> str:
    """Return the key of a prompt's row."""
    return hash_text(prompt)


def _index(items: Iterable[Item], key: Callable[[Item], str]) -> dict[str, Item]:
    """Return items by key, the first of each key, in order."""
    found: dict[str, Item] = {}
    for item in items:
        found.setdefault(key(item), item)
    return found


def _read_ahead(read: Callable[[Any], Any], parts: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Yield each part and what `read` makes of it, while the next ones are being read in other threads."""
    with ThreadPoolExecutor(2) as pool:
        waiting: deque[tuple[Any, Future[Any]]] = deque()
        for part in parts:
            waiting.append((part, pool.submit(read, part)))
            if len(waiting) > 2:
                done, job = waiting.popleft()
                yield done, job.result()
        for done, job in waiting:
            yield done, job.result()


class Features:
    """Features of photos and prompts by the backbone's frozen encoders, kept on disk.

    Args:
        backbone: whose encoders they are.
        cache: folder of the store; shared by all methods, runs and processes.
        device: where the encoders run.
        batch_size: photos a forward pass of an encoder.
        conditions: whether photos condition, so that what an adapter takes of them is kept.
    """

    def __init__(
        self,
        backbone: Backbone,
        cache: str | Path,
        device: torch.device | str = "cpu",
        batch_size: int = 32,
        conditions: bool = True,
    ) -> None:
        self.backbone, self.device, self.batch_size = backbone, device, batch_size
        text = "".join(map(backbone.fingerprint, backbone.text_components))
        self.kinds = backbone.layout.kinds if conditions else ()
        names = {kind: self._name(kind) for kind in self.kinds} | {
            "latent": f"{backbone.fingerprint('vae')}-{backbone.image_side}px",
            "text": text,
        }
        if backbone.takes_sizes:
            names |= {"pooled": text, "frame": f"{backbone.image_side}px"}
        self.store = {kind: Shards(Path(cache) / f"{kind}-{name}") for kind, name in names.items()}
        self.refresh()

    def _name(self, kind: str) -> str:
        """Name what makes a kind of a photo that conditions, by its content."""
        own, face = self.backbone, self.backbone.face_encoder
        if kind == "tokens":
            return own.fingerprint_image_encoder()
        if kind == "face" and face is not None:
            return face.fingerprint()
        return own.fingerprint_photo_encoder() + ("-nan" if face else "")

    def build(
        self, photos: Iterable[Photo], targets: Iterable[Photo], prompts: Iterable[str], rank: int = 0, world: int = 1
    ) -> None:
        """Encode whatever is not stored yet; of `world` ranks, this one does every world-th.

        Args:
            photos: whose image embeddings will be asked for.
            targets: whose latents will be asked for.
            prompts: whose text states will be asked for; that of the empty prompt is always built.
            rank: this process's number.
            world: number of processes that build together.
        """
        conditions = _index(photos, methodcaller("content_key")) if self.kinds else {}
        items: dict[str, dict[str, Any]] = dict.fromkeys(self.kinds, conditions) | {
            "latent": _index(targets, methodcaller("content_key")),
            "text": _index(["", *prompts], prompt_key),
        }
        if "tokens" in self.kinds and conditions:
            items["tokens"] = conditions | {BLANK_KEY: BLANK}
        encoders: dict[str, Callable[[], Encoder]] = {
            kind: self._embedder if kind == "embeds" else partial(load_photo_encoder, self.backbone, kind, self.device)
            for kind in self.kinds
        }
        encoders |= {
            "latent": self._latent_encoder,
            "text": lambda: self._text_encoder("prompt_embeds"),
        }
        if self.backbone.takes_sizes:
            items |= {"pooled": items["text"], "frame": items["latent"]}
            encoders |= {
                "pooled": lambda: self._text_encoder("pooled_prompt_embeds"),
                "frame": lambda: Encoder(self.frames, lambda rows: rows),
            }
        if rank == 0:
            self._forecast({kind: len(self.store[kind].missing(wanted)) for kind, wanted in items.items()})
        for kind, load in encoders.items():
            self._fill(kind, items[kind], load, rank, world)

    def row_bytes(self) -> dict[str, int]:
        """Return the bytes of a row of each kind on disk, by the encoders' configurations."""
        shapes = self.backbone.feature_shapes() | (self._shapes if self.kinds else {})
        return {kind: math.prod(shape) * (4 if kind in FLOAT32 else 2) for kind, shape in shapes.items()}

    def _forecast(self, missing: dict[str, int]) -> None:
        """Log what will be computed, and what it will take on disk."""
        if any(missing.values()):
            counts = ", ".join(f"{count} {kind}" for kind, count in missing.items() if count)
            size = sum(count * self.row_bytes()[kind] for kind, count in missing.items())
            logger.info("features to compute: %s; %s MiB on disk", counts, f"{size / 2**20:,.1f}")

    def refresh(self) -> None:
        """Read what other processes have built."""
        for shards in self.store.values():
            shards.refresh()

    def embeds(self, photos: Sequence[Photo]) -> Tensor:
        """Return what conditions of photos, float32; see `replace_missing` for photos without a face.

        Returns:
            Image or face embeddings (n, D), patch tokens (n, T, H), or where the adapter takes both, a row of both a
            photo, (n, E + T H).
        """
        keys = [photo.content_key() for photo in photos]
        return join_rows([self.store[kind].get(keys).float() for kind in self.kinds])

    def blank(self) -> Tensor | None:
        """Return what stands for no photo, the shape of a row of `embeds`; None where that is zeros.

        In the place of patch tokens stand those of an input of zeros, of face embeddings zeros.
        """
        if "tokens" not in self.kinds:
            return None
        tokens = self.store["tokens"].get([BLANK_KEY]).float()  # (1, T, H)
        return blank_row(tokens, self._shapes)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return self.backbone.photo_shapes()

    def moments(self, photo: Photo) -> Tensor:
        """Return posterior mean and logvar of the VAE's unscaled latent, (2C, h, w) float32."""
        return self.store["latent"].get([photo.content_key()])[0].float()

    def text(self, prompt: str) -> dict[str, Tensor]:
        """Return a prompt's `prompt_embeds`, text states (L, E), and of SDXL `pooled_prompt_embeds` (P,); float32."""
        kinds = {"prompt_embeds": "text"} | ({"pooled_prompt_embeds": "pooled"} if "pooled" in self.store else {})
        return {name: self.store[kind].get([prompt_key(prompt)])[0].float() for name, kind in kinds.items()}

    def sizes(self, photo: Photo) -> dict[str, Tensor]:
        """Return the sizes of a photo that the UNet takes besides the text; empty for most backbones."""
        if "frame" not in self.store:
            return {}
        return self.backbone.sizes(self.store["frame"].get([photo.content_key()])[0].float())

    def frames(self, photos: Sequence[Photo]) -> Tensor:
        """Return height and width of photos, and top and left of their squares once scaled, (B, 4) float32."""
        rows, side = [], self.backbone.image_side
        for photo in photos:
            width, height = photo.image().size
            top, left = ((edge * side // min(width, height) - side) // 2 for edge in (height, width))
            rows.append([height, width, top, left])
        return torch.tensor(rows, dtype=torch.float32)

    def _fill(self, kind: str, items: Mapping[str, Any], load: Callable[[], Encoder], rank: int, world: int) -> None:
        """Encode this rank's share of the items (by key) that have no row of this kind yet."""
        shards = self.store[kind]
        missing = shards.missing(items, rank, world)
        if not missing:
            return
        encoder = load()

        def read(keys: Sequence[str]) -> Any:
            return encoder.read([items[key] for key in keys])

        parts = [missing[i : i + self.batch_size] for i in range(0, len(missing), self.batch_size)]
        stored: list[str] = []
        rows: list[npt.NDArray[Any]] = []
        started = time.monotonic()
        with tqdm(total=len(missing), desc=f"encoding {kind}", unit="item", disable=rank > 0) as bar:
            for keys, batch in _read_ahead(read, parts):
                with torch.inference_mode():
                    encoded = encoder.encode(batch).cpu()
                fine = encoded.flatten(1).isfinite().all(dim=1)  # (B,)
                if kind in ("embeds", "face") and self.backbone.face_encoder is not None:
                    fine |= encoded.isnan().all(dim=1)  # a photo without a face
                if not fine.all():
                    bad = items[keys[int(fine.int().argmin())]]
                    raise DataError(f"the {kind} encoder makes NaN or infinity of {bad!r}: leave it out")
                stored += keys
                rows.append(encoded.numpy())
                bar.update(len(keys))
                if len(stored) >= SHARD_ROWS or keys is parts[-1] or time.monotonic() - started > SHARD_SECONDS:
                    shards.add(stored, np.concatenate(rows))
                    stored, rows, started = [], [], time.monotonic()
        shards.refresh()

    def _embedder(self) -> Encoder:
        return load_photo_encoder(self.backbone, "embeds", self.device)

    def _latent_encoder(self) -> Encoder:
        return load_latent_encoder(self.backbone, self.device)

    def _text_encoder(self, part: str) -> Encoder:
        pipe = self.backbone.text_pipeline().to(self.device)
        encode = self.backbone.encode_prompts
        return Encoder(list, lambda prompts: encode(pipe, prompts)[part].half())  # (B, L, E) or (B, P)
