"""What all command lines share: settings files, and terminals that cannot show every name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from jobs import cli
from jobs.options import protection_parser
from pipeline.errors import SettingsError
from tests.runs import ROOT


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_settings_file_that_is_not_utf8_is_one_line_of_usage(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes("output: geschützt\n".encode(encoding))
    with pytest.raises(SettingsError, match=rf"--config {path}: not UTF-8; save it again as that"):
        cli.read_config(path, protection_parser())
    path.write_bytes("output: geschützt\n".encode("utf-8-sig"))
    assert cli.read_config(path, protection_parser()) == {"output": "geschützt"}


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}, {}])
def test_a_terminal_that_cannot_show_a_name_gets_its_codes(environment: dict[str, str]) -> None:
    code = r"from jobs import cli; cli.run(lambda _: print('caf\xe9', '\udce9') or 0)"
    environment = {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.endswith(b" \\udce9\n")
