"""The file format of all protections: one safetensors file whose JSON header names the surrogate."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from pipeline.errors import ConflictError, InputError, one_line
from pipeline.hashing import canonical
from pipeline.settings import LARGEST_EPSILON, NO_BOUND

if TYPE_CHECKING:
    from torch import nn

_ENTRY = "scumble"  # a single metadata entry, because the library writes several in no fixed order
_LENGTH_BYTES = 8
_FORMAT = 1  # version of the file format


def artefact_to_bytes(header: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> bytes:
    """The bytes of the file; equal contents give equal bytes. `header` must be JSON; the format version is added."""
    whole = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    return save(whole, metadata={_ENTRY: canonical({**header, "format_version": _FORMAT}).decode()})


def read_header(data: bytes) -> dict[str, Any]:
    """Read only the header of a whole file.

    Raises InputError if `data` is not a protection, is truncated or has another format version.
    """
    start = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
    try:
        entries = json.loads(data[_LENGTH_BYTES:start])
        metadata = entries.pop("__metadata__")
        size = start + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if size != len(data):
            raise ValueError(f"{len(data):,} of {size:,} bytes")
        header: dict[str, Any] = dict(json.loads(metadata[_ENTRY]))
        version = header.pop("format_version")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(error) from None
    if version != _FORMAT:
        raise InputError(f"the protection has format {version}, but this version of Scumble reads format {_FORMAT}")
    return header


def read_tensors(data: bytes) -> dict[str, NDArray[Any]]:
    """Read the arrays. Raises InputError if `data` is not a protection file or is truncated."""
    try:
        return dict(load(data))
    except (SafetensorError, ValueError) as error:
        raise damaged(error) from None


def check_epsilon(epsilon: float) -> None:
    """Raise ValueError for an epsilon that cannot change an 8-bit image, or is more than a delta may be."""
    if not isinstance(epsilon, float) or not (1 / 255 <= epsilon <= LARGEST_EPSILON or epsilon == NO_BOUND):
        raise ValueError(f"epsilon {epsilon} is not between 1/255 and 127/255")


def check_network(weights: Mapping[str, NDArray[Any]], make: Callable[[], nn.Module]) -> None:
    """Raise ValueError unless these are the weights, all finite, of the network that `make` makes."""
    import torch  # imported late: a header is read without it

    try:
        with torch.device("meta"):
            wanted = {name: tuple(value.shape) or (1,) for name, value in make().state_dict().items()}
    except RuntimeError as error:  # a network that cannot be
        raise ValueError(one_line(error)) from None
    found = {name: array.shape or (1,) for name, array in weights.items()}  # a file has no arrays without dimensions
    if found != wanted:
        name = min(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        raise ValueError(f"weights {name}: {found.get(name, 'none')}, not {wanted.get(name, 'any')}")
    for name, array in weights.items():
        if not np.isfinite(array).all():
            raise ValueError(f"weights {name} are not finite")


def damaged(error: Exception) -> InputError:
    """The error for a file that cannot be read."""
    reason = one_line(error, 120)
    return InputError(f"not a protection file, or truncated ({reason}); copy it again or fit a new one")


def named_surrogate(surrogate_id: str) -> tuple[str, int]:
    """Name and input size in pixels of the surrogate that a protection names. Raises InputError if it names none."""
    if not surrogate_id:
        raise InputError("the protection follows labels or keys: it serves only the images that it was made for")
    try:
        identity = json.loads(surrogate_id)
        return str(identity["name"]), int(identity["size"])
    except (ValueError, KeyError, TypeError):
        raise InputError(f"the protection names an unknown surrogate: {surrogate_id[:80]!r}") from None


def check_same_surrogate(named: str, given: str) -> None:
    """Raise ConflictError unless the `given` surrogate is the one that the protection names."""
    if given != named:
        raise ConflictError(
            f"the protection was fitted for surrogate {named}, not {given}: "
            "use the same --surrogate, --surrogate-weights and --surrogate-size"
        )
