"""Which pictures deltas are fitted on, and how much of a shard is read for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from actors.cluster.batches import RunContext, shard_rows
from actors.sampler import FitImageReader
from pipeline import layout
from pipeline.errors import InputError
from pipeline.fitting.fit import fit_images_from
from pipeline.fitting.fit_images import chosen_images, read_fit_images
from pipeline.records import Sample, Shard
from pipeline.settings import Settings
from pipeline.storage.store import Store
from pipeline.surrogates.features import Assignment, assignment_to_parquet
from tests.support.samples import image_bytes, tar_bytes

KEYS = tuple(f"k{number}" for number in range(200))


def assignment(cluster: int, keys: tuple[str, ...] = KEYS) -> Assignment:
    count = len(keys)
    return Assignment("a.tar", keys, np.full(count, cluster, np.int32), np.zeros(count, np.float32))


def sample(key: str, level: int) -> Sample:
    return Sample(key, {"png": image_bytes(np.full((8, 8, 3), level, np.uint8), "PNG")})


def test_a_share_chooses_about_so_many_and_the_same_ones_whoever_asks() -> None:
    chosen = chosen_images(assignment(3), {3: 0.5}, seed=0)
    assert 70 <= len(chosen) <= 130  # 200 throws of a fair coin, four standard deviations
    assert set(chosen.values()) == {3}
    assert chosen == chosen_images(assignment(3), {3: 0.5}, seed=0)
    assert chosen.keys() <= chosen_images(assignment(3), {3: 0.9}, seed=0).keys()
    assert chosen.keys() != chosen_images(assignment(3), {3: 0.5}, seed=1).keys()
    assert chosen_images(assignment(3), {3: 1.0}, seed=0).keys() == set(KEYS)
    assert chosen_images(assignment(3), {3: 0.0}, seed=0) == {}


def test_nothing_is_read_behind_the_last_chosen_picture() -> None:
    def shard() -> Iterator[Sample]:
        yield from (sample("k0", 10), sample("k1", 20), sample("k2", 30))
        pytest.fail("read on")

    found = list(read_fit_images(shard(), {"k2": 5, "k0": 4}, side=8, settings=Settings()))
    assert [(key, cluster) for key, _, cluster in found] == [("k0", 4), ("k2", 5)]
    assert [set(pixels.ravel().tolist()) for _, pixels, _ in found] == [{10}, {30}]


@pytest.mark.parametrize(
    ("k1", "why"), [(None, ""), (Sample("k1", {"png": b"no picture"}), r" \(unsupported-format: .*\)")]
)
def test_a_chosen_picture_that_cannot_be_read_any_more_is_no_silent_gap(
    tmp_path: Path, k1: Sample | None, why: str
) -> None:
    source, output = Store(str(tmp_path / "in")), Store(str(tmp_path / "out"))
    samples = [sample("k0", 10), *([] if k1 is None else [k1])]
    members = [(f"{one.key}.{suffix}", data) for one in samples for suffix, data in one.members.items()]
    source.put("a.tar", tar_bytes(members))
    output.put(layout.assignment("a.tar"), assignment_to_parquet(assignment(0, ("k0", "k1"))))
    (entry,) = source.list()
    (row,) = shard_rows([Shard(*entry[:3])])
    reader = FitImageReader(RunContext(source, output, Settings(), "", 1, "cpu"), 8, {0: 1.0})
    words = rf"^a\.tar: 1 images were embedded but cannot be read now{why}, among them k1; check the shard, then run"
    with pytest.raises(InputError, match=words):
        reader({field: [value] for field, value in row.items()})


def test_a_shard_of_which_nothing_is_chosen_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    context = RunContext(Store(str(tmp_path / "in")), Store(str(tmp_path / "out")), Settings(), "", 1, "cpu")
    context.output.put(layout.assignment("a.tar"), assignment_to_parquet(assignment(0)))
    (row,) = shard_rows([Shard("a.tar", 1, "gone")])
    batch = {field: [value] for field, value in row.items()}
    assert FitImageReader(context, 8, {0: 0.0})(batch)["key"].tolist() == []
    with pytest.raises(InputError, match="is gone"):
        FitImageReader(context, 8, {0: 0.5})(batch)


def test_pictures_are_laid_out_by_shard_and_key_whatever_order_their_tables_came_in() -> None:
    def table(rows: list[tuple[str, str, int]]) -> pa.Table:
        pixels = [np.full((4, 4, 3), cluster, np.uint8).tobytes() for _, _, cluster in rows]
        shards, keys, clusters = zip(*rows, strict=True)
        return pa.table({"pixels": pixels, "cluster": clusters, "shard": shards, "key": keys})

    images = fit_images_from(
        iter([table([("b", "k1", 3), ("a", "k9", 2)]), table([("a", "k2", 1), ("b", "k0", 7)])]), side=4
    )
    assert images.clusters.tolist() == [1, 2, 7, 3]
    assert images.pixels.shape == (4, 3, 4, 4)
    assert images.pixels[:, 0, 0, 0].tolist() == [1, 2, 7, 3]
    with pytest.raises(InputError, match="nothing to fit deltas on"):
        fit_images_from([], side=4)
