"""Hundreds of mutated data sets of each format: each is packed as far as it is whole, or ends in one line."""

from __future__ import annotations

import io
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.packing.steps import PackRun, prepare_pack, start_pack
from pipeline.errors import ScumbleError
from pipeline.packing.pack import pack_commits
from pipeline.packing.settings import PackSettings
from pipeline.records import Sample
from pipeline.shards.names import fault_of
from tests.faults.test_fuzz import watched
from tests.support.batches import as_python_2_wrote_it, names_as_python_2_wrote_them
from tests.support.packed import jpeg
from tests.support.samples import read, tar_bytes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200, method="thread")]

SEED = int(os.environ.get("SCUMBLE_FUZZ_SEED", "1"))
INPUTS = 150  # of each format


def tar_of_tars() -> bytes:
    return tar_bytes(
        [(f"n{c}.tar", tar_bytes([(f"n{c}_{n}.JPEG", jpeg(10 * c + n)) for n in range(3)])) for c in range(3)]
    )


def batch() -> bytes:
    return as_python_2_wrote_it(np.random.default_rng(0).integers(0, 256, (4, 3072)).astype(np.uint8), [0, 1, 1, 0])


def npz() -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, images=np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8), labels=np.arange(4))
    return file.getvalue()


def parquet() -> bytes:
    file = io.BytesIO()
    images = [{"bytes": jpeg(n), "path": f"{n}.jpg"} for n in range(8)]
    table = pa.table({"image": images, "label": [0, 1] * 4, "caption": ["a", "b"] * 4})
    pq.write_table(table, file, row_group_size=3)
    return file.getvalue()


def labels() -> bytes:
    return b"path,label\n" + b"".join(b"a/%d.jpg,class %d\n" % (n, n % 2) for n in range(6))


MADE: dict[str, tuple[str, Callable[[], bytes]]] = {
    "tar": ("in.tar", tar_of_tars),
    "cifar": ("in/data_batch_1", batch),
    "names": ("in/batches.meta", lambda: names_as_python_2_wrote_them(b"label_names", [b"cat", b"dog"])),
    "npz": ("in.npz", npz),
    "parquet": ("in.parquet", parquet),
    "labels": ("labels.csv", labels),
}
WORDS = (
    b"../",
    b"/",
    b"\0",
    b"\n",
    b"\\",
    b'"',
    b"\xff",
    b"b",
    b"R",
    b"cos\nsystem\n",
    b"\x7f\xff\xff\xff",
    b"0777777",
)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """The same with a few bytes changed, added, removed, repeated, or without its end."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        beginning, end = rng.randrange(min(len(made), 700) or 1), len(made) - rng.randrange(min(len(made), 900) or 1)
        at = rng.choice((beginning, end, rng.randrange(len(made) or 1)))
        length = rng.choice((1, 1, 4, 64, 512))
        how = rng.randrange(6)
        if how == 0:
            made[at : at + 1] = bytes([rng.randrange(256)])
        elif how == 1:
            del made[at : at + length]
        elif how == 2:
            made[at:at] = made[at : at + length]
        elif how == 3:
            made[at : at + length] = bytes(length)
        elif how == 4:
            word = rng.choice(WORDS)
            made[at : at + len(word)] = word
        else:
            del made[at if rng.random() < 0.2 else len(made) :]
    return bytes(made)


def inputs(folder: Path) -> None:
    """Everything beside what is mutated."""
    for name in ("in", "photos/a"):
        (folder / name).mkdir(parents=True)
    (folder / "in/data_batch_1").write_bytes(batch())
    (folder / "in/batches.meta").write_bytes(MADE["names"][1]())
    for n in range(6):
        (folder / f"photos/a/{n}.jpg").write_bytes(jpeg(n))


def packed_whole(run: PackRun, output: Path) -> int:
    """Pack all shards; every planned image is in one, under a key of its own, or in quarantine. Returns how many."""
    start_pack(run)
    for shard in run.plan.shards:
        run.task.run(shard)
    samples = [one for shard in run.plan.shards for one in read((output / shard.name).read_bytes())]
    assert all(isinstance(one, Sample) for one in samples)
    assert len({one.key for one in samples}) == len(samples)
    assert all(fault_of(one.key) is None for one in samples)
    refused = sum(commit.num_quarantined for commit in pack_commits(run.output, run.plan.shards))
    assert len(samples) + refused == len(run.plan.rows)
    return len(samples)


@pytest.mark.parametrize("kind", MADE)
def test_a_mutated_data_set_is_packed_where_whole_or_ends_in_one_line(tmp_path: Path, kind: str) -> None:
    inputs(tmp_path)
    name, make = MADE[kind]
    good, rng = make(), random.Random(f"{SEED} {kind}")
    given = {"cifar": "in", "names": "in", "labels": "photos"}.get(kind, name)
    table = str(tmp_path / name) if kind == "labels" else None
    num_packed, said = 0, list[str]()
    for number in range(INPUTS):
        data = mutated(good, rng)
        (tmp_path / name).write_bytes(data)
        output = tmp_path / f"out-{number}"
        with watched((kind, SEED, number)):
            try:
                run = prepare_pack(PackSettings(input=str(tmp_path / given), output=str(output), labels=table))
                num_packed += packed_whole(run, output) > 0
            except ScumbleError as error:
                said.append(str(error))
    assert num_packed > 10
    assert said
    assert not [line for line in said if "\n" in line]
    outputs = {f"out-{number}" for number in range(INPUTS)}
    assert {path.name for path in tmp_path.iterdir()} <= {"in", "photos", name.partition("/")[0]} | outputs
