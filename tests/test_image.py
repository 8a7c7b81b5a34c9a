"""The Dockerfile builds without a Docker engine, and what it builds runs as an ordinary user.

Needs root and Debian's buildah, crun and debootstrap; takes some ten minutes and 30 GB of disk while it runs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs import ROOT, write_collection

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
TOOLS = ("buildah", "crun", "debootstrap")
LEAST_BYTES = 40_000_000_000


class Builder:
    """buildah with all its state in one folder. The container sees this machine's network: a proof, no sandbox."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._options = ["--root", str(folder / "root"), "--runroot", str(folder / "run"), "--storage-driver", "vfs"]

    def __call__(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = ["buildah", *self._options, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=2400)
        assert not check or done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        return done

    def base(self) -> str:
        """A Debian without Python, made from the distribution's own packages."""
        files = self.folder / "base"
        subprocess.run(
            ["debootstrap", "--variant=minbase", "bookworm", str(files)], check=True, capture_output=True, timeout=900
        )
        container = self("from", "scratch").stdout.strip()
        self("add", container, str(files), "/")
        self("commit", "-q", "--rm", container, "base:bookworm")
        shutil.rmtree(files)
        return "localhost/base:bookworm"


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
    """A builder with the image `scumble:test` in it."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed (Debian: apt-get install {' '.join(TOOLS)})")
    if os.getuid() != 0:
        pytest.skip("building without an engine needs root")
    folder = tmp_path_factory.mktemp("image")
    if shutil.disk_usage(folder).free < LEAST_BYTES:
        pytest.skip(f"building takes {LEAST_BYTES / 1e9:.0f} GB of disk while it runs")
    made = Builder(folder)
    mounts = [word for option in _pip_mounts(folder) for word in ("--volume", option)]
    arguments = ["--isolation", "chroot", "--network", "host", "--build-arg", f"BASE={made.base()}", *mounts]
    made("bud", *arguments, "-t", "scumble:test", "-f", str(ROOT / "k8s" / "Dockerfile"), str(ROOT))
    yield made
    made("rm", "--all", check=False)
    made("rmi", "--all", "--force", check=False)


def _pip_mounts(folder: Path) -> list[str]:
    """Where this machine's pip finds packages, for the pip inside: its settings, and folders that they name."""
    told = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    pairs = [line.partition("=") for line in told.splitlines()]
    settings = {name.rpartition(".")[2].strip(): value.strip().strip("'") for name, _, value in pairs}
    (folder / "pip.conf").write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
    words = [word.removeprefix("file://") for value in settings.values() for word in value.split()]
    places = {Path(word) for word in words if word.startswith("/") and Path(word).exists()}
    return [f"{folder}/pip.conf:/etc/pip.conf:ro", *(f"{place}:{place}:ro" for place in sorted(places))]


def run(build: Builder, *words: str, volume: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A command in a new container of the image, as the image's own user."""
    container = build("from", "localhost/scumble:test").stdout.strip()
    mounts = ["--volume", f"{volume}:/data"] if volume is not None else []
    return build("run", "--isolation", "chroot", *mounts, container, "--", *words, check=False)


def test_it_runs_as_an_ordinary_user_and_has_what_kuberay_calls(build: Builder) -> None:
    assert run(build, "id", "-u").stdout.strip() == "1000"
    for program in ("ray", "wget", "bash"):
        assert run(build, "sh", "-c", f"command -v {program}").returncode == 0, program
    assert run(build, "sh", "-c", "touch /app/x").returncode != 0


def test_the_versions_are_those_of_the_constraints(build: Builder) -> None:
    frozen = run(build, "pip", "freeze").stdout.splitlines()
    tried = (ROOT / "constraints.txt").read_text().splitlines()
    for name in ("ray", "torch", "pillow", "timm", "faiss-cpu"):
        (line,) = (line for line in frozen if line.lower().startswith(f"{name}=="))
        assert line.lower() in [one.partition(" ")[0].lower() for one in tried]


def test_the_main_job_plans_a_run_and_the_doctor_finds_nothing_wrong(build: Builder, tmp_path: Path) -> None:
    write_collection(tmp_path / "in", shards=2, per_shard=16)
    for path in (tmp_path, *tmp_path.rglob("*")):
        path.chmod(0o777)
    where = ["--input", "/data/in", "--output", "/data/out", "--surrogate", "timm:tf_efficientnet_lite0"]
    planned = run(build, "python", "jobs/protect_imagenet.py", *where, "--dry-run", volume=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert "input        /data/in: 2 shards" in planned.stdout
    assert "time         about" in planned.stdout
    looked = run(build, "python", "jobs/doctor.py", *where, volume=tmp_path)
    assert looked.returncode == 0, looked.stdout + looked.stderr
