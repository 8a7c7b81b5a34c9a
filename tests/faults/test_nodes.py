"""Nodes of a cluster that die, or are cut off while they hold shards."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.kills import PROTECTOR
from tests.faults.nodes import Nodes, nodes
from tests.support import runs
from tests.support.uploads import small_protection

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can give nodes networks of their own"),
]


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `in`, a protection, and the `out` of one undisturbed run of it."""
    folder = tmp_path_factory.mktemp("quiet")
    runs.write_collection(folder / "in", shards=12, per_shard=150, side=96)
    (folder / "protection.safetensors").write_bytes(small_protection().to_bytes())
    done = runs.protect(str(folder / "in"), str(folder / "out"), *protection(folder))
    assert done.returncode == 0, done.stderr
    return folder


def protection(quiet: Path) -> tuple[str, str]:
    return "--protection", str(quiet / "protection.safetensors")


@contextlib.contextmanager
def started(cluster: Nodes, quiet: Path, output: Path) -> Iterator[subprocess.Popen[str]]:
    """A run on the cluster, which does not outlive the block."""
    with (output.parent / "job.log").open("wb") as log:
        process = subprocess.Popen(
            runs.command(str(quiet / "in"), str(output), *runs.small(*protection(quiet))),
            env=cluster.environment,
            stdout=log,
            stderr=log,
            text=True,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def committed(output: Path) -> int:
    return len(list((output / "_scumble/commits").glob("*.json")))


def ended(process: subprocess.Popen[str], output: Path, quiet: Path) -> None:
    assert process.wait(timeout=420) == 0, (output.parent / "job.log").read_text()[-3000:]
    assert runs.shard_digests(output) == runs.shard_digests(quiet / "out")


@contextlib.contextmanager
def working_on_both(quiet: Path, output: Path, commits: int = 1) -> Iterator[Nodes]:
    """Two nodes that have committed something and hold more; after the block the run has to end as the quiet one."""
    with nodes(2) as cluster, started(cluster, quiet, output) as process:
        runs.wait_for(lambda: committed(output) >= commits, process)
        runs.wait_for(lambda: bool(cluster.processes("node2", PROTECTOR)), process)
        yield cluster
        ended(process, output, quiet)


@pytest.mark.parametrize("words", ["raylet/raylet", "all of it"])
def test_a_node_that_dies_with_its_shards_costs_nothing_but_time(quiet: Path, tmp_path: Path, words: str) -> None:
    with working_on_both(quiet, tmp_path / "out") as cluster:
        cluster.kill("node2", "" if words == "all of it" else words)


def test_a_head_that_dies_ends_the_run_and_a_new_submit_finishes_it_though_a_node_is_cut_off_for_twenty_seconds(
    quiet: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with nodes(1) as cluster, started(cluster, quiet, output) as process:
        runs.wait_for(lambda: committed(output) >= 2, process)
        cluster.kill("head")
        assert process.wait(timeout=300) != 0
        before = committed(output)
        assert before < 12
    with working_on_both(quiet, output, commits=before + 1) as cluster:
        cluster.cut(2)
        time.sleep(20)
        cluster.mend(2)
