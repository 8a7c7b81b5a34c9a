"""What a protection run has done, read from its commits alone, while it runs or after it died.

python jobs/status.py --output protected/
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from jobs.shared import cli
from pipeline import layout
from pipeline.errors import SettingsError
from pipeline.runs.run_record import read_run
from pipeline.runs.totals import totals_of
from pipeline.storage.store import Store
from pipeline.uploads.ledger import Ledger
from pipeline.uploads.summary import LastRun


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
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


def status_of(output: Store) -> dict[str, Any]:
    """Counts over all commits of an output. Raises InputError if no run has begun there."""
    record = read_run(output)
    totals, total = totals_of(output), record.num_shards
    return {
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
    last = LastRun.read(output, layout.UPLOADS_LAST_RUN)
    return {
        **{name: counts[name] for name in ("objects", "images", "quarantined", "drifted")},
        "reasons": {reason: count for reason, count in sorted(reasons.items()) if count},
        "input_bytes": counts["input_bytes"],
        "output_bytes": counts["output_bytes"],
        "last_run": f"{last.state} at {last.ended}, exit code {last.exit_code}" if last else "none yet",
    }


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
