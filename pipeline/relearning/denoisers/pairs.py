"""What a denoiser is trained on: pairs from two collections that share keys, or clean pictures alone."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.hashing import sha256
from pipeline.relearning.alignment import check_aligned
from pipeline.relearning.collection import Collection
from pipeline.relearning.denoisers.denoiser import DenoiserRecipe
from pipeline.shards.photographs import train_squares

_MOST_SHARED = 0.01  # share of --pairs: blank pictures may coincide by chance

Pictures = NDArray[np.uint8]  # [n, 3, S, S]


def pair_up(clean: Collection, protected: Collection) -> tuple[Pictures, Pictures]:
    """Clean and protected pictures of --pairs, aligned by key.

    Raises InputError for a copy without an original, and if the two do not show the same part of the pictures.
    """
    rows = {key: row for row, key in enumerate(clean.keys)}
    unknown = [key for key in protected.keys if key not in rows]
    if unknown:
        raise InputError(
            f"--pairs: {len(unknown):,} keys of the protected copies are not among the originals, e.g. {unknown[0]}"
        )
    matches = np.array([rows[key] for key in protected.keys], np.int64)
    check_aligned(protected.images, clean.images, matches, protected.keys, "--pairs")
    return clean.images[matches], protected.images


def check_other_pictures(pairs: Pictures, *collections: Collection) -> None:
    """Raise InputError if originals of --pairs are being evaluated: with those, an adversary needs no pairs."""
    evaluated = {_digest(image) for collection in collections for image in collection.images}
    shared = sum(_digest(image) in evaluated for image in pairs)
    if shared > _MOST_SHARED * len(pairs):
        raise InputError(
            f"--pairs: {shared:,} of its {len(pairs):,} originals are in --clean or --test; use other pictures, "
            "or leaked-pairs:N for an adversary who has some of these"
        )


def training_data(
    side: int, pairs: tuple[Pictures, Pictures] | None, *, is_noise: bool
) -> tuple[Pictures, Pictures | None]:
    """Clean pictures and their protected copies; with `is_noise`, clean pictures only (by default the demo's).

    When the demo collection itself is evaluated, the denoiser has therefore seen its training images.
    """
    if pairs is None:
        assert is_noise, "without pairs there is only noise"
        return train_squares(side, seed=0), None
    return (pairs[0], None) if is_noise else pairs


def denoiser_digest(
    clean: Pictures, protected: Pictures | None, recipe: DenoiserRecipe, seed: int, noise: str = "noise"
) -> str:
    """Digest of everything that determines a denoiser; `noise` names what it is trained on in place of pairs."""
    parts = [recipe.digest(), str(seed), _digest(clean), noise if protected is None else _digest(protected)]
    return sha256("\n".join(parts).encode())


def _digest(pixels: Pictures) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()
