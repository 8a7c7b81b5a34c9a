"""The progress of a run, counted from its commits, from the ledger of its uploads, or from its finished trials."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from pipeline import layout
from pipeline.errors import InputError
from pipeline.relearning.evaluation import REPORT, SETTINGS, TRIALS
from pipeline.report.page import duration, size
from pipeline.runs.run_record import RunStatus, StageProgress, read_run
from pipeline.runs.totals import totals_of
from pipeline.storage.store import Store, file_at
from pipeline.uploads.ledger import Ledger
from pipeline.uploads.summary import LastRun

_SHOWN_AS = {"input_bytes": "read", "output_bytes": "written"}
_SHOWN_SHARE = 0.1  # of the time, below which a step is not named


def any_status_of(url: str) -> dict[str, Any]:
    """How far the run is that writes to `url`, whichever job it is. Raises InputError if none was started there."""
    if url.endswith(".safetensors"):
        return training_status_of(*file_at(url))
    output = Store(url)
    look = uploads_status_of if output.info(layout.UPLOADS_ORIGIN) else status_of
    return (evaluation_status_of if output.info(SETTINGS) else look)(output)


def status_of(output: Store) -> dict[str, Any]:
    """Counts over all commits of an output. Raises InputError if no run was started there."""
    record = read_run(output)
    totals, total = totals_of(output), record.num_shards
    status, progress = RunStatus.read(output, layout.STATUS), StageProgress.read(output, layout.PROGRESS)
    facts: dict[str, Any] = {} if status is None else {"state": status.state}
    if status is not None and status.message is not None:
        facts["message"] = status.message
    if progress is not None and status is not None and (status.state, status.stage) == ("running", progress.stage):
        facts["progress"] = progress.to_json()
    return facts | {
        "fingerprint": record.fingerprint,
        "stage": _stage(output, total),
        "shards": f"{totals.shards} of {total} committed",
        "done": totals.shards == total,
        "images": totals.images,
        "quarantined": totals.quarantined,
        "reasons": dict(sorted(totals.reasons.items())),
        "input_bytes": totals.input_bytes,
        "output_bytes": totals.output_bytes,
    }


def evaluation_status_of(output: Store) -> dict[str, Any]:
    """Finished trials of an evaluation, and how far the trials are that its last start had left."""
    finished = sum(name.endswith(".json") for name in output.names(TRIALS))
    progress = StageProgress.read(output, layout.PROGRESS)
    facts = {"trials": f"{finished:,} finished", "report": output.info(REPORT) is not None}
    return facts if progress is None or progress.done == progress.total else facts | {"progress": progress.to_json()}


def training_status_of(output: Store, name: str) -> dict[str, Any]:
    """How far the training of a universal generator is, whose file is `name`. Raises InputError if none was started."""
    progress, info = StageProgress.read(output, layout.training_progress(name)), output.info(name)
    if progress is None and info is None:
        raise InputError(f"{output.url}/{name}: no such protection, and no training of it has been started")
    facts: dict[str, Any] = {"protection": "there" if info is not None else "not yet"}
    return facts if progress is None else facts | {"progress": progress.to_json()}


def facts_text(facts: Mapping[str, Any]) -> list[str]:
    """One line for each fact that `any_status_of` found."""
    return [f"{_SHOWN_AS.get(name, name.replace('_', ' ')):<12} {_text(name, value)}" for name, value in facts.items()]


def _text(name: str, value: Any) -> str:
    if name == "progress":
        return progress_text(value)
    if name.endswith("_bytes"):
        return size(value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {count:,}" for key, count in value.items()) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def progress_text(progress: Mapping[str, Any]) -> str:
    """A StageProgress as plain data, in one line."""
    parts = [
        f"{progress['stage']} {progress['done']:,} of {progress['total']:,} {progress['unit']}s".replace(
            "percents", "percent"
        )
    ]
    if progress["images"]:
        parts += [f"{progress['rate']:,.0f} images/s", f"{progress['quarantined']:,} quarantined"]
    left = progress["eta"]
    parts.append("more are being looked for" if left is None else f"about {duration(left)} left")
    steps = ", ".join(f"{step} {share:.0%}" for step, share in progress["steps"].items() if share >= _SHOWN_SHARE)
    age = f"(as of {duration(max(0.0, time.time() - progress['updated']))} ago)"
    return ", ".join(parts) + (f"; time: {steps}" if steps else "") + f" {age}"


def uploads_status_of(output: Store) -> dict[str, Any]:
    """Counts over the ledger of an output of protect_uploads.py, and how its last run ended."""
    ledger = Ledger(output)
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for row in ledger.rows():
        counts["objects"] += 1
        counts["images"] += row.protected
        counts["quarantined"] += row.quarantined
        counts["drifted"] += row.drifted
        counts["input_bytes"] += row.size
        counts["output_bytes"] += row.output_size
        reasons[row.reason or "inside of shards"] += row.quarantined
    last, progress = LastRun.read(output, layout.UPLOADS_LAST_RUN), StageProgress.read(output, layout.UPLOADS_PROGRESS)
    is_running = progress is not None and (last is None or progress.updated > last.ended_s)
    return {
        **({"progress": progress.to_json()} if progress is not None and is_running else {}),
        **{name: counts[name] for name in ("objects", "images", "quarantined", "drifted")},
        "reasons": {reason: count for reason, count in sorted(reasons.items()) if count},
        "input_bytes": counts["input_bytes"],
        "output_bytes": counts["output_bytes"],
        "last_run": f"{last.state} at {last.ended}, exit code {last.exit_code}" if last else "none yet",
    }


def _stage(output: Store, total: int) -> str:
    """How far the run got, judging by what it wrote."""
    if output.info(layout.REPORT) is not None:
        return "report written"
    if output.info(layout.PROTECTION) is not None:
        return "applying"
    if output.info(layout.CLUSTERING) is not None:
        fitted = sum("checkpoint" not in name for name in output.names(layout.CLUSTERS))
        return f"fitting deltas ({fitted} files finished)"
    embedded = sum(1 for _ in output.names(layout.FEATURES))
    return f"embedding ({embedded} of {total} shards)"
