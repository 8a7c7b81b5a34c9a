"""Canonical bytes -> SHA-256, and named randomness: (seed, purpose, index) -> generator."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode
# of output bytes; since 2, stored layout, transparency and colour metadata are kept; since 3, a JPEG's coding; since 4,
# proxies and the steps through them compute in bfloat16 where a processor has instructions for it; since 5, the network
# of --generator distilled sums in an order that no number of threads changes
FORMAT_VERSION = 5
_DECIDE_BYTES = (
    "pillow",
    "opencv-python-headless",
    "simplejpeg",
    "numpy",
    "torch",
    "torchvision",
    "timm",
    "open_clip_torch",
    "scikit-learn",
)


def sha256(data: bytes) -> str:
    """Hex digest of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal values give equal bytes."""
    return _CANONICAL(value).encode()


def derive(seed: int, purpose: str, *index: object) -> int:
    """A 63-bit seed that depends only on (seed, purpose, index)."""
    digest = hashlib.sha256(canonical([seed, purpose, [str(part) for part in index]])).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def numpy_rng(seed: int, purpose: str, *index: object) -> np.random.Generator:
    """NumPy generator for one named draw."""
    import numpy as np  # imported here, like torch and Pillow below: settings and options need only digests

    return np.random.default_rng(derive(seed, purpose, *index))


def torch_rng(seed: int, purpose: str, *index: object) -> torch.Generator:
    """torch generator for one named draw; on the CPU, so that every device draws the same numbers."""
    import torch

    return torch.Generator().manual_seed(derive(seed, purpose, *index))


def hash_sample(keys: Iterable[str], count: int, seed: int, purpose: str) -> list[int]:
    """Indices, ascending, of the `count` keys with the smallest hashes.

    The choice depends on (seed, purpose) and the keys, not on their order.
    """
    ranked = sorted((derive(seed, purpose, key), index) for index, key in enumerate(keys))
    return sorted(index for _, index in ranked[:count])


def in_sample(share: float, seed: int, purpose: str, *index: object) -> bool:
    """True for about `share` of all `index` values, independent of the order in which they are tested."""
    return derive(seed, purpose, *index) < share * 2.0**63


def library_versions() -> dict[str, str]:
    """Versions of everything that can change an output byte."""
    from importlib.metadata import version

    versions = {name: version(name) for name in _DECIDE_BYTES}
    versions["python"] = ".".join(platform.python_version_tuple()[:2])
    return versions | codec_versions()


def codec_versions() -> dict[str, str]:
    """Versions of what encodes images."""
    from PIL import __version__, features

    codecs = {codec: str(features.version_codec(codec)) for codec in ("jpg", "zlib")}
    return {"pillow": __version__, **codecs, "webp": str(features.version_module("webp"))}
