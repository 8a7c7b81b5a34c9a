"""Protect a collection:  python jobs/protect_imagenet.py --input photos/ --output protected/ --epsilon 16/255"""

from __future__ import annotations

from jobs import cli
from actors.cluster.connect import connected
from actors.cluster.metrics import recorder
from jobs.dry_run import print_plan
from jobs.options import parse_settings
from jobs.outcome import finish
from jobs.prepare import Run, is_left, prepare, start
from jobs.reported import StatusFile, reported
from jobs.stages import apply, cluster, embed, fit, measure
from pipeline.metrics import report_success


def main(argv: list[str] | None = None) -> int:
    settings = parse_settings(argv)
    run = prepare(settings)
    print(run.summary)
    if settings.dry_run:
        print_plan(run)
        return cli.DONE
    with reported(run.output, run.plan.fingerprint) as status:
        start(run)
        if not is_left(run):
            return finish(run, status)
        with connected(settings):
            protect(run, status)
            code = finish(run, status)
            if code == cli.DONE:
                report_success(recorder(), "protect_imagenet")
        return code


def protect(run: Run, status: StatusFile) -> None:
    """The stages in their order; each skips what is there already."""
    if run.universal is None:  # a universal generator is trained already, and embeds each image as it is applied
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


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
