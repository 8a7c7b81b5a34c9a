"""What every maker of single images' deltas shares: batches of one size, so that results are equal to the bit."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SIDES = range(8, 4097, 2)  # of deltas, pixels
BATCH = {"cpu": 16, "cuda": 512}  # images per batch: always exactly this many, so that results are equal to the bit
_KINDS = {"plain": bool, "flat_share": float}  # of the fields of a generator; the others are int


def check_header(header: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError unless these can be the fields of a generator."""
    for name, value in header.items():
        if type(value) is not _KINDS.get(name, int):
            raise TypeError(f"{name} is {value!r}")
    if header["side"] not in SIDES or header.get("steps", 1) < 1:
        raise ValueError(f"deltas of {header['side']} px in {header.get('steps', 1)} steps")
    if not 0 < header["flat_share"] <= 1:
        raise ValueError(f"flat_share {header['flat_share']}")


class DeltaMaker(abc.ABC):
    """Makes deltas on one device, batch by batch; the last batch is filled up with copies.

    targets  the target cluster of each cluster
    epsilon  bound on |delta|, pixel units
    """

    def __init__(self, targets: Sequence[int], epsilon: float, device: torch.device | str) -> None:
        self._epsilon, self._device = epsilon, torch.device(device)
        self._size = BATCH[self._device.type]
        self._targets = torch.tensor(targets, device=device)

    def levels(self, squares: NDArray[np.uint8], clusters: Sequence[int], keys: Sequence[str]) -> NDArray[np.int8]:
        """Whole 8-bit levels int8 [n, 3, S, S] within epsilon.

        squares  uint8 [n, S, S, 3]
        A row depends only on its own square, cluster and key, to the bit, because batches always have the same size.
        Raises PromiseError if a loss is not finite.
        """
        return self.levels_and_losses(squares, clusters, keys)[0]

    def levels_and_losses(
        self, squares: NDArray[np.uint8], clusters: Sequence[int], keys: Sequence[str]
    ) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """The levels, and the loss at every step float32 [n, steps]; no columns if there are no steps."""
        batches = []
        for at in range(0, len(squares), self._size):
            real = squares[at : at + self._size]
            missing = self._size - len(real)
            padded = np.concatenate([real, np.repeat(real[-1:], missing, axis=0)])
            padded_clusters, padded_keys = [*clusters[at : at + self._size]], [*keys[at : at + self._size]]
            images = torch.from_numpy(padded).to(self._device).permute(0, 3, 1, 2).float().div_(255)
            aims = self._targets[torch.tensor(padded_clusters + padded_clusters[-1:] * missing, device=self._device)]
            made = self._batch(images, aims, padded_keys + padded_keys[-1:] * missing)
            batches.append([part[: len(real)] for part in made])
        return np.concatenate([levels for levels, _ in batches]), np.concatenate([losses for _, losses in batches])

    @abc.abstractmethod
    def _batch(self, images: Tensor, aims: Tensor, keys: Sequence[str]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """Levels and losses of exactly one batch: images float [B, 3, S, S] in [0, 1], target clusters int64 [B]."""
