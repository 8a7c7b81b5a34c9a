"""One run at a time below an output: an object that its holder renews, and that others take over once it is stale.

Nobody's wall clock is believed. How old the lease is, the store itself says (the same clock set its time and tells the
time now); whoever waits may also see it unchanged for its whole length by the own monotonic clock. The holder counts
by that clock too, from before each renewal was sent, so that it gives up before anybody else may begin.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from dataclasses import dataclass, replace

from pipeline.errors import ConflictError, InputError, StoreError
from pipeline.json_record import CompactRecord
from pipeline.storage.store import Seen, Store

GRACE_S = 2.0  # times in answers of a store are whole seconds
_POLL_S = 1.0


class LeaseLost(ConflictError):
    """The lease was taken over, or could not be renewed in time; nothing may be committed any more."""


@dataclass(frozen=True)
class Held:
    """Somebody else's lease that is alive."""

    who: str
    age_s: float  # since its last heartbeat
    duration_s: float

    def __str__(self) -> str:
        return f"{self.who}, heartbeat {max(0.0, self.age_s):.0f} s ago, ends {self.duration_s:.0f} s after its last"


def take_lease(store: Store, name: str, *, duration_s: float, wait_s: float = 0.0) -> Lease | Held:
    """The lease, with its heartbeat running, or whoever holds it; waits up to `wait_s` seconds for it.

    duration_s  how long it lasts without a heartbeat; four are sent in that time
    """
    began = _now()
    content = LeaseRecord(uuid.uuid4().hex, f"{socket.gethostname()} pid {os.getpid()}", duration_s)
    unchanged: tuple[str, float] = ("", began)
    while True:
        sent = _now()
        seen = store.look(name)
        if seen is not None and seen.etag != unchanged[0]:
            unchanged = (seen.etag, sent)
        held = _held(seen, sent - unchanged[1])
        if held is None:
            etag = _taken(store, name, content, seen)
            if etag is not None:
                return Lease(store, name, content, etag, sent)
            held = Held("another run that started at the same time", 0.0, duration_s)
        if _now() - began >= wait_s:
            return held
        time.sleep(min(_POLL_S, wait_s))


@dataclass(frozen=True)
class LeaseRecord(CompactRecord):
    """lease.json: whose it is; the number of renewals makes every version unlike any other.

    who         for people
    duration_s  how long it lasts without a heartbeat
    """

    holder: str
    who: str
    duration_s: float
    renewals: int = 0
    released: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.duration_s < float("inf"):
            raise ValueError(f"duration_s is {self.duration_s}")


# a newer version's, or a damaged one: neither is replaced at once, and neither is in the way for ever
_UNREADABLE = LeaseRecord("", "somebody whose lease cannot be read", 60.0)


def _held(seen: Seen | None, unchanged_s: float) -> Held | None:
    """None if the lease may be taken."""
    if seen is None:
        return None
    try:
        found = LeaseRecord.from_bytes(seen.data, "the lease")
    except InputError:
        found = _UNREADABLE
    if found.released or max(seen.age_s, unchanged_s) > found.duration_s + GRACE_S:
        return None
    return Held(found.who, seen.age_s, found.duration_s)


def _taken(store: Store, name: str, content: LeaseRecord, seen: Seen | None) -> str | None:
    """The version that is ours, or None if somebody was faster."""
    data = content.to_bytes()
    if seen is not None:
        return store.replace_if(name, data, seen.etag)
    store.create(name, data)  # an answer may have been lost: what stands there now decides
    now = store.look(name)
    return now.etag if now is not None and now.data == data else None


class Lease:
    """A lease that is ours while `check` does not raise; a thread renews it until it is released."""

    def __init__(self, store: Store, name: str, content: LeaseRecord, etag: str, renewed: float) -> None:
        self._store, self._name, self._content, self._etag = store, name, content, etag
        self._until = renewed + content.duration_s
        self._lost = ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise LeaseLost, one line that says why, unless the lease is ours for some while yet."""
        if not self._lost and _now() > self._until:
            self._lost = f"no heartbeat reached the store for {self._content.duration_s:.0f} s"
        if self._lost:
            raise LeaseLost(
                f"{self._store.url}/{self._name}: {self._lost}, so another run may go on from here; nothing more was "
                "committed by this one; start again if none is running"
            )

    def release(self) -> None:
        """Let the next run begin at once; if the store does not answer, it begins when the lease ends."""
        self._over.set()
        self._thread.join()
        if not self._lost:
            with contextlib.suppress(StoreError):
                self._store.replace_if(self._name, replace(self._content, released=True).to_bytes(), self._etag)

    def _beat(self) -> None:
        while not self._over.wait(self._content.duration_s / 4):
            if self._lost or _now() > self._until:
                return
            sent = _now()
            try:
                etag = self._renewed()
            except StoreError:
                continue  # it may answer before the lease ends
            if etag is None:
                self._lost = "the lease was taken over"
                return
            self._etag, self._until = etag, sent + self._content.duration_s

    def _renewed(self) -> str | None:
        self._content = replace(self._content, renewals=self._content.renewals + 1)
        data = self._content.to_bytes()
        etag = self._store.replace_if(self._name, data, self._etag)
        if etag is not None:
            return etag
        seen = self._store.look(self._name)  # a heartbeat whose answer was lost is ours too
        if seen is None or self._content.holder.encode() not in seen.data:
            return None
        return self._store.replace_if(self._name, data, seen.etag)


def _now() -> float:
    """Seconds by a clock that nobody sets and that goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
