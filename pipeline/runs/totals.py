"""Sums over all commits of an output, however many; only a few hundred are in memory at a time."""

from __future__ import annotations

import heapq
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import islice
from operator import attrgetter
from typing import Any

from pipeline import layout
from pipeline.errors import Reason, unreadable
from pipeline.records import Commit, Shard
from pipeline.storage.bounded import bounded_map
from pipeline.storage.store import Store

READERS = 16  # threads, for stores with high latency
TOGETHER = 32  # commits per task
REFUSING = 50  # shards with a quarantine to name: at least one refused sample each, so enough for a report


@dataclass
class Totals:
    """Sums over commits.

    finer     JPEGs written with finer steps or more colour than they came with
    reread    pictures decoded again after encoding
    survival  sum of the shares of their deltas that were left
    reasons   quarantined samples by reason
    clusters  protected images by cluster
    seconds   process seconds by step of apply
    refusing  first names, sorted, of shards with a quarantine
    damaged   first names, sorted, of shards that could not be read completely
    """

    shards: int = 0
    images: int = 0
    quarantined: int = 0
    input_bytes: int = 0
    output_bytes: int = 0
    input_image_bytes: int = 0
    output_image_bytes: int = 0
    finer: int = 0
    reread: int = 0
    survival: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)
    clusters: Counter[int] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    refusing: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)

    def count(self, commit: Mapping[str, Any]) -> None:
        """Add a commit from its raw JSON: building a Commit first would take twice as long."""
        self.shards += 1
        self.images += commit["num_protected"]
        self.quarantined += commit["num_quarantined"]
        self.input_bytes += commit["input_size"]
        self.output_bytes += commit["output_size"]
        self.input_image_bytes += commit["input_image_bytes"]
        self.output_image_bytes += commit["output_image_bytes"]
        self.finer += commit.get("num_finer", 0)
        self.reread += commit.get("num_reread", 0)
        self.survival += commit.get("survival", 0.0)
        for reason, count in commit["quarantine"].items():
            self.reasons[reason] += count
        for cluster, count in commit["clusters"].items():
            self.clusters[int(cluster)] += count
        for step, seconds in commit["seconds"].items():
            self.seconds[step] += seconds
        if commit["num_quarantined"]:
            self.refusing.append(commit["shard"])
        if Reason.TRUNCATED_SHARD.value in commit["quarantine"]:
            self.damaged.append(commit["shard"])

    def add(self, other: Totals) -> None:
        for column in fields(self):
            ours = getattr(self, column.name)
            ours += getattr(other, column.name)
            setattr(self, column.name, ours)
        self.refusing = heapq.nsmallest(REFUSING, self.refusing)
        self.damaged = heapq.nsmallest(REFUSING, self.damaged)


def totals_of(output: Store) -> Totals:
    """Sums over the commits of an output. Raises InputError, naming the file, for one that cannot be read."""
    names, whole = output.names(layout.COMMITS), Totals()
    parts = iter(lambda: list(islice(names, TOGETHER)), [])
    if output.is_local:  # local reads are fast: threads would only wait for each other
        for part in parts:
            whole.add(_totals(output, part))
        return whole
    with ThreadPoolExecutor(READERS) as pool:
        for sums in bounded_map(pool, partial(_totals, output), parts, ahead=2 * READERS):
            whole.add(sums)
    return whole


def _totals(output: Store, names: Sequence[str]) -> Totals:
    totals = Totals()
    for name in names:
        data = output.read(name)
        try:
            totals.count(json.loads(data))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise unreadable(f"{output.url}/{name}", error) from None
    return totals


def committed_units(output: Store) -> list[Shard]:
    """The units of loose images that a run has written, sorted by name, every image under the key of its original."""
    commits = (Commit.read(output, name) for name in output.names(layout.COMMITS))
    units = [commit.written() for commit in commits if commit is not None and commit.images]
    return sorted(units, key=attrgetter("name"))
