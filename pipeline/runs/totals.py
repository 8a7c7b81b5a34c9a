"""Sums over all commits of an output, however many there are: a few hundred are in memory at a time."""

from __future__ import annotations

import heapq
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import islice
from typing import Any

from pipeline import layout
from pipeline.errors import Reason, unreadable
from pipeline.runs.bounded import bounded_map
from pipeline.storage.store import Store

READERS = 16  # threads, of a store that takes its time
TOGETHER = 32  # commits that one thread reads at a time
REFUSING = 50  # shards with a quarantine that are named: one refused sample or more each, as many as a report shows


@dataclass
class Totals:
    """What commits add up to.

    reasons   quarantined samples by reason         clusters  protected images by cluster
    seconds   process seconds by step of apply      refusing  the first names, sorted, of shards with a quarantine
    damaged   the first names of shards of which a part could not be read
    """

    shards: int = 0
    images: int = 0
    quarantined: int = 0
    input_bytes: int = 0
    output_bytes: int = 0
    input_image_bytes: int = 0
    output_image_bytes: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    clusters: Counter[int] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    refusing: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)

    def count(self, commit: Mapping[str, Any]) -> None:
        """Add a commit as its file has it: to build a Commit of each would take twice as long."""
        self.shards += 1
        self.images += commit["num_protected"]
        self.quarantined += commit["num_quarantined"]
        self.input_bytes += commit["input_size"]
        self.output_bytes += commit["output_size"]
        self.input_image_bytes += commit["input_image_bytes"]
        self.output_image_bytes += commit["output_image_bytes"]
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
        for one in fields(self):
            ours = getattr(self, one.name)
            ours += getattr(other, one.name)
            setattr(self, one.name, ours)
        self.refusing = heapq.nsmallest(REFUSING, self.refusing)
        self.damaged = heapq.nsmallest(REFUSING, self.damaged)


def totals_of(output: Store) -> Totals:
    """Sums over the commits of an output. Raises InputError, which names the file, if one cannot be counted."""
    names, whole = output.names(layout.COMMITS), Totals()
    parts = iter(lambda: list(islice(names, TOGETHER)), [])
    if output.is_local:  # a folder answers at once: threads would wait for each other
        for part in parts:
            whole.add(_totals(output, part))
        return whole
    with ThreadPoolExecutor(READERS) as pool:
        for found in bounded_map(pool, partial(_totals, output), parts, ahead=2 * READERS):
            whole.add(found)
    return whole


def _totals(output: Store, names: Sequence[str]) -> Totals:
    found = Totals()
    for name in names:
        data = output.read(name)
        try:
            found.count(json.loads(data))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise unreadable(f"{output.url}/{name}", error) from None
    return found
