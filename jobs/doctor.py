"""What would break a run later?  python jobs/doctor.py --input photos/ --output protected/ --surrogate NAME"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from jobs.protection.options import protection_parser
from jobs.shared import cli
from pipeline.runs.checkup import (
    Finding,
    check_codecs,
    check_gpu,
    check_input,
    check_output,
    check_python,
    check_space,
    check_weights,
    findings_of,
)
from pipeline.settings import DEFAULT_SURROGATE
from pipeline.storage.listings import Entry
from pipeline.storage.store import Store

DESCRIPTION = """\
Look for what would break a run later: versions of driver and cluster, GPUs, space, the bucket, weights, codecs.

  python jobs/doctor.py
  python jobs/doctor.py --input s3://art/raw --output s3://art/protected --surrogate timm:tf_efficientnet_lite0
  python jobs/doctor.py --config protect.yaml          (a settings file of protect_imagenet.py)

Every line is ok, a warning, or an error with what to do about it. With RAY_ADDRESS set, every node of that cluster is
asked too. In the output it writes two small probes and removes them; weights that a run would fetch are fetched.
"""
EPILOG = "exit codes: 0 nothing but ok and warnings, 1 an error was found, 2 usage"


def doctor_parser() -> cli.Parser:
    """All options; each means what it means to protect_imagenet.py."""
    parser = cli.Parser(prog="doctor.py", usage="doctor.py [options]", description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add("--input", metavar="URL", help="folder, s3:// prefix or pattern of shards that will be protected")
    add("--output", metavar="URL", help="folder or s3:// prefix for protected shards")
    add("--surrogate", metavar="NAME", help="the surrogate whose weights must be at hand")
    add("--surrogate-weights", metavar="FILE", help="safetensors file with the surrogate's weights")
    add("--surrogate-size", type=int, metavar="PIXELS", help="side of what is embedded")
    add("--protection", metavar="FILE", help="a fitted protection that must match the surrogate")
    add("--gpus-per-worker", type=float, metavar="G", help="GPU share that the run will ask for (default 0)")
    add("--workers", type=int, metavar="N", help="processes of the run (default: one per CPU)")
    add("--config", metavar="FILE", help="settings file of the run; the command line wins over it")
    add("--debug", action="store_true", default=None, help="Ray's own logs, and tracebacks")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    asked = vars(doctor_parser().parse_args(argv))
    given = {name: value for name, value in asked.items() if value is not None}
    config = given.pop("config", None)
    if config:
        of_run = cli.read_config(Path(config), protection_parser())
        given = {"surrogate": DEFAULT_SURROGATE} | {k: v for k, v in of_run.items() if k in asked} | given
    errors = 0
    for finding in check_up(given):
        print(finding, flush=True)
        errors += finding.level == "error"
    return cli.FAILED if errors else cli.DONE


def check_up(given: dict[str, Any]) -> Iterator[Finding]:
    """One finding after the other, the quick ones first."""
    asked = SimpleNamespace(
        workers=given.get("workers"), gpus_per_worker=given.get("gpus_per_worker", 0.0), debug=bool(given.get("debug"))
    )
    yield from findings_of("python", check_python)
    yield from findings_of("codecs", check_codecs)
    shards: list[Entry] = []
    sources: list[Store] = []
    if "input" in given:
        yield from findings_of("input", lambda: _input(given["input"], shards, sources))
    if "output" in given:
        yield from findings_of("output", lambda: check_output(given["output"], *sources))
    yield from findings_of("space", lambda: check_space(shards, asked.workers or os.cpu_count() or 1))
    if "surrogate" in given:
        wanted = [given.get(name) for name in ("surrogate_weights", "surrogate_size", "protection")]
        yield from findings_of("weights", lambda: check_weights(given["surrogate"], *wanted))
    if "RAY_ADDRESS" not in os.environ:
        yield from findings_of("gpu", lambda: check_gpu(asked.gpus_per_worker))
    yield from findings_of("ray", lambda: _cluster(asked))


def _input(url: str, shards: list[Entry], sources: list[Store]) -> list[Finding]:
    sources.append(Store(url))  # what cannot be listed may be the output all the same
    listed, findings = check_input(url)
    sources[:] = [listed.store]
    shards += listed.shards
    return findings


def _cluster(asked: Any) -> list[Finding]:
    from actors.cluster.checkup import check_cluster  # takes a second to import: the lines before it come at once

    return check_cluster(asked)


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
