"""Show the progress of a run, read from what it left in its output: while it runs, or after it died.

python jobs/status.py --output protected/
"""

from __future__ import annotations

import json

from jobs import importing
from jobs.shared import cli
from pipeline.errors import SettingsError


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    made = cli.Parser(prog="status.py", description=__doc__)
    made.add_argument(
        "--output",
        metavar="URL",
        help="output of a protection, of uploads or of an evaluation, or a universal .safetensors",
    )
    made.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    made.add_argument("--debug", action="store_true", help="show tracebacks")
    options = made.parse_args(argv)
    if not options.output:
        raise SettingsError("--output is missing (see --help)")
    with importing():
        from jobs.inspection.status import any_status_of, facts_text

    facts = any_status_of(options.output)
    if options.json:
        print(json.dumps(facts, sort_keys=True))
    else:
        print("\n".join(facts_text(facts)))
    return cli.DONE


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
