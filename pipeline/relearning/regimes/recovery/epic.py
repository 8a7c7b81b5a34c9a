"""Effective poison identification: leave out images whose gradients lie alone.

Yang, Liu and Mirzasoleiman, Not All Poisons are Created Equal (ICML 2022), with the settings of their code for 16/255.
Their code chooses medoids among all images each time, ours among those that are left.
"""

from __future__ import annotations

import heapq
import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from torch import Tensor

from pipeline.relearning.training import TEST_BATCH, Regime, Training

EVERY = 5 / 40  # of the epochs; none is left out in the last eighth of them
MEDOIDS = 0.1  # of the images of each label
BLOCK = 8_192  # images of one label whose distances are held at a time: 768 MiB while they are made, 256 MiB after


class IsolatedDropped(Regime):
    """After every eighth of the epochs, drop the training images that are medoids of nobody but themselves.

    The medoids of a label's gradients of the loss by the class scores are chosen greedily, and every image belongs to
    the nearest. Images that are dropped do not return.
    """

    name = "epic"

    def __init__(self) -> None:
        self._kept: Tensor | None = None  # rows of the images that training began with

    def begin_epoch(self, training: Training, epoch: int) -> None:
        if self._kept is not None and len(self._kept) < len(training.images):  # training was resumed
            training.keep(self._kept)
        every, epochs = max(1, round(EVERY * training.recipe.epochs)), training.recipe.epochs
        if epoch == 0 or epoch % every or epoch > (1 - EVERY) * epochs:
            return
        stay = torch.from_numpy(~is_isolated(score_gradients(training), training.labels.cpu().numpy())).nonzero()[:, 0]
        training.keep(stay)
        self._kept = training.rows

    def end_epoch(self, training: Training, epoch: int) -> dict[str, float]:
        return {"images_kept": float(len(training.images))}

    def state(self) -> dict[str, Tensor]:
        return {} if self._kept is None else {"kept": self._kept}

    def load(self, state: dict[str, Tensor]) -> None:
        self._kept = state.get("kept")


@torch.no_grad()
def score_gradients(training: Training) -> NDArray[np.float32]:
    """Gradient of each training image's cross entropy by its class scores, [n, classes]: probabilities less truth."""
    training.network.eval()
    parts = []
    for at in range(0, len(training.images), TEST_BATCH):
        images = training.central(training.images[at : at + TEST_BATCH]).float().div_(255)
        gradients = training.scores(images).softmax(1)
        rows = torch.arange(len(gradients), device=gradients.device)
        gradients[rows, training.labels[at : at + TEST_BATCH]] -= 1
        parts.append(gradients.cpu())
    return torch.cat(parts).numpy()


def is_isolated(gradients: NDArray[np.float32], labels: NDArray[np.int64], share: float = MEDOIDS) -> NDArray[np.bool_]:
    """Whether each point, of [n, d], is the only one of its medoid; bool [n].

    share  of medoids among the points of each label
    """
    isolated = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        for block in np.array_split(rows, math.ceil(len(rows) / BLOCK)):
            distances = cdist(gradients[block], gradients[block]).astype(np.float32)
            medoids = choose_medoids(distances, math.ceil(share * len(block)))
            nearest = distances[:, medoids].argmin(1)
            alone = np.bincount(nearest, minlength=len(medoids)) == 1
            isolated[block] = alone[nearest]
    return isolated


def choose_medoids(distances: NDArray[np.float32], count: int) -> list[int]:
    """`count` points, each the one that most reduces the sum of all points' distances to the nearest chosen one.

    distances  [n, n]
    A gain only shrinks as others are chosen, so old gains are upper bounds (lazy greedy, Minoux 1978).
    """
    nearness = distances.max() - distances
    best = np.zeros(len(distances), np.float32)
    bounds = [(-float(gain), point) for point, gain in enumerate(nearness.sum(0, dtype=np.float64))]
    heapq.heapify(bounds)
    chosen: list[int] = []
    while len(chosen) < count:
        _, point = heapq.heappop(bounds)
        gain = float(np.maximum(nearness[:, point] - best, 0).sum(dtype=np.float64))
        if bounds and -gain > bounds[0][0]:
            heapq.heappush(bounds, (-gain, point))
            continue
        chosen.append(point)
        best = np.maximum(best, nearness[:, point])
    return chosen
