"""The benchmark that compares options of a protection judges on images that were not protected."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from pipeline.records import Sample
from pipeline.shards.tar import read_samples
from tests.bench.strength import named, split
from tests.support.runs import write_collection


def keys(pattern: str) -> set[str]:
    found = set()
    for path in Path(pattern).parent.glob(Path(pattern).name):
        with path.open("rb") as stream:
            for sample in read_samples(stream, max_member_bytes=1 << 24):
                assert isinstance(sample, Sample)
                assert "cls" in sample.members
                found.add(sample.key)
    return found


def test_judge_and_protected_images_are_apart_and_whole(tmp_path: Path) -> None:
    write_collection(tmp_path / "in", shards=2, per_shard=40, side=16)
    everything = keys(f"{tmp_path}/in/*.tar")
    fit, judge = (keys(pattern) for pattern in split(f"{tmp_path}/in/*.tar", tmp_path / "split"))
    assert fit | judge == everything
    assert not fit & judge
    assert 8 <= len(judge) <= 32  # a quarter of 80
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "split").rglob("*.tar")}
    split(f"{tmp_path}/in/*.tar", tmp_path / "split")
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_an_arm_has_a_name_and_options() -> None:
    assert named("two robust=--robust-proxies 2") == ("two-robust", ["--robust-proxies", "2"])
    assert named("default=") == ("default", [])
    with pytest.raises(argparse.ArgumentTypeError, match="NAME=OPTIONS"):
        named("--robust-proxies")
