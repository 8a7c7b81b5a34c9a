"""The flags of a run over new uploads, in groups; pipeline.uploads defines what they mean."""

from __future__ import annotations

from jobs.protection.options import add_picture_options
from jobs.shared.cli import Parser, defaults_of, given_options
from pipeline.quantities import parse_bytes, parse_seconds
from pipeline.uploads.settings import UploadSettings, uploads_from

DESCRIPTION = """\
Protect what is new below a prefix of uploads, then exit: loose images (jpg, jpeg, png, webp, in any folder) and
shards (.tar, .tar.gz). Nothing is clustered again: every image gets the delta of the nearest cluster of a fitted
protection.

  python jobs/protect_uploads.py --input s3://art/uploads --output s3://art/protected-uploads \\
      --protection s3://art/protected/_scumble/protection.safetensors
  */5 * * * *  cd scumble && python jobs/protect_uploads.py --config uploads.yaml      (cron: runs may overlap)
  python jobs/protect_uploads.py --input uploads/ --output safe/ --protection p.safetensors --dry-run

New is what is in the input but, by etag, not in the ledger below OUTPUT/_scumble/uploads/. Run the same command again
after any interruption: nothing that was committed is protected again. The protected copy of a deleted upload is kept.
"""
EPILOG = """\
exit codes: 0 done (or another run is working on it), 1 input or run error, 2 usage, 3 done, but more was quarantined
than --max-quarantine allows
OUTPUT/_scumble/uploads/last-run.json has the same, with all counts, for machines.

Protection raises the cost of unauthorised training; it is no guarantee. Keep your originals.
"""


def uploads_parser() -> Parser:
    """All options; none has a default here, so that it is known which ones were given."""
    usage = "protect_uploads.py --input URL --output URL --protection FILE [options]"
    defaults = defaults_of(UploadSettings) | {"metrics_linger": 0.0}
    parser = Parser(prog="protect_uploads.py", usage=usage, description=DESCRIPTION, epilog=EPILOG, defaults=defaults)
    _where(parser)
    _new(parser)
    _files(parser)
    _run(parser)
    _metrics(parser)
    return parser


def _where(parser: Parser) -> None:
    add = parser.add_argument_group("where").add_argument
    add("--input", metavar="URL", help="folder or s3:// prefix of uploads; read only")
    add("--output", metavar="URL", help="folder or s3:// prefix for the protected copies, under the same names")
    add("--protection", metavar="FILE", help="protection.safetensors of a finished run, or its URL")
    add(
        "--surrogate-weights",
        metavar="FILE",
        help="weights of the protection's surrogate (default: the published ones)",
    )
    add("--key-file", metavar="FILE", help="secret of a protection made with --generator texture; never stored")
    add("--config", metavar="FILE", help="YAML file of options (`settle: 2m`); the command line overrides it")


def _new(parser: Parser) -> None:
    add = parser.add_argument_group("what is new").add_argument
    add("--settle", type=parse_seconds, metavar="TIME", help="leave alone what changed less than TIME ago")
    add("--unit-images", type=int, metavar="N", help="commit N images at a time; the first units hold 1, 2, 4, ...")
    add("--unit-bytes", type=parse_bytes, metavar="SIZE", help="commit at most SIZE at a time")
    add("--dry-run", action="store_true", default=None, help="list what is new; write nothing, take no lease")


def _files(parser: Parser) -> None:
    add = parser.add_argument_group("files").add_argument
    add_picture_options(add)
    add("--max-pixels", type=int, metavar="N", help="quarantine larger images")
    add("--max-member-bytes", type=parse_bytes, metavar="SIZE", help="quarantine larger files")
    add("--max-quarantine", type=float, metavar="SHARE", help="exit with 3 if a larger share of images is quarantined")
    drift = "warn if a larger share of images is farther from its cluster than 99 %% of the fitted ones"
    add("--max-drift", type=float, metavar="SHARE", help=drift)


def _run(parser: Parser) -> None:
    add = parser.add_argument_group("run").add_argument
    add("--watch", type=parse_seconds, metavar="TIME", help="look again every TIME, such as 5m, until SIGTERM")
    add("--lease", type=parse_seconds, metavar="TIME", help="take over a run whose heartbeat stopped TIME ago")
    add("--wait-lease", type=parse_seconds, metavar="TIME", help="wait up to TIME for another run before giving up")
    add("--ray", action="store_true", default=None, help="spread units over a Ray cluster, or start a private one")
    add("--workers", type=int, metavar="N", help="processes of --ray (default: one per CPU, or per GPU share)")
    add("--gpus-per-worker", type=float, metavar="G", help="GPU share of each worker; 0: CPUs only")
    add("--debug", action="store_true", default=None, help="show tracebacks and Ray's own logs")


def _metrics(parser: Parser) -> None:
    add = parser.add_argument_group("metrics").add_argument
    add("--metrics-port", type=int, metavar="PORT", help="serve metrics for Prometheus on PORT while the job runs")
    add("--metrics-linger", type=float, metavar="SECONDS", help="keep serving that long at the end, for a last scrape")
    add("--metrics-file", metavar="FILE", help="write metrics to a .prom file in node_exporter's textfile folder")


def parse_uploads(argv: list[str] | None) -> UploadSettings:
    """Command line over settings file. Raises SettingsError."""
    return uploads_from(given_options(uploads_parser(), argv))
