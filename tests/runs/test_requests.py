"""How often a store is asked: at a million shards every request counts."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs.protection.finish import finish_run
from jobs.protection.options import parse_settings
from jobs.protection.prepare import prepare, start_run
from jobs.protection.status_file import reported
from pipeline import layout
from pipeline.errors import SettingsError
from pipeline.shards.inputs import resolve_input
from pipeline.storage.store import Store
from tests.deltas.test_protection import made
from tests.support import runs
from tests.support.faulty_server import FaultyServer
from tests.support.samples import commit_of

SHARDS = 150


@pytest.fixture
def counted(s3_server: str, bucket: str, s3_at: Callable[[str], None]) -> Iterator[FaultyServer]:
    """A server in between, which counts requests, once a bucket is there."""
    server = FaultyServer(s3_server)
    s3_at(server.url)
    yield server
    server.close()


def test_a_pattern_is_listed_page_by_page_from_its_fixed_beginning_on(bucket: str, counted: FaultyServer) -> None:
    store = Store(f"{bucket}/in[1]")
    many = {f"{store.root}/a/t-{number:04d}.tar": b"x" for number in range(1002)}
    store.filesystem.pipe({**many, f"{store.root}/z/u-1.tar": b"x", f"{store.root}/z/v/u-2.tar": b"x"})

    def found(pattern: str) -> tuple[list[str], int]:
        before = counted.count
        return [entry.name for entry in store.glob(pattern)], counted.count - before

    assert found("z/*.tar") == (["z/u-1.tar"], 1)
    assert found("a/t-100[01].tar") == (["a/t-1000.tar", "a/t-1001.tar"], 1)
    assert found("**/u-?.tar") == (["z/u-1.tar", "z/v/u-2.tar"], 2)
    before = counted.count
    listing = store.glob("a/*.tar")
    assert next(listing).name == "a/t-0000.tar"
    assert counted.count == before + 1  # the second page is asked for when the first is used up
    assert len(list(listing)) == 1001
    before = counted.count
    assert [entry.name for entry in resolve_input(f"{store.url}/a/t-100{{0..1}}.tar").shards] == [
        "t-1000.tar",
        "t-1001.tar",
    ]
    assert counted.count == before + 4  # three of them find out that the folder is there, and no such name
    with pytest.raises(SettingsError, match="cannot list .*Invalid pattern"):
        found("**.tar")


def test_plan_and_end_of_a_committed_run_read_each_commit_once(
    bucket: str, counted: FaultyServer, tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        runs.add(tar, "a.png", b"x")
    source, output = Store(f"{bucket}/in"), Store(f"{bucket}/out")
    for number in range(SHARDS):
        source.put_file(f"{number:03d}.tar", tmp_path / "a.tar")
    given = ["--input", source.url, "--output", output.url, "--surrogate", "timm:tf_efficientnet_lite0"]
    settings = parse_settings([*given, "--surrogate-size", "64"])
    run = prepare(settings)
    start_run(run)
    output.put(layout.PROTECTION, made().to_bytes())
    for shard in run.plan.shards:
        output.put(layout.commit(shard.name), commit_of(shard, run.plan.fingerprint).to_bytes())
    before = counted.count
    again = prepare(settings)
    assert len(again.plan.done) == SHARDS
    with reported(again.output, again.plan.fingerprint) as status:
        start_run(again)
        assert finish_run(again, status) == 0
    assert counted.count - before <= SHARDS + SHARDS / 1000 + 50
