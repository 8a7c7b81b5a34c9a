"""Unpack shards into a folder tree or Parquet:  python jobs/unpack.py --input protected/ --output folder/"""

from __future__ import annotations

from jobs import importing
from jobs.packing.options import parse_unpack
from jobs.shared import cli


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    settings = parse_unpack(argv)
    with importing():
        from jobs.packing.steps import finish_unpack, over_left, prepare_unpack, start_unpack

    run = prepare_unpack(settings)
    print(run.summary)
    if settings.dry_run:
        return run.foreseen
    start_unpack(run)
    over_left(run.output, run.shards, run.task, settings, "unpack")
    return finish_unpack(run)


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
