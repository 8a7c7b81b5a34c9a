"""Measure what a protected collection still teaches:  python jobs/evaluate_relearning.py --clean URL ..."""

from __future__ import annotations

from jobs import importing
from jobs.evaluation.options import parse_evaluation
from jobs.shared import cli
from pipeline.errors import ScumbleError
from pipeline.metrics import report_success


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    settings = parse_evaluation(argv)
    with importing():
        from actors.cluster.connect import connected
        from actors.cluster.metrics import recorder
        from jobs.evaluation.certificate import certify_all
        from jobs.evaluation.results import gather, gather_finished
        from jobs.evaluation.steps import check_names, load_collections, plan, print_trials, train_targets

    check_names(settings)
    if settings.dry_run:
        return print_trials(settings)
    with connected(settings):
        loaded = load_collections(settings)
        trials = plan(settings, loaded)
        try:
            train_targets(settings, loaded, trials)
        except ScumbleError:
            gather_finished(settings, trials, loaded)
            raise
        report_success(recorder(), "evaluate_relearning")
        certify_all(settings, gather(settings, trials, loaded), loaded)
    return cli.DONE


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
