"""The informed adversary: reads each group's delta off the protected images and subtracts it before training.

It knows how such protections are made, but no delta, no centroid and no surrogate.
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
    """Estimate (c) of `pipeline.measures.removal`, per group of training images, subtracted from them.

    groups   label: the adversary's own class labels; blind: found in the pixels; either: whichever gives estimates
             that agree better between two halves of the images, which needs nothing but the protected images
    known    how many groups the blind search looks for, and the bound of what is subtracted
    """

    def __init__(self, groups: Groups, known: Knowledge) -> None:
        self.name = "subtract" if groups == "either" else f"subtract-{groups}"
        self.groups = groups
        self.known = known

    def prepare(self, images: Tensor, labels: Tensor, *, seed: int) -> Tensor:
        pixels = images.cpu().numpy().copy()  # the caller's images stay as they are
        group_ids = self._group(pixels, labels.cpu().numpy(), seed)
        estimate = estimate_deltas(pixels, group_ids, epsilon=self.known.epsilon)["iterated"]
        for group, delta in enumerate(estimate):
            members = group_ids == group
            pixels[members] = np.rint(pixels[members] - delta).clip(0, 255).astype(np.uint8)
        return torch.from_numpy(pixels).to(images.device)

    def _group(self, pixels: Pixels, labels: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
        if self.groups == "label":
            return labels
        found = blind_groups(pixels, self.known.num_groups or int(labels.max()) + 1, seed=seed)
        if self.groups == "blind":
            return found
        by_label = split_half_agreement(pixels, labels, epsilon=self.known.epsilon, seed=seed)
        by_pixels = split_half_agreement(pixels, found, epsilon=self.known.epsilon, seed=seed)
        return found if by_pixels >= by_label else labels
