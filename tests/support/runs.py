"""Real protection runs for tests: small collections, the real command in its own process, what it left behind."""

from __future__ import annotations

import contextlib
import hashlib
import io
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import ray

from jobs.shared import cli
from pipeline.shards.photographs import photograph
from tests.support.processes import descendants as descendants
from tests.support.processes import kill as kill
from tests.support.processes import named as named
from tests.support.samples import image_bytes

ROOT = Path(__file__).parents[2]
WITHOUT_A_FIT = ["--surrogate", "timm:tf_efficientnet_lite0", "--surrogate-size", "64", "--max-quarantine", "1"]
FEW_STEPS = [*WITHOUT_A_FIT, "--clusters", "4", "--generator", "direct", "--steps", "8", "--restarts", "4"]
SMALL = [*FEW_STEPS, "--proxy-steps", "40"]
ONE_WORKER = ["--workers", "1"]  # half the starts of processes where nothing depends on their number
_NAMES = ("grass", "brick", "coffee", "retina")


def write_collection(folder: Path, *, shards: int = 5, per_shard: int = 32, side: int = 64, seed: int = 0) -> None:
    """Shards of real patches: JPEG and PNG by turns, a label and a caption beside each."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for shard in range(shards):
        with tarfile.open(folder / f"photos-{shard:03d}.tar", "w") as tar:
            for number in range(per_shard):
                which = number % len(_NAMES)
                pixels = photograph(_NAMES[which])
                pixels = pixels if pixels.ndim == 3 else pixels[..., None]
                top, left = (int(rng.integers(0, size - side)) for size in pixels.shape[:2])
                patch = np.ascontiguousarray(pixels[top : top + side, left : left + side])
                kind, suffix = (("JPEG", "jpg"), ("PNG", "png"))[number % 2]
                add(tar, f"{shard:03d}/{number:04d}.{suffix}", image_bytes(patch, kind))
                add(tar, f"{shard:03d}/{number:04d}.cls", str(which).encode())
                add(tar, f"{shard:03d}/{number:04d}.txt", f"{_NAMES[which]} ü {number}".encode())


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, BytesIO(data))


def command(source: str, output: str, *options: str) -> list[str]:
    return [sys.executable, str(ROOT / "jobs/protect_imagenet.py"), "--input", source, "--output", output, *options]


def small(*options: str) -> list[str]:
    """The options with those of a small run before them: of a small fit, unless a protection is given."""
    return [*(WITHOUT_A_FIT if "--protection" in options else SMALL), *options]


def protect(source: str, output: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the main job to its end, with one worker unless the options say otherwise."""
    return subprocess.run(
        command(source, output, *small(*ONE_WORKER, *options)), capture_output=True, text=True, timeout=500, check=False
    )


def refusal(main: Callable[[list[str] | None], int], *argv: str) -> tuple[int, str]:
    """Exit code and stderr of a job that is refused before it starts anything, run in this process."""
    given, err = sys.argv, io.StringIO()
    hooks = sys.unraisablehook, threading.excepthook
    sys.argv = ["job", *argv]
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            code = cli.run(main)
    finally:
        sys.argv = given
        sys.unraisablehook, threading.excepthook = hooks
    assert not ray.is_initialized()
    return code, err.getvalue()


def start(source: str, output: str, *options: str) -> subprocess.Popen[str]:
    """Start the main job, with one worker, in a process group of its own."""
    return subprocess.Popen(
        command(source, output, *small(*ONE_WORKER, *options)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 300) -> None:
    """Poll until `condition` holds while `process` runs: as fast as leaves the processor to those it waits for."""
    until = time.monotonic() + seconds
    while True:
        asked = time.monotonic()
        if condition():
            return
        assert process.poll() is None, f"the job ended with {process.returncode} before the moment to kill it came"
        assert time.monotonic() < until, "the moment to kill the job never came"
        time.sleep(max(0.002, 4 * (time.monotonic() - asked)))


def kill_tree(process: subprocess.Popen[str]) -> None:
    """SIGKILL the driver, then every Ray process that it started and that is left."""
    children = descendants(process.pid)
    process.kill()
    process.wait()
    for child in children:
        kill(child)


def shard_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every shard in an output folder; what lies in _scumble is not among them."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.tar*"))
        if "_scumble" not in path.parts
    }


@contextlib.contextmanager
def local_cluster(num_cpus: int) -> Iterator[None]:
    """A Ray cluster of this process, without tokens and dashboard; ended with the block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            object_store_memory=300_000_000,
            logging_level="ERROR",
            log_to_driver=False,
        )
        yield
        ray.shutdown()
