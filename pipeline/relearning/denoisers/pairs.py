"""What a denoiser is trained on: pairs of two collections that share keys, or clean pictures alone."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.fingerprint import sha256
from pipeline.relearning.collection import Collection
from pipeline.relearning.denoisers.denoiser import DenoiserRecipe
from pipeline.shards.photographs import train_squares

_MOST_SHARED = 0.01  # of the pictures of --pairs: flat ones are equal to others by chance

Pictures = NDArray[np.uint8]  # [n, 3, S, S]


def pair_up(clean: Collection, protected: Collection) -> tuple[Pictures, Pictures]:
    """Clean and protected pictures of --pairs, row by row. Raises InputError for copies without an original."""
    rows = {key: row for row, key in enumerate(clean.keys)}
    unknown = [key for key in protected.keys if key not in rows]
    if unknown:
        raise InputError(
            f"--pairs: {len(unknown):,} keys of the protected copies are not among the originals, first {unknown[0]}"
        )
    return clean.images[[rows[key] for key in protected.keys]], protected.images


def check_other_pictures(pairs: Pictures, *collections: Collection) -> None:
    """Raise InputError if the originals of --pairs are pictures that are evaluated: who has those needs no pairs."""
    evaluated = {_digest(image) for one in collections for image in one.images}
    shared = sum(_digest(image) in evaluated for image in pairs)
    if shared > _MOST_SHARED * len(pairs):
        raise InputError(
            f"--pairs: {shared:,} of its {len(pairs):,} originals are in --clean or --test; give other pictures, "
            "or try leaked-pairs:N, the adversary who has some of these"
        )


def training_data(
    side: int, pairs: tuple[Pictures, Pictures] | None, *, is_noise: bool
) -> tuple[Pictures, Pictures | None]:
    """Clean pictures and their protected copies; with `is_noise` pictures alone, or photographs where there are none.

    The photographs are those of the demo: whoever evaluates that has denoised its training images before.
    """
    if pairs is None:
        assert is_noise, "who has no pairs has noise alone"
        return train_squares(side, seed=0), None
    return (pairs[0], None) if is_noise else pairs


def denoiser_digest(clean: Pictures, protected: Pictures | None, recipe: DenoiserRecipe, seed: int) -> str:
    """Digest of all that a denoiser is made of."""
    parts = [recipe.digest(), str(seed), _digest(clean), "noise" if protected is None else _digest(protected)]
    return sha256("\n".join(parts).encode())


def _digest(pixels: Pictures) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()
