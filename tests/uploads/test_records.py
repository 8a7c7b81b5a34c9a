"""The records of uploads: their bytes stay as they were first written, and what is none is refused in one line."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import protect_uploads, status, verify
from pipeline import layout
from pipeline.errors import InputError
from pipeline.json_record import JsonRecord
from pipeline.storage.store import Store
from pipeline.uploads.lease import GRACE_S, Held, Lease, LeaseRecord, take_lease
from pipeline.uploads.ledger import Ledger, Manifest, UnitCommit
from pipeline.uploads.segments import Row
from tests.support.runs import refusal
from tests.support.uploads import Job, jpeg, upload

COMMIT = (
    b'{"fingerprint":"ffff","format":1,"rows":[{"cluster":3,"detail":"","distance":0.5,"drifted":1,"etag":"e-1",'
    b'"kind":"image","name":"\\u00fc \\udcff.jpg","output":"\\u00fc \\udcff.jpg","output_sha256":"abab",'
    b'"output_size":12,"protected":1,"quarantined":0,"reason":"","size":10,"version":2},{"cluster":-1,'
    b'"detail":"no bytes","distance":null,"drifted":0,"etag":"e-2","kind":"image","name":"b.jpg","output":"",'
    b'"output_sha256":"","output_size":0,"protected":0,"quarantined":1,"reason":"empty","size":0,"version":1}],'
    b'"unit":"u1"}'
)
MANIFEST = (
    b'{"format":1,"retired":["0aa1"],"segments":[{"drifted":1,"name":"0bb2","protected":7,"quarantined":2,"rows":9},'
    b'{"drifted":0,"name":"0cc3","protected":1,"quarantined":0,"rows":1}]}'
)
LEASE = b'{"duration_s":60.0,"holder":"0dd4","released":false,"renewals":3,"who":"host pid 7"}'
ROWS = (
    Row("ü \udcff.jpg", "e-1", 2, 10, "image", "ü \udcff.jpg", 12, "abab", 3, 0.5, 1, 0, 1),
    Row("b.jpg", "e-2", 1, 0, "image", quarantined=1, reason="empty", detail="no bytes"),
)
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[:-3],
    "a list": lambda data: b"[" + data + b"]",
    "a text": lambda data: b'"' + b"x" * 20 + b'"',
    "nothing but brackets": lambda data: b"[" * 100_000,
    "not UTF-8": lambda data: data.replace(b'{"', b'{"\xff', 1),
    "with an unknown field": lambda data: b'{"more":1,' + data[1:],
    "without a field": lambda data: data.replace(b'"format":1,', b"").replace(b'"holder":"0dd4",', b""),
    "of wrong types": lambda data: json.dumps(dict.fromkeys(json.loads(data), {"a": 1})).encode(),
    "of a newer format": lambda data: data.replace(b'"format":1', b'"format":2').replace(b'"who":"', b'"who":["'),
}
damaged = pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)


@pytest.fixture
def job(job: Job) -> Job:
    """Its output has a ledger of one image."""
    upload(job.source, {"a.jpg": jpeg(1)})
    assert job.run() == 0
    return job


@pytest.mark.parametrize(("kind", "data"), [(UnitCommit, COMMIT), (Manifest, MANIFEST), (LeaseRecord, LEASE)])
def test_a_file_of_before_is_read_and_written_again_byte_for_byte(kind: type[JsonRecord], data: bytes) -> None:
    assert kind.from_bytes(data, "file").to_bytes() == data


def test_a_commit_of_before_says_what_it_said() -> None:
    assert UnitCommit.from_bytes(COMMIT, "file") == UnitCommit("u1", "ffff", ROWS)


@damaged
def test_a_damaged_commit_is_refused_by_name_whoever_reads_the_ledger(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    store, name = Store(str(tmp_path)), layout.upload_commit("u1")
    store.put(name, damage(COMMIT))
    ledger = Ledger(store)
    for read in (
        lambda: list(ledger.known()),
        lambda: list(ledger.rows()),
        lambda: ledger.compact(merge=True),
        lambda: ledger.commit(UnitCommit("u1", "ffff", ROWS)),
    ):
        line = refused(read)
        assert line.startswith(f"{store.url}/{name} is damaged or from another version of Scumble (")
        assert line.endswith("): restore or delete it")
    assert store.read(name) == damage(COMMIT)


@damaged
def test_a_damaged_manifest_is_refused_by_name_and_left_as_it_is(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    store = Store(str(tmp_path))
    store.put(layout.UPLOADS_LEDGER, damage(MANIFEST))
    store.put(layout.upload_commit("u1"), COMMIT)
    ledger = Ledger(store)
    for read in (
        lambda: list(ledger.known()),
        lambda: list(ledger.rows()),
        lambda: ledger.compact(merge=True),
        ledger.manifest,
    ):
        line = refused(read)
        assert line.startswith(f"{store.url}/{layout.UPLOADS_LEDGER} is damaged or from another version of Scumble (")
        assert line.endswith("): restore it; without it, everything would be protected again")
    assert store.read(layout.UPLOADS_LEDGER) == damage(MANIFEST)
    assert store.read(layout.upload_commit("u1")) == COMMIT


def refused(read: Callable[[], object]) -> str:
    """The one line that a reading ends with."""
    with pytest.raises(InputError) as caught:
        read()
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    return line


@pytest.mark.parametrize(("name", "data"), [(layout.UPLOADS_LEDGER, MANIFEST), (layout.upload_commit("u"), COMMIT)])
@damaged
def test_every_command_over_a_damaged_ledger_ends_with_one_line_and_exit_code_1(
    job: Job, name: str, data: bytes, damage: Callable[[bytes], bytes]
) -> None:
    job.output.put(name, damage(data))
    line = f"error: {job.output.url}/{name} is damaged or from another version of Scumble ("
    for main, arguments in (
        (protect_uploads.main, job.arguments()),
        (protect_uploads.main, job.arguments("--dry-run")),
        (status.main, ["--output", job.output.url]),
        (verify.main, ["--output", job.output.url]),
    ):
        code, said = refusal(main, *arguments)
        assert (code, len(said.splitlines()), said[: len(line)]) == (1, 1, line), said
        assert "): restore " in said
    assert job.output.read("a.jpg")


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[:-9], lambda data: data[:99] + b"x" + data[99:]]
)
def test_a_damaged_segment_is_refused_by_name(job: Job, damage: Callable[[bytes], bytes]) -> None:
    (segment,) = Ledger(job.output).manifest().segments
    name = layout.upload_segment(segment.name)
    job.output.put(name, damage(job.output.read(name)))
    for main, arguments in ((protect_uploads.main, job.arguments()), (status.main, ["--output", job.output.url])):
        code, said = refusal(main, *arguments)
        assert (code, len(said.splitlines())) == (1, 1), said
        assert said.startswith(f"error: {job.output.url}/{name} is damaged or from another version of Scumble (")
        assert said.endswith("): restore it; without ledger.json, everything would be protected again\n")


def test_a_segment_of_other_columns_is_none(job: Job) -> None:
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    (segment,) = Ledger(job.output).manifest().segments
    sink = io.BytesIO()
    pq.write_table(pa.table({"name": ["a.jpg"], "etag": ["1"], "version": [1]}), sink)
    job.output.put(layout.upload_segment(segment.name), sink.getvalue())
    assert "(unexpected columns)" in refused(lambda: list(Ledger(job.output).known()))


@damaged
def test_a_lease_that_cannot_be_read_is_respected_for_its_time_and_then_taken_over(
    job: Job, damage: Callable[[bytes], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    job.output.put(layout.UPLOADS_LEASE, damage(LEASE))
    held = take_lease(job.output, layout.UPLOADS_LEASE, duration_s=20)
    assert isinstance(held, Held)
    assert job.run() == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith(f"another run is working on {job.output.url} (a run whose lease cannot be read, ")
    assert "expires 60 s after it" in said
    then = time.time() - 60 - GRACE_S - 5
    os.utime(job.output.path(layout.UPLOADS_LEASE), (then, then))
    assert job.run() == 0
    assert "1 already done" in capsys.readouterr().out


@pytest.mark.parametrize("duration", ["1e999", "NaN", "-5", "0", "true"])
def test_a_lease_of_no_sensible_length_is_not_held_for_ever(tmp_path: Path, duration: str) -> None:
    store = Store(str(tmp_path))
    store.put(layout.UPLOADS_LEASE, LEASE.replace(b"60.0", duration.encode()))
    then = time.time() - 100
    os.utime(store.path(layout.UPLOADS_LEASE), (then, then))
    lease = take_lease(store, layout.UPLOADS_LEASE, duration_s=20)
    assert isinstance(lease, Lease)
    lease.release()


def test_of_a_unit_that_two_have_read_in_part_the_commit_that_stands_counts(tmp_path: Path) -> None:
    ledger = Ledger(Store(str(tmp_path)))
    ledger.commit(UnitCommit("u1", "ffff", ROWS[:1]))
    ledger.commit(UnitCommit("u1", "ffff", ROWS))
    assert list(ledger.rows()) == [ROWS[0]]
