"""The `scumble` command: finds the job that a subcommand names, and runs it as `python jobs/JOB.py` would."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.metadata import version

from jobs.shared import cli
from jobs.shared.commands import COMMANDS
from pipeline.errors import SettingsError
from pipeline.settings import near_matches

_LISTED = "\n".join(f"  {name:<16} {command.does}" for name, command in COMMANDS.items())
DESCRIPTION = f"""\
Protect large image collections from being learned, and measure how well.

commands:
{_LISTED}

`scumble COMMAND --help` shows the options of one. For completion in bash or zsh, install the extra `completion` and run
  eval "$(register-python-argcomplete scumble)"
"""


def main() -> int:
    """The entry point of the console script; returns its exit code."""
    return cli.run(_dispatched)


def _dispatched(_: list[str] | None) -> int:
    """Run the job of the subcommand in sys.argv. Raises SettingsError if there is no such subcommand."""
    given = sys.argv[1:]
    chosen = _completed() or (given[0] if given else "--help")
    if chosen in COMMANDS:
        # a job reads its name and its options here, wherever it was started
        sys.argv = [f"scumble {chosen}", *given[1:]]
        return int(import_module(f"jobs.{COMMANDS[chosen].job}").main(None))
    if not chosen.startswith("-"):
        raise SettingsError(f"unknown command {chosen!r}{near_matches(chosen, list(COMMANDS))} (see scumble --help)")
    parser = cli.Parser(prog="scumble", usage="scumble COMMAND [options]", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"scumble {version('scumble')}")
    parser.parse_args(given or ["--help"])
    raise SettingsError("no command is given (see scumble --help)")


def _completed() -> str | None:
    """The subcommand on the line that a shell wants completed, or None; completes the subcommand itself."""
    if "_ARGCOMPLETE" not in os.environ:
        return None
    words = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])].replace("\t", " ").split(" ")
    words = [word for word in words[:-1] if word] + words[-1:]  # the last one is being typed, and may be empty
    if len(words) > 2 and words[1] in COMMANDS:
        os.environ["_ARGCOMPLETE"] = "2"  # the job's own parser begins at the second word
        return words[1]
    parser = cli.Parser(prog="scumble")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("command", choices=[*COMMANDS])
    parser.parse_args([])
    return None
