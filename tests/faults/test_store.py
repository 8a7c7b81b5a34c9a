"""A store that throttles, dawdles, breaks off, forgets to answer or is gone: it costs time, or it is one line.

Nothing is ever half visible, and the bytes are those of a quiet run. Single calls are tried in this process; the real
job runs as a process of its own, from bucket to bucket, through a server that fails by a seed.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jobs import status, verify
from pipeline.errors import StoreError
from pipeline.shards.inputs import resolve_input
from pipeline.storage.store import Store
from tests.support import runs
from tests.support.faulty_server import Asked, Fault, FaultyServer
from tests.support.uploads import small_protection

SEED = 20
SLOW_DOWN, INTERNAL = Fault("answer", 503, "SlowDown"), Fault("answer", 500, "InternalError")
CONFLICT = Fault("answer", 409, "ConditionalRequestConflict")
REFUSED = Fault("answer", 412, "PreconditionFailed")
DENIED, UNKNOWN_KEY = Fault("answer", 403, "AccessDenied"), Fault("answer", 403, "InvalidAccessKeyId")
Plan = Callable[[Asked], Fault | None]
Through = Callable[[Plan], FaultyServer]


@pytest.fixture
def through(s3_server: str) -> Iterator[Through]:
    """Makes a faulty server before the real one."""
    made = []

    def make(plan: Plan) -> FaultyServer:
        made.append(FaultyServer(s3_server, plan=plan))
        return made[-1]

    yield make
    for server in made:
        server.close()


@pytest.fixture
def here(through: Through, s3_at: Callable[[str], None]) -> Through:
    """As `through`, for the stores of this process too."""

    def make(plan: Plan) -> FaultyServer:
        server = through(plan)
        s3_at(server.url)
        return server

    return make


# --- single calls ----------------------------------------------------------------------------------------------------


def first(turns: int, method: str, fault: Fault, ending: str = "") -> Plan:
    """The first turns of every path that ends so."""
    return lambda asked: (
        fault if asked.method == method and asked.turn <= turns and asked.path.endswith(ending) else None
    )


@pytest.mark.parametrize("kind", ["reset", "short", "drip"])
def test_a_stream_that_breaks_off_again_and_again_is_read_to_the_same_bytes(
    bucket: str, here: Through, kind: str
) -> None:
    data = random.Random(SEED).randbytes(3_000_000)
    Store(bucket).put("photos-000.tar", data)
    server = here(first(7, "GET", Fault(kind), ".tar"))  # more often than s3fs itself tries again
    with Store(bucket).open("photos-000.tar") as stream:
        assert b"".join(iter(lambda: stream.read(262_144), b"")) == data
    assert Store(bucket).read("photos-000.tar") == data
    assert server.made[kind] == (7 if kind != "drip" else 2)


def test_a_stream_that_never_comes_whole_is_one_line_with_its_place(
    bucket: str, here: Through, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.storage.retries._ATTEMPTS", 2)
    Store(bucket).put("photos-000.tar", bytes(10_000))
    here(first(1_000, "GET", Fault("short"), ".tar"))
    with (
        Store(bucket).open("photos-000.tar") as stream,
        pytest.raises(StoreError, match=rf"^cannot read {bucket}/photos-000\.tar: .*payload") as caught,
    ):
        stream.read()
    assert "\n" not in str(caught.value)


def test_a_put_whose_answer_is_lost_is_there_once_and_counts_as_done(bucket: str, here: Through) -> None:
    server = here(first(2, "PUT", Fault("lost")))
    store = Store(bucket)
    store.put("photos-000.tar", b"shard")
    assert server.made["lost"] == 2
    assert [(entry.name, entry.size) for entry in store.list()] == [("photos-000.tar", 5)]
    assert store.read("photos-000.tar") == b"shard"


@pytest.mark.parametrize("fault", [SLOW_DOWN, INTERNAL])
def test_a_create_that_is_refused_for_long_comes_through(bucket: str, here: Through, fault: Fault) -> None:
    server = here(first(7, "PUT", fault))  # more often than s3fs itself tries again
    assert Store(bucket).create("commit.json", b"ours")
    assert server.made[fault.code] == 7
    assert Store(bucket).read("commit.json") == b"ours"


def test_a_create_whose_answer_is_lost_is_ours_but_anothers_is_not(bucket: str, here: Through) -> None:
    server = here(first(1, "PUT", Fault("lost")))
    store = Store(bucket)
    assert store.create("commit.json", b"ours")
    assert server.made["lost"] == 1
    assert not store.create("commit.json", b"another's")
    assert store.read("commit.json") == b"ours"
    assert store.honours_create()


def test_what_may_not_be_there_is_read_with_one_request(bucket: str, here: Through) -> None:
    Store(bucket).put("a", b"1")
    server = here(lambda asked: None)
    assert (Store(bucket).read_if_there("a"), server.count) == (b"1", 1)
    assert (Store(bucket).read_if_there("b"), server.count) == (None, 2)


@pytest.mark.parametrize("fault", [CONFLICT, REFUSED], ids=["409", "412"])
def test_a_create_that_is_refused_although_nothing_is_there_is_tried_again(
    bucket: str, here: Through, fault: Fault
) -> None:
    server = here(first(2, "PUT", fault))
    store = Store(bucket)
    assert store.create("commit.json", b"ours")
    assert server.made[fault.code] == 2
    assert store.read("commit.json") == b"ours"


@pytest.mark.parametrize(("fault", "burst"), [(SLOW_DOWN, 12), (INTERNAL, 5)], ids=["503", "500"])
def test_a_burst_of_refusals_longer_than_the_clients_own_patience_passes(
    bucket: str, here: Through, fault: Fault, burst: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    server = here(first(burst, "PUT", fault))  # two attempts of botocore's, times five of s3fs's for SlowDown
    Store(bucket).put("a", b"1")
    assert server.made[fault.code] == burst
    assert Store(bucket).read("a") == b"1"


@pytest.mark.slow
def test_a_listing_of_several_pages_is_whole_although_pages_fail(bucket: str, here: Through) -> None:
    names = [f"in/photos-{number:04d}.tar" for number in range(1_100)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: Store(bucket).put(name, b"x"), names))

    def every_second_page(asked: Asked) -> Fault | None:
        return [SLOW_DOWN, None, Fault("short"), INTERNAL, None][asked.turn % 5] if "list-type" in asked.query else None

    server = here(every_second_page)
    _, entries, *_ = resolve_input(bucket + "/in")
    assert [f"in/{entry.name}" for entry in entries] == names
    assert [f"in/{entry.name}" for entry in Store(bucket + "/in").walk()] == names
    assert len(resolve_input(bucket + "/in/photos-{0000..1099}.tar")[1]) == len(names)
    assert server.made["SlowDown"] + server.made["short"] + server.made["InternalError"] >= 6


# --- the real job ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a collection `in` and a protection for it."""
    folder = tmp_path_factory.mktemp("given")
    runs.write_collection(folder / "in", shards=3, per_shard=8)
    (folder / "protection.safetensors").write_bytes(small_protection().to_bytes())
    return folder


@pytest.fixture(scope="module")
def quiet(given: Path) -> Path:
    """The same with `out` of one undisturbed run, from folder to folder."""
    done = job(given, str(given / "in"), str(given / "out"))
    assert done.returncode == 0, done.stderr
    return given


@pytest.fixture
def filled(bucket: str, given: Path) -> str:
    """A bucket with the collection below `in`."""
    source = Store(bucket + "/in")
    for path in sorted((given / "in").glob("*.tar")):
        source.put_file(path.name, path)
    return bucket


def job(given: Path, source: str, output: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The main job with the given protection, in an environment of its own."""
    options = [*runs.WITHOUT_A_FIT, *runs.ONE_WORKER, "--protection", str(given / "protection.safetensors")]
    line = runs.command(source, output, *options)
    with_own = os.environ | environment
    return subprocess.run(line, capture_output=True, text=True, timeout=580, check=False, env=with_own)


def endpoint(url: str) -> dict[str, str]:
    return {"AWS_ENDPOINT_URL": url, "AWS_ENDPOINT_URL_S3": url}


def check_equals_quiet(quiet: Path, filled: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes, counts, and what status and verify say, asked without the faulty server between."""
    output = Store(filled + "/out")
    shards = [entry.name for entry in output.list() if not entry.name.startswith("_scumble/")]
    digests = {name: hashlib.sha256(output.read(name)).hexdigest() for name in shards}
    assert digests == runs.shard_digests(quiet / "out")
    capsys.readouterr()
    assert status.main(["--output", output.url, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["shards"], found["images"], found["quarantined"]) == ("3 of 3 committed", 24, 0)
    assert verify.main(["--output", output.url, "--input", filled + "/in", "--decode", "1"]) == 0
    assert "24 counted, 24 decoded" in capsys.readouterr().out


def failing(asked: Asked) -> Fault | None:
    """What a path's first answers are, one fault after the other; then all is well, though shards come in drops.

    Two of five are refused one to three times, and one commit for long. Then what is read breaks off, one shard more
    often than s3fs itself tries again; and what is put is done but its answer is lost, after two commits were refused
    as if others had made them, although nothing is there.
    """
    key = asked.path.split("/", 2)[-1]  # the bucket's name is another every time
    chance = random.Random(f"{SEED} {asked.method} {key}")
    commit = key.partition("/commits/")[2]
    times = 12 if commit == "photos-000.tar.json" and asked.creates else chance.choice([0, 0, 0, 1, 3])
    faults = [chance.choice([SLOW_DOWN, INTERNAL]) for _ in range(times)]
    if asked.method == "GET":
        often = 7 if key.endswith("in/photos-002.tar") else chance.choice([0, 1, 2])
        faults += [Fault("reset" if turn % 2 else "short") for turn in range(often)]
    elif asked.method == "PUT" and not key.endswith("status.json"):
        refusal = {"photos-001.tar.json": CONFLICT, "photos-002.tar.json": REFUSED}.get(commit)
        faults += [refusal] * 2 if refusal else []
        faults += [Fault("lost")]
    if asked.turn <= len(faults):
        return faults[asked.turn - 1]
    return Fault("drip") if asked.method == "GET" and key.endswith(".tar") else None


AT_LEAST = {"SlowDown": 6, "InternalError": 6, "drip": 6, "reset": 6, "short": 5, "lost": 12}
AT_LEAST |= {CONFLICT.code: 2, REFUSED.code: 2}


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_over_a_store_that_fails_ends_with_the_bytes_of_a_quiet_run(
    quiet: Path, filled: str, through: Through, capsys: pytest.CaptureFixture[str]
) -> None:
    server = through(failing)
    done = job(quiet, filled + "/in", filled + "/out", **endpoint(server.url))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "does not support" not in done.stderr
    assert {kind: count for kind, count in AT_LEAST.items() if server.made[kind] < count} == {}, server.made
    check_equals_quiet(quiet, filled, capsys)


# --- hopeless --------------------------------------------------------------------------------------------------------


def check_one_line(done: subprocess.CompletedProcess[str], seconds: float, limit: float) -> str:
    """Exit code 1, no traceback, exactly one line that says what is wrong; the line."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert seconds < limit
    return errors[0]


def denies_puts(asked: Asked) -> Fault | None:
    return DENIED if asked.method in ("PUT", "POST", "DELETE") else None


def denies_strangers(asked: Asked) -> Fault | None:
    """What the in-process server would not look at; a real one refuses by itself."""
    return UNKNOWN_KEY if "Credential=stranger/" in asked.authorization else None


HOPELESS: dict[str, tuple[Plan, dict[str, str], str, str, str]] = {
    # the server's plan, the environment, input and output below the bucket, what the line must say
    "wrong credentials": (
        denies_strangers,
        {"AWS_ACCESS_KEY_ID": "stranger", "AWS_SECRET_ACCESS_KEY": "not the secret of anybody"},
        *("{bucket}/in", "{bucket}/out"),
        "cannot list {bucket}/in: *; access denied: check the credentials of this environment",
    ),
    "no such input": (
        lambda _: None,
        {},
        *("s3://no-such-bucket-anywhere/in", "{bucket}/out"),
        "cannot list s3://no-such-bucket-anywhere/in: no such bucket",
    ),
    "no such output": (
        lambda _: None,
        {},
        *("{bucket}/in", "s3://no-such-bucket-anywhere/out"),
        "cannot list s3://no-such-bucket-anywhere/out: no such bucket",
    ),
    "read-only output": (
        denies_puts,
        {},
        *("{bucket}/in", "{bucket}/out"),
        "cannot create {bucket}/out/_scumble/*: *; access denied: check the credentials of this environment",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOPELESS)
def test_a_store_that_will_never_do_is_one_line_before_any_work(
    given: Path, filled: str, through: Through, name: str
) -> None:
    plan, environment, source, output, says = HOPELESS[name]
    server, started = through(plan), time.monotonic()
    places = [url.format(bucket=filled) for url in (source, output)]
    done = job(given, *places, **environment, **endpoint(server.url))
    line = check_one_line(done, time.monotonic() - started, 120)
    for words in says.format(bucket=filled).split("*"):
        assert words in line
    assert len(done.stderr.splitlines()) == 1
    assert "not the secret" not in done.stderr
    assert Store(filled + "/out").list() == []


@pytest.mark.slow
def test_a_store_that_refuses_all_connections_is_one_line_within_two_minutes(given: Path, filled: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"  # bound but not listening: refused
        started = time.monotonic()
        done = job(given, filled + "/in", filled + "/out", **endpoint(url))
    line = check_one_line(done, time.monotonic() - started, 180)
    assert f"cannot list {filled}/in: Could not connect to the endpoint URL" in line
    assert Store(filled + "/out").list() == []


@pytest.mark.slow
@pytest.mark.ray
def test_a_store_that_goes_down_in_the_middle_ends_the_run_and_the_next_start_finishes_it(
    quiet: Path, filled: str, through: Through, capsys: pytest.CaptureFixture[str]
) -> None:
    commits: list[str] = []

    def down_from_the_first_commit_on(asked: Asked) -> Fault | None:
        if asked.method == "PUT" and "/commits/" in asked.path:
            commits.append(asked.path)
        return Fault("answer", 503, "ServiceUnavailable") if commits else None

    server, started = through(down_from_the_first_commit_on), time.monotonic()
    environment = endpoint(server.url) | {"AWS_MAX_ATTEMPTS": "1"}
    done = job(quiet, filled + "/in", filled + "/out", **environment)
    assert commits
    line = check_one_line(done, time.monotonic() - started, 400)
    assert re.match(r"error: cannot (create|read|write|open|look up) s3://.*Service ?Unavailable", line), line
    assert status.main(["--output", filled + "/out", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["shards"], found["images"], found["done"]) == ("0 of 3 committed", 0, False)
    again = job(quiet, filled + "/in", filled + "/out")
    assert again.returncode == 0, again.stderr
    check_equals_quiet(quiet, filled, capsys)
