"""A folder of pictures goes the way of a shard: the same pixels, all or nothing, and what is altered is found."""

from __future__ import annotations

import io
import os
import signal
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jobs.inspection.verification import check_run
from pipeline import layout
from pipeline.deltas.apply import LaidDeltas, ShardOutcome, protect_shard
from pipeline.errors import ConflictError, InputError, Reason, StoreError
from pipeline.measures.verify import ShardCheck
from pipeline.records import Commit, Rejection, Sample, Shard, read_quarantine
from pipeline.runs.fingerprint import ingredients_of
from pipeline.runs.plan import make_plan, plan_to_parquet
from pipeline.runs.run_record import RunRecord
from pipeline.runs.transaction import ShardTransaction
from pipeline.settings import Settings
from pipeline.shards.inputs import resolve_input
from pipeline.shards.samples import SampleWriter, samples_of
from pipeline.storage.store import Store
from tests.support.pictures import exif_with
from tests.support.samples import ExtremeDeltas, image_bytes, noise

PICTURES = {
    "a/one.jpg": image_bytes(noise(40, 30, seed=1), "JPEG", quality=92, exif=exif_with(Orientation=6, Artist="me")),
    "a/TWO.PNG": image_bytes(noise(24, 24, 4, seed=2)),
    "b/three.webp": image_bytes(noise(17, 33, seed=3), "WEBP", lossless=True),
    "four.jpeg": image_bytes(noise(20, 20, 1, seed=4), "JPEG"),
    "b/broken.jpg": b"no image at all",
}
KEYS = ("a/one", "a/TWO", "b/three", "four", "b/broken", "A", "a.jpg", "a.png", "a.webp", "t")
CLUSTERS = dict.fromkeys((*KEYS, *(f"{number:02d}" for number in range(20))), 0)
SIDECARS = {"a/one.cls": b"3", "a/one.jpg.json": b'{"title": "one"}', "four.txt": "ü".encode()}


class PerSample(ExtremeDeltas):
    """Every key has a delta of its own, as with sample-wise protections."""

    per_sample = True

    def delta_for(self, cluster: int, key: str, height: int, width: int) -> Any:
        return super().delta_for(sum(key.encode()) % 8, key, height, width)


def protected(samples: Iterator[Sample | Rejection], writer: SampleWriter, settings: Settings) -> ShardOutcome:
    return protect_shard(samples, writer, LaidDeltas(PerSample()), CLUSTERS, settings=settings)


class Run:
    """One run over a folder, up to its transactions."""

    def __init__(self, source: Path, output: Path, settings: Settings = Settings()) -> None:  # noqa: B008
        listing = resolve_input(str(source), settings.keep_sidecar)
        self.settings, self.source, self.output = settings, listing.store, Store(str(output))
        ingredients = ingredients_of(settings, listing.shards, weights_sha256="w")
        self.plan = make_plan(listing.shards, ingredients.fingerprint, ())
        self.record = RunRecord.of(ingredients, settings, self.plan)
        self.transaction = ShardTransaction(
            self.source, self.output, self.plan.fingerprint, "p", settings.max_member_bytes, settings.encode
        )

    def go(self) -> list[Commit]:
        self.output.create(layout.RUN, self.record.to_bytes())
        self.output.put(layout.PLAN, plan_to_parquet(self.plan))
        return [
            self.transaction.run(shard, partial(protected, settings=self.settings))[0] for shard in self.plan.shards
        ]

    def check(self, *, with_originals: bool = True) -> ShardCheck:
        with ThreadPoolExecutor(1) as pool:
            return check_run(self.output, self.source.url if with_originals else None, 1.0, pool)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return written(tmp_path / "in")


def written(folder: Path) -> Path:
    for name, data in (PICTURES | SIDECARS).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """Everything in an output but its records."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith("_scumble/")}


def test_names_types_sizes_metadata_and_sidecars_come_back_and_what_is_broken_is_in_quarantine(
    source: Path, tmp_path: Path
) -> None:
    run = Run(source, tmp_path / "out")
    (commit,) = run.go()
    found = files(tmp_path / "out")
    assert set(found) == {*PICTURES, *SIDECARS} - {"b/broken.jpg"}
    assert {name: found[name] for name in SIDECARS} == SIDECARS
    for name in PICTURES.keys() - {"b/broken.jpg"}:
        before, after = (Image.open(io.BytesIO(data)) for data in (PICTURES[name], found[name]))
        assert (after.format, after.size, after.mode) == (before.format, before.size, before.mode)
        assert after.getexif() == before.getexif()
        assert np.abs(np.asarray(after, np.int16) - np.asarray(before, np.int16)).max() > 8
    assert (commit.num_protected, commit.num_members, commit.quarantine) == (4, 7, {"unsupported-format": 1})
    assert [image.key for image in commit.images] == ["a/TWO", "a/one", "b/three", "four"]
    checked = run.check()
    assert checked.problems == []
    assert (checked.files, checked.num_samples, checked.num_exact, checked.max_exact_delta) == (7, 4, 2, 16)


@pytest.mark.parametrize("encode", ["same", "lossless"])
def test_a_folder_gives_the_bytes_that_a_tar_of_the_same_paths_gives(source: Path, tmp_path: Path, encode: str) -> None:
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars/all.tar", "w") as tar:
        for path in sorted(source.rglob("*.*")):
            tar.add(path, str(path.relative_to(source)))
    settings = Settings(encode=encode)
    folder, packed = (
        Run(tmp_path / given, tmp_path / out, settings) for given, out in (("in", "out"), ("tars", "outs"))
    )
    (ours,), (theirs,) = folder.go(), packed.go()
    limit = settings.max_member_bytes
    ours_read, theirs_read = (
        {
            sample.key: list(sample.members.values())
            for sample in samples_of(one.output, commit.written(), max_member_bytes=limit, any_version=True)
            if isinstance(sample, Sample)
        }
        for one, commit in ((folder, ours), (packed, theirs))
    )
    assert {key: sorted(members) for key, members in ours_read.items()} == {
        key: sorted(members) for key, members in theirs_read.items()
    }
    names = {"same": "a/one.jpg", "lossless": "a/one.jpg.png"}
    assert names[encode] in files(tmp_path / "out")
    assert folder.check().problems == packed.check().problems == []


def tampered(change: Callable[[Path], object], problem: str) -> Any:
    return pytest.param(change, problem, id=problem[:30])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        tampered(lambda out: (out / "four.jpeg").unlink(), "images-0000000 key four: four.jpeg is missing"),
        tampered(lambda out: (out / "a/one.cls").write_bytes(b"4"), "key a/one: a/one.cls: SHA-256: found"),
        tampered(
            lambda out: (out / "a/TWO.PNG").write_bytes(PICTURES["a/TWO.PNG"]),
            "key a/TWO: the image is unprotected: its bytes are identical to the input's",
        ),
        tampered(lambda out: (out / "five.jpg").write_bytes(b"5"), "five.jpg: in the output without a commit"),
        tampered(lambda out: (out / layout.PLAN).unlink(), "images-0000000: not compared with its originals"),
        tampered(
            lambda out: (out / "_scumble/commits/images-0000000.json").unlink(), "1 of 1 shards are not committed"
        ),
    ],
)
def test_whatever_is_altered_in_the_output_is_found(
    source: Path, tmp_path: Path, change: Callable[[Path], object], problem: str
) -> None:
    run = Run(source, tmp_path / "out")
    run.go()
    change(tmp_path / "out")
    assert any(problem in line for line in run.check().problems)


def test_what_the_system_leaves_in_any_folder_is_no_problem(source: Path, tmp_path: Path) -> None:
    run = Run(source, tmp_path / "out")
    run.go()
    for name in (".DS_Store", "a/Thumbs.db", "desktop.ini", "a/._one.jpg", ".nfs0001"):
        (tmp_path / "out" / name).write_bytes(b"x")
    assert run.check().problems == []


def test_bytes_that_are_committed_are_not_overwritten_by_others(source: Path, tmp_path: Path) -> None:
    run = Run(source, tmp_path / "out")
    run.go()
    before = files(tmp_path / "out")

    class Other(PerSample):
        def delta_for(self, cluster: int, key: str, height: int, width: int) -> Any:
            return super().delta_for(cluster, f"{key}!", height, width)

    def otherwise(samples: Iterator[Sample | Rejection], writer: SampleWriter) -> ShardOutcome:
        return protect_shard(samples, writer, LaidDeltas(Other()), CLUSTERS, settings=run.settings)

    with pytest.raises(ConflictError, match="two runs disagree"):
        run.transaction.run(run.plan.shards[0], otherwise)
    assert files(tmp_path / "out") == before
    assert run.check().problems == []


def test_a_commit_that_is_refused_and_not_there_is_no_success(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(source, tmp_path / "out")
    monkeypatch.setattr(Store, "create", lambda *_: False)
    with pytest.raises(StoreError, match=r"images-0000000\.json was refused as existing, and is not there"):
        run.transaction.run(run.plan.shards[0], partial(protected, settings=run.settings))


def test_a_unit_of_which_nothing_could_be_protected_is_no_problem(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(20):
        data = PICTURES["a/one.jpg"] if number >= 16 else b"no image"
        (tmp_path / f"in/{number:02d}.jpg").write_bytes(data)
    run = Run(tmp_path / "in", tmp_path / "out")
    commits = run.go()
    assert [commit.num_protected for commit in commits] == [0, 4]
    for with_originals in (True, False):
        assert run.check(with_originals=with_originals).problems == []


def test_nothing_is_published_of_a_unit_whose_input_changes_meanwhile(source: Path, tmp_path: Path) -> None:
    run = Run(source, tmp_path / "out")
    (source / "four.jpeg").write_bytes(PICTURES["a/one.jpg"])  # the last of the unit
    with pytest.raises(InputError, match=r"changed-input: .*four\.jpeg is now"):
        run.go()
    assert files(tmp_path / "out") == {}
    assert Run(source, tmp_path / "out").plan.fingerprint != run.plan.fingerprint


def test_a_sidecar_that_hides_a_picture_sends_its_image_to_quarantine(source: Path, tmp_path: Path) -> None:
    (source / "four.txt").write_bytes(PICTURES["a/one.jpg"])
    (commit,) = Run(source, tmp_path / "out").go()
    assert commit.quarantine == {"several-images": 1, "unsupported-format": 1}
    assert not {"four.txt", "four.jpeg"} & set(files(tmp_path / "out"))


def test_images_that_share_a_stem_are_all_protected(tmp_path: Path) -> None:
    pixels = noise(16, 16)
    for name, kind in (("a.png", "PNG"), ("a.jpg", "JPEG"), ("A.png", "PNG"), ("a.txt", ""), ("a.webp", "")):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(image_bytes(pixels, kind) if kind else b"text")
    run = Run(tmp_path / "in", tmp_path / "out", Settings(encode="lossless"))
    (commit,) = run.go()
    assert set(files(tmp_path / "out")) == {"a.png", "a.jpg.png", "A.png", "a.txt"}
    assert [image.key for image in commit.images] == ["A", "a.jpg", "a.png"]
    (refused,) = read_quarantine(run.output, layout.quarantine(commit.shard))
    assert (refused.key, refused.member, refused.reason) == ("a.webp", "a.webp", Reason.UNSUPPORTED_FORMAT)
    assert run.check().problems == []


CALLS = [f"put_file {name}" for name in ("a/TWO.PNG", "a/one.cls", "four.txt")]
CALLS += ["put _scumble/quarantine/images-0000000.jsonl", "create _scumble/commits/images-0000000.json"]


def test_shards_and_loose_images_side_by_side_are_both_protected(source: Path, tmp_path: Path) -> None:
    with tarfile.open(source / "b/shard.tar", "w") as tar:
        tar.add(source / "four.jpeg", "t.jpeg")
    run = Run(source, tmp_path / "out")
    assert run.plan.contents == "1 shards, 5 loose images in 1 units"
    assert [commit.num_protected for commit in run.go()] == [1, 4]
    assert {"b/shard.tar", "four.jpeg"} < set(files(tmp_path / "out"))
    assert run.check().problems == []


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_run_that_is_killed_between_two_steps_leaves_nothing_half_done_or_unprotected(
    source: Path, tmp_path: Path, when: str, call: str
) -> None:
    quiet = Run(source, tmp_path / "quiet")
    (expected,) = quiet.go()
    run = Run(source, tmp_path / "out")
    child = os.fork()
    if not child:
        try:
            _die_at(f"{when} {call}")
            run.go()
        finally:
            os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    whole, left = files(tmp_path / "quiet"), files(tmp_path / "out")
    assert left.items() <= whole.items()
    is_committed = run.output.info(layout.commit(expected.shard)) is not None
    assert is_committed == (when == "after" and "commits" in call)
    if left and not is_committed:
        assert sum("without a commit" in line for line in run.check().problems) == len(left)
    (commit,) = Run(source, tmp_path / "out").go()
    assert commit.agrees_with(expected)
    assert files(tmp_path / "out") == whole
    assert run.check().problems == []


def _die_at(point: str) -> None:
    """Let this process die where a call of the store begins or ends."""

    def watched(method: str, original: Any) -> Any:
        def call(self: Store, name: str, *arguments: Any) -> Any:
            if f"before {method} {name}" == point:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(self, name, *arguments)
            if f"after {method} {name}" == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for method in ("put", "put_file", "create"):
        setattr(Store, method, watched(method, getattr(Store, method)))


def test_from_bucket_to_bucket(source: Path, bucket: str) -> None:
    for name, data in (PICTURES | SIDECARS).items():
        Store(f"{bucket}/in").put(name, data)
    listing = resolve_input(f"{bucket}/in")
    (unit,) = listing.shards
    output = Store(f"{bucket}/out")
    transaction = ShardTransaction(listing.store, output, "f", "p", 1 << 20)
    commit, _ = transaction.run(unit, partial(protected, settings=Settings()))
    assert sorted(name for name in output.names() if not name.startswith("_scumble/")) == sorted(
        {*PICTURES, *SIDECARS} - {"b/broken.jpg"}
    )
    assert {file.name: output.read(file.name) for image in commit.images for file in image.files[1:]} == SIDECARS
    assert isinstance(commit.written(), Shard)
