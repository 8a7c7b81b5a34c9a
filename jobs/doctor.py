"""Find what would break a run later:  python jobs/doctor.py --input photos/ --output protected/ --surrogate NAME"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs import importing
from jobs.protection.options import KEEP_SIDECAR, protection_parser
from jobs.shared import cli
from pipeline.errors import SettingsError
from pipeline.settings import DEFAULT_SURROGATE, PRESETS, apply_settings, check_choice, flag

DESCRIPTION = """\
Find what would break a run later: versions of driver and cluster, GPUs, disk space, the bucket, weights, codecs.

  python jobs/doctor.py
  python jobs/doctor.py --input s3://art/raw --output s3://art/protected --surrogate timm:tf_efficientnet_lite0
  python jobs/doctor.py --config protect.yaml          (a settings file of protect_imagenet.py)

Every line is ok, a warning, or an error that says what to do. With RAY_ADDRESS set, every node of that cluster is
checked too. Two small probes are written to the output and removed; weights that a run would download are downloaded.
"""
EPILOG = "exit codes: 0 no errors, 1 an error was found, 2 usage"


def doctor_parser() -> cli.Parser:
    """All options; each means what it means to protect_imagenet.py."""
    parser = cli.Parser(
        prog="doctor.py",
        usage="doctor.py [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
        defaults={"gpus_per_worker": 0},
    )
    add = parser.add_argument
    add("--input", metavar="URL", help="folder, s3:// prefix or pattern of what is to be protected")
    add("--output", metavar="URL", help="folder or s3:// prefix for protected copies")
    add("--surrogate", metavar="NAME", help="the surrogate whose weights must be available")
    add("--surrogate-weights", metavar="FILE", help="safetensors file with the surrogate's weights")
    add("--surrogate-size", type=int, metavar="PIXELS", help="side of embedded images")
    add("--protection", metavar="FILE", help="a fitted protection that must match the surrogate")
    add("--gpus-per-worker", type=float, metavar="G", help="GPU share that the run will request")
    add("--workers", type=int, metavar="N", help="processes of the run (default: one per CPU)")
    add("--keep-sidecar", nargs="+", action="extend", metavar="SUFFIX", help=KEEP_SIDECAR)
    add("--config", metavar="FILE", help="settings file of the run; the command line overrides it")
    add("--debug", action="store_true", default=None, help="show tracebacks and Ray's own logs")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    asked = vars(doctor_parser().parse_args(argv))
    given = {name: value for name, value in asked.items() if value is not None}
    config = given.pop("config", None)
    of_run: dict[str, Any] = {}
    if config:
        of_run = cli.read_config(Path(config), protection_parser())
        check_choice("preset", preset := of_run.get("preset", "scumble"), tuple(PRESETS))
        of_run = PRESETS[preset] | of_run
        given = {name: value for name, value in of_run.items() if name in asked} | given
        if "protection" not in given:  # which knows its surrogate
            given = {"surrogate": DEFAULT_SURROGATE} | given
    elif "input" in given and "protection" not in given:
        given = {"surrogate": DEFAULT_SURROGATE} | given
    for name, least in (("workers", 1), ("gpus_per_worker", 0), ("surrogate_size", 32)):
        if given.get(name, least) < least:
            raise SettingsError(f"{flag(name)} must be at least {least}, not {given[name]}")
    with importing():
        from jobs.inspection.checkup import check_up

    errors = 0
    for finding in check_up(given, apply_settings(of_run | given)):
        print(finding, flush=True)
        errors += finding.level == "error"
    return cli.FAILED if errors else cli.DONE


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
