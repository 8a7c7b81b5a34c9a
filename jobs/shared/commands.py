"""The subcommands of `scumble`: which job each one is, and what it does."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A subcommand.

    job  the module of `jobs` whose main it calls
    """

    job: str
    does: str


COMMANDS = {
    "pack": Command("pack", "pack a data set into shards"),
    "protect": Command("protect_imagenet", "protect a collection"),
    "baseline": Command("protect_baseline", "protect a collection with a published method, to compare"),
    "uploads": Command("protect_uploads", "protect new uploads, each once"),
    "concepts": Command("concepts", "make a bank of concepts"),
    "train-universal": Command("train_one_for_all", "train a universal generator"),
    "evaluate": Command("evaluate_relearning", "measure what a protected collection still teaches"),
    "verify": Command("verify", "check an output against its records and its originals"),
    "status": Command("status", "show the progress of a run"),
    "unpack": Command("unpack", "write shards as files again"),
    "report": Command("report", "write the report of a run again"),
    "doctor": Command("doctor", "find what would break a run later"),
    "demo": Command("demo", "protect a small real collection and measure the effect"),
}


def called_as(text: str) -> str:
    """A usage text of a job in the words of the command that the user typed; unchanged if that was the job itself.

    `ray job submit` needs the file of a job, so what follows its `--` stays.
    """
    if not sys.argv[0].startswith("scumble "):
        return text
    for name, command in COMMANDS.items():
        text = re.sub(rf"(?<!-- )python jobs/{command.job}\.py|^{command.job}\.py", f"scumble {name}", text)
    return text
