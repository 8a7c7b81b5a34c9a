"""Which part of a collection is protected: a share of its samples or of its classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.errors import SettingsError
from pipeline.hashing import hash_sample
from pipeline.settings import near_matches

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

_KINDS = ["samples", "classes"]


def parse_share(text: str) -> tuple[str, float]:
    """'samples:0.5' or 'classes:0.5' -> kind and share, in (0, 1]. Raises SettingsError."""
    kind, _, number = text.partition(":")
    if kind not in _KINDS:
        raise SettingsError(f"--shares {text!r} is neither samples:SHARE nor classes:SHARE{near_matches(kind, _KINDS)}")
    try:
        share = float(number)
    except ValueError:
        share = float("nan")
    if not 0 < share <= 1:
        raise SettingsError(f"--shares {text!r}: {number!r} is not a number above 0 and at most 1, as in {kind}:0.5")
    return kind, share


def protected_mask(share: str, keys: Sequence[str], labels: ArrayLike, *, seed: int) -> NDArray[np.bool_]:
    """True for the samples that are protected, bool [n].

    share   samples:0.5 for half of the keys, or classes:0.5 for all samples of half of the classes that occur
    keys    of the samples, [n]
    labels  of the samples, integers [n]

    The choice depends only on the seed and on the key or class: a larger share contains every smaller one of the same
    kind and seed. Raises SettingsError for an invalid share, or one that rounds to no or all samples or classes.
    """
    import numpy as np  # here: options name shares without it

    kind, part = parse_share(share)
    classes = np.asarray(labels)
    if classes.shape != (len(keys),):
        raise ValueError(f"{len(keys)} keys, but labels {classes.shape}")
    if kind == "samples":
        chosen = _choose(share, part, list(keys), seed)
        return np.isin(np.arange(len(keys)), chosen)
    present = np.unique(classes)
    chosen = _choose(share, part, [str(label) for label in present], seed)
    return np.isin(classes, present[chosen])


def _choose(share: str, part: float, names: list[str], seed: int) -> list[int]:
    """Indices of that share of the names: at least one, and not all unless the share is 1."""
    count = round(part * len(names))
    if count == 0 or (count == len(names) and part < 1):
        kind, _, _ = share.partition(":")
        rounded = "none" if count == 0 else "all"
        raise SettingsError(f"share {share}: of {len(names)} {kind} this rounds to {rounded}; choose another share")
    return hash_sample(names, count, seed, "protected share")
