"""Records of files: each comes back as it was, and what is not it is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import layout
from pipeline.clusters.clustering import ClusterQuality, ClusterReport
from pipeline.errors import InputError, Reason
from pipeline.json_record import JsonRecord
from pipeline.measures.gallery import GallerySample, gallery_from_bytes, gallery_to_bytes
from pipeline.measures.removal import RemovalCheck
from pipeline.records import Plan, Rejection, Shard
from pipeline.runs.fingerprint import ingredients_of
from pipeline.runs.run_record import RunRecord, RunStatus, read_run
from pipeline.settings import Settings
from pipeline.storage.store import Store
from pipeline.uploads.lease import LeaseRecord
from pipeline.uploads.ledger import Manifest, UnitCommit
from pipeline.uploads.origin import Origin
from pipeline.uploads.segments import Row, Segment
from pipeline.uploads.summary import Summary
from tests.support.samples import commit_of


def run_record() -> RunRecord:
    shards = [Shard("a.tar", 7, "etag")]
    settings = Settings(input="s3://in", output="out", clusters=4)
    ingredients = ingredients_of(settings, shards, weights_sha256="w")
    return RunRecord.of(ingredients, settings, Plan(tuple(shards), ingredients.fingerprint))


RECORDS = [
    run_record(),
    RunStatus("f", "2026", stage_seconds={"embed": 1.5}, counts={"shards": 3}, exit_code=0),
    ClusterReport(90, (40, 50), 12.5, 7, 0, (12.5, 13.0), ClusterQuality(None, 0.75)),
    RemovalCheck(9, {"mean": (0.1, 0.2)}, {"mean": (0.3,)}, 0.5, 0.25, False),
    commit_of(Shard("a.tar", 7, "etag"), "f"),
    Origin("/in", "p", 16 / 255, {"encode": "same", "keep_sidecar": ["seg.png"]}),
    Summary().record("failed", 1, "the store is down"),
    UnitCommit("u", "f", (Row("a.jpg", "etag", 1, 7, "image", distance=0.5), Row("b.jpg", "etag", 2, 0, "image"))),
    Manifest((Segment("0aa1", 3, 2, 1, 0),), ("0bb2",)),
    LeaseRecord("0cc3", "host pid 7", 60.0),
    Rejection("k", "k.jpg", Reason.EMPTY, "no bytes"),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_record_comes_back_from_its_file(record: JsonRecord) -> None:
    assert type(record).from_bytes(record.to_bytes(), "file") == record


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_every_field_that_is_missing_strange_or_of_another_type_is_refused_by_name(record: JsonRecord) -> None:
    fields = record.to_json()
    for name, value in fields.items():
        wrong = {**fields, name: 7 if value is None or isinstance(value, str | dict | list) else "seven"}
        with pytest.raises(InputError, match=rf"^file is damaged or from another version of Scumble \({name} is "):
            type(record).from_bytes(json.dumps(wrong).encode(), "file")
    with pytest.raises(InputError, match=rf"\(more is unknown\): {record.cure}$"):
        type(record).from_bytes(json.dumps(fields | {"more": 1}).encode(), "file")
    first = next(iter(fields))
    with pytest.raises(InputError, match=rf"\({first} is missing\)"):
        type(record).from_bytes(json.dumps({n: v for n, v in fields.items() if n != first}).encode(), "file")


@pytest.mark.parametrize("data", [b"", b"{", b"null", b"[]", b"7", b"\xff", b"[" * 100_000, b'{"a": true'])
def test_what_is_no_record_at_all_is_refused_in_one_line(data: bytes) -> None:
    with pytest.raises(InputError) as caught:
        RunStatus.from_bytes(data, "s3://bucket/status.json")
    assert str(caught.value).startswith("s3://bucket/status.json is damaged or from another version")
    assert len(str(caught.value).splitlines()) == 1


def test_what_is_wrong_inside_is_named_by_its_path() -> None:
    fields: dict[str, Any] = run_record().to_json()
    fields["ingredients"]["versions"]["torch"] = None
    with pytest.raises(InputError, match=r"\(ingredients\.versions\.torch is null\)"):
        RunRecord.from_bytes(json.dumps(fields).encode(), "run.json")


def test_true_is_no_number_and_a_whole_number_is_a_float() -> None:
    status = {"fingerprint": "f", "started": "s"}
    assert RunStatus.from_json({**status, "stage_seconds": {"fit": 3}}).stage_seconds == {"fit": 3.0}
    with pytest.raises(InputError, match="exit_code is true"):
        RunStatus.from_bytes(json.dumps({**status, "exit_code": True}).encode(), "file")


def test_an_output_without_a_run_is_told_from_one_with_a_damaged_record(tmp_path: Path) -> None:
    output = Store(str(tmp_path))
    with pytest.raises(InputError, match=r"is not the output of a protection run: _scumble/run\.json not found"):
        read_run(output)
    output.put(layout.RUN, b'{"fingerprint": "f"')
    with pytest.raises(InputError, match=r"_scumble/run\.json is damaged"):
        read_run(output)


def test_a_gallery_comes_back_with_two_samples_a_cluster_whatever_their_keys() -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    given = [
        GallerySample(key, cluster, pixels, pixels + 1) for cluster in (10, 2) for key in ("a/b/original/c", "", "x")
    ]
    found = gallery_from_bytes(gallery_to_bytes(given), "gallery")
    assert [(one.cluster, one.key) for one in found] == [(c, k) for c in (2, 10) for k in ("a/b/original/c", "")]
    assert all(np.array_equal(one.protected, one.original + 1) for one in found)
    assert gallery_from_bytes(gallery_to_bytes([]), "gallery") == ()


@pytest.mark.parametrize("arrays", [{"1/0/original/k": 0}, {"one": 0}, {"a/b/original/k": 0}, None])
def test_what_is_no_gallery_is_refused_in_one_line(arrays: dict[str, int] | None) -> None:
    from safetensors.numpy import save

    data = b"damaged" if arrays is None else save({name: np.zeros(1, np.uint8) for name in arrays})
    with pytest.raises(InputError, match=r"^gallery is not a gallery written by this version of Scumble \(.*\)$"):
        gallery_from_bytes(data, "gallery")
