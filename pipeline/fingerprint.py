"""Canonical bytes -> SHA-256, and named randomness: (seed, purpose, index) -> generator."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

FORMAT_VERSION = 2  # of output bytes: 2 keeps the stored layout, transparency and what says how to show the numbers
_DECIDE_BYTES = ("pillow", "numpy", "torch", "torchvision", "timm", "open_clip_torch", "scikit-learn")


def sha256(data: bytes) -> str:
    """Hex digest of `data`."""
    return hashlib.sha256(data).hexdigest()


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def derive(seed: int, purpose: str, *index: object) -> int:
    """A 63-bit seed that belongs to (seed, purpose, index) alone."""
    digest = hashlib.sha256(canonical([seed, purpose, [str(part) for part in index]])).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def numpy_rng(seed: int, purpose: str, *index: object) -> np.random.Generator:
    """numpy generator for one named draw."""
    import numpy as np  # here, as torch and Pillow below: settings and options need digests alone

    return np.random.default_rng(derive(seed, purpose, *index))


def torch_rng(seed: int, purpose: str, *index: object) -> torch.Generator:
    """CPU torch generator for one named draw; CPU, so that every device draws the same numbers."""
    import torch

    return torch.Generator().manual_seed(derive(seed, purpose, *index))


def hash_sample(keys: Iterable[str], count: int, seed: int, purpose: str) -> list[int]:
    """Indices, ascending, of `count` keys: those with the smallest hashes.

    Which keys are chosen depends on (seed, purpose) and the key, not on the order of the keys.
    """
    ranked = sorted((derive(seed, purpose, key), index) for index, key in enumerate(keys))
    return sorted(index for _, index in ranked[:count])


def in_sample(share: float, seed: int, purpose: str, *index: object) -> bool:
    """True for about `share` of all things that are named by `index`, whoever asks and in whatever order."""
    return derive(seed, purpose, *index) < share * 2.0**63


def library_versions() -> dict[str, str]:
    """Versions of everything whose version can change an output byte."""
    from importlib.metadata import version

    from PIL import features

    found = {name: version(name) for name in _DECIDE_BYTES}
    found["python"] = ".".join(platform.python_version_tuple()[:2])
    for codec in ("jpg", "zlib"):
        found[codec] = str(features.version_codec(codec))
    found["webp"] = str(features.version_module("webp"))
    return found
