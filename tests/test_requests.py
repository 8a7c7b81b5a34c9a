"""How often a store is asked: at a million shards every request counts."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import s3fs

from jobs.options import parse_settings
from jobs.outcome import finish
from jobs.prepare import prepare, start
from jobs.reported import reported
from pipeline import layout
from pipeline.records import Commit, Shard
from pipeline.store import Store
from tests import runs
from tests.faulty_server import FaultyServer
from tests.test_protection import made

SHARDS = 150


def commit_of(shard: Shard, fingerprint: str) -> Commit:
    counts = {"num_protected": 1, "num_quarantined": 0, "num_members": 1, "max_abs_delta": 16}
    sizes = {"output_size": 1, "input_image_bytes": 1, "output_image_bytes": 1}
    digests = {"output_sha256": "d", "protection_sha256": "p", "input_etag": shard.etag, "input_size": shard.size}
    rest = {"quarantine": {}, "clusters": {"1": 1}, "seconds": {"put": 0.1}}
    return Commit(fingerprint=fingerprint, shard=shard.name, **counts, **sizes, **digests, **rest)  # type: ignore[arg-type]


def test_plan_and_end_of_a_committed_run_read_each_commit_once(
    s3_server: str, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        runs.add(tar, "a.png", b"x")
    source, output = Store(f"{bucket}/in"), Store(f"{bucket}/out")
    for number in range(SHARDS):
        source.put_file(f"{number:03d}.tar", tmp_path / "a.tar")
    given = ["--input", source.url, "--output", output.url, "--surrogate", "timm:tf_efficientnet_lite0"]
    settings = parse_settings([*given, "--surrogate-size", "64"])
    run = prepare(settings)
    start(run)
    output.put(layout.PROTECTION, made().to_bytes())
    for shard in run.plan.shards:
        output.put(layout.commit(shard.name), json.dumps(commit_of(shard, run.plan.fingerprint).to_json()).encode())
    server = FaultyServer(s3_server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        again = prepare(settings)
        assert len(again.plan.done) == SHARDS
        with reported(again.output, again.plan.fingerprint) as status:
            start(again)
            assert finish(again, status) == 0
    finally:
        server.close()
        s3fs.S3FileSystem.clear_instance_cache()
    assert server.count <= SHARDS + SHARDS / 1000 + 50
