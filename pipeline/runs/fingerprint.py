"""The fingerprint of a run: everything that decides its output bytes, and the digest of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.hashing import FORMAT_VERSION, canonical, library_versions, sha256
from pipeline.records import Shard
from pipeline.settings import Settings


@dataclass(frozen=True)
class Ingredients:
    """Everything that decides output bytes: runs with equal ingredients write equal shards."""

    settings: Mapping[str, Any]
    listing_sha256: str
    weights_sha256: str  # of the surrogate
    protection_sha256: str | None  # of an existing protection that is applied instead of fitting one
    key_sha256: str | None  # of the secret for --generator texture
    device: str  # device class: "cpu" or "cuda"
    versions: Mapping[str, str]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all of it."""
        return sha256(canonical([FORMAT_VERSION, asdict(self)]))


def ingredients_of(
    settings: Settings,
    shards: Iterable[Shard],
    *,
    weights_sha256: str,
    protection_sha256: str | None = None,
    key_sha256: str | None = None,
) -> Ingredients:
    """Collect what decides the output bytes of a run over `shards` with `settings`."""
    listing = [[shard.name, shard.size, shard.etag] for shard in shards]
    return Ingredients(
        settings=settings.deciding,
        listing_sha256=sha256(canonical(listing)),
        weights_sha256=weights_sha256,
        protection_sha256=protection_sha256,
        key_sha256=key_sha256,
        device="cuda" if settings.gpus_per_worker else "cpu",
        versions=library_versions(),
    )
