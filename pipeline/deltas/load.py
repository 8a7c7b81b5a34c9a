"""Load protection files of any kind, and the deltas that they give to new pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.clusters.clustering import Clustering
from pipeline.deltas.artefact import damaged, read_header, read_tensors
from pipeline.deltas.picture_deltas import NearestDeltas, PictureDeltas, SampleDeltas
from pipeline.deltas.protection import Protection
from pipeline.deltas.samplewise.kinds import PictureGenerator
from pipeline.deltas.universal.deltas import UniversalDeltas
from pipeline.deltas.universal.protection import METHOD, UniversalProtection
from pipeline.errors import InputError
from pipeline.settings import SmallImages
from pipeline.surrogates.surrogate import Surrogate

_P = TypeVar("_P", Protection, UniversalProtection)


class AnyProtection(Protocol):
    """Common interface of all protections; the fields are explained in Protection."""

    @property
    def method(self) -> str: ...
    @property
    def generator(self) -> str: ...
    @property
    def surrogate_id(self) -> str: ...
    @property
    def epsilon(self) -> float: ...
    @property
    def clustering(self) -> Clustering: ...
    @property
    def targets(self) -> tuple[int, ...]: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def figures(self) -> Mapping[str, Any]: ...
    @property
    def per_sample(self) -> bool: ...
    @property
    def needs_pixels(self) -> bool: ...
    @property
    def needs_key(self) -> bool: ...
    @property
    def sample(self) -> PictureGenerator | None: ...
    @property
    def sha256(self) -> str: ...
    def with_key(self, key: bytes) -> AnyProtection: ...
    def check_surrogate(self, surrogate_id: str) -> None: ...
    def delta_for(self, cluster: int, key: str, height: int, width: int) -> NDArray[np.int16]: ...
    def to_bytes(self) -> bytes: ...


def load_protection(data: bytes) -> AnyProtection:
    """Load what `to_bytes` of any protection wrote.

    Raises InputError, one line, if `data` is truncated, not a protection, or of another format version.
    """
    if read_header(data).get("method") == METHOD:
        return load_universal_protection(data)
    return load_cluster_protection(data)


def load_cluster_protection(data: bytes) -> Protection:
    """As load_protection; raises InputError for a universal generator too."""
    if read_header(data).get("method") == METHOD:
        raise InputError("this is a universal generator, not cluster deltas")
    return _from_parts(Protection, data)


def load_universal_protection(data: bytes) -> UniversalProtection:
    """As load_protection; raises InputError for cluster deltas too."""
    if read_header(data).get("method") != METHOD:
        raise InputError("these are cluster deltas, not a universal generator")
    return _from_parts(UniversalProtection, data)


def _from_parts(kind: type[_P], data: bytes) -> _P:
    try:
        return kind.from_parts(read_header(data), read_tensors(data))
    except (KeyError, ValueError, TypeError) as error:
        raise damaged(error) from None


def deltas_of(
    data: bytes,
    surrogate: Surrogate | None,
    *,
    key: bytes | None = None,
    device: str = "cpu",
    small_images: SmallImages = "resize",
) -> PictureDeltas:
    """The deltas that a protection file gives to pictures that no stage has clustered.

    surrogate     the surrogate that the file names; None if every picture comes with its cluster
    key           secret of a texture protection
    small_images  how a universal generator sees pictures of at most 64 px
    Raises InputError for a damaged file, ConflictError if surrogate or key differ from those it was fitted with.
    """
    if surrogate is not None and read_header(data).get("method") == METHOD:
        return UniversalDeltas(load_universal_protection(data), surrogate, small_images=small_images)
    protection = load_cluster_protection(data)
    if protection.needs_pixels:
        return SampleDeltas(protection, surrogate, device)
    with_key = protection.with_key(key) if protection.needs_key and key is not None else protection
    return NearestDeltas(with_key, surrogate)
