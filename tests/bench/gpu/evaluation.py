"""Step 5: an evaluation: the default protection, a third of its steps, and a control; ResNet-18, four trials a GPU."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
from rows import BENCH, Task, job, run, told

from pipeline.settings import EMBEDDED_SURROGATE
from pipeline.shards.photographs import write_demo_collection

REGIMES = "nt,nt-cg,iss-jpeg10,subtract+cg"
GOOD = 0.6  # accuracy on clean test images that a target should reach soon


def main() -> None:
    task = told()
    train, test = collection(task)
    output, controls = task.work / "uc", task.work / "controls"
    surrogate = ["--surrogate", EMBEDDED_SURROGATE, "--surrogate-size", "64" if task.tiny else "160"]
    protect = ["--input", train, "--output", str(output), *surrogate, *task.gpu_options, "--steps", "500"]
    with task.timed("the default protection, 500 steps"):  # in a rehearsal step 2 makes one
        run(job("protect_imagenet", *protect, *(["--dry-run"] if task.tiny else [])))
    run([sys.executable, str(BENCH / "control_protections.py"), "--input", train, "--output", str(controls)])
    target, regimes, epochs = ("small", "nt", 1) if task.tiny else ("resnet18", REGIMES, 12)
    protected = {"control": controls / "class-random"} | ({} if task.tiny else {"uc": output})
    judged = ["--clean", train, "--test", test]
    judged += ["--protected", *(f"{name}={folder}" for name, folder in protected.items())]
    judged += ["--targets", target, "--regimes", regimes, "--epochs", str(epochs), "--seeds", "0"]
    judged += ["--output", str(task.work / "evaluation"), *(["--gpus-per-worker", "0.25"] if task.gpu_options else [])]
    if task.tiny:  # other steps run beside it
        judged += ["--workers", "1"]
    with (
        told_as_they_end(task, task.work / "evaluation"),
        task.timed(f"evaluate_relearning.py, {target}, {epochs} epochs, {len(regimes.split(','))} regimes"),
    ):
        run(job("evaluate_relearning", *judged))
    tell(task, task.work / "evaluation")


def collection(task: Task) -> tuple[str, str]:
    """Training and test images: CIFAR-10 where it is at hand, else the demo's photographs."""
    folder = task.data / "cifar10"
    if folder.is_dir() and not task.tiny:
        task.row("images", "CIFAR-10, 6,000 to train on")
        return f"{folder}/cifar10-train-*.tar.gz", f"{folder}/cifar10-test-*.tar.gz"
    made = write_demo_collection(task.work / "photographs", seed=0, side=32)
    if task.tiny:
        task.row("images", "patches of photographs, one shard to train on")
        return f"{made.folder}/train-000000.tar", f"{made.folder}/test-000000.tar"
    task.row("images", f"{made.num_train:,} patches of photographs")
    return f"{made.folder}/train-*.tar", f"{made.folder}/test-*.tar"


@contextlib.contextmanager
def told_as_they_end(task: Task, output: Path) -> Iterator[None]:
    """Accuracy and seconds of every trial as soon as it has ended: the step may be cut off before the last one has."""
    over, seen = threading.Event(), set[Path]()

    def tell_new() -> None:
        for path in sorted(set(output.glob("trials/*.json")) - seen):
            row = json.loads(path.read_text())
            what = f"{row['protection']}, {row['regime']}: accuracy on clean test images"
            task.row(what, 100 * row["accuracy_last"], "%", f"{row['seconds']:.1f} s")
            seen.add(path)

    def watch() -> None:
        while not over.wait(2.0):
            tell_new()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        tell_new()


def tell(task: Task, output: Path) -> None:
    """How soon the clean target was good."""
    rows = pq.read_table(output / "results.parquet").to_pylist()
    (plain,) = [row for row in rows if (row["protection"], row["regime"]) == ("clean", "nt")]
    epochs = [one for one in pq.read_table(output / "histories.parquet").to_pylist() if one["key"] == plain["key"]]
    good = [one["epoch"] + 1 for one in epochs if one["accuracy_test"] >= GOOD]
    seconds = min(good) * plain["seconds"] / len(epochs) if good else "not reached"
    task.row(f"clean images, nt: time to {GOOD:.0%}", seconds, "s")


if __name__ == "__main__":
    main()
