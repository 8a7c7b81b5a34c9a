"""Train a universal generator:  python jobs/train_one_for_all.py --input photos/ --output universal.safetensors"""

from __future__ import annotations

from jobs import importing
from jobs.one_for_all.options import parse_one_for_all
from jobs.shared import cli
from pipeline.metrics import report_success


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    settings = parse_one_for_all(argv)
    with importing():
        from actors.cluster.connect import connected
        from actors.cluster.metrics import recorder
        from jobs.one_for_all.steps import load_squares, prepare_training, print_training, report, train_generator

    run = prepare_training(settings)
    print(run.summary)
    if settings.dry_run:
        return print_training(run)
    if not run.is_done:
        with connected(settings):
            squares = load_squares(run)
            train_generator(run, squares)
            report_success(recorder(), "train_one_for_all")
    return report(run)


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
