"""What a protection run has done, read from its commits alone, while it runs or after it died.

python jobs/status.py --output protected/
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from itertools import islice
from typing import Any

from jobs import cli
from pipeline import layout
from pipeline.errors import InputError, SettingsError
from pipeline.records import Commit
from pipeline.store import Store
from pipeline.uploads.ledger import Ledger

READERS = 16  # threads
TOGETHER = 32  # commits that one thread reads at a time


def main(argv: list[str] | None = None) -> int:
    made = cli.Parser(prog="status.py", description=__doc__)
    made.add_argument("--output", metavar="URL", help="output of protect_imagenet.py or protect_uploads.py")
    made.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    made.add_argument("--debug", action="store_true", help="tracebacks")
    options = made.parse_args(argv)
    if not options.output:
        raise SettingsError("--output is missing (see --help)")
    output = Store(options.output)
    found = uploads_status_of(output) if output.info(layout.UPLOADS_ORIGIN) else status_of(output)
    if options.json:
        print(json.dumps(found, sort_keys=True))
    else:
        for name, value in found.items():
            print(f"{name:<12} {_text(value)}")
    return cli.DONE


@dataclass
class Tally:
    """Sums over commits."""

    shards: int = 0
    images: int = 0
    quarantined: int = 0
    input_bytes: int = 0
    output_bytes: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def count(self, commit: Commit) -> None:
        self.shards += 1
        self.images += commit.num_protected
        self.quarantined += commit.num_quarantined
        self.input_bytes += commit.input_size
        self.output_bytes += commit.output_size
        self.reasons.update(commit.quarantine)

    def add(self, other: Tally) -> None:
        for one in fields(self):
            ours = getattr(self, one.name)
            ours += getattr(other, one.name)
            setattr(self, one.name, ours)


def status_of(output: Store) -> dict[str, Any]:
    """Counts over all commits of an output. Raises InputError if no run has begun there."""
    if output.info(layout.RUN) is None:
        raise InputError(f"{output.url} is not an output of a protection run: it has no {layout.RUN}")
    record = json.loads(output.read(layout.RUN))
    tally, total = tally_of(output), record["num_shards"]
    return {
        "fingerprint": record["fingerprint"],
        "stage": _stage(output, total),
        "shards": f"{tally.shards} of {total} committed",
        "done": tally.shards == total,
        "images": tally.images,
        "quarantined": tally.quarantined,
        "reasons": dict(sorted(tally.reasons.items())),
        "input_bytes": tally.input_bytes,
        "output_bytes": tally.output_bytes,
    }


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
    last = output.look(layout.UPLOADS_LAST_RUN)
    ended = json.loads(last.data) if last is not None else None
    return {
        **{name: counts[name] for name in ("objects", "images", "quarantined", "drifted")},
        "reasons": {reason: count for reason, count in sorted(reasons.items()) if count},
        "input_bytes": counts["input_bytes"],
        "output_bytes": counts["output_bytes"],
        "last_run": f"{ended['status']} at {ended['ended']}, exit code {ended['exit_code']}" if ended else "none yet",
    }


def tally_of(output: Store) -> Tally:
    """Sums over the commits of an output, of which a few hundred are in memory at a time."""
    names, whole = output.names(layout.COMMITS), Tally()
    waiting: deque[Future[Tally]] = deque()
    with ThreadPoolExecutor(READERS) as pool:
        while part := list(islice(names, TOGETHER)):
            waiting.append(pool.submit(_tally, output, part))
            if len(waiting) > 2 * READERS:
                whole.add(waiting.popleft().result())
        for left in waiting:
            whole.add(left.result())
    return whole


def _tally(output: Store, names: Sequence[str]) -> Tally:
    found = Tally()
    for name in names:
        found.count(Commit.from_json(json.loads(output.read(name))))
    return found


def _stage(output: Store, total: int) -> str:
    """How far the run got, by what it left behind."""
    if output.info(layout.REPORT) is not None:
        return "report written"
    if output.info(layout.PROTECTION) is not None:
        return "applying"
    if output.info(layout.CLUSTERING) is not None:
        fitted = sum("checkpoint" not in name for name in output.names(layout.CLUSTERS))
        return f"fitting deltas ({fitted} files finished)"
    embedded = sum(1 for _ in output.names(layout.FEATURES))
    return f"embedding ({embedded} of {total} shards)"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in value.items()) or "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
