"""Rows of features on disk, by key."""

from __future__ import annotations

import json
import mmap
import tempfile
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lit_multiip.data.photos import DataError
from lit_multiip.files import write_durably

SHARD_ROWS, SHARD_SECONDS = 1024, 60.0  # an interrupted build loses at most this much


def _read_rows_alone(array: Any) -> None:
    """Tell the system not to read 128 KB around each row that is asked for, where a row is no more than a page."""
    if hasattr(mmap, "MADV_RANDOM") and len(array) and array[0].nbytes <= mmap.PAGESIZE:
        array.base.madvise(mmap.MADV_RANDOM)


Digests = npt.NDArray[np.bytes_]


class Shards:
    """Rows by key in memory-mapped arrays; only ever grows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: set[str] = set()
        self._arrays: list[npt.NDArray[Any]] = []
        self._keys = np.empty(0, "S16")  # sorted; half a SHA-256 is enough to tell any two contents apart
        self._places = np.empty((0, 2), np.uint32)  # array and row of each key

    def refresh(self) -> None:
        """Take in shards that appeared since the last look."""
        found, places = [self._keys], [self._places]
        for index in sorted(self.folder.glob("*.json")):
            if index.name in self._known:
                continue
            try:
                keys = json.loads(index.read_text())
                array = np.load(index.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
                if len(array) != len(keys):
                    raise ValueError(f"{len(keys)} keys, {len(array)} rows")
                found.append(digests_of(keys))
            except (OSError, ValueError) as error:
                raise DataError(f"feature shard '{index.with_suffix('')}' is broken ({error}): delete it") from error
            rows = np.arange(len(keys), dtype=np.uint32)
            places.append(np.stack([np.full_like(rows, len(self._arrays)), rows], axis=1))
            self._known.add(index.name)
            _read_rows_alone(array)
            self._arrays.append(array.view(np.ndarray))  # indexing a memmap itself costs three times as much
        if len(found) > 1:
            keys, first = np.unique(np.concatenate(found), return_index=True)
            self._keys, self._places = self._mapped(keys), self._mapped(np.concatenate(places)[first])

    def _mapped(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Move an array out of memory into an unnamed file beside the shards, whose pages the system can drop."""
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                array.tofile(file)
                file.flush()
                return np.memmap(file, array.dtype, "r", shape=array.shape).view(np.ndarray)
        except (OSError, ValueError):  # a store that may only be read, or nothing in it
            return array

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Return the keys that have no row yet, each once, in order."""
        keys = list(keys)
        return [keys[at] for at in self.lacking(digests_of(keys))]

    def lacking(self, digests: Digests, rank: int = 0, world: int = 1) -> npt.NDArray[np.int64]:
        """Where in `digests` those stand, each once, that have no row yet.

        Args:
            digests: of keys, (n,).
            rank: of `world` ranks, this one gets every world-th of the distinct keys: a share that does not depend on
                what others have stored by now.
            world: number of ranks.
        """
        first = np.sort(np.unique(digests, return_index=True)[1])[rank::world]
        return first[~self._find(digests[first])[1]]

    def add(self, keys: Sequence[str], rows: npt.NDArray[Any]) -> None:
        """Write one shard, durable before it becomes visible; `refresh` takes it in."""
        name = self.folder / uuid.uuid4().hex
        rows = np.ascontiguousarray(rows)
        write_durably(name.with_suffix(".npy"), lambda file: np.lib.format.write_array(file, rows, allow_pickle=False))
        write_durably(name.with_suffix(".json"), lambda file: file.write(json.dumps(list(keys)).encode()))

    def get(self, keys: Sequence[str]) -> Tensor:
        """Return the rows of `keys` stacked, as stored.

        Raises:
            KeyError: one was never stored.
        """
        at, found = self._find(digests_of(keys))
        if not found.all():
            raise KeyError(keys[int(found.argmin())])
        return torch.from_numpy(np.stack([self._arrays[array][row] for array, row in self._places[at].tolist()]))

    def _find(self, digests: Digests) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Where in the index each key is, and whether it is there."""
        if not len(self._keys):
            return np.zeros(len(digests), int), np.zeros(len(digests), bool)
        at = np.minimum(np.searchsorted(self._keys, digests), len(self._keys) - 1)
        return at, self._keys[at] == digests


def digests_of(keys: Iterable[str]) -> Digests:
    """What keys are told apart by in memory: the first half of each SHA-256, (n,) of 16 bytes."""
    packed = bytearray()
    for key in keys:
        packed += bytes.fromhex(key[:32])
    return np.frombuffer(packed, "S16")
