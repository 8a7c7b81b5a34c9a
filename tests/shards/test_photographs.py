"""The demo's collection: real, balanced, the same every time, and honest about train and test."""

from __future__ import annotations

import io
import json
import socket
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander

from pipeline.shards.photographs import PHOTOGRAPHS, DemoCollection, photograph, plan_patches, write_demo_collection


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> DemoCollection:
    return write_demo_collection(tmp_path_factory.mktemp("demo"), seed=0, side=32)


def samples(paths: tuple[Path, ...]) -> list[dict[str, bytes]]:
    found = []
    for path in paths:
        with path.open("rb") as stream:  # opened here, because webdataset leaves its own files open
            found += group_by_keys(tar_file_expander([{"url": path.name, "stream": stream}]))
    return found


def test_no_pixel_of_a_photograph_is_in_both_train_and_test():
    for name in PHOTOGRAPHS:
        seen = {split: np.zeros(photograph(name).shape[:2], dtype=bool) for split in ("train", "test")}
        for patch in plan_patches(seed=0):
            if patch.photograph == name:
                seen[patch.split][patch.y : patch.y + patch.side, patch.x : patch.x + patch.side] = True
        assert seen["train"].any(), name
        assert seen["test"].any(), name
        assert not (seen["train"] & seen["test"]).any(), name


def test_patches_differ_and_lie_inside_their_photograph():
    patches = plan_patches(seed=0)
    assert len({(p.photograph, p.x, p.y, p.side) for p in patches}) > 0.99 * len(patches)
    for patch in patches:
        height, width = photograph(patch.photograph).shape[:2]
        assert 0 <= patch.x <= width - patch.side
        assert 0 <= patch.y <= height - patch.side
        assert patch.side >= 38  # never enlarged by much


def test_the_collection_is_balanced_and_large_enough(collection):
    train, test = samples(collection.train), samples(collection.test)
    assert (len(train), len(test)) == (collection.num_train, collection.num_test)
    assert len(train) >= 1_500
    assert len(test) >= 400
    assert len(collection.classes) >= 12
    for split in (train, test):
        assert len(set(Counter(int(sample["cls"]) for sample in split).values())) == 1
    keys = [sample["__key__"] for sample in train + test]
    assert len(set(keys)) == len(keys)


def test_every_sample_is_the_patch_that_its_json_names(collection):
    formats = Counter()
    for sample in samples(collection.train)[:200]:
        cut = json.loads(sample["json"])
        suffix = "jpg" if "jpg" in sample else "png"
        image = Image.open(io.BytesIO(sample[suffix]))
        formats[image.format, image.mode] += 1
        assert collection.classes[int(sample["cls"])] == cut["photograph"]
        assert image.size == (32, 32)
        y, x, side = cut["y"], cut["x"], cut["side"]
        source = photograph(cut["photograph"])[y : y + side, x : x + side]
        assert abs(source.mean() - np.asarray(image).mean()) < 3
    assert set(formats) == {("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGB"), ("PNG", "L")}


def test_writing_again_leaves_complete_shards_alone_and_repairs_others(collection):
    first, second = collection.train[:2]
    before = {path: path.read_bytes() for path in collection.train + collection.test}
    inode, broken_inode = first.stat().st_ino, second.stat().st_ino
    second.write_bytes(before[second][:1000])
    again = write_demo_collection(collection.folder, seed=0, side=32)
    assert again == collection
    assert {path: path.read_bytes() for path in before} == before
    assert first.stat().st_ino == inode
    assert second.stat().st_ino != broken_inode
    assert sorted(collection.folder.iterdir()) == sorted(before)


def test_another_seed_cuts_other_patches():
    assert plan_patches(seed=0) == plan_patches(seed=0)
    assert plan_patches(seed=0) != plan_patches(seed=1)


def test_every_photograph_loads_without_network(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a photograph asked for the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    photograph.cache_clear()
    for name in PHOTOGRAPHS:
        assert min(photograph(name).shape[:2]) >= 300
