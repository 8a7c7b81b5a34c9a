"""The checks of doctor, the quick ones first."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from jobs.protection.prepare import first_held, held_by_a_stranger, written_names
from jobs.shared.inputs import check_finished
from pipeline import layout
from pipeline.deltas.apply import check_writable
from pipeline.errors import ConflictError
from pipeline.measures.cpus import available_cpus
from pipeline.measures.estimate import first_usable
from pipeline.records import Sample, Shard
from pipeline.runs.checkup import (
    Finding,
    check_codecs,
    check_gpu,
    check_input,
    check_output,
    check_python,
    check_space,
    check_weights,
    findings_of,
)
from pipeline.settings import ApplySettings
from pipeline.storage.store import Store


def check_up(given: dict[str, Any], reading: ApplySettings) -> Iterator[Finding]:
    """Yields one finding after another, the quick ones first.

    given    options of the doctor
    reading  how the run reads and writes pictures
    """
    asked = SimpleNamespace(
        workers=given.get("workers"), gpus_per_worker=given.get("gpus_per_worker", 0.0), debug=bool(given.get("debug"))
    )
    yield from findings_of("python", check_python)
    yield from findings_of("codecs", check_codecs)
    shards: list[Shard] = []
    sources: list[Store] = []
    names: set[str] = set()
    if "input" in given:
        yield from findings_of("input", lambda: _input(given["input"], reading, shards, sources, names))
    if "output" in given:
        yield from findings_of("output", lambda: _output(given["output"], sources, names))
    yield from findings_of("space", lambda: check_space(shards, asked.workers or available_cpus()))
    if "surrogate" in given or "protection" in given:
        wanted = [given.get(name) for name in ("surrogate", "surrogate_weights", "surrogate_size", "protection")]
        yield from findings_of("weights", lambda: check_weights(*wanted))
    if "RAY_ADDRESS" not in os.environ:
        yield from findings_of("gpu", lambda: check_gpu(asked.gpus_per_worker))
    yield from findings_of("ray", lambda: _cluster(asked))


def _input(
    url: str, settings: ApplySettings, shards: list[Shard], sources: list[Store], names: set[str]
) -> list[Finding]:
    sources.append(Store(url))  # even if it cannot be listed, it may be the same place as the output
    listed, findings = check_input(url, settings.keep_sidecar)
    sources[:] = [listed.store]
    shards += listed.shards
    names |= written_names(listed, settings)
    check_finished(listed.store, listed.shards)
    count = 0

    def use(sample: Sample) -> None:
        nonlocal count
        check_writable(sample, settings)
        count += 1

    first_usable(listed.store, listed.shards, max_member_bytes=settings.max_member_bytes, use=use)
    if not count:
        advice = "a run would put everything into quarantine; protect_imagenet.py --dry-run says why"
        return [*findings, Finding("error", "images", "none of the first 1,000 can be protected", advice)]
    return [*findings, Finding("ok", "images", f"the first {count} usable ones were decoded and encoded")]


def _output(url: str, sources: list[Store], names: set[str]) -> list[Finding]:
    findings = check_output(url, *sources)
    output = Store(url)
    if output.info(layout.RUN) is None and (stranger := first_held(output, names)):
        raise ConflictError(held_by_a_stranger(url, stranger))
    return findings


def _cluster(asked: Any) -> list[Finding]:
    from actors.cluster.checkup import check_cluster  # takes a second to import: print the findings before it first

    return check_cluster(asked)
