"""The protection trained by One for All, and its safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.clusters.clustering import Clustering
from pipeline.deltas.artefact import artefact_to_bytes, check_epsilon, check_network, check_same_surrogate
from pipeline.deltas.universal.generator import UniversalGenerator
from pipeline.deltas.universal.shape import BOUNDS, STRIDE, Bound
from pipeline.errors import PromiseError
from pipeline.hashing import sha256
from pipeline.settings import NO_BOUND

METHOD = "one-for-all"
_FIELDS = ("surrogate_id", "epsilon", "bound", "side", "width", "blocks", "fingerprint", "licence", "figures")


@dataclass(frozen=True, eq=False)
class UniversalProtection:
    """Everything needed to protect any image: the generator, and the identity of its surrogate.

    surrogate_id  of the encoder that the generator was trained with: name, digest of the weights, preprocessing
    epsilon       bound on |delta|, pixel units
    bound         how the generator's output is kept within epsilon
    side          of the images that the generator sees, pixels
    weights       float32 arrays of the generator by name, including running statistics
    clustering    of the training images' embeddings; an image far from all centroids is unlike any of them
    figures       measurements from training, as JSON (report only)
    """

    surrogate_id: str
    epsilon: float
    bound: Bound
    side: int
    width: int
    blocks: int
    weights: Mapping[str, NDArray[Any]]
    clustering: Clustering
    fingerprint: str
    licence: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)

    method = METHOD
    generator = "universal"
    per_sample = needs_pixels = True
    needs_key = False
    sample = None
    targets = ()  # images are not moved to another cluster

    def with_key(self, key: bytes) -> UniversalProtection:
        """Returns itself, as there is no secret."""
        return self

    def delta_for(self, cluster: int, key: str, height: int, width: int) -> NDArray[np.int16]:
        """Raises PromiseError: every delta depends on the image."""
        raise PromiseError(f"sample {key}: its delta depends on its pixels")

    def check_surrogate(self, surrogate_id: str) -> None:
        """Raise ConflictError unless this is the surrogate that the generator was trained with."""
        check_same_surrogate(self.surrogate_id, surrogate_id)

    def to_bytes(self) -> bytes:
        """One safetensors file; equal protections give equal bytes."""
        header = {name: getattr(self, name) for name in _FIELDS} | {"method": METHOD, "figures": dict(self.figures)}
        tensors = {f"clustering.{name}": array for name, array in self.clustering.to_tensors().items()}
        tensors |= {f"generator.{name}": array for name, array in self.weights.items()}
        return artefact_to_bytes(header, tensors)

    @cached_property
    def sha256(self) -> str:
        """Digest of the file."""
        return sha256(self.to_bytes())

    @classmethod
    def from_parts(cls, header: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> UniversalProtection:
        """The inverse of `to_bytes`. Raises KeyError, ValueError or TypeError for anything else."""

        def under(prefix: str) -> dict[str, NDArray[Any]]:
            return {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}

        made = cls(
            **{name: header[name] for name in _FIELDS},
            weights=under("generator."),
            clustering=Clustering.from_tensors(under("clustering.")),
        )
        check_epsilon(made.epsilon)
        for name in ("side", "width", "blocks"):
            if type(getattr(made, name)) is not int or getattr(made, name) < 1:
                raise ValueError(f"{name} {getattr(made, name)!r}")
        if made.side % STRIDE or made.bound not in BOUNDS or made.epsilon == NO_BOUND:
            raise ValueError(f"side {made.side}, bound {made.bound!r}, epsilon {made.epsilon:g}")
        dimension = made.clustering.feature_means.shape[1]
        check_network(made.weights, lambda: UniversalGenerator(dimension, width=made.width, blocks=made.blocks))
        return made
