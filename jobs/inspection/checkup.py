"""The checks of doctor, the quick ones first."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from pipeline.records import Shard
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
from pipeline.storage.store import Store


def check_up(given: dict[str, Any]) -> Iterator[Finding]:
    """Yields one finding after another, the quick ones first."""
    asked = SimpleNamespace(
        workers=given.get("workers"), gpus_per_worker=given.get("gpus_per_worker", 0.0), debug=bool(given.get("debug"))
    )
    yield from findings_of("python", check_python)
    yield from findings_of("codecs", check_codecs)
    shards: list[Shard] = []
    sources: list[Store] = []
    if "input" in given:
        yield from findings_of("input", lambda: _input(given["input"], shards, sources))
    if "output" in given:
        yield from findings_of("output", lambda: check_output(given["output"], *sources))
    yield from findings_of("space", lambda: check_space(shards, asked.workers or os.cpu_count() or 1))
    if "surrogate" in given or "protection" in given:
        wanted = [given.get(name) for name in ("surrogate", "surrogate_weights", "surrogate_size", "protection")]
        yield from findings_of("weights", lambda: check_weights(*wanted))
    if "RAY_ADDRESS" not in os.environ:
        yield from findings_of("gpu", lambda: check_gpu(asked.gpus_per_worker))
    yield from findings_of("ray", lambda: _cluster(asked))


def _input(url: str, shards: list[Shard], sources: list[Store]) -> list[Finding]:
    sources.append(Store(url))  # even if it cannot be listed, it may be the same place as the output
    listed, findings = check_input(url)
    sources[:] = [listed.store]
    shards += listed.shards
    return findings


def _cluster(asked: Any) -> list[Finding]:
    from actors.cluster.checkup import check_cluster  # takes a second to import: print the findings before it first

    return check_cluster(asked)
