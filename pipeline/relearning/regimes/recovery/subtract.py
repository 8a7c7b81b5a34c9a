"""The informed adversary: estimates each group's delta from the protected images and subtracts it before training.

This adversary knows how such protections are made, but not the deltas, centroids or surrogate.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.measures.removal import Pixels, blind_groups, estimate_deltas, split_half_agreement
from pipeline.relearning.regimes.base import Knowledge
from pipeline.relearning.training import Regime

Groups = Literal["label", "blind", "either"]


class SubtractEstimate(Regime):
    """Subtract estimate (c) of `pipeline.measures.removal` from each group of training images.

    groups   label: the adversary's own class labels; blind: groups found in the pixels; either: whichever grouping's
             estimates agree better between two halves of the images, which needs only the protected images
    known    the number of groups for the blind search, and the bound on what is subtracted
    """

    def __init__(self, groups: Groups, known: Knowledge) -> None:
        self.name = "subtract" if groups == "either" else f"subtract-{groups}"
        self.groups = groups
        self.known = known

    def prepare(self, images: Tensor, labels: Tensor, *, seed: int) -> Tensor:
        pixels = images.cpu().numpy().copy()  # leave the caller's images unchanged
        group_ids = self._group(pixels, labels.cpu().numpy(), seed)
        estimate = estimate_deltas(pixels, group_ids, epsilon=self.known.epsilon)["iterated"]
        for group, delta in enumerate(estimate):
            members = group_ids == group
            pixels[members] = np.rint(pixels[members] - delta).clip(0, 255).astype(np.uint8)
        return torch.from_numpy(pixels).to(images.device)

    def _group(self, pixels: Pixels, labels: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
        if self.groups == "label":
            return labels
        blind = blind_groups(pixels, self.known.num_groups or int(labels.max()) + 1, seed=seed)
        if self.groups == "blind":
            return blind
        by_label = split_half_agreement(pixels, labels, epsilon=self.known.epsilon, seed=seed)
        by_pixels = split_half_agreement(pixels, blind, epsilon=self.known.epsilon, seed=seed)
        return blind if by_pixels >= by_label else labels
