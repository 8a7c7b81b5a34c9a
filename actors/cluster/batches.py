"""Columns of Ray Data <-> our records: the only place that knows column names. One row is one shard."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.profile import Work
from pipeline.records import Shard, images_from_json, images_to_json
from pipeline.settings import Settings
from pipeline.storage.store import Store

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class RunContext:
    """What every actor of a run needs: where to read and write, and the settings."""

    source: Store
    output: Store
    settings: Settings
    fingerprint: str
    threads: int
    device: str


class Secret:
    """A key on its way to an actor. Ray may log the arguments of actors, so this one has a repr that shows nothing."""

    def __init__(self, key: bytes | None = None) -> None:
        self.key = key

    def __repr__(self) -> str:
        return "Secret()"


@dataclass(frozen=True)
class ShardDone:
    """What an actor returns for one shard: enough for progress and profile, no pictures."""

    name: str
    images: int
    rejected: int
    input_bytes: int
    seconds: float
    work: Work = field(default_factory=Work)


def shard_rows(shards: Sequence[Shard]) -> list[dict[str, Any]]:
    """Rows for ray.data.from_items."""
    return [
        {"name": shard.name, "size": shard.size, "etag": shard.etag, "images": images_to_json(shard.images)}
        for shard in shards
    ]


def shards_of(batch: Batch) -> list[Shard]:
    """The shards of one incoming batch."""
    return [
        Shard(str(name), int(size), str(etag), images_from_json(images))
        for name, size, etag, images in zip(*(batch[column] for column in _SHARD), strict=True)
    ]


def done_columns(done: Sequence[ShardDone]) -> dict[str, NDArray[Any]]:
    """Outgoing columns of a stage whose results are in the store."""
    columns = {name: np.array([getattr(shard, name) for shard in done]) for name in _PLAIN}
    return columns | {"work": np.array([json.dumps(asdict(shard.work)) for shard in done])}


def done_of(batch: Batch) -> list[ShardDone]:
    """The results in one outgoing batch, on the driver."""
    rows = zip(*(batch[name] for name in (*_PLAIN, "work")), strict=True)
    return [ShardDone(str(n), int(i), int(r), int(b), float(s), Work(**json.loads(w))) for n, i, r, b, s, w in rows]


_SHARD = ("name", "size", "etag", "images")
_PLAIN = ("name", "images", "rejected", "input_bytes", "seconds")
