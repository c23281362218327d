"""Rows of features on disk, by key."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lit_multiip.data.photos import DataError
from lit_multiip.files import LitMultiIPError, write_durably

SHARD_ROWS, SHARD_SECONDS = 1024, 60.0  # an interrupted build loses at most this much


class Shards:
    """Rows by key in memory-mapped arrays; only ever grows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: set[str] = set()
        self._arrays: list[npt.NDArray[Any]] = []
        self._digests = np.empty(0, "S16")  # of the keys, sorted: 24 bytes a row with its place, not a dictionary's 300
        self._places = np.empty((0, 2), np.uint32)  # array and row of each key

    def refresh(self) -> None:
        """Read the shards that appeared since the last call."""
        digests, places = [self._digests], [self._places]
        for index in sorted(self.folder.glob("*.json")):
            if index.name in self._known:
                continue
            try:
                keys = json.loads(index.read_text())
                array = np.load(index.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
                if len(array) != len(keys):
                    raise LitMultiIPError(f"{len(keys)} keys, {len(array)} rows")
                digests.append(_digests_of(keys))
            except (OSError, ValueError) as error:
                raise DataError(f"feature shard '{index.with_suffix('')}' is broken ({error}): delete it") from error
            rows = np.arange(len(keys), dtype=np.uint32)
            places.append(np.stack([np.full_like(rows, len(self._arrays)), rows], axis=1))
            self._known.add(index.name)
            self._arrays.append(array.view(np.ndarray))  # indexing a memmap itself costs three times as much
        self._digests, first = np.unique(np.concatenate(digests), return_index=True)
        self._places = np.concatenate(places)[first]

    def missing(self, keys: Iterable[str], rank: int = 0, world: int = 1) -> list[str]:
        """Return the keys that have no row yet, each once, in order.

        Rank `rank` of `world` gets every world-th of the distinct keys, whatever others have stored by now.
        """
        share = list(dict.fromkeys(keys))[rank::world]
        return [key for key, found in zip(share, self._find(share)[1], strict=True) if not found]

    def add(self, keys: Sequence[str], rows: npt.NDArray[Any]) -> None:
        """Write one shard, durable before it becomes visible; `refresh` reads it."""
        name = self.folder / uuid.uuid4().hex
        rows = np.ascontiguousarray(rows)
        write_durably(name.with_suffix(".npy"), lambda file: np.lib.format.write_array(file, rows, allow_pickle=False))
        write_durably(name.with_suffix(".json"), lambda file: file.write(json.dumps(list(keys)).encode()))

    def get(self, keys: Sequence[str]) -> Tensor:
        """Return the rows of `keys` stacked, as stored.

        Raises:
            KeyError: one was never stored.
        """
        at, found = self._find(keys)
        if not found.all():
            raise KeyError(keys[int(found.argmin())])
        return torch.from_numpy(np.stack([self._arrays[array][row] for array, row in self._places[at].tolist()]))

    def _find(self, keys: Sequence[str]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Return where in the index each key is, and whether it is there."""
        digests = _digests_of(keys)
        if not len(self._digests):
            return np.zeros(len(digests), int), np.zeros(len(digests), bool)
        at = np.minimum(np.searchsorted(self._digests, digests), len(self._digests) - 1)
        return at, self._digests[at] == digests


def _digests_of(keys: Iterable[str]) -> npt.NDArray[np.bytes_]:
    """Return the first half of each SHA-256, (n,) of 16 bytes: enough to tell any two contents apart."""
    return np.frombuffer(b"".join(bytes.fromhex(key[:32]) for key in keys), "S16")
