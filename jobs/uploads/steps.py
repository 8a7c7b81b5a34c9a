"""The steps of a run over new uploads: check, list, protect unit by unit, commit, print a summary."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from jobs.shared import cli
from jobs.shared.progress import Progress, progress
from pipeline import layout
from pipeline.errors import Reason, ScumbleError, StoreError, ending
from pipeline.hashing import sha256
from pipeline.measures.cpus import available_cpus
from pipeline.metrics import LEASE_HELD, Recorder, report_failure, report_shard, report_success
from pipeline.records import shown
from pipeline.shards.names import fault_of, output_name
from pipeline.storage.places import check_apart
from pipeline.storage.store import Store, file_at
from pipeline.uploads.deltas import UploadDeltas, check_protection, deltas_from
from pipeline.uploads.lease import Held, Lease, LeaseLost, take_lease
from pipeline.uploads.ledger import Ledger
from pipeline.uploads.listing import LookedAhead, Tally, changes
from pipeline.uploads.origin import Origin, check_origin, claim, honours_conditions
from pipeline.uploads.settings import UploadSettings
from pipeline.uploads.summary import Summary
from pipeline.uploads.transaction import Places, UnitResult, protect_unit
from pipeline.uploads.units import Item, Unit, units_of

Protect = Callable[[Iterable[Unit]], Iterator[UnitResult]]

COMMAND, STAGE = "protect_uploads", "uploads"  # in metrics
_COMPACT_UNITS = 200  # between two compactions of a long run
_SILENT_UNITS = 5  # of which the store gave no object, and not even an answer: it is down
_LOOKING = 0.1  # share of the time that may go into finding out how much there is to do
_SHOWN = 50


@dataclass(frozen=True)
class UploadsRun:
    """A run that was checked and may start."""

    settings: UploadSettings
    places: Places
    origin: Origin
    protection: bytes
    key: bytes | None
    is_first: bool  # nothing was written to this output yet

    def load(self) -> UploadDeltas:
        """The protection with its surrogate; takes seconds, so only once there is something to protect."""
        weights = Path(self.settings.surrogate_weights) if self.settings.surrogate_weights else None
        device = "cuda" if self.settings.gpus_per_worker else "cpu"
        small = self.settings.small_images
        return deltas_from(self.protection, key=self.key, weights=weights, device=device, small_images=small)


def prepare_uploads(settings: UploadSettings) -> UploadsRun:
    """Check everything that can be checked before anything is listed or written."""
    source, output = Store(settings.input), Store(settings.output)
    check_apart(source, output)
    key = cli.read_key(settings.key_file)
    store, name = file_at(settings.protection)
    protection = store.read(name)
    epsilon = check_protection(protection, has_key=key is not None)
    origin = Origin(source.root, sha256(protection), epsilon, settings.deciding)
    is_first = not check_origin(output, origin)
    if is_first:
        next(iter(source.walk()), None)  # raises if there is no such folder, before the output is claimed
    places = Places(source, output, settings, origin.fingerprint)
    return UploadsRun(settings, places, origin, protection, key, is_first)


def new_uploads(run: UploadsRun, tally: Tally) -> Iterator[Item]:
    """New uploads, one by one while the input is listed."""
    places, encode = run.places, run.settings.encode
    output = places.output

    def fault(name: str) -> tuple[Reason, str] | None:
        found = fault_of(name)
        long = "" if found else output.too_long(output_name(name, encode))
        return (Reason.UNUSABLE_NAME, f"in the output it would be {long}") if long else found

    known, now = Ledger(output).known(), places.source.clock()
    settle_s = run.settings.settle
    return changes(places.source.walk(), known, now=now, settle_s=settle_s, fault=fault, tally=tally)


def first_look(run: UploadsRun) -> int:
    """The dry run: print names and counts, write nothing."""
    summary = Summary()
    size = 0
    for number, item in enumerate(new_uploads(run, summary.tally)):
        size += item.size
        if number < _SHOWN:
            print(f"new          {shown(item.name)}" + (f" ({item.fault[0].value})" if item.fault else ""))
        elif number == _SHOWN:
            print("new          ... and more")
    print(f"to protect   {summary.tally.new + summary.tally.changed:,} objects, {size / 1e6:,.1f} MB")
    print("\n".join(line for line in summary.lines() if line.startswith(("found", "deleted"))))
    return cli.DONE


def round_of(run: UploadsRun, protect: Protect, stop: threading.Event, metrics: Recorder) -> int:
    """Protect what is new, once and under the lease; with --watch, a failure that may pass does not end the job."""
    try:
        return _round(run, protect, stop, metrics)
    except (StoreError, LeaseLost) as error:
        if run.settings.watch is None:
            raise
        print(f"error: {error}; looking again in {run.settings.watch:.0f} s", file=sys.stderr, flush=True)
        return cli.FAILED


def _round(run: UploadsRun, protect: Protect, stop: threading.Event, metrics: Recorder) -> int:
    settings, output = run.settings, run.places.output
    lease = take_lease(output, layout.UPLOADS_LEASE, duration_s=settings.lease, wait_s=settings.wait_lease, stop=stop)
    metrics.record(LEASE_HELD, float(isinstance(lease, Held)), command=COMMAND)
    if isinstance(lease, Held):
        print(f"another run is working on {settings.output} ({lease}); nothing to do")
        return cli.DONE
    with contextlib.ExitStack() as stack:
        stack.callback(lease.release)
        summary = Summary()
        try:
            if run.is_first and not check_origin(output, run.origin):
                _claim(run)
            output.sweep()
            _protect_new(run, protect, stop, lease, summary, metrics)
        except BaseException as error:
            report_failure(metrics, STAGE, error)
            _note_failure(output, summary, error)
            raise
        code = _finish(run, summary, stopped=stop.is_set())
        if code == cli.DONE and not stop.is_set():
            report_success(metrics, COMMAND)
        return code


def _claim(run: UploadsRun) -> None:
    if not honours_conditions(run.places.output):
        cli.warn(
            f"{run.settings.output} does not support If-Match or create-if-absent: never run two jobs on it at once"
        )
    claim(run.places.output, run.origin)


def _protect_new(
    run: UploadsRun, protect: Protect, stop: threading.Event, lease: Lease, summary: Summary, metrics: Recorder
) -> None:
    ledger, settings = Ledger(run.places.output), run.settings
    ledger.compact(merge=False, before=lease.check)  # what a run left that was killed
    items = LookedAhead(new_uploads(run, summary.tally))
    units = units_of(items, max_images=settings.unit_images, max_bytes=settings.unit_bytes)
    silent = 0
    with progress(STAGE, 0, "object", run.places.output, layout.UPLOADS_PROGRESS, metrics) as bar:
        for result in protect(_until(stop, units)):
            lease.check()
            if result.commit.rows:
                ledger.commit(result.commit)
                report_shard(metrics, STAGE, result.counts)
            summary.add(result)
            items.look(_LOOKING)
            _say(bar, result, summary.tally, items)
            silent = silent + 1 if result.is_down and not result.commit.rows else 0
            if silent == _SILENT_UNITS:
                raise StoreError(f"{_SILENT_UNITS} units in a row could not be read: {result.failed[0][1]}")
            if summary.units % _COMPACT_UNITS == 0:
                ledger.compact(merge=False, before=lease.check)
    ledger.compact(merge=True, before=lease.check)


def _until(stop: threading.Event, units: Iterator[Unit]) -> Iterator[Unit]:
    for unit in units:
        if stop.is_set():
            return
        yield unit


def _say(bar: Progress, result: UnitResult, tally: Tally, items: LookedAhead) -> None:
    """Show what is done of what was found so far."""
    bar.found(tally.new + tally.changed, is_whole=items.is_whole)
    units = len(result.commit.rows) + len(result.moved) + len(result.failed)
    counts = {"images": result.protected, "rejected": result.quarantined}
    bar.step(result.commit.unit[:12], units=units, spent=result.seconds, **counts)


def _finish(run: UploadsRun, summary: Summary, *, stopped: bool) -> int:
    """Print and write the counts, warn where a user must act; returns the exit code."""
    settings, share = run.settings, summary.quarantine_share
    code = cli.QUARANTINED if share > settings.max_quarantine or summary.lost else cli.DONE
    code = cli.FAILED if summary.failed else code
    record = summary.record("stopped" if stopped else "done", code)
    run.places.output.put(layout.UPLOADS_LAST_RUN, record.to_bytes())
    print("\n".join(summary.lines()))
    where = f"{settings.output}/{layout.UPLOADS}"
    if not summary.tally.listed and not stopped:
        cli.warn(f"{settings.input} is empty; check the path")
    if summary.drifts(settings.max_drift):
        shown_share = f"{summary.drift_share:.0%} of the new images are unlike what the protection was fitted on"
        cli.warn(f"{shown_share} (--max-drift {settings.max_drift:.0%}): plan to fit a new one")
    if summary.finer:
        from pipeline.deltas.survival import finer_jpegs  # imported late, like all of `deltas`

        cli.warn(finer_jpegs(summary.finer))
    cli.print_losses(summary.lost, f"{where}/quarantine/")
    if share > settings.max_quarantine:
        allowed = f"--max-quarantine allows {settings.max_quarantine:.1%}"
        cli.warn(f"{share:.1%} of the images were quarantined, {allowed}; see {where}/quarantine/")
    if summary.failed:
        name, error = summary.failed[0]
        cli.warn(
            f"{summary.num_failed:,} objects could not be read and are left for the next run; first {name}: {error}"
        )
    if stopped:
        print("stopped after the current unit; the next run continues")
    return code


def _note_failure(output: Store, summary: Summary, error: BaseException) -> None:
    message, code = ending(error)
    with contextlib.suppress(ScumbleError):  # the store itself may be what fails
        output.put(layout.UPLOADS_LAST_RUN, summary.record("failed", code, message).to_bytes())


@contextlib.contextmanager
def stopping() -> Iterator[threading.Event]:
    """An event that SIGTERM sets: the run ends after the current unit."""
    stop = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def workers(run: UploadsRun) -> Iterator[Protect]:
    """What protects units: this process, or with --ray actors; no model is loaded before the first unit."""
    with contextlib.ExitStack() as stack:
        if run.settings.ray and "RAY_ADDRESS" in os.environ:  # a run that finds nothing reports there, too
            _connect(run, stack)
        yield partial(_on_ray, run, stack) if run.settings.ray else _Here(run)


def _connect(run: UploadsRun, stack: contextlib.ExitStack) -> None:
    """Join the cluster, or start a private one, unless that has been done: with --watch it stays."""
    import ray

    from actors.cluster.connect import connected
    from actors.cluster.failures import ray_failures

    if not ray.is_initialized():
        with ray_failures():
            stack.enter_context(connected(run.settings))


class _Here:
    def __init__(self, run: UploadsRun) -> None:
        self._run = run
        self._deltas: UploadDeltas | None = None

    def __call__(self, units: Iterable[Unit]) -> Iterator[UnitResult]:
        for unit in units:
            self._deltas = self._deltas or self._run.load()
            yield protect_unit(unit, self._run.places, self._deltas, threads=available_cpus())


def _on_ray(run: UploadsRun, stack: contextlib.ExitStack, units: Iterable[Unit]) -> Iterator[UnitResult]:
    """Imports and starts Ray only for the first unit: most runs find nothing new."""
    waiting = iter(units)
    first = next(waiting, None)
    if first is None:
        return
    from actors.cluster.connect import workers_now
    from actors.cluster.failures import ray_failures
    from actors.uploader import UploaderContext, over_units

    _connect(run, stack)
    with ray_failures():
        weights = run.settings.surrogate_weights
        context = UploaderContext(run.places, run.protection, run.key, weights)
        yield from over_units(chain([first], waiting), context, workers_now(run.settings))
