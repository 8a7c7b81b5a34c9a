"""Write the report of a run again, from what the run left in its output; needs no Ray.

python jobs/report.py --output protected/
"""

from __future__ import annotations

from jobs import importing
from jobs.shared import cli
from pipeline.errors import SettingsError


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    made = cli.Parser(prog="report.py", description=__doc__)
    made.add_argument("--output", metavar="URL", help="output of a protection run")
    made.add_argument("--debug", action="store_true", help="show tracebacks")
    options = made.parse_args(argv)
    if not options.output:
        raise SettingsError("--output is missing (see --help)")
    with importing():
        from jobs.protection.finish import publish_report
        from pipeline.report.report_data import report_data
        from pipeline.storage.store import Store

    output = Store(options.output)
    print(f"report       {publish_report(output, report_data(output))}")
    return cli.DONE


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
