"""The flags of a run over new uploads, written out and grouped; what they mean is settled in pipeline.uploads."""

from __future__ import annotations

from jobs.protection.options import add_picture_options
from jobs.shared.cli import Parser, given_options
from pipeline.uploads.settings import UploadSettings, parse_bytes, parse_seconds, uploads_from

DESCRIPTION = """\
Protect what is new below a prefix of uploads, and end: loose images (jpg, jpeg, png, webp, in any folder) and shards
(.tar, .tar.gz). Nothing is clustered again: every image gets the delta of the nearest cluster of a fitted protection.

  python jobs/protect_uploads.py --input s3://art/uploads --output s3://art/protected-uploads \\
      --protection s3://art/protected/_scumble/protection.safetensors
  */5 * * * *  cd scumble && python jobs/protect_uploads.py --config uploads.yaml      (cron: runs may overlap)
  python jobs/protect_uploads.py --input uploads/ --output safe/ --protection p.safetensors --dry-run

New is what the input lists and the ledger below OUTPUT/_scumble/uploads/ does not, by etag. Start the same command
again after any interruption: nothing that was committed is protected again.
"""
EPILOG = """\
exit codes: 0 done (or another run is at it), 1 input or run error, 2 usage, 3 done with more quarantine than allowed
OUTPUT/_scumble/uploads/last-run.json says the same to machines, with all counts.

Protected images raise the cost of unauthorised training; they are no guarantee. Keep your originals.
"""


def uploads_parser() -> Parser:
    """All options; none has a default here, so that what was given can be told apart."""
    usage = "protect_uploads.py --input URL --output URL --protection FILE [options]"
    parser = Parser(prog="protect_uploads.py", usage=usage, description=DESCRIPTION, epilog=EPILOG)
    _where(parser)
    _new(parser)
    _files(parser)
    _run(parser)
    _metrics(parser)
    return parser


def _where(parser: Parser) -> None:
    add = parser.add_argument_group("where").add_argument
    add("--input", metavar="URL", help="folder or s3:// prefix of uploads; it is only read")
    add("--output", metavar="URL", help="folder or s3:// prefix for protected copies of the same names")
    add("--protection", metavar="FILE", help="protection.safetensors of a finished run, or its URL")
    add("--surrogate-weights", metavar="FILE", help="weights of the surrogate that the protection names (its own)")
    add("--key-file", metavar="FILE", help="secret of a protection made with --generator texture; never stored")
    add("--config", metavar="FILE", help="YAML file of options (`settle: 2m`); the command line wins over it")


def _new(parser: Parser) -> None:
    add = parser.add_argument_group("what is new").add_argument
    add("--settle", type=parse_seconds, metavar="TIME", help="leave what was changed less than that ago (30s)")
    add("--unit-images", type=int, metavar="N", help="images that are committed together, after 1, 2, 4 … (50)")
    add("--unit-bytes", type=parse_bytes, metavar="SIZE", help="bytes of them (64M)")
    add("--dry-run", action="store_true", default=None, help="say what is new; write nothing, take no lease")


def _files(parser: Parser) -> None:
    add = parser.add_argument_group("files").add_argument
    add_picture_options(add)
    add("--max-pixels", type=int, metavar="N", help="larger images go to quarantine (100000000)")
    add("--max-member-bytes", type=parse_bytes, metavar="SIZE", help="larger files go to quarantine (256M)")
    add("--max-quarantine", type=float, metavar="SHARE", help="exit with 3 above this share of a run's images (0.01)")
    add("--max-drift", type=float, metavar="SHARE", help="warn above this share beyond the training's p99 (0.1)")


def _run(parser: Parser) -> None:
    add = parser.add_argument_group("run").add_argument
    add("--watch", type=parse_seconds, metavar="TIME", help="look again after so long, until SIGTERM; 5m")
    add("--lease", type=parse_seconds, metavar="TIME", help="a run that is dead so long is taken over (60s)")
    add("--wait-lease", type=parse_seconds, metavar="TIME", help="wait so long for another run instead of ending (0)")
    add("--ray", action="store_true", default=None, help="spread units over a Ray cluster, or a private one")
    add("--workers", type=int, metavar="N", help="processes with --ray (one per CPU, or per GPU share)")
    add("--gpus-per-worker", type=float, metavar="G", help="GPU share of each process (0: CPUs only)")
    add("--debug", action="store_true", default=None, help="Ray's own logs, and tracebacks")


def _metrics(parser: Parser) -> None:
    add = parser.add_argument_group("metrics").add_argument
    add("--metrics-port", type=int, metavar="PORT", help="serve metrics for Prometheus on this port while the job runs")
    add("--metrics-linger", type=float, metavar="SECONDS", help="then stay for one more scrape (default 0)")
    add("--metrics-file", metavar="FILE", help="leave metrics in this .prom file, for node_exporter's textfile folder")


def parse_uploads(argv: list[str] | None) -> UploadSettings:
    """Command line over settings file. Raises SettingsError."""
    return uploads_from(given_options(uploads_parser(), argv))
