"""One run at a time, whatever the clocks say and whoever dies."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.errors import StoreError
from pipeline.storage.store import Store
from pipeline.uploads import lease as leases
from pipeline.uploads.lease import Held, Lease, LeaseLost, take_lease

NAME = "_scumble/uploads/lease.json"


@contextmanager
def taken(store: Store, duration_s: float = 20.0, wait_s: float = 0.0) -> Iterator[Lease]:
    lease = take_lease(store, NAME, duration_s=duration_s, wait_s=wait_s)
    assert isinstance(lease, Lease), lease
    try:
        yield lease
    finally:
        lease.release()


def die(lease: Lease) -> None:
    """As a killed process: no heartbeat, no release."""
    lease._over.set()
    lease._thread.join()


def test_a_second_run_finds_the_first_and_goes_on_when_it_has_ended(store: Store) -> None:
    with taken(store) as lease:
        lease.check()
        other = take_lease(store, NAME, duration_s=20)
        assert isinstance(other, Held)
        assert f"pid {os.getpid()}" in str(other)
    with taken(store):
        pass


def test_of_many_who_begin_at_once_one_gets_it(store: Store) -> None:
    store.put("warm", b"")
    barrier = threading.Barrier(6)
    got: list[Lease | Held] = []

    def begin() -> None:
        barrier.wait()
        got.append(take_lease(store, NAME, duration_s=20))

    threads = [threading.Thread(target=begin) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [one for one in got if isinstance(one, Lease)]
    assert len(winners) == 1
    winners[0].release()


def test_a_heartbeat_keeps_it_and_a_dead_holder_loses_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "GRACE_S", 1.0)
    lease = take_lease(store, NAME, duration_s=2.0)
    assert isinstance(lease, Lease)
    time.sleep(3.5)
    lease.check()
    assert isinstance(take_lease(store, NAME, duration_s=2.0), Held)
    die(lease)
    with taken(store, duration_s=20, wait_s=30):
        with pytest.raises(
            LeaseLost, match=r"no heartbeat reached the store for 2 s, so another run may have taken over"
        ):
            lease.check()
        lease.release()  # takes nothing from the other
        assert isinstance(take_lease(store, NAME, duration_s=2.0), Held)


@pytest.mark.parametrize("wrong", [-86400.0, 86400.0])
def test_nobodys_wall_clock_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    store = Store(str(tmp_path))
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + wrong)
    lease = take_lease(store, NAME, duration_s=20)  # by a holder whose clock is wrong
    assert isinstance(lease, Lease)
    monkeypatch.setattr(time, "time", real)
    assert isinstance(take_lease(store, NAME, duration_s=20), Held)
    monkeypatch.setattr(time, "time", lambda: real() + wrong)
    assert isinstance(take_lease(store, NAME, duration_s=20), Held)  # and by a looker whose clock is wrong
    lease.release()
    assert str(int(real()))[:5] not in store.read(NAME).decode()


def test_a_lease_that_never_changes_ends_even_if_the_store_calls_it_young(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "GRACE_S", 0.2)
    store = Store(str(tmp_path))
    lease = take_lease(store, NAME, duration_s=1.0)
    assert isinstance(lease, Lease)
    die(lease)
    ahead = time.time() + 86400
    os.utime(store.path(NAME), (ahead, ahead))
    assert isinstance(take_lease(store, NAME, duration_s=1.0), Held)
    with taken(store, duration_s=20, wait_s=15):
        pass


def test_a_holder_whose_lease_was_taken_stops(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    lease = take_lease(store, NAME, duration_s=1.0)
    assert isinstance(lease, Lease)
    store.put(NAME, json.dumps({"holder": "other", "who": "other", "duration_s": 60, "released": False}).encode())
    time.sleep(0.6)
    with pytest.raises(LeaseLost, match="the lease was taken over"):
        lease.check()
    lease.release()
    assert json.loads(store.read(NAME))["who"] == "other"


def test_a_store_that_fails_for_a_while_costs_nothing_and_for_long_the_lease(tmp_path: Path) -> None:
    class Failing(Store):
        fails = False

        def replace_if(self, name: str, data: bytes, etag: str) -> str | None:
            done = super().replace_if(name, data, etag)
            if self.fails:
                raise StoreError("the answer was lost")  # after it was written
            return done

    store = Failing(str(tmp_path))
    lease = take_lease(store, NAME, duration_s=1.6)
    assert isinstance(lease, Lease)
    store.fails = True
    time.sleep(0.9)
    store.fails = False
    time.sleep(1.4)
    lease.check()
    store.fails = True
    time.sleep(2.2)
    with pytest.raises(LeaseLost):
        lease.check()
    lease.release()
