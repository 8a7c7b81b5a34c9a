"""Uploads for tests: small real files, protections, and deltas that need no surrogate."""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs import protect_uploads
from pipeline import layout
from pipeline.clusters.clustering import Clustering, ClusterSpace
from pipeline.deltas.picture_deltas import DeltaAnswer, DeltaRequest
from pipeline.deltas.protection import Protection
from pipeline.hashing import sha256
from pipeline.shards.photographs import photograph
from pipeline.storage.store import Store
from pipeline.surrogates.surrogate import Surrogate, load_surrogate
from pipeline.uploads.deltas import UploadDeltas
from pipeline.uploads.ledger import Ledger
from pipeline.uploads.segments import Row
from tests.support.samples import ExtremeDeltas, image_bytes

SURROGATE = "timm:tf_efficientnet_lite0"


class FakeDeltas:
    """Answers at once: the cluster is the key's length, the distance too."""

    def __init__(self) -> None:
        self._source = ExtremeDeltas()
        self.epsilon, self.at_least, self.side, self.uses_small = self._source.epsilon, 32, None, False

    def for_pictures(self, requests: Sequence[DeltaRequest]) -> list[DeltaAnswer]:
        return [self._answer(request, len(request.key) % 8) for request in requests]

    def _answer(self, request: DeltaRequest, cluster: int) -> DeltaAnswer:
        levels = self._source.delta_for(cluster, request.key, request.height, request.width)
        return DeltaAnswer(request.laid(levels), cluster, 1.0)


def fake_deltas(*_: Any, **__: Any) -> UploadDeltas:
    return UploadDeltas(FakeDeltas(), np.full(8, 2.0, np.float32))


@functools.cache
def small_surrogate() -> Surrogate:
    return load_surrogate(SURROGATE, weights=None, size=64, device="cpu")


@functools.cache
def small_protection() -> Protection:
    """A protection for `small_surrogate`."""
    return protection_of(small_surrogate())


def protection_of(surrogate: Surrogate | None) -> Protection:
    """Four clusters around real patches, random deltas: nothing was fitted, all of it is real."""
    surrogate = surrogate or load_surrogate(SURROGATE, weights=None, size=None, device="cpu")
    rng, p99 = np.random.default_rng(0), 2.0
    features = surrogate.embed_pictures([patch(number) for number in range(16)])
    space = ClusterSpace.fit("smoothed", features, surrogate.head)
    clustering = Clustering(space, space.points(features)[:4], features[:4], np.full(4, p99, np.float32))
    return Protection(
        method="uc",
        generator="direct",
        surrogate_id=surrogate.id,
        epsilon=16 / 255,
        clustering=clustering,
        targets=(1, 2, 3, 0),
        levels=rng.integers(-16, 17, (4, 3, 16, 16)).astype(np.int8),
        fingerprint="f" * 64,
    )


def patch(number: int, side: int = 64) -> Any:
    """uint8 [side, side, 3] of a photograph."""
    pixels = photograph(("grass", "brick", "coffee", "retina")[number % 4])
    pixels = np.repeat(pixels[:, :, None], 3, axis=2) if pixels.ndim == 2 else pixels
    top, left = (int(one) for one in np.random.default_rng(number).integers(0, min(pixels.shape[:2]) - side, 2))
    return np.ascontiguousarray(pixels[top : top + side, left : left + side])


def jpeg(number: int, **options: Any) -> bytes:
    return image_bytes(patch(number), "JPEG", quality=90, **options)


def upload(store: Store, files: Mapping[str, bytes], *, age_s: float = 3600.0) -> None:
    """Put files that were last changed so long ago; an object store only knows now."""
    for name, data in files.items():
        store.put(name, data)
        if store.is_local:
            then = time.time() - age_s
            os.utime(store.path(name), (then, then))
    if store.is_local:  # a folder's store writes beside its records; an input has none
        for path in (Path(store.root) / "_scumble" / "scratch", Path(store.root) / "_scumble"):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


class Job:
    """The command over one input and one output, with deltas that need no surrogate unless told otherwise."""

    def __init__(self, folder: Path, *, source: Store, output: Store, monkeypatch: pytest.MonkeyPatch | None) -> None:
        self.source, self.output = source, output
        self.protection = folder / "protection.safetensors"
        self.protection.write_bytes(protection_bytes() if monkeypatch else small_protection().to_bytes())
        if monkeypatch is not None:
            monkeypatch.setattr("jobs.uploads.steps.deltas_from", fake_deltas)

    @classmethod
    def local(cls, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
        """From one folder below `folder` to another."""
        (folder / "in").mkdir()
        return cls(folder, source=Store(f"{folder}/in"), output=Store(f"{folder}/out"), monkeypatch=monkeypatch)

    def arguments(self, *options: str) -> list[str]:
        places = ["--input", self.source.url, "--output", self.output.url, "--protection", str(self.protection)]
        settle = [] if "--settle" in options else ["--settle", "0"]
        return [*places, "--max-quarantine", "1", *settle, *options]

    def run(self, *options: str) -> int:
        return protect_uploads.main(self.arguments(*options))

    def last(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.output.read(layout.UPLOADS_LAST_RUN))
        return found

    def rows(self) -> dict[str, Row]:
        return {row.name: row for row in Ledger(self.output).rows()}

    def outputs(self) -> dict[str, bytes]:
        """What readers of the output see."""
        names = [entry.name for entry in self.output.walk() if not entry.name.startswith("_scumble/")]
        return {name: self.output.read(name) for name in names}


@functools.cache
def protection_bytes() -> bytes:
    """A protection whose surrogate is never loaded."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(3, 5)).astype(np.float32)
    clustering = Clustering(ClusterSpace(), points, points, np.ones(3, np.float32))
    return Protection(
        method="uc",
        generator="direct",
        surrogate_id='{"name":"timm:none","size":64}',
        epsilon=16 / 255,
        clustering=clustering,
        targets=(1, 2, 0),
        levels=rng.integers(-16, 17, (3, 3, 8, 8)).astype(np.int8),
        fingerprint="f" * 64,
    ).to_bytes()


def photos(count: int) -> dict[str, bytes]:
    return {f"{number:02d}.jpg": jpeg(number) for number in range(count)}


def check_all(job: Job, names: set[str]) -> None:
    """Every object has one row, one output, and the two agree."""
    outputs, rows = job.outputs(), job.rows()
    assert outputs.keys() == rows.keys() == names
    assert {name: sha256(data) for name, data in outputs.items()} == {n: row.output_sha256 for n, row in rows.items()}
    assert {row.version for row in rows.values()} == {1}
