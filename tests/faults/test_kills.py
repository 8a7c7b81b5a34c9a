"""Fifty kills, by seed, over driver and workers, between any two steps: the bytes are always those of a quiet run."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.faults.kills import DRIVER, EMBEDDER, PROTECTOR, READER, TRAINER, Campaign, deal, job, spread
from tests.support import runs

pytestmark = [pytest.mark.slow, pytest.mark.ray]

CAMPAIGNS = 2
WHEN = ("before", "after")
SHORT = ("--fit-images", "48", "--proxy-steps", "200")  # so many that a fit lasts longer than the kills below
SHARDS = [f"photos-{number:03d}.tar" for number in range(8)]
BROKEN = (SHARDS[1], SHARDS[4])  # one image of each is refused, so that there is a quarantine to be written

# in the order in which a run comes by; each campaign gets every second, so both have some of each stage
OF_THE_DRIVER = [
    *("after create _scumble/run.json", "before put _scumble/plan.parquet", "after put _scumble/clusters.json"),
    *("before create _scumble/clustering.safetensors", "after create _scumble/protection.safetensors"),
    "before put _scumble/gallery.safetensors",
]
OF_EMBEDDERS = [
    *(f"before open_version {SHARDS[0]}", f"after open_version {SHARDS[2]}", f"after open_version {SHARDS[6]}"),
    *(f"{when} create _scumble/features/{SHARDS[1 + at]}.parquet" for at in (0, 2, 4) for when in WHEN),
]
OF_TASKS = [f"{when} create _scumble/assignments/{SHARDS[at]}.parquet" for at in (0, 3, 6) for when in WHEN]
OF_TRAINERS = ["before create _scumble/clusters/all.safetensors", "after create _scumble/clusters/all.safetensors"]
OF_PROTECTORS = [
    *(f"{when} put_file {SHARDS[at]}" for at in (0, 6) for when in WHEN),
    *(f"{when} create _scumble/commits/{SHARDS[at]}.json" for at in (3, 5, 7) for when in WHEN),
    *(f"before put _scumble/quarantine/{SHARDS[1]}.jsonl", f"after put _scumble/quarantine/{SHARDS[4]}.jsonl"),
]
POINTS = [*OF_THE_DRIVER, *OF_EMBEDDERS, *OF_TASKS, *OF_TRAINERS, *OF_PROTECTORS]
ROLES = [(EMBEDDER, 2.0), (EMBEDDER, 4.0), (READER, 1.0), (TRAINER, 4.0), (PROTECTOR, 1.0), (PROTECTOR, 2.0)]
ALSO = [[(DRIVER, 30.0), (READER, 2.0)], [(TRAINER, 8.0)]]  # in one campaign each


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `in` and `out` of one undisturbed run."""
    folder = tmp_path_factory.mktemp("quiet")
    runs.write_collection(folder / "in", shards=len(SHARDS), per_shard=16)
    for shard in BROKEN:
        with tarfile.open(folder / "in" / shard, "a") as tar:
            runs.add(tar, "broken.jpg", b"no image at all")
    done = runs.protect(str(folder / "in"), str(folder / "out"), *SHORT)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def landed() -> list[str]:
    """All kills of all campaigns."""
    return []


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("number", range(CAMPAIGNS))
def test_a_run_that_is_killed_again_and_again_ends_with_the_bytes_of_a_quiet_one(
    quiet: Path, tmp_path: Path, landed: list[str], number: int
) -> None:
    campaign = Campaign(
        quiet / "in",
        tmp_path / "out",
        tmp_path / "tokens",
        named=deal(POINTS, CAMPAIGNS, number),
        random=spread(number, ROLES + ALSO[number]),
        options=SHORT,
    )
    campaign.run()
    assert not campaign.left, "points that no process came by"
    assert not campaign.random, "roles that no process had"
    landed += campaign.landed
    same(campaign.output, quiet / "out")
    counts_agree(campaign.output, quiet)


def test_fifty_kills_have_landed(landed: list[str]) -> None:
    if not landed:
        pytest.skip("the campaigns were not run")
    assert len(landed) >= 50, landed


def same(ours: Path, quiet: Path) -> None:
    """Shards, protection, assignments and quarantine byte for byte; commits but for their times."""
    assert runs.shard_digests(ours) == runs.shard_digests(quiet)
    for folder, ending in (("features", ".parquet"), ("assignments", ".parquet"), ("quarantine", ".jsonl")):
        assert contents(ours, folder, ending) == contents(quiet, folder, ending), folder
    for name in ("run.json", "protection.safetensors", "clustering.safetensors", "scores.parquet"):
        assert (ours / "_scumble" / name).read_bytes() == (quiet / "_scumble" / name).read_bytes(), name
    assert commits(ours) == commits(quiet)


def contents(output: Path, folder: str, ending: str) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in (output / "_scumble" / folder).glob(f"*{ending}")}
    assert found
    return found


def commits(output: Path) -> dict[str, Any]:
    found = {path.name: json.loads(path.read_bytes()) for path in (output / "_scumble" / "commits").iterdir()}
    for commit in found.values():
        del commit["seconds"]
    return found


def counts_agree(output: Path, quiet: Path) -> None:
    """What the commands count is what went in, and nothing lies about that nobody counts."""
    counted = json.loads(job("status.py", "--output", str(output), "--json").stdout)
    assert (counted["images"], counted["quarantined"], counted["done"]) == (8 * 16, len(BROKEN), True)
    checked = job("verify.py", "--output", str(output), "--input", str(quiet / "in"), "--decode", "1")
    assert checked.returncode == 0, checked.stdout
