"""What `pip install .` puts into an environment works outside of the checkout, whatever else is called the same."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.support.runs import ROOT

ROOMS = ("pipeline", "actors", "jobs")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an unpacked wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    skipped = shutil.ignore_patterns("__pycache__")
    for room in ROOMS:
        shutil.copytree(ROOT / room, folder / "source" / room, ignore=skipped)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source" / name)
    pip = [sys.executable, "-W", "ignore", "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    built = subprocess.run(
        [*pip, "-q", "-w", str(folder), str(folder / "source")], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("scumble-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with the installed packages, and a decoy of each behind them, in a folder of its own."""
    for room in ROOMS:
        (cwd / "decoy" / room).mkdir(parents=True, exist_ok=True)
        (cwd / "decoy" / room / "__init__.py").write_text("raise ImportError('the decoy')\n")
    path = os.pathsep.join([str(installed), str(cwd / "decoy")])
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_wheel_holds_every_file_of_the_three_packages_but_documents(installed: Path) -> None:
    def files(folder: Path) -> set[str]:
        found = (path for room in ROOMS for path in (folder / room).rglob("*"))
        return {
            str(p.relative_to(folder))
            for p in found
            if p.is_file() and p.suffix != ".md" and "__pycache__" not in p.parts
        }

    assert files(installed) == files(ROOT)
    assert "pipeline/surrogates/weights/tf_efficientnet_lite0_in1k_fp16.safetensors" in files(installed)


_SLOW = [pytest.param(job, marks=pytest.mark.slow) for job in ("evaluate_relearning", "train_one_for_all", "demo")]


@pytest.mark.parametrize("job", ["protect_imagenet", "protect_uploads", *_SLOW])
def test_an_installed_command_runs_outside_of_the_checkout(installed: Path, tmp_path: Path, job: str) -> None:
    helped = run(installed, tmp_path, "-m", f"jobs.{job}", "--help")
    assert helped.returncode == 0, helped.stderr
    assert f"usage: {job}.py" in helped.stdout


def test_what_is_installed_wins_over_a_package_of_the_same_name_and_finds_its_data(
    installed: Path, tmp_path: Path
) -> None:
    program = (
        "import pipeline, actors, jobs\n"
        "from pipeline.report.page import find_template\n"
        "find_template('report.html.j2')\n"
        "print(pipeline.__file__, actors.__file__, jobs.__file__)\n"
    )
    done = run(installed, tmp_path, "-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(installed / room / "__init__.py") for room in ("pipeline", "actors", "jobs")]


def test_pip_installs_the_scumble_command_into_an_environment_of_its_own(installed: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "own"], check=True)
    (site,) = tmp_path.glob("own/lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # all but what lies in .pth files there
    (wheel,) = installed.parent.glob("scumble-*.whl")
    pip = [sys.executable, "-W", "ignore", "-m", "pip", "--python", tmp_path / "own/bin/python", "install", "-q"]
    subprocess.run([*pip, "--no-deps", "--no-index", wheel], check=True)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def said(*command: str | Path) -> str:
        return subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, check=True).stdout

    assert said(tmp_path / "own/bin/scumble", "verify", "--help").startswith("usage: scumble verify ")
    program = "import pipeline, actors, jobs; print(pipeline.__file__, actors.__file__, jobs.__file__)"
    assert said(tmp_path / "own/bin/python", "-c", program).split() == [
        str(site / room / "__init__.py") for room in ROOMS
    ]
