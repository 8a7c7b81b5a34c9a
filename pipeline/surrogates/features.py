"""Features and assignments of one shard <-> Parquet bytes; equal contents give equal bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.records import Features


@dataclass(frozen=True)
class Assignment:
    """The cluster of every usable sample of one shard, in input order."""

    shard: str
    keys: tuple[str, ...]
    clusters: NDArray[np.int32]  # [n]
    distance: NDArray[np.float32]  # [n], Euclidean, to the cluster's centroid

    def __post_init__(self) -> None:
        if not len(self.keys) == len(self.clusters) == len(self.distance):
            raise ValueError(f"{self.shard}: {len(self.keys)} keys, {len(self.clusters)} clusters")


def features_to_parquet(features: Features, *, surrogate_id: str, fingerprint: str) -> bytes:
    """Columns key (string) and feature (fixed-size list of float16), with the origin in the metadata."""
    rows, dimension = features.values.shape
    values = pa.array(np.ascontiguousarray(features.values, dtype=np.float16).ravel())
    lists = pa.FixedSizeListArray.from_arrays(values, dimension)
    origin = {"shard": features.shard, "surrogate": surrogate_id, "fingerprint": fingerprint}
    return _write({"key": _keys(features.keys), "feature": lists}, origin)


def features_from_parquet(data: bytes) -> Features:
    """The inverse of `features_to_parquet`. Raises InputError if `data` is not such a file."""
    table, origin = _read(data, ("key", "feature"))
    dimension = table.schema.field("feature").type.list_size
    column = table.column("feature").combine_chunks()
    values = column.flatten().to_numpy(zero_copy_only=False).astype(np.float16, copy=False)
    return Features(origin["shard"], _texts(table), values.reshape(-1, dimension))


def feature_keys(data: bytes) -> tuple[str, ...]:
    """Only the keys, without reading features. Raises InputError like `features_from_parquet`."""
    return _texts(_read(data, ("key",))[0])


def assignment_to_parquet(assignment: Assignment) -> bytes:
    """Columns key (string), cluster (int32), distance (float32)."""
    columns = {
        "key": _keys(assignment.keys),
        "cluster": pa.array(assignment.clusters, pa.int32()),
        "distance": pa.array(assignment.distance, pa.float32()),
    }
    return _write(columns, {"shard": assignment.shard})


def assignment_from_parquet(data: bytes) -> Assignment:
    """The inverse of `assignment_to_parquet`. Raises InputError if `data` is not such a file."""
    table, origin = _read(data, ("key", "cluster", "distance"))
    clusters, distance = (table.column(name).to_numpy() for name in ("cluster", "distance"))
    return Assignment(origin["shard"], _texts(table), clusters, distance)


def _keys(keys: tuple[str, ...]) -> pa.Array:
    return pa.array(keys, pa.string())


def _texts(table: pa.Table) -> tuple[str, ...]:
    return tuple(table.column("key").to_pylist())


def _write(columns: dict[str, pa.Array], origin: dict[str, str]) -> bytes:
    table = pa.table(columns).replace_schema_metadata(origin)
    sink = pa.BufferOutputStream()
    pq.write_table(
        table, sink, compression="none", use_dictionary=False, write_statistics=False, write_page_checksum=True
    )
    return bytes(sink.getvalue())


def _read(data: bytes, columns: tuple[str, ...]) -> tuple[pa.Table, dict[str, str]]:
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        table = file.read(columns=list(columns))
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"not a Parquet file, or truncated: {error}; delete it and it will be made again") from None
    metadata: dict[bytes, Any] = table.schema.metadata or {}
    origin = {name.decode(): value.decode() for name, value in metadata.items()}
    if table.column_names != list(columns) or "shard" not in origin:
        raise InputError(
            f"a Parquet file without the columns {', '.join(columns)}, so not written by Scumble; delete it"
        )
    return table, origin
