"""The leaderboard: one JSON file for each protection and contest (data set, epsilon, targets, epochs and battery of
regimes), and the pages made from them.

  python tests/bench/leaderboard.py add evaluation/ --protection scumble --method scumble --labels none \\
      --data "CIFAR-10 at hand, 32 px" --source "this repository" --command "python jobs/protect_imagenet.py …"
  python tests/bench/leaderboard.py write      leaderboard.md and leaderboard.html, from the files
  python tests/bench/leaderboard.py check      exit with 1 unless both pages are what `write` would write

`add` takes the output of evaluate_relearning.py; the outputs of the fits are those that its evaluation.json names.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import ChoiceLoader, FileSystemLoader

from pipeline import layout
from pipeline.deltas.load import load_protection
from pipeline.json_record import JsonRecord
from pipeline.measures.scores import scores_from_parquet
from pipeline.relearning.evaluation import CLEAN, SETTINGS, TRIALS, WHOLE
from pipeline.relearning.presets import AUDIT, AUDIT_CPU
from pipeline.relearning.report.certificate import fit_at
from pipeline.relearning.report.results import Row, mean_accuracies, results_from_parquet, select
from pipeline.report.page import find_template
from pipeline.storage.store import Store

HERE = Path(__file__).parent
FOLDER = HERE / "results/leaderboard"
PAGES = {"md": HERE / "results/leaderboard.md", "html": HERE / "results/leaderboard.html"}
LABELS = ("none", "cluster", "predicted", "true")
FEWEST_FITS = 3


@dataclass(frozen=True)
class Cell:
    """Accuracy on clean test images in [0, 1] after training under one regime: a mean for each fit, and the control."""

    regime: str
    target: str
    fits: tuple[float, ...]
    sd: float | None  # over trainings of one fit
    clean: float

    @property
    def mean(self) -> float:
        return float(np.mean(self.fits))


@dataclass(frozen=True, order=True)
class Contest:
    """What rows must share to be ranked in one table.

    epsilon  in units of 1/255; infinite for those that something else bounds, such as an L2 norm
    images   that a target is trained on, of `side` pixels
    """

    data: str
    epsilon: float
    targets: tuple[str, ...]
    epochs: int
    battery: str
    recipe: str
    side: int
    images: int

    def __str__(self) -> str:
        budget = "budgets of their own" if math.isinf(self.epsilon) else f"epsilon {self.epsilon:g}/255"
        trained = f"{', '.join(self.targets)}, {self.epochs} epochs, {self.battery}"
        recipe = "" if self.recipe == "fast" else f", recipe {self.recipe}"
        return f"{self.data}, {budget}: {trained}{recipe}; {self.images:,} images of {self.side} px"


@dataclass(frozen=True)
class Entry(JsonRecord):
    """One protection on one data set.

    labels    what it was given: none, cluster, predicted or true labels
    epsilon   the largest change of a pixel value in units of 1/255 that the fits declare
    bound     linf: epsilon is their budget; otherwise what is
    hours     of all trainings of its targets, on `device`
    psnr      median over pictures of all fits, dB
    seeds         trainings of each fit, the fewest of any regime
    clean_sha256  digest of the unprotected collection; "" in files that are older than it
    computation   of the evaluation: its trials are comparable by the eye, and not the same, if it differs
    """

    method: str
    source: str
    labels: str
    data: str
    epsilon: float
    bound: str
    epochs: int
    recipe: str
    side: int
    images: int
    clean_sha256: str
    computation: int
    seeds: int
    cells: tuple[Cell, ...]
    psnr: float
    ssim: float
    hours: float
    device: str
    versions: tuple[str, ...]
    commit: str
    collections: tuple[str, ...]  # digest of each fit's shards
    commands: tuple[str, ...]

    @property
    def contest(self) -> Contest:
        targets = tuple(sorted({cell.target for cell in self.cells}))
        epsilon = self.epsilon if self.bound == "linf" else math.inf
        trained = (targets, self.epochs, self.battery or "audit-cpu", self.recipe, self.side, self.images)
        return Contest(self.data, epsilon, *trained)

    @property
    def file(self) -> str:
        contest = self.contest
        trained = (*contest.targets, f"{contest.epochs}-epochs", contest.battery)
        trained += () if contest.recipe == "fast" else (contest.recipe,)
        budget = self.bound if math.isinf(contest.epsilon) else f"{contest.epsilon:g}-255"
        parts = (contest.data, budget, *trained, self.method, self.labels)
        return "_".join("".join(c if c.isalnum() or c in ".-" else "-" for c in part) for part in parts) + ".json"

    @property
    def worst(self) -> Cell:
        return max(self.cells, key=lambda cell: cell.mean)

    @property
    def clean(self) -> float:
        """What the strongest regime gets out of unprotected images."""
        return max(cell.clean for cell in self.cells)

    @property
    def ordinary(self) -> Cell | None:
        return next((cell for cell in self.cells if cell.regime == "nt"), None)

    @property
    def battery(self) -> str:
        """The widest battery that was run whole, else ""."""
        has = {cell.regime for cell in self.cells}
        names = {"audit": AUDIT, "audit-cpu": AUDIT_CPU}
        return next((name for name, regimes in names.items() if set(regimes) <= has), "")

    @property
    def lacks(self) -> str:
        """Why it is shown but not ranked; "" if it is ranked."""
        if not self.battery:
            missing = sorted(set(AUDIT_CPU) - {cell.regime for cell in self.cells})
            return f"regimes not run: {', '.join(missing)}"
        fits = min(len(cell.fits) for cell in self.cells)
        fits = min(fits, len(set(self.collections)))  # copies of one fit are one
        if fits < FEWEST_FITS:
            return f"{FEWEST_FITS} fits are needed; of some regimes there are {fits}"
        pairs = {(cell.regime, cell.target) for cell in self.cells}
        targets = {target for _, target in pairs}
        absent = sorted({(regime, target) for regime in AUDIT_CPU for target in targets} - pairs)
        return f"not run: {', '.join(' on '.join(pair) for pair in absent)}" if absent else ""


def entry_of(rows: Sequence[Row], fits: Sequence[Store], options: argparse.Namespace) -> Entry:
    """An entry from the rows of an evaluation and the outputs of the fits. Raises ValueError if there are no rows."""
    own, control = select(rows, options.protection, "original", WHOLE), select(rows, CLEAN, "original", WHOLE)
    if not own or not control:
        raise ValueError(f"no rows of {options.protection if not own else CLEAN} with the original labels")
    clean = mean_accuracies(control, ("regime", "target"))
    cells = []
    for (regime, target), found in sorted(mean_accuracies(own, ("regime", "target")).items()):
        cell = clean.get((regime, target))
        if cell is None or cell.mean is None:
            raise ValueError(f"no training on clean images under {regime}, {target}, that did not diverge")
        if found.fits:  # else all diverged, and `lacks` names the regime
            cells.append(Cell(regime, target, found.fits, found.sd, cell.mean))
    if not cells:
        raise ValueError(f"all trainings of {options.protection} diverged")
    scores = [score for fit in fits for score in scores_from_parquet(fit.read(layout.SCORES), fit.url)]
    epsilons = {load_protection(fit.read(layout.PROTECTION)).epsilon for fit in fits}
    if len(epsilons) != 1 and options.bound == "linf":
        raise ValueError(f"the fits have different bounds: {sorted(255 * epsilon for epsilon in epsilons)}")
    return Entry(
        method=options.method,
        source=options.source,
        labels=options.labels,
        data=options.data,
        epsilon=round(255 * max(epsilons), 6),
        bound=options.bound,
        epochs=_one(own, "epochs"),
        recipe=_one(own, "recipe"),
        side=_one(own, "side"),
        images=_one(own, "num_train"),
        clean_sha256=options.clean_sha256,
        computation=options.computation,
        seeds=min(Counter((row["regime"], row["target"], row["fit"]) for row in own).values()),
        cells=tuple(cells),
        psnr=float(np.median([score.psnr for score in scores])),
        ssim=float(np.nanmedian([score.ssim for score in scores])),
        hours=sum(row["seconds"] for row in own) / 3600,
        device=options.device or str(own[0]["device"]),
        versions=tuple(sorted({str(row["versions"]) for row in own})),
        collections=tuple(fit_at(fit, "").collection_sha256 for fit in fits),
        commit=options.commit or _head(),
        commands=tuple(options.command),
    )


def _one(rows: Sequence[Row], name: str) -> Any:
    found = {row[name] for row in rows}
    if len(found) != 1:
        raise ValueError(f"the trainings differ in {name}: {', '.join(map(str, sorted(found)))}")
    return found.pop()


def _head() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()


def read_entries(folder: Path = FOLDER) -> list[Entry]:
    """All entries. Raises InputError for a file that is not one, ValueError for one under another's name."""
    entries = list[Entry]()
    for path in sorted(folder.glob("*.json")):
        entry = Entry.from_bytes(path.read_bytes(), str(path))
        if entry.file != path.name or entry.labels not in LABELS:
            raise ValueError(f"{path}: it should be called {entry.file}, with labels that are one of {LABELS}")
        same = {one.clean_sha256 for one in entries if one.data == entry.data} | {entry.clean_sha256}
        if len(same - {""}) > 1:
            raise ValueError(f"{path}: other pictures than those of the files before it, which it calls {entry.data}")
        entries.append(entry)
    return entries


def tables(entries: Sequence[Entry]) -> list[tuple[Contest, list[Entry], list[Entry]]]:
    """(contest, ranked, others): what differs in any part of a contest is never compared."""

    def place(entry: Entry) -> Contest:
        return entry.contest

    found = []
    for contest, group in groupby(sorted(entries, key=place), key=place):
        members = sorted(group, key=lambda entry: entry.worst.mean)
        ranked = [entry for entry in members if not entry.lacks]
        found.append((contest, ranked, [entry for entry in members if entry.lacks]))
    return found


def pages(entries: Sequence[Entry]) -> dict[str, str]:
    """The text of both pages."""
    made = {}
    for kind in PAGES:
        template = find_template("page.html.j2")
        loader = ChoiceLoader([FileSystemLoader(HERE), template.environment.loader or FileSystemLoader(HERE)])
        environment = template.environment.overlay(loader=loader, autoescape=kind == "html")
        made[kind] = environment.get_template(f"leaderboard.{kind}.j2").render(tables=tables(entries)).rstrip() + "\n"
    return made


def _computed(output: Store, rows: Sequence[Row]) -> tuple[str, int]:
    """Digest of the clean collection, and the computation of the trials. Raises ValueError if they differ."""
    clean = {str(row["data"]) for row in rows if row["protection"] == CLEAN and row["regime"] == "nt"}
    about = (json.loads(output.read(f"{TRIALS}/{row['key']}.json")) for row in rows)
    computations = {int(one.get("computation", 1)) for one in about}
    if len(clean) != 1 or len(computations) != 1:
        raise ValueError(f"trials of {len(clean)} clean collections, of the computations {sorted(computations)}")
    return clean.pop(), computations.pop()


def add(options: argparse.Namespace) -> None:
    output = Store(options.evaluation)
    rows = results_from_parquet(output.read("results.parquet"))
    judged = json.loads(output.read(SETTINGS))["protected"].get(options.protection, [])
    fits = options.fits or judged
    if len(fits) != len(judged):
        name = options.protection
        raise ValueError(f"--fits: the evaluation judged {len(judged)} fits of {name}: {', '.join(judged)}")
    options.clean_sha256, options.computation = _computed(output, rows)
    entry = entry_of(rows, [Store(url) for url in fits], options)
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / entry.file).write_bytes(entry.to_bytes() + b"\n")
    print(f"{FOLDER / entry.file}: {entry.lacks or 'ranked'}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    adding = actions.add_parser("add", help="write the file of one protection")
    adding.add_argument("evaluation", help="output of evaluate_relearning.py")
    adding.add_argument("--protection", required=True, help="its name in the evaluation")
    adding.add_argument("--fits", nargs="+", metavar="URL", help="where the outputs of its fits are now, in order")
    adding.add_argument("--method", required=True, help="name in the table")
    adding.add_argument("--labels", required=True, choices=LABELS, help="what the method was given")
    bound = "what bounds the deltas (default: linf, by epsilon); otherwise a name such as l2"
    adding.add_argument("--bound", default="linf", help=bound)
    adding.add_argument("--data", required=True, help="data set, as the table calls it")
    adding.add_argument("--source", required=True, help="paper or repository")
    adding.add_argument("--device", help="processor or GPU that the targets were trained on")
    adding.add_argument("--commit", help="that the evaluation ran on (default: the one that is checked out)")
    adding.add_argument("--command", action="append", required=True, help="one of the commands; repeat")
    actions.add_parser("write", help="make the pages from the files")
    actions.add_parser("check", help="are the pages what the files say?")
    options = parser.parse_args()
    if options.action == "add":
        add(options)
        return 0
    made = pages(read_entries())
    if options.action == "write":
        for kind, text in made.items():
            PAGES[kind].write_text(text)
        return 0
    stale = [path.name for kind, path in PAGES.items() if path.read_text() != made[kind]]
    if stale:
        print(f"{', '.join(stale)}: run python tests/bench/leaderboard.py write", file=sys.stderr)
    return bool(stale)


if __name__ == "__main__":
    raise SystemExit(main())
