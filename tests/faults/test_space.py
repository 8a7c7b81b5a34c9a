"""No room, on disks or in memory: one line or success, and a second start ends with the bytes of a quiet run.

One shard holds an image of 48 million pixels: its output does not fit where little room is left, and who protects it
needs far more memory than for any other.
"""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from jobs import verify
from jobs.inspection.status import status_of
from pipeline.shards.photographs import photograph
from pipeline.storage.store import Store
from tests.support import runs
from tests.support.samples import image_bytes
from tests.support.uploads import small_protection

pytestmark = [pytest.mark.slow, pytest.mark.ray]

HEIGHT, WIDTH = 6000, 8000
HUGE = "photos-001.tar"
CGROUP = Path("/sys/fs/cgroup/memory")


@pytest.fixture(scope="module")
def mounts(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips where this user may not mount."""
    folder = tmp_path_factory.mktemp("mount")
    tried = subprocess.run(
        ["unshare", "-m", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if tried.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {tried.stderr.strip()}")


@pytest.fixture(scope="module")
def quiet(mounts: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `in`, a protection, `out` of one undisturbed run, and the digests of the originals."""
    folder = tmp_path_factory.mktemp("quiet")
    runs.write_collection(folder / "in", shards=3, per_shard=8)
    with tarfile.open(folder / "in" / HUGE, "a") as tar:
        tile = photograph("grass")
        repeats = (-(-HEIGHT // tile.shape[0]), -(-WIDTH // tile.shape[1]))
        pixels = np.tile(tile, repeats)[:HEIGHT, :WIDTH]
        runs.add(tar, "001/huge.jpg", image_bytes(np.repeat(pixels[..., None], 3, axis=2), "JPEG"))
    (folder / "protection.safetensors").write_bytes(small_protection().to_bytes())
    (folder / "originals.json").write_text(json.dumps(runs.shard_digests(folder / "in")))
    done = subprocess.run(line_of(folder, folder / "out"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (folder / "out" / HUGE).stat().st_size > 20_000_000
    return folder


def remove(group: Path) -> None:
    """Remove a group of processes when the last of them has ended."""
    until = time.monotonic() + 20
    while (group / "cgroup.procs").read_text() and time.monotonic() < until:
        time.sleep(0.2)
    group.rmdir()


def line_of(quiet: Path, output: Path) -> list[str]:
    options = [*runs.WITHOUT_A_FIT, *runs.ONE_WORKER, "--protection", str(quiet / "protection.safetensors")]
    options += ["--encode", "jpeg:95"]  # the huge image's own coding needs less room
    return runs.command(str(quiet / "in"), str(output), *options)


def confined(before: str, line: list[str]) -> list[str]:
    """The command line of a process that does `before` first, where mounts are its own."""
    return ["unshare", "-m", "sh", "-c", f'{before} && exec "$@"', "sh", *line]


def job(quiet: Path, output: Path, before: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """The main job; `before` is done first, by the same process, where mounts are its own."""
    line = confined(before, line_of(quiet, output)) if before else line_of(quiet, output)
    with_own = os.environ | environment
    return subprocess.run(line, capture_output=True, text=True, timeout=580, check=False, env=with_own)


def check_equals_quiet(quiet: Path, output: Path) -> None:
    assert runs.shard_digests(output) == runs.shard_digests(quiet / "out")
    assert runs.shard_digests(quiet / "in") == json.loads((quiet / "originals.json").read_text())
    found = status_of(Store(str(output)))
    assert (found["shards"], found["images"], found["quarantined"]) == ("3 of 3 committed", 25, 0)


def check_failed_whole(quiet: Path, output: Path, done: subprocess.CompletedProcess[str]) -> str:
    """One line, exit code 1, the originals as they were, only whole shards in the output; the line.

    The worker may be ended while it puts another shard, or before that shard's commit: it is made again.
    """
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert runs.shard_digests(quiet / "in") == json.loads((quiet / "originals.json").read_text())
    visible = runs.shard_digests(output)
    assert HUGE not in visible
    assert visible.items() <= runs.shard_digests(quiet / "out").items()
    commits = {path.name.removesuffix(".json") for path in (output / "_scumble/commits").glob("*")}
    assert commits <= visible.keys()
    left = [path.stat().st_size for path in (output / "_scumble/scratch").glob("*")]
    assert len(left) <= 1
    assert sum(left) < 1_000_000  # nothing of the huge shard
    found = status_of(Store(str(output)))
    assert (found["shards"], found["done"]) == (f"{len(commits)} of 3 committed", False)
    return errors[0]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for the records of a run and for small shards, as all processes see it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    tried = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if tried.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {tried.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disks_for_scratch_and_output_are_a_line_each_and_with_room_the_next_start_finishes(
    quiet: Path, small_disk: Path, request: pytest.FixtureRequest
) -> None:
    output = small_disk / "out"
    scratch = Path(tempfile.mkdtemp(prefix="s"))  # sockets of Ray lie in it, whose names must be short
    request.addfinalizer(scratch.rmdir)
    done = job(quiet, output, f"mount -t tmpfs -o size=16m tmpfs {scratch}", TMPDIR=str(scratch))
    line = check_failed_whole(quiet, output, done)
    assert line.startswith(f"error: cannot write {HUGE} to scratch space {scratch}: No space left on device; make room")
    done = job(quiet, output)
    line = check_failed_whole(quiet, output, done)
    assert line == (
        f"error: cannot write {output}/{HUGE}: No space left on device: free some space, "
        "then run the same command again"
    )
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    again = job(quiet, output)
    assert again.returncode == 0, again.stderr
    check_equals_quiet(quiet, output)
    assert verify.main(["--output", str(output), "--input", str(quiet / "in"), "--decode", "1"]) == 0


def holders(parent: int) -> list[int]:
    """Protectors below `parent` that hold the pixels of the huge image: a piece of memory of a byte for each value."""
    found = []
    for pid in runs.named(runs.descendants(parent), "ray::MapWorker(MapBatches(Protector))"):
        try:
            lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
        except OSError:
            continue
        kilobytes = [int(line.split()[1]) for line in lines if line.startswith("Anonymous:")]
        found += [pid] if max(kilobytes, default=0) * 1024 >= 3 * HEIGHT * WIDTH else []
    return found


def test_in_64_mb_of_shared_memory_as_containers_have_it_a_worker_killed_with_a_huge_image_costs_only_time(
    quiet: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with (tmp_path / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            confined("mount -t tmpfs -o size=64m tmpfs /dev/shm", line_of(quiet, output)),
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
    runs.wait_for(lambda: bool(holders(process.pid)), process)
    for pid in holders(process.pid):
        runs.kill(pid)
    assert not (output / HUGE).exists()
    assert process.wait(timeout=500) == 0
    assert "Traceback" not in (tmp_path / "stderr").read_text()
    check_equals_quiet(quiet, output)


@pytest.fixture
def group(quiet: Path) -> Iterator[Path]:
    """A group of processes whose memory can be limited, as a container's is."""
    folder = CGROUP / f"scumble-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"memory cannot be limited here: {error}")
    yield folder
    remove(folder)


def held(group: Path) -> int:
    """The memory of all processes of a group, in bytes, without what the kernel would give up."""
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(stat["total_rss"]) + int(stat.get("total_shmem", 0))


def test_an_image_that_does_not_fit_into_memory_is_one_line_and_with_more_the_next_start_finishes(
    quiet: Path, group: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    # the kernel and Ray's memory monitor see the group's limit as that of a container
    enter = f"echo $$ > {group}/cgroup.procs && mount --bind {group} {CGROUP}"
    process = subprocess.Popen(
        confined(enter, line_of(quiet, output)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    runs.wait_for(lambda: bool(holders(process.pid)), process)
    # room for the pixels, which are there, and twice as much again; delta and coding need some six times as much
    (group / "memory.limit_in_bytes").write_text(str(held(group) + 2 * 3 * HEIGHT * WIDTH))
    stdout, stderr = process.communicate(timeout=580)
    done = subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
    line = check_failed_whole(quiet, output, done)
    assert line.startswith("error: a worker process died too often (")
    assert line.endswith("give it more, or use fewer --workers, then run the same command again")
    assert len(list((output / "_scumble/features").glob("*"))) == 3  # there was room for all but the huge image
    again = job(quiet, output)
    assert again.returncode == 0, again.stderr
    check_equals_quiet(quiet, output)
