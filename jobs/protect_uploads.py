"""Protect new uploads:  python jobs/protect_uploads.py --input uploads/ --output safe/ --protection FILE"""

from __future__ import annotations

from jobs import importing
from jobs.shared import cli
from jobs.uploads.options import parse_uploads


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    settings = parse_uploads(argv)
    with importing():
        from jobs.shared.metrics import exported
        from jobs.uploads.steps import first_look, prepare_uploads, round_of, stopping, workers

    run = prepare_uploads(settings)
    if settings.dry_run:
        return first_look(run)
    where = exported(port=settings.metrics_port, file=settings.metrics_file, linger=settings.metrics_linger)
    with where as metrics, stopping() as stop, workers(run) as protect:
        code = round_of(run, protect, stop, metrics)
        while settings.watch is not None and not stop.wait(settings.watch):
            code = round_of(run, protect, stop, metrics)
    return cli.DONE if settings.watch is not None else code


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
