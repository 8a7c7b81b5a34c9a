"""The `scumble` command is the jobs under other names: same options, same refusals, same exit codes, no slower."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from jobs.shared.commands import COMMANDS
from tests.jobs.test_cli import COMMANDS as JOBS
from tests.jobs.test_cli import HEAVY, TELLS_MODULES
from tests.support import runs

SCRIPT = "import sys\nfrom jobs.shared.scumble import main\nsys.exit(main())\n"


def scumble(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The console script as pip writes it, started in an empty folder; stderr ends with the modules imported."""
    (folder / "sitecustomize.py").write_text(TELLS_MODULES)
    (folder / "scumble").write_text(SCRIPT)
    path = os.pathsep.join([str(folder), str(runs.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, str(folder / "scumble"), *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_every_job_is_one_subcommand_and_help_lists_them_all(tmp_path: Path) -> None:
    assert sorted(command.job for command in COMMANDS.values()) == JOBS
    for options in ([], ["--help"]):
        done = scumble(tmp_path, *options)
        assert done.returncode == 0
        assert re.findall(r"^  ([a-z-]+) {2,}\S", done.stdout.partition("options:")[0], re.MULTILINE) == list(COMMANDS)
        assert HEAVY & set(done.stderr.partition("modules: ")[2].split()) == set()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_subcommand_has_the_options_of_its_job_in_its_own_words_and_as_fast(tmp_path: Path, name: str) -> None:
    before = os.times()
    ours = scumble(tmp_path, name, "--help", COLUMNS="100")
    seconds = os.times().children_user - before.children_user
    job = [sys.executable, str(runs.ROOT / f"jobs/{COMMANDS[name].job}.py"), "--help"]
    environment = {**os.environ, "PYTHONPATH": str(runs.ROOT), "COLUMNS": "100"}
    theirs = subprocess.run(job, env=environment, capture_output=True, text=True, check=True)
    assert ours.returncode == 0
    assert ours.stdout.startswith(f"usage: scumble {name} ")
    assert ours.stdout.partition("options:")[2] != ""
    flags = [set(re.findall(r"(?<!\S)--[a-z-]+", text)) for text in (ours.stdout, theirs.stdout)]
    assert flags[0] == flags[1]
    assert re.findall(r"(?<!-- )python jobs/", ours.stdout) == []
    assert HEAVY & set(ours.stderr.partition("modules: ")[2].split()) == set()
    assert seconds < 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["protct"], "error: unknown command 'protct'; did you mean protect"),
        (["--verison"], "error: unknown option --verison; did you mean --version?"),
        (["status", "--outptu", "x"], "error: unknown option --outptu; did you mean --output?"),
        (["verify"], "error: --output is missing (see --help)"),
        (["protect", "--input", "a", "--output", "b", "--epsilon", "x"], "error: --epsilon 'x' is not a number"),
    ],
)
def test_what_is_wrong_is_refused_as_by_the_job_itself(tmp_path: Path, options: list[str], said: str) -> None:
    done = scumble(tmp_path, *options)
    assert done.returncode == 2
    line, modules = done.stderr.splitlines()
    assert line.startswith(said)
    assert modules.startswith("modules: ")


def test_the_version_is_that_of_the_package(tmp_path: Path) -> None:
    done = scumble(tmp_path, "--version")
    assert (done.returncode, done.stdout) == (0, f"scumble {version('scumble')}\n")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("scumble pro", ["protect "]),
        ("scumble --ver", ["--version "]),
        ("scumble protect --clusters 5 --over", ["--overwrite "]),
        ("scumble  status --js", ["--json "]),
        ("scumble protect --metadata strip", ["strip", "strip-gps"]),
    ],
)
def test_a_shell_completes_commands_and_options(tmp_path: Path, line: str, expected: list[str]) -> None:
    pytest.importorskip("argcomplete")
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    answer = tmp_path / "answer"
    done = scumble(tmp_path, **asked, _ARGCOMPLETE_STDOUT_FILENAME=str(answer), _ARGCOMPLETE_SUPPRESS_SPACE="0")
    assert done.returncode == 0
    assert sorted(answer.read_text().split("\n")) == expected
