"""Pack a data set into shards:  python jobs/pack.py --input photos/ --output shards/"""

from __future__ import annotations

from jobs import importing
from jobs.packing.options import parse_pack
from jobs.shared import cli


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    settings = parse_pack(argv)
    with importing():
        from jobs.packing.steps import finish_pack, over_left, prepare_pack, start_pack

    run = prepare_pack(settings)
    print(run.summary)
    if settings.dry_run:
        return run.foreseen
    start_pack(run)
    over_left(run.output, run.plan.shards, run.task, settings, "pack")
    return finish_pack(run)


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
