"""Protect with a published method:  python jobs/protect_baseline.py --method sp --input train/ --output sp/"""

from __future__ import annotations

from jobs import importing
from jobs.baselines.options import parse_baseline
from jobs.shared import cli
from pipeline.baselines.settings import EMBEDDED
from pipeline.metrics import report_success


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    settings = parse_baseline(argv)
    with importing():
        from actors.cluster.connect import connected
        from actors.cluster.metrics import recorder
        from jobs.baselines.steps import check_baseline_memory, fit_baseline, label, prepare_baseline, print_baseline
        from jobs.protection.finish import finish_run
        from jobs.protection.prepare import is_left, start_run
        from jobs.protection.stages import apply, embed, measure
        from jobs.protection.status_file import reported

    run = prepare_baseline(settings)
    print(run.summary)
    if settings.dry_run:
        print_baseline(run)
        return cli.DONE
    with reported(run.output, run.plan.fingerprint) as status:
        if not is_left(run):
            start_run(run)
            return finish_run(run, status)
        with connected(settings):
            check_baseline_memory(run)
            start_run(run)
            if settings.labels in EMBEDDED:
                with status.stage("embed"):
                    embed(run)
            with status.stage("label"):
                clustering = label(run)
            with status.stage("fit"):
                fit_baseline(run, clustering)
            with status.stage("apply"):
                apply(run)
            with status.stage("measure"):
                measure(run)
            code = finish_run(run, status)
            if code == cli.DONE:
                report_success(recorder(), "protect_baseline")
        return code


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
