"""The protection fitted to clusters, and its safetensors file. It gives the delta of each sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.clusters.clustering import Clustering
from pipeline.deltas.artefact import artefact_to_bytes, check_epsilon, check_same_surrogate
from pipeline.deltas.delta import lay, levels_of
from pipeline.deltas.samplewise.kinds import PER_PICTURE, PictureGenerator, generator_from
from pipeline.deltas.textures import Bands, bands_for, check_key
from pipeline.errors import ConflictError, PromiseError, SettingsError
from pipeline.hashing import sha256
from pipeline.settings import Generator, Size

Origin = Generator | Literal["keyed"]
_FIELDS = ("method", "generator", "surrogate_id", "epsilon", "key_sha256", "fingerprint", "licence", "size", "figures")


@dataclass(frozen=True, eq=False)
class Protection:
    """Everything needed to protect more images, except the secret key of a texture.

    surrogate_id  of the encoder that `clustering` belongs to: name, digest of the weights, preprocessing
    epsilon       bound on |delta|, pixel units
    targets       the target cluster of each cluster; () if images are not moved to another cluster
    levels        int8 [p, 3, S, S], whole 8-bit levels; None if every sample has a delta of its own: by a texture, by
                  `sample`, or `keyed`, in files of their own beside this one (see pipeline.deltas.keyed)
    sample        makes the delta of each image from the image itself (`sample`, `distilled`); None for other generators
    key_sha256    digest of a texture's secret key; None for other generators
    fingerprint   of the run that fitted it
    licence       one line: how the terms of the surrogate and the images affect this file
    figures       measurements from fitting, as JSON: moved, before, ... (report only)
    key           the secret, in memory only: never written or shown
    Raises ValueError if the parts are inconsistent.
    """

    method: str
    generator: Origin
    surrogate_id: str
    epsilon: float
    clustering: Clustering
    targets: tuple[int, ...]
    levels: NDArray[np.int8] | None
    fingerprint: str
    key_sha256: str | None = None
    licence: str = ""
    size: Size = "native"
    figures: Mapping[str, Any] = field(default_factory=dict)
    sample: PictureGenerator | None = None
    key: bytes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        num_clusters = len(self.clustering.centroids)
        is_aimed = self.method == "uc" or self.targets != ()
        if is_aimed and sorted(self.targets) != list(range(num_clusters)):
            raise ValueError(f"targets {self.targets} are not a permutation of {num_clusters} clusters")
        has = (self.key_sha256 is not None, self.sample is not None, self.levels is not None)
        if has != (self.generator == "texture", self.generator in PER_PICTURE, self.generator in ("direct", "network")):
            raise ValueError(f"generator {self.generator} does not match its parts (key, networks, levels): {has}")
        check_epsilon(self.epsilon)
        if self.sample is not None and self.sample.num_clusters != num_clusters:
            raise ValueError(f"networks of {self.sample.num_clusters} clusters, not {num_clusters}")
        if self.levels is None:
            return
        if self.levels.ndim != 4 or self.levels.shape[:2] != (num_clusters, 3) or self.levels.dtype != np.int8:
            raise ValueError(f"levels {self.levels.dtype} {self.levels.shape} do not fit {num_clusters} clusters")
        if np.abs(self.levels.astype(np.int16)).max() > levels_of(self.epsilon):
            raise ValueError(f"a delta exceeds the bound of {levels_of(self.epsilon)} levels")

    @property
    def per_sample(self) -> bool:
        """True if every sample has its own delta, so that caching it is pointless."""
        return self.levels is None

    @property
    def needs_key(self) -> bool:
        """True if `with_key` must be called before `delta_for`."""
        return self.key_sha256 is not None

    @property
    def needs_pixels(self) -> bool:
        """True if the delta cannot be told from cluster and key, so that delta_for raises PromiseError."""
        return self.sample is not None or self.generator == "keyed"

    def delta_for(self, cluster: int, key: str, height: int, width: int) -> NDArray[np.int16]:
        """The delta of the sample called `key`: int16 [height, width, 3], whole 8-bit levels within epsilon.

        Raises SettingsError if the secret key is needed but missing, PromiseError if there is no such cluster or if
        the delta depends on the image.
        """
        num_clusters = len(self.clustering.centroids)
        if not 0 <= cluster < num_clusters:
            raise PromiseError(f"sample {key}: cluster {cluster} does not exist; there are {num_clusters}")
        if self.needs_pixels:
            raise PromiseError(f"sample {key}: its delta depends on its pixels")
        if self.levels is None:
            return self._bands.levels(cluster, key, height, width, self.epsilon)
        return lay(self.levels[cluster], height, width, self.epsilon)

    @cached_property
    def _bands(self) -> Bands:
        if self.key is None:
            raise SettingsError("this protection needs the secret it was made with: add --key-file FILE")
        return bands_for(self.key, len(self.targets))

    def with_key(self, key: bytes) -> Protection:
        """The same protection with its secret key. Raises ConflictError if it was made with another key."""
        if check_key(key) != self.key_sha256:
            raise ConflictError(
                f"the key has digest {sha256(key)[:12]}, but the protection was made with "
                f"{(self.key_sha256 or 'none')[:12]}: give the --key-file of that run"
            )
        return replace(self, key=key)

    def check_surrogate(self, surrogate_id: str) -> None:
        """Raise ConflictError unless the centroids were computed from features of this surrogate."""
        check_same_surrogate(self.surrogate_id, surrogate_id)

    def to_bytes(self) -> bytes:
        """One safetensors file; equal protections give equal bytes. The secret key is not in it."""
        header = {name: getattr(self, name) for name in _FIELDS} | {"figures": dict(self.figures)}
        tensors = {f"clustering.{name}": array for name, array in self.clustering.to_tensors().items()}
        tensors["targets"] = np.array(self.targets, np.int64)
        if self.levels is not None:
            tensors["levels"] = self.levels
        if self.sample is not None:
            header["sample"] = self.sample.header()
            tensors |= self.sample.tensors()
        return artefact_to_bytes(header, tensors)

    @cached_property
    def sha256(self) -> str:
        """Digest of the file."""
        return sha256(self.to_bytes())

    @classmethod
    def from_parts(cls, header: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> Protection:
        """The inverse of `to_bytes`. Raises KeyError, ValueError or TypeError for anything else."""
        clustering = {n.removeprefix("clustering."): a for n, a in tensors.items() if n.startswith("clustering.")}
        return cls(
            **{name: header[name] for name in _FIELDS},
            clustering=Clustering.from_tensors(clustering),
            targets=tuple(tensors["targets"].tolist()),
            levels=tensors.get("levels"),
            sample=generator_from(header["generator"], header["sample"], tensors) if "sample" in header else None,
        )
