"""Check a protected collection against the records of its run and, if they are available, against the originals.

python jobs/verify.py --output protected/ [--input photos/] [--certificate evaluation/certificate.json]
"""

from __future__ import annotations

from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jobs import importing
from jobs.shared import cli
from pipeline import layout
from pipeline.errors import SettingsError

EPILOG = "exit codes: 0 as recorded, 1 a problem, 2 usage, 3 part of the input could not be read when it was protected"


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = parse_verify(argv)
    with importing():
        from jobs.inspection.verification import certified_as, check_run, check_uploads, print_result
        from pipeline.storage.store import Store

    output = Store(options.output)
    is_uploads = output.info(layout.UPLOADS_ORIGIN) is not None
    check = check_uploads if is_uploads else check_run
    if options.certificate and is_uploads:
        raise SettingsError("--certificate is for an output of protect_imagenet.py: uploads have no fixed collection")
    certified = certified_as(output, Path(options.certificate)) if options.certificate else ""
    with ThreadPoolExecutor(options.workers) as pool:
        result = check(output, options.input, options.decode, pool)
    if options.certificate and not certified:
        result.problems.append(f"{options.certificate}: not the collection that it certifies")
    print_result(result, with_originals=bool(options.input), is_uploads=is_uploads)
    if certified:
        print(f"certificate  {certified}")
    cli.print_losses(result.lost, f"{output.url}/{layout.REPORT}")
    return cli.FAILED if result.problems else cli.QUARANTINED if result.lost else cli.DONE


def parse_verify(argv: list[str] | None) -> Namespace:
    """The options. Raises SettingsError."""
    made = cli.Parser(prog="verify.py", description=__doc__, epilog=EPILOG)
    output = "output of protect_imagenet.py, protect_baseline.py or protect_uploads.py (required)"
    made.add_argument("--output", metavar="URL", help=output)
    made.add_argument("--input", metavar="URL", help="the originals: also compare sidecars, order and epsilon")
    made.add_argument(
        "--certificate", metavar="FILE", help="also check that this is the collection that an audit certified"
    )
    made.add_argument("--decode", type=float, default=0.1, metavar="SHARE", help="share of the images to decode")
    made.add_argument("--workers", type=int, default=4, metavar="N", help="files to read at once")
    made.add_argument("--debug", action="store_true", help="show tracebacks")
    options: Namespace = made.parse_args(argv)
    if not options.output:
        raise SettingsError("--output is missing (see --help)")
    if options.workers < 1:
        raise SettingsError(f"--workers must be at least 1, not {options.workers}")
    if not 0 <= options.decode <= 1:
        raise SettingsError(f"--decode is a share between 0 and 1, e.g. 0.1, not {options.decode:g}")
    return options


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
