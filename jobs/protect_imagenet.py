"""Protect a collection:  python jobs/protect_imagenet.py --input photos/ --output protected/ --epsilon 16/255"""

from __future__ import annotations

from jobs import importing
from jobs.protection.options import parse_settings
from jobs.shared import cli
from pipeline.metrics import report_success


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    settings = parse_settings(argv)
    with importing():
        from actors.cluster.connect import connected
        from actors.cluster.metrics import recorder
        from jobs.protection.dry_run import print_plan
        from jobs.protection.finish import finish_run
        from jobs.protection.prepare import is_left, prepare, start_run
        from jobs.protection.stages import apply, check_fit_memory, cluster, embed, fit, measure
        from jobs.protection.status_file import reported

    run = prepare(settings)
    print(run.summary)
    if settings.dry_run:
        print_plan(run)
        return cli.DONE
    with reported(run.output, run.plan.fingerprint) as status:
        if not is_left(run):
            start_run(run)
            return finish_run(run, status)
        with connected(settings):
            check_fit_memory(run)
            start_run(run)
            if not run.is_universal:  # a universal generator is trained already, and embeds what it is applied to
                with status.stage("embed"):
                    embed(run)
                with status.stage("cluster"):
                    clustering = cluster(run)
                with status.stage("fit"):
                    fit(run, clustering)
            with status.stage("apply"):
                apply(run)
            with status.stage("measure"):
                measure(run)
            code = finish_run(run, status)
            if code == cli.DONE:
                report_success(recorder(), "protect_imagenet")
        return code


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
