"""Deltas that are looked up by the keys of the samples, and their file: one for each shard."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from pipeline.deltas.delta import lay
from pipeline.errors import PromiseError, unreadable

_KEYS = "keys"


class KeyedDeltas:
    """The delta of every sample of a shard.

    keys     [n]
    levels   int8 or int16 [n, 3, S, S], whole 8-bit levels
    epsilon  bound on |delta|, pixel units
    """

    per_sample = True

    def __init__(self, keys: Sequence[str], levels: NDArray[np.int8] | NDArray[np.int16], epsilon: float) -> None:
        if len(keys) != len(levels):
            raise ValueError(f"{len(keys)} keys, but {len(levels)} deltas")
        self.keys, self.levels, self.epsilon = tuple(keys), levels, epsilon

    @classmethod
    def none(cls, epsilon: float) -> KeyedDeltas:
        """Those of a shard of which no sample can be protected."""
        return cls((), np.zeros((0, 3, 1, 1), np.int8), epsilon)

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {key: row for row, key in enumerate(self.keys)}

    def delta_for(self, cluster: int, key: str, height: int, width: int) -> NDArray[np.int16]:
        """int16 [height, width, 3], whole 8-bit levels. Raises PromiseError for a key that has no delta."""
        if key not in self._rows:
            raise PromiseError(f"sample {key} has no delta of its own")
        return lay(self.levels[self._rows[key]], height, width, self.epsilon)

    def to_bytes(self) -> bytes:
        """One safetensors file, 8 bits a level where they are enough; equal deltas give equal bytes."""
        largest = max(int(self.levels.max(initial=0)), -int(self.levels.min(initial=0)))
        levels = np.ascontiguousarray(self.levels, np.int8 if largest <= 127 else np.int16)
        return save({"levels": levels}, metadata={_KEYS: json.dumps(self.keys)})

    @classmethod
    def from_bytes(cls, data: bytes, epsilon: float, where: str) -> KeyedDeltas:
        """The inverse of `to_bytes`. Raises InputError, naming `where`, for anything that it did not write."""
        try:
            length = int.from_bytes(data[:8], "little")
            keys = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_KEYS])
            return cls(keys, load(data)["levels"], epsilon)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise unreadable(where, error) from None
