"""Commands of this checkout, as benchmarks run them one after the other."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(script: str, *options: str) -> None:
    """Show and run a script, by its path below the top of the checkout; the first that fails ends the benchmark."""
    print(shlex.join(["python", script, *options]), flush=True)
    code = subprocess.run([sys.executable, script, *options], cwd=ROOT, check=False).returncode
    if code:
        raise SystemExit(code)
