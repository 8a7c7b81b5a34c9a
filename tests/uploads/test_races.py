"""Several runs at once, killed, frozen or told to stop: every object is protected exactly once."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import layout
from pipeline.storage.store import Store
from pipeline.uploads.lease import LeaseLost, take_lease
from pipeline.uploads.units import Unit
from tests.support.runs import ROOT, wait_for
from tests.support.uploads import Job, check_all, jpeg, photos, upload

CHILD = """
import sys, time
sys.path.insert(0, {root!r})
import jobs.uploads.steps, pipeline.uploads.transaction as transaction
from jobs import protect_uploads
from jobs.shared import cli
from tests.support.uploads import fake_deltas
jobs.uploads.steps.deltas_from = fake_deltas
{more}
sys.argv = ["protect_uploads.py", *{arguments!r}]
raise SystemExit(cli.run(protect_uploads.main))
"""
SLOWLY = """
real = transaction._put_image
def slowly(*given):
    time.sleep({seconds})
    return real(*given)
transaction._put_image = slowly
"""
STOPS = """
from pipeline.uploads.ledger import Ledger
real = Ledger.commit
count = [0]
def stops(self, commit):
    count[0] += 1
    if count[0] == 3:
        print("between put and commit", flush=True)
        time.sleep(600)
    real(self, commit)
Ledger.commit = stops
"""


def child(job: Job, *options: str, more: str = "") -> subprocess.Popen[str]:
    """The command as a process of its own, with the deltas of these tests."""
    program = CHILD.format(root=str(ROOT), arguments=job.arguments(*options), more=more)
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def test_of_two_runs_at_once_one_does_all_and_the_other_ends_at_once(job: Job) -> None:
    upload(job.source, photos(12))
    runs = [child(job, more=SLOWLY.format(seconds=0.2)) for _ in range(2)]
    results = [ended(run) for run in runs]
    assert [code for code, _, _ in results] == [0, 0], results
    check_all(job, set(photos(12)))
    idle = [out for _, out, _ in results if "another run is working on" in out]
    # where the second started only after the first had ended, it found nothing new
    assert len(idle) + sum("0 new, 0 changed, 12 already done" in out for _, out, _ in results) == 1


@pytest.mark.slow
@pytest.mark.s3
def test_many_runs_at_once_on_a_bucket_protect_each_object_once(remote: Job) -> None:
    upload(remote.source, photos(20))
    runs = [child(remote, "--wait-lease", "60", more=SLOWLY.format(seconds=0.05)) for _ in range(3)]
    results = [ended(run) for run in runs]
    assert [code for code, _, _ in results] == [0, 0, 0], results
    check_all(remote, set(photos(20)))
    done = [int(line.split()[1]) for _, out, _ in results for line in out.splitlines() if line.startswith("protected ")]
    assert sum(done) == 20


def test_a_run_killed_between_put_and_commit_is_taken_over_when_its_lease_ends(job: Job) -> None:
    upload(job.source, photos(10))
    first = child(job, "--lease", "2", more=STOPS)
    assert first.stdout is not None
    assert first.stdout.readline() == "between put and commit\n"
    first.kill()
    first.communicate()
    assert job.outputs().keys() == {f"{number:02d}.jpg" for number in range(7)}  # units of 1, 2 and 4
    assert len(job.rows()) == 3
    assert job.run("--lease", "2", "--wait-lease", "30") == 0
    check_all(job, set(photos(10)))
    assert job.last()["protected"] == 7


def test_a_run_that_was_frozen_past_its_lease_commits_nothing_more(job: Job) -> None:
    upload(job.source, photos(10))
    frozen = child(job, "--lease", "2", more=SLOWLY.format(seconds=0.3))
    wait_for(lambda: Store(job.output.url).info("00.jpg") is not None, frozen)
    frozen.send_signal(signal.SIGSTOP)
    assert job.run("--lease", "2", "--wait-lease", "60") == 0
    frozen.send_signal(signal.SIGCONT)
    code, _, err = ended(frozen)
    assert code == 1
    assert "so another run may have taken over; this one committed nothing more" in err
    check_all(job, set(photos(10)))


def test_two_without_a_lease_still_count_each_object_once(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    assert job.run() == 0
    upload(job.source, photos(14))
    monkeypatch.setattr("pipeline.uploads.lease.Lease.check", lambda self: None)
    leases = iter([layout.UPLOADS_LEASE + "1", layout.UPLOADS_LEASE + "2"])
    barrier, codes = threading.Barrier(2, timeout=10), []
    monkeypatch.setattr(
        "jobs.uploads.steps.take_lease", lambda store, name, **options: take_lease(store, next(leases), **options)
    )
    real = jobs_protect_unit()

    def together(*given: object, **options: object) -> object:
        result = real(*given, **options)
        with contextlib.suppress(threading.BrokenBarrierError):
            barrier.wait()  # both have put the same unit, neither has committed it
        return result

    monkeypatch.setattr("jobs.uploads.steps.protect_unit", together)
    monkeypatch.setattr("jobs.uploads.steps.stopping", _no_signals)
    threads = [threading.Thread(target=lambda: codes.append(_code(job))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0 in codes, codes
    monkeypatch.setattr("jobs.uploads.steps.take_lease", take_lease)
    assert job.run() == 0
    check_all(job, set(photos(14)))


class _no_signals:
    """Signals belong to the main thread."""

    def __enter__(self) -> threading.Event:
        return threading.Event()

    def __exit__(self, *_: object) -> None:
        return


def _code(job: Job) -> int | str:
    try:
        return job.run()
    except Exception as error:
        return str(error)


def test_a_watcher_ends_cleanly_on_sigterm(job: Job) -> None:
    upload(job.source, photos(3))
    watcher = child(job, "--watch", "0.3", more=SLOWLY.format(seconds=0.1))
    wait_for(lambda: len(job.outputs()) == 3 if Path(job.output.root).exists() else False, watcher)
    upload(job.source, {"later.jpg": jpeg(50)})
    wait_for(lambda: "later.jpg" in job.outputs(), watcher)
    watcher.send_signal(signal.SIGTERM)
    code, out, err = ended(watcher)
    assert code == 0, err
    check_all(job, {*photos(3), "later.jpg"})
    assert job.run() == 0  # the lease was given back
    assert job.last()["known"] == 4


def test_sigterm_in_the_middle_finishes_the_unit_and_the_next_run_goes_on(job: Job) -> None:
    upload(job.source, photos(20))
    run = child(job, "--unit-images", "2", more=SLOWLY.format(seconds=0.2))
    wait_for(lambda: Path(job.output.path("02.jpg")).exists(), run)
    run.send_signal(signal.SIGTERM)
    code, out, err = ended(run)
    assert code == 0, err
    assert "stopped after the current unit; the next run continues" in out
    assert job.last()["state"] == "stopped"
    assert 3 <= len(job.rows()) < 20
    assert job.outputs().keys() == job.rows().keys()
    assert job.run() == 0
    check_all(job, set(photos(20)))


def test_a_lost_lease_stops_the_run_before_its_next_commit(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    upload(job.source, photos(9))
    real = jobs_protect_unit()

    def steals(unit: Unit, *given: object, **options: object) -> object:
        if len(unit.items) == 4:
            Store(job.output.url).put(layout.UPLOADS_LEASE, b'{"who":"other","duration_s":60,"released":false}')
            time.sleep(0.8)
        return real(unit, *given, **options)

    monkeypatch.setattr("jobs.uploads.steps.protect_unit", steals)
    with pytest.raises(LeaseLost):
        job.run("--lease", "1.2")
    assert len(job.rows()) == 3
    assert json.loads(job.output.read(layout.UPLOADS_LEASE))["who"] == "other"


def jobs_protect_unit() -> Callable[..., object]:
    from jobs.uploads import steps as uploads

    return uploads.protect_unit
