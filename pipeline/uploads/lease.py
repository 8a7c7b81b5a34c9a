"""Only one run at a time works on an output: the holder renews an object, which others take over once it is stale.

No wall clock is trusted. The age of the lease comes from the store, whose clock set its timestamp and tells the current
time; a waiting run may also see it unchanged for its whole duration by its own monotonic clock. The holder uses its
monotonic clock too, counting from before each renewal was sent, so that it gives up before anyone else may take over.
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
from pipeline.storage.store import Store
from pipeline.storage.versions import Seen

GRACE_S = 2.0  # stores report times in whole seconds
_POLL_S = 1.0


class LeaseLost(ConflictError):
    """The lease was taken over or could not be renewed in time; nothing more may be committed."""


@dataclass(frozen=True)
class Held:
    """Another run's live lease."""

    who: str
    age_s: float  # since its last heartbeat
    duration_s: float

    def __str__(self) -> str:
        return f"{self.who}, last heartbeat {max(0.0, self.age_s):.0f} s ago, expires {self.duration_s:.0f} s after it"


def take_lease(
    store: Store, name: str, *, duration_s: float, wait_s: float = 0.0, stop: threading.Event | None = None
) -> Lease | Held:
    """Take the lease and start its heartbeat, or return its holder after waiting up to `wait_s` seconds.

    duration_s  how long it lasts without a heartbeat; four heartbeats are sent in that time
    stop        ends the waiting when it is set
    """
    stop = stop or threading.Event()
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
        if _now() - began >= wait_s or stop.wait(min(_POLL_S, wait_s)):
            return held


@dataclass(frozen=True)
class LeaseRecord(CompactRecord):
    """lease.json: who holds it; counting renewals makes every version unique.

    who         the holder, for people
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


# a newer version's lease, or a damaged one: not replaced at once, but it does not block for ever either
_UNREADABLE = LeaseRecord("", "a run whose lease cannot be read", 60.0)


def _held(seen: Seen | None, unchanged_s: float) -> Held | None:
    """The live lease, or None if it may be taken."""
    if seen is None:
        return None
    try:
        lease = LeaseRecord.from_bytes(seen.data, "the lease")
    except InputError:
        lease = _UNREADABLE
    if lease.released or max(seen.age_s, unchanged_s) > lease.duration_s + GRACE_S:
        return None
    return Held(lease.who, seen.age_s, lease.duration_s)


def _taken(store: Store, name: str, content: LeaseRecord, seen: Seen | None) -> str | None:
    """The etag of our version, or None if another run was faster."""
    data = content.to_bytes()
    if seen is not None:
        return store.replace_if(name, data, seen.etag)
    store.create(name, data)  # the response may have been lost: what is there now decides
    now = store.look(name)
    return now.etag if now is not None and now.data == data else None


class Lease:
    """A lease we hold as long as `check` does not raise; a thread renews it until it is released."""

    def __init__(self, store: Store, name: str, content: LeaseRecord, etag: str, renewed: float) -> None:
        self._store, self._name, self._content, self._etag = store, name, content, etag
        self._until = renewed + content.duration_s
        self._lost = ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise LeaseLost, saying why, unless the lease is still ours."""
        if not self._lost and _now() > self._until:
            self._lost = f"no heartbeat reached the store for {self._content.duration_s:.0f} s"
        if self._lost:
            raise LeaseLost(
                f"{self._store.url}/{self._name}: {self._lost}, so another run may have taken over; this one committed "
                "nothing more; start it again if no other is running"
            )

    def release(self) -> None:
        """Let the next run start at once; if the store does not respond, it starts when the lease expires."""
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
                continue  # the store may recover before the lease expires
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
        seen = self._store.look(self._name)  # a heartbeat whose response was lost still counts
        if seen is None or self._content.holder.encode() not in seen.data:
            return None
        return self._store.replace_if(self._name, data, seen.etag)


def _now() -> float:
    """Seconds on a clock that is never adjusted and keeps running while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
