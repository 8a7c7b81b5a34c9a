"""Protect a small real collection on this machine, offline, and measure what the protection is worth.

  python jobs/demo.py --output demo

The photographs ship with libraries that are installed anyway; nothing is downloaded.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from jobs import importing
from jobs.shared import cli
from pipeline.errors import ScumbleError, SettingsError, one_line
from pipeline.settings import EMBEDDED_SURROGATE

SIDE = 64
CLUSTERS = ("--clusters", "16")
BATTERY = ("--regimes", "nt,nt-cg,iss-jpeg10,subtract+cg", "--epochs", "12", "--side", str(SIDE))


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    made = cli.Parser(prog="demo.py", description=__doc__)
    made.add_argument("--output", default="demo", metavar="FOLDER", help="folder for everything that the demo makes")
    made.add_argument("--debug", action="store_true", help="show tracebacks")
    given = made.parse_args(argv).output
    if "://" in given:
        raise SettingsError(f"--output {given}: the demo writes into a folder of this machine")
    folder = Path(given)
    with importing():
        from pipeline.shards.photographs import write_demo_collection

    started = time.monotonic()
    try:
        collection = write_demo_collection(folder / "collection", seed=0, side=SIDE)
    except OSError as error:
        raise SettingsError(f"--output {folder} cannot be written: {one_line(error)}") from None
    print(
        f"collection   {collection.num_train:,} train and {collection.num_test:,} test images of {SIDE} px in {folder}"
    )
    train, test = (str(folder / f"collection/{part}-*.tar") for part in ("train", "test"))
    options = ("--surrogate", EMBEDDED_SURROGATE, *CLUSTERS)
    run_job("protect_imagenet.py", "--input", train, "--output", str(folder / "protected"), *options)
    collections = ("--clean", train, "--protected", f"uc={folder / 'protected'}", "--test", test)
    run_job("evaluate_relearning.py", *collections, "--output", str(folder / "evaluation"), *BATTERY)
    print(f"time         {time.monotonic() - started:.0f} s")
    return cli.DONE


def run_job(job: str, *options: str) -> None:
    """Run a job as a user would. Raises ScumbleError if it fails."""
    command = [sys.executable, str(Path(__file__).with_name(job)), *options]
    print("$", *command[1:], flush=True)
    if code := subprocess.run(command, check=False).returncode:
        raise ScumbleError(f"{job} exited with {code}; its output above says why")


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
