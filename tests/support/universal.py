"""Universal protections for tests: nothing was trained, all of it is real."""

from __future__ import annotations

import numpy as np

from pipeline.clusters.clustering import Clustering, ClusterSpace
from pipeline.deltas.universal.generator import UniversalGenerator
from pipeline.deltas.universal.protection import UniversalProtection
from pipeline.surrogates.surrogate import Surrogate


def untrained(surrogate: Surrogate, *, side: int = 64, width: int = 8, blocks: int = 1) -> UniversalProtection:
    """A generator with random weights, large enough to change pixels, within 8/255."""
    generator = UniversalGenerator(surrogate.dimension, width=width, blocks=blocks)
    generator.up[-1].weight.data.mul_(100)  # untrained, its deltas are less than half a level
    zeros = np.zeros((2, surrogate.dimension), np.float32)
    return UniversalProtection(
        surrogate_id=surrogate.id,
        epsilon=8 / 255,
        bound="eps_tanh",
        side=side,
        width=width,
        blocks=blocks,
        weights={name: tensor.detach().numpy() for name, tensor in generator.state_dict().items()},
        clustering=Clustering(ClusterSpace(), zeros, zeros, np.ones(2, np.float32)),
        fingerprint="f" * 64,
    )
