"""Parquet files of features and assignments: what goes in comes out, and pandas-free readers can read them."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError
from pipeline.hashing import numpy_rng
from pipeline.records import Features
from pipeline.surrogates.features import (
    Assignment,
    assignment_from_parquet,
    assignment_to_parquet,
    feature_keys,
    features_from_parquet,
    features_to_parquet,
)


@pytest.fixture
def features() -> Features:
    values = numpy_rng(0, "test").normal(size=(300, 24)).astype(np.float16)
    return Features("deep/shard-0.tar", tuple(f"ключ/{i:04d}" for i in range(300)), values)


@pytest.fixture
def data(features: Features) -> bytes:
    return features_to_parquet(features, surrogate_id='{"name":"s"}', fingerprint="f00")


def test_features_come_back_to_the_bit(features: Features, data: bytes) -> None:
    back = features_from_parquet(data)
    assert (back.shard, back.keys) == (features.shard, features.keys)
    assert back.values.dtype == np.float16
    np.testing.assert_array_equal(back.values, features.values)
    assert feature_keys(data) == features.keys


def test_the_columns_are_what_any_parquet_reader_sees(features: Features, data: bytes) -> None:
    table = pq.read_table(io.BytesIO(data))
    assert table.schema.field("key").type == pa.string()
    assert table.schema.field("feature").type == pa.list_(pa.float16(), 24)
    assert table.schema.metadata[b"shard"] == b"deep/shard-0.tar"
    assert table.column("feature")[7].as_py() == features.values[7].tolist()


def test_equal_features_give_equal_bytes(features: Features, data: bytes) -> None:
    assert features_to_parquet(features, surrogate_id='{"name":"s"}', fingerprint="f00") == data


def test_a_shard_without_usable_samples_keeps_its_dimension() -> None:
    empty = Features("a.tar", (), np.zeros((0, 24), np.float16))
    back = features_from_parquet(features_to_parquet(empty, surrogate_id="s", fingerprint="f"))
    assert back.values.shape == (0, 24)
    assert back.keys == ()


@pytest.mark.parametrize("end", [0, 100, -1000])
def test_a_file_cut_short_is_refused(data: bytes, end: int) -> None:
    with pytest.raises(InputError, match="not a Parquet file, or truncated"):
        features_from_parquet(data[:end])


def test_a_flipped_bit_in_the_features_is_noticed(features: Features, data: bytes) -> None:
    at = data.index(features.values[150].tobytes())
    damaged = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    with pytest.raises(InputError, match="not a Parquet file, or truncated"):
        features_from_parquet(damaged)


def test_a_foreign_parquet_file_is_refused() -> None:
    sink = io.BytesIO()
    pq.write_table(pa.table({"key": ["a"], "value": [1]}), sink)
    with pytest.raises(InputError, match="without the columns key, feature"):
        features_from_parquet(sink.getvalue())


def test_assignments_come_back_to_the_bit() -> None:
    mine = Assignment("a.tar", ("x", "y"), np.array([3, 0], np.int32), np.array([0.5, 1.25], np.float32))
    data = assignment_to_parquet(mine)
    back = assignment_from_parquet(data)
    assert (back.shard, back.keys) == ("a.tar", ("x", "y"))
    assert (back.clusters.dtype, back.distance.dtype) == (np.int32, np.float32)
    assert (back.clusters.tolist(), back.distance.tolist()) == ([3, 0], [0.5, 1.25])
    assert assignment_to_parquet(back) == data


def test_an_assignment_without_a_cluster_for_every_key_cannot_be_built() -> None:
    with pytest.raises(ValueError, match="2 keys, 1 clusters"):
        Assignment("a.tar", ("x", "y"), np.zeros(1, np.int32), np.zeros(1, np.float32))
