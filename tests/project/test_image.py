"""The Dockerfile builds without a Docker engine, and what it builds runs as an ordinary user.

Needs root and Debian's buildah, crun and debootstrap; downloads 3.5 GB, holds 24 GB of disk while it runs, and takes
5 minutes on two cores, 28 where others use them ten times over.
"""

from __future__ import annotations

import ast
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.runs import ROOT, write_collection

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
TOOLS = ("buildah", "crun", "debootstrap")
# buildah seals a copy of its own program before it does anything else; now and then the kernel is not ready for that.
UNSEALED = "sealing memfd copy: Device or resource busy"
IMAGE_BYTES = 8_000_000_000
# Its container, its layer on the way and the stored layer are there at once. Overlay was measured.
DISK_BYTES = {"overlay": 28_000_000_000, "vfs": 45_000_000_000}


class Builder:
    """buildah with all its state in one folder. The container sees this machine's network and /dev: no sandbox."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "tmp").mkdir()
        # vfs copies the whole image for every container: 9 minutes more on a busy machine
        self.driver = "overlay" if self._works("overlay") else "vfs"
        self._options = self._storage(self.driver)

    def _storage(self, driver: str) -> list[str]:
        folder = self.folder / driver
        return ["--root", str(folder / "root"), "--runroot", str(folder / "run"), "--storage-driver", driver]

    def _works(self, driver: str) -> bool:
        return subprocess.run(["buildah", *self._storage(driver), "info"], capture_output=True).returncode == 0

    def __call__(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = ["buildah", *self._options, *words]
        scratch = os.environ | {"TMPDIR": str(self.folder / "tmp")}
        for _ in range(3):
            done = subprocess.run(command, env=scratch, capture_output=True, text=True, check=False, timeout=2400)
            if UNSEALED not in done.stderr:
                break
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

    def remove(self) -> None:
        self("rm", "--all", check=False)
        self("rmi", "--all", "--force", check=False)
        shutil.rmtree(self.folder)


class Image:
    """What was built, in one container: a second one may be a second copy."""

    def __init__(self, build: Builder, name: str) -> None:
        self._build, self.name = build, name
        self._container = build("from", name).stdout.strip()
        self.root = Path(build("mount", self._container).stdout.strip())

    def run(self, *words: str, volume: Path | None = None) -> subprocess.CompletedProcess[str]:
        """A command in the container, as the image's own user."""
        mounts = ["--volume", f"{volume}:/data"] if volume is not None else []
        return self._build("run", "--isolation", "chroot", *mounts, self._container, "--", *words, check=False)

    def described(self) -> str:
        """Settings and history of the image."""
        return self._build("inspect", "--type", "image", self.name).stdout


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed (Debian: apt-get install {' '.join(TOOLS)})")
    if os.getuid() != 0:
        pytest.skip("building without an engine needs root")
    build = Builder(tmp_path_factory.mktemp("image"))
    try:
        needed = DISK_BYTES[build.driver]
        if shutil.disk_usage(build.folder).free < needed:
            pytest.skip(f"building takes {needed / 1e9:.0f} GB of disk while it runs")
        arguments = ["--isolation", "chroot", "--network", "host", "--build-arg", f"BASE={build.base()}"]
        arguments += ["--build-arg", "SURROGATE=timm:tf_efficientnet_lite0"]  # fetches nothing: it is in the package
        arguments += _reach_packages(build.folder)
        build("bud", *arguments, "-t", "scumble:test", "-f", str(ROOT / "k8s" / "Dockerfile"), str(ROOT))
        yield Image(build, "localhost/scumble:test")
    finally:
        build.remove()


def pip_settings() -> dict[str, str]:
    """Where and how this machine's pip finds packages; what the environment says wins, as in pip."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    settings: dict[str, str] = {}
    for name, _, value in (line.partition("=") for line in told.splitlines()):
        settings.setdefault(name.rpartition(".")[2], " ".join(ast.literal_eval(value).split()))
    return settings


def _reach_packages(folder: Path) -> list[str]:
    """The options that tell the pip inside the same: secrets, which stay outside of the image, and folders it names."""
    settings, secrets = pip_settings(), [f"id=pip.conf,src={folder}/pip.conf"]
    if certificates := settings.get("cert"):
        settings["cert"] = "/run/secrets/ca.crt"
        secrets.append(f"id=ca.crt,src={certificates}")
    (folder / "pip.conf").write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
    words = [word.removeprefix("file://") for value in settings.values() for word in value.split()]
    places = {_top(Path(word)) for word in words if word.startswith("/") and Path(word).is_dir()}
    return [
        *(word for secret in secrets for word in ("--secret", secret)),
        *(word for place in sorted(places) for word in ("--volume", f"{place}:{place}:ro")),
    ]


def _top(index: Path) -> Path:
    """The folder that holds an index and the files that its pages name."""
    return index.parent if index.name == "simple" else index


def test_it_runs_as_an_ordinary_user_and_has_what_kuberay_calls(image: Image) -> None:
    assert image.run("id", "-u").stdout.strip() == "1000"
    for program in ("ray", "wget", "bash"):
        assert image.run("sh", "-c", f"command -v {program}").returncode == 0, program
    assert image.run("sh", "-c", "touch /app/x").returncode != 0
    assert image.run("sh", "-c", "touch /tmp/x").returncode == 0


def test_it_is_no_larger_than_expected_and_holds_nothing_of_the_machine_that_built_it(image: Image) -> None:
    told = subprocess.run(["du", "-sxB1", str(image.root)], capture_output=True, text=True, check=True).stdout
    assert int(told.split()[0]) < IMAGE_BYTES
    assert not (image.root / "etc" / "pip.conf").exists()
    assert not any((image.root / "run" / "secrets").iterdir())
    assert sorted(path.name for path in (image.root / "app").iterdir()) == [
        *("LICENSE", "README.md", "actors", "constraints.txt", "jobs", "pipeline", "pyproject.toml")
    ]
    assert not [path for path in (image.root / "dev").rglob("*") if stat.S_ISREG(path.lstat().st_mode)]
    described = image.described()
    assert "constraints.txt" in described
    for word in (word for value in pip_settings().values() for word in value.split() if "/" in word):
        assert word not in described


def test_the_versions_are_those_of_the_constraints(image: Image) -> None:
    frozen = image.run("pip", "freeze").stdout.splitlines()
    tried = (ROOT / "constraints.txt").read_text().splitlines()
    for name in ("ray", "torch", "pillow", "timm", "faiss-cpu"):
        (line,) = (line for line in frozen if line.lower().startswith(f"{name}=="))
        assert line.lower() in [one.partition(" ")[0].lower() for one in tried]


def test_the_main_job_plans_a_run_and_the_doctor_finds_nothing_wrong(image: Image, tmp_path: Path) -> None:
    write_collection(tmp_path / "in", shards=2, per_shard=16)
    for path in (tmp_path, *tmp_path.rglob("*")):
        path.chmod(0o777)
    where = ["--input", "/data/in", "--output", "/data/out", "--surrogate", "timm:tf_efficientnet_lite0"]
    planned = image.run("python", "jobs/protect_imagenet.py", *where, "--dry-run", volume=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert "input        /data/in: 2 shards" in planned.stdout
    assert "time         about" in planned.stdout
    looked = image.run("python", "jobs/doctor.py", *where, volume=tmp_path)
    assert looked.returncode == 0, looked.stdout + looked.stderr
    assert "weights      timm:tf_efficientnet_lite0" in looked.stdout


def test_the_job_for_uploads_explains_itself(image: Image) -> None:
    told = image.run("python", "jobs/protect_uploads.py", "--help")
    assert told.returncode == 0, told.stderr
    assert "--metrics-port" in told.stdout
