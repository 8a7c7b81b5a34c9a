"""Deltas that were computed elsewhere, by the keys of the samples: anybody's method can be judged with them."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from pipeline.deltas.delta import levels_of
from pipeline.deltas.keyed import KeyedDeltas
from pipeline.errors import InputError, one_line
from pipeline.hashing import canonical, sha256, sha256_of
from pipeline.surrogates.features import Assignment

_ENDING = ".npy"
_UNREADABLE = (OSError, EOFError, ValueError, TypeError, zlib.error, zipfile.BadZipFile, SafetensorError)


class GivenDeltas:
    """An .npz or .safetensors file with an array for each key, or a folder with KEY.npy; read array by array.

    path  on this machine
    Arrays are whole 8-bit levels, integers [3, H, W], all of one shape. Raises InputError for anything else.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        if not self.path.is_dir() and (not self.path.is_file() or self.path.suffix not in (".npz", ".safetensors")):
            raise InputError(f"--deltas {path} is no .npz or .safetensors file and no folder of {_ENDING} files")
        self._shape: tuple[int, ...] | None = None

    @cached_property
    def sha256(self) -> str:
        """Digest of the file, or over names and digests of the folder's files."""
        if not self.path.is_dir():
            return sha256_of(self.path)
        return sha256(canonical([[key, sha256_of(self._file(key))] for key in self.keys]))

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Sorted."""
        if self.path.is_dir():
            found = self.path.rglob(f"*{_ENDING}")
            return tuple(sorted(str(file.relative_to(self.path))[: -len(_ENDING)] for file in found))
        return tuple(sorted(self._opened[0]))

    def check(self, epsilon: float) -> None:
        """Read all of them once. Raises InputError, naming the key, if one exceeds the bound, is 0 or unusable."""
        if not self.keys:
            raise InputError(f"--deltas {self.path} holds no deltas")
        changes = [(int(np.abs(self._levels(key)).max(initial=0)), key) for key in self.keys]
        (least, idle), (largest, at) = min(changes), max(changes)
        if least == 0:
            where = f"--deltas {self.path}: the delta of {idle}"
            raise InputError(f"{where} is 0 everywhere: the image would be left unprotected")
        if largest > levels_of(epsilon):
            raise InputError(
                f"--deltas {self.path}: the delta of {at} has {largest} levels, --epsilon allows {levels_of(epsilon)}: "
                f"give the true bound, --epsilon {largest if largest <= 127 else 255}/255"
            )

    def of(self, assignment: Assignment, epsilon: float) -> KeyedDeltas:
        """The deltas of a shard's samples. Raises InputError if one has none: it would be left without protection."""
        missing = sorted(set(assignment.keys) - self._known)
        if missing:
            raise InputError(
                f"--deltas {self.path}: {len(missing):,} of {len(assignment.keys):,} images of {assignment.shard} have "
                f"no delta, e.g. {missing[0]}"
            )
        return KeyedDeltas(assignment.keys, np.stack([self._levels(key) for key in assignment.keys]), epsilon)

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.keys)

    @cached_property
    def _opened(self) -> tuple[list[str], Callable[[str], NDArray[Any]]]:
        """The names of the arrays, and what reads one of them."""
        try:
            if self.path.suffix == ".safetensors":
                tensors = safe_open(self.path, framework="numpy")
                return list(tensors.keys()), tensors.get_tensor  # type: ignore[no-untyped-call]
            arrays = np.load(self.path, allow_pickle=False)
            if not isinstance(arrays, np.lib.npyio.NpzFile):
                raise ValueError("it is a single array, not an .npz file")
            return arrays.files, arrays.__getitem__
        except _UNREADABLE as error:
            raise InputError(f"--deltas {self.path} cannot be read: {one_line(error)}") from None

    def _file(self, key: str) -> Path:
        return self.path / f"{key}{_ENDING}"

    def _levels(self, key: str) -> NDArray[np.int16]:
        try:
            levels = np.load(self._file(key), allow_pickle=False) if self.path.is_dir() else self._opened[1](key)
        except _UNREADABLE as error:
            raise InputError(f"--deltas {self.path}: {key} cannot be read: {one_line(error)}") from None
        self._shape = self._shape or levels.shape
        fits = levels.ndim == 3 and levels.shape[0] == 3 and levels.shape == self._shape
        if not fits or levels.dtype.kind not in "iu" or np.abs(levels.astype(np.int64)).max(initial=0) > 255:
            raise InputError(
                f"--deltas {self.path}: {key} is {levels.dtype} {levels.shape}; deltas are whole 8-bit levels, "
                "integers [3, H, W], all of one shape"
            )
        whole: NDArray[np.int16] = levels.astype(np.int16)
        return whole
