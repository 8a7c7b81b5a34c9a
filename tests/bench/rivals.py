"""Published protections and our own, fitted several times and judged alike, as rows of the leaderboard:

  python tests/bench/rivals.py --output rivals/ --methods sp,em-class,scumble --device "2 cores of a Xeon"
  python tests/bench/rivals.py --output rivals/ … --target resnet18 --preset audit --gpus-per-worker 0.25 --seconds 540

Every fit and every training is kept in --output, so the same command goes on where it was stopped. After --seconds
nothing new is begun. `scumble` is the default of protect_imagenet.py, which is given no labels.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

from pipeline.baselines.methods import BASELINES, baseline

ROOT = Path(__file__).parents[2]
OURS = "scumble"
AT_HAND = "CIFAR-10 at hand, 32 px"
BOARD = str(ROOT / "tests/bench/leaderboard.py")
EMBEDDED = ("--surrogate", "timm:tf_efficientnet_lite0")


def job(name: str, *options: str) -> list[str]:
    return ["python", f"jobs/{name}.py", *options]


def run(command: list[str]) -> bool:
    """Run a command of this checkout; True if it succeeded."""
    print(shlex.join(command), flush=True)
    return subprocess.run([sys.executable, *command[1:]], cwd=ROOT, check=False).returncode == 0


def fit_command(options: argparse.Namespace, method: str, labels: str, seed: int, output: Path) -> list[str]:
    """One fit of a method; those with a budget of their own take no epsilon."""
    given = ["--input", options.train, "--output", str(output), "--seed", str(seed), "--encode", "lossless"]
    given += ["--gpus-per-worker", options.gpus_per_worker]
    if method == OURS:
        return job("protect_imagenet", *given, *EMBEDDED, "--epsilon", options.epsilon, "--clusters", options.clusters)
    given += ["--method", method, "--labels", labels]
    if labels == "cluster":
        given += ["--clusters", options.clusters]
    if baseline(method).bound == "linf":
        given += ["--epsilon", options.epsilon]
    if BASELINES[method].trains:
        given += ["--network", options.network]
    if BASELINES[method].place.startswith("trained."):
        given += ["--effort", str(options.effort)]
    return job("protect_baseline", *given)


def row_command(options: argparse.Namespace, name: str, commands: list[list[str]]) -> list[str]:
    """The command that writes the leaderboard's row."""
    method, _, labels = (name, "", "none") if name == OURS else name.rpartition("-")
    source = "this repository, the default" if method == OURS else baseline(method).source
    row = ["python", BOARD, "add", str(options.output / "evaluation"), "--protection", name]
    if method != OURS:
        row += ["--bound", baseline(method).bound]
    row += ["--method", as_fitted(options, method), "--labels", labels, "--data", options.data, "--source", source]
    row += ["--device", options.device]
    for command in commands:
        row += ["--command", shlex.join(command)]
    return row


def as_fitted(options: argparse.Namespace, method: str) -> str:
    """The name of the method, with the network and the effort where they are not the published ones."""
    name = method
    if method != OURS and BASELINES[method].trains and options.network != "resnet18":
        name += f", {options.network} surrogate"
    if method != OURS and BASELINES[method].place.startswith("trained.") and options.effort < 1:
        name += f", effort {options.effort:g}"
    return name


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True)
    add("--methods", required=True, help=f"comma-separated: {OURS}, {', '.join(BASELINES)}")
    add("--labels", default="true,cluster")
    add("--fits", type=int, default=3)
    add("--epsilon", default="16/255")
    add("--clusters", default="10")
    add("--train", default="data/cifar10/cifar10-train-*.tar.gz")
    add("--test", default="data/cifar10/cifar10-test-*.tar.gz")
    add("--data", help=f"as the leaderboard calls it (needed for other pictures than the default, {AT_HAND})")
    add("--preset", default="audit-cpu", help="of the evaluation")
    add("--target", default="small")
    add("--seeds", help="of the trainings of each fit (default: the preset's; one training is half the work or less)")
    add("--network", default="small", help="that methods train")
    add("--effort", type=float, default=1.0, help="share of the published steps")
    add("--gpus-per-worker", default="0")
    add("--device", required=True, help="as the leaderboard calls it")
    add("--seconds", type=float, default=float("inf"), help="begin nothing new after so long")
    options = parser.parse_args()
    is_other = (options.train, options.test) != (parser.get_default("train"), parser.get_default("test"))
    if is_other and options.data is None:
        parser.error("--train and --test are other pictures: say what the leaderboard calls them, by --data")
    options.data = options.data or AT_HAND
    return options


def main() -> int:
    options = parsed()
    over = time.monotonic() + options.seconds
    judged: dict[str, list[list[str]]] = {}  # name in the evaluation -> command of each fit
    for method in options.methods.split(","):
        for labels in ["none"] if method == OURS else options.labels.split(","):
            name = method if method == OURS else f"{method}-{labels}"
            commands = [
                fit_command(options, method, labels, seed, options.output / f"{name}-{seed}")
                for seed in range(options.fits)
            ]
            if all(time.monotonic() < over and run(command) for command in commands):
                judged[name] = commands
    if not judged:
        return 1
    fits = {name: [str(options.output / f"{name}-{seed}") for seed in range(options.fits)] for name in judged}
    evaluation = job(
        "evaluate_relearning",
        *(
            "--preset",
            options.preset,
            "--targets",
            options.target,
            *(() if options.seeds is None else ("--seeds", options.seeds)),
            "--gpus-per-worker",
            options.gpus_per_worker,
        ),
        *("--clean", options.train, "--test", options.test, "--output", str(options.output / "evaluation")),
        *("--protected", *(f"{name}={','.join(urls)}" for name, urls in fits.items())),
    )
    if time.monotonic() > over or not run(evaluation):
        return 1
    rows = [run(row_command(options, name, [*commands, evaluation])) for name, commands in judged.items()]
    return 0 if run(["python", BOARD, "write"]) and all(rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
