"""How far finished deltas move images, and the settings that make fits reproducible bit by bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from pipeline.deltas.delta import levels_of, perturb
from pipeline.fitting.fit import FittedDeltas
from pipeline.fitting.objective import is_moved

_EVALUATION_BATCH = 256


def embed_all(embed: Callable[[Tensor], Tensor], pixels: Tensor, levels: Tensor | None, clusters: Tensor) -> Tensor:
    """Features of uint8 pixels, clean or with their cluster's delta in whole levels [k, 3, S, S]."""
    features = []
    with torch.no_grad():
        for start in range(0, len(pixels), _EVALUATION_BATCH):
            batch = slice(start, start + _EVALUATION_BATCH)
            images = pixels[batch].float() / 255
            if levels is not None:
                images = perturb(images, levels.to(images.device)[clusters[batch]].float() / 255)
            features.append(embed(images.contiguous(memory_format=torch.channels_last)))
    return torch.cat(features) if features else torch.zeros(0, 1, device=pixels.device)


def moved_shares(features: Tensor, centroids: Tensor, targets: Tensor, clusters: Tensor) -> Tensor:
    """Share of each cluster's images nearest to its target's centroid, [p]; nan without images."""
    num_clusters = len(centroids)
    counts = torch.bincount(clusters, minlength=num_clusters).cpu()
    if len(features) == 0:
        return torch.full((num_clusters,), math.nan)
    moved = is_moved(features, centroids, targets[clusters])
    return torch.bincount(clusters[moved], minlength=num_clusters).cpu() / counts  # 0 / 0 is nan


def reproducible() -> AbstractContextManager[None]:
    """Only deterministic cuDNN algorithms, not chosen by timing: a resumed fit must be bit-identical."""
    flags: AbstractContextManager[None] = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
    return flags


def with_figures(
    clusters: Sequence[int],
    targets: Sequence[int],
    levels: Tensor,
    losses: Tensor,
    shares: Sequence[Tensor],
    epsilon: float,
    extra: Mapping[str, Tensor],
) -> FittedDeltas:
    """Finished deltas and their figures.

    levels  int8 [k, 3, S, S]; losses float32 [k, steps]
    shares  of the images that were moved, float32 [k]: with their deltas, and clean
    """
    values = levels.float()
    return FittedDeltas(
        clusters=tuple(clusters),
        targets=tuple(targets),
        levels=levels,
        losses=losses.clone(),
        moved=shares[0],
        before=shares[1],
        rms=values.square().mean((1, 2, 3)).sqrt(),
        clamped=(values.abs() >= levels_of(epsilon)).float().mean((1, 2, 3)),
        extra=extra,
    )
