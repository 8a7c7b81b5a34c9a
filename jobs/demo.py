"""Protect a small real collection on this machine, offline, and measure what the protection is worth.

  python jobs/demo.py --output demo

The photographs ship inside libraries that are installed anyway; nothing is downloaded.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from jobs import cli
from jobs.outcome import publish_report
from jobs.progress import progress
from pipeline import layout
from pipeline.errors import ScumbleError
from pipeline.photographs import DemoCollection, write_demo_collection
from pipeline.relearning.collection import load_labelled
from pipeline.relearning.compare import compare
from pipeline.relearning.regimes import Knowledge
from pipeline.settings import EMBEDDED_SURROGATE
from pipeline.store import Store

SIDE = 64
SURROGATE_SIDE = 160
CLUSTERS = 16
REGIMES = ("nt", "nt-cg", "iss-jpeg10", "subtract+cg")
EPOCHS = 12
PROCESSES = 2


def main(argv: list[str] | None = None) -> int:
    made = cli.Parser(prog="demo.py", description=__doc__)
    made.add_argument("--output", default="demo", metavar="FOLDER", help="where to put everything (demo)")
    made.add_argument("--debug", action="store_true", help="tracebacks")
    folder = Path(made.parse_args(argv).output)
    started = time.monotonic()
    collection = write_demo_collection(folder / "collection", seed=0, side=SIDE)
    print(
        f"collection   {collection.num_train:,} train and {collection.num_test:,} test images of {SIDE} px in {folder}"
    )
    protect(folder)
    accuracy = measure(folder, collection)
    output = Store(str(folder / "protected"))
    output.put(layout.ACCURACY, json.dumps(accuracy, indent=1).encode())
    report = publish_report(output)
    print_table(accuracy)
    print(f"report       {report}")
    print(f"time         {time.monotonic() - started:.0f} s")
    return cli.DONE


def protect(folder: Path) -> None:
    """Run the main job as a user would. Raises ScumbleError if it fails."""
    command = [
        *(sys.executable, str(Path(__file__).with_name("protect_imagenet.py"))),
        *("--input", str(folder / "collection/train-*.tar"), "--output", str(folder / "protected")),
        *("--surrogate", EMBEDDED_SURROGATE, "--surrogate-size", str(SURROGATE_SIDE)),
        *("--clusters", str(CLUSTERS)),
    ]
    print("$", *command[1:])
    if code := subprocess.run(command, check=False).returncode:
        raise ScumbleError(f"the protection job ended with {code}; what it said stands above")


def measure(folder: Path, collection: DemoCollection) -> dict[str, Any]:
    """Train a small target on clean and on protected images, plainly and as adversaries would."""
    source, output = Store(str(folder / "collection")), Store(str(folder / "protected"))
    train = [path.name for path in collection.train]
    clean, protected, test = (
        load_labelled(store, names, side=SIDE)
        for store, names in (
            (source, train),
            (output, train),
            (source, [path.name for path in collection.test]),
        )
    )
    with progress("relearn", 2 * len(REGIMES), "trial") as bar:
        return compare(
            *(clean, protected, test, REGIMES),
            known=Knowledge(num_groups=CLUSTERS),
            epochs=EPOCHS,
            seeds=(0,),
            processes=PROCESSES,
            progress=bar.step,
        )


def print_table(accuracy: dict[str, Any]) -> None:
    """Regime by regime, and the one figure that a protection is reported with."""
    print(f"\n{'accuracy on clean test images':<34}{'clean':>8}{'protected':>11}")
    for row in accuracy["rows"]:
        print(f"  {row['regime']:<32}{row['clean'][0]:>8.1%}{row['protected'][0]:>11.1%}")
    best = {which: max(row[which][0] for row in accuracy["rows"]) for which in ("clean", "protected")}
    print(f"  {'relearned (worst case of these)':<32}{best['clean']:>8.1%}{best['protected']:>11.1%}")
    print(f"  {'largest class':<32}{accuracy['chance']:>8.1%}\n")


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
