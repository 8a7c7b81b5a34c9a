"""One file holds a protection, byte for byte the same, and whatever does not belong to it is refused in one line."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from pipeline.clusters.clustering import Clustering, ClusterSpace
from pipeline.deltas.delta import lay
from pipeline.deltas.load import load_cluster_protection
from pipeline.deltas.protection import Protection
from pipeline.errors import ConflictError, InputError, PromiseError, SettingsError
from pipeline.hashing import sha256

KEY = b"a secret of at least 16 bytes"
LEVELS = np.random.default_rng(0).integers(-16, 17, (3, 3, 8, 8)).astype(np.int8)


def clustering(seed: int = 0) -> Clustering:
    rng = np.random.default_rng(seed)
    head = (rng.normal(size=(4, 5)).astype(np.float32), np.zeros(4, np.float32))
    space = ClusterSpace.fit("smoothed", rng.normal(size=(9, 5)).astype(np.float32), head)
    return Clustering(
        space,
        rng.normal(size=(3, 4)).astype(np.float32),
        rng.normal(size=(3, 5)).astype(np.float32),
        np.ones(3, np.float32),
    )


def made(**changes: Any) -> Protection:
    parts: dict[str, Any] = {
        "method": "uc",
        "generator": "direct",
        "surrogate_id": "tiny",
        "epsilon": 16 / 255,
        "clustering": clustering(),
        "targets": (1, 2, 0),
        "levels": LEVELS,
        "fingerprint": "f" * 64,
        "licence": "CC0",
        "figures": {"moved": [0.5, 0.25, 1.0], "before": [0, 0, 0]},
    }
    return Protection(**parts | changes)


def texture(**changes: Any) -> Protection:
    return made(**{"generator": "texture", "levels": None, "key_sha256": sha256(KEY)} | changes)


def test_a_protection_comes_back_as_it_was() -> None:
    before = made(size="224")
    after = load_cluster_protection(before.to_bytes())
    for name in ("method", "generator", "surrogate_id", "epsilon", "targets", "fingerprint", "licence", "size"):
        assert getattr(after, name) == getattr(before, name)
    assert after.figures == before.figures
    assert np.array_equal(after.levels, LEVELS)
    features = np.random.default_rng(1).normal(size=(20, 5)).astype(np.float32)
    assert np.array_equal(after.clustering.assign(features)[0], before.clustering.assign(features)[0])
    assert after.sha256 == before.sha256 == sha256(before.to_bytes())


def test_equal_protections_give_equal_bytes_in_another_process() -> None:
    program = "import test_protection as t; print(t.made().sha256)"
    found = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=__file__.rpartition("/")[0],
            env={"PYTHONHASHSEED": seed, "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert found == {made().sha256}


def test_the_answer_is_the_clusters_delta_at_the_images_size() -> None:
    protection = made()
    assert not protection.per_sample
    assert np.array_equal(protection.delta_for(2, "any", 8, 8), LEVELS[2].transpose(1, 2, 0))
    assert np.array_equal(protection.delta_for(1, "any", 13, 30), lay(LEVELS[1], 13, 30, 16 / 255))
    for cluster in (-1, 3):
        with pytest.raises(PromiseError, match=f"cluster {cluster} does not exist; there are 3"):
            protection.delta_for(cluster, "any", 8, 8)


def test_a_texture_answers_for_each_sample_and_only_with_its_key() -> None:
    protection = load_cluster_protection(texture().to_bytes())
    assert protection.per_sample
    with pytest.raises(SettingsError, match="add --key-file FILE"):
        protection.delta_for(0, "a", 9, 7)
    able = protection.with_key(KEY)
    first, second = able.delta_for(0, "a", 9, 7), able.delta_for(0, "b", 9, 7)
    assert first.shape == (9, 7, 3)
    assert not np.array_equal(first, second)
    assert np.abs(first).max() <= 16
    assert able.sha256 == protection.sha256


def test_the_secret_is_in_no_file_and_no_text() -> None:
    able = texture().with_key(KEY)
    assert KEY not in able.to_bytes()
    assert "secret" not in repr(able)


def test_another_key_or_surrogate_is_a_conflict() -> None:
    with pytest.raises(ConflictError, match="give the --key-file of that run") as caught:
        texture().with_key(b"another secret, long enough")
    assert "another" not in str(caught.value)
    made().check_surrogate("tiny")
    with pytest.raises(ConflictError, match="fitted for surrogate tiny, not huge"):
        made().check_surrogate("huge")


def header_with(text: bytes) -> bytes:
    """The beginning of a safetensors file."""
    return len(text).to_bytes(8, "little") + text


def altered() -> bytes:
    return made().to_bytes().replace(b'\\"format_version\\":1', b'\\"format_version\\":9')


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a protection file, or truncated"),
        (b"PK\x03\x04 something else altogether", "not a protection file, or truncated"),
        (made().to_bytes()[:-1], "not a protection file, or truncated"),
        (made().to_bytes()[:100], "not a protection file, or truncated"),
        (save({"levels": LEVELS}), "not a protection file, or truncated"),
        (header_with(b'{"a": {"data_offsets": []}, "__metadata__": {}}'), "not a protection file, or truncated"),
        (header_with(b"[" * 100_000), "not a protection file, or truncated"),
        (altered(), "the protection has format 9, but this version of Scumble reads format 1"),
    ],
)
def test_what_is_no_protection_is_refused_in_one_line(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_cluster_protection(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"targets": (0, 1)},
        {"targets": (1, 1, 2)},
        {"levels": LEVELS[:2]},
        {"levels": LEVELS.astype(np.int16)},
        {"levels": (LEVELS * 0 + 17).astype(np.int8)},
        {"levels": None},
        {"key_sha256": "0" * 64},
        {"generator": "texture"},
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"targets|levels|texture|bound"):
        made(**changes)
