"""Thousands of mutated shards, images and uploads: none raises, hangs, leaves unprotected, or reaches outside.

Every input is made again from its name, `Case(base, seeds)`: a failure prints it. An input that led to an outcome
never seen before is mutated further. SCUMBLE_FUZZ_SEED=7 looks elsewhere than the usual run.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import re
import signal
import tarfile
import tempfile
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

import pytest

from pipeline import layout
from pipeline.errors import Reason
from pipeline.records import Rejection
from pipeline.settings import Settings
from pipeline.shards.names import fault_of, output_name
from pipeline.storage.store import Store
from pipeline.uploads.listing import Tally, changes
from pipeline.uploads.transaction import Places, UnitResult, protect_unit
from pipeline.uploads.units import Unit, units_of
from tests.faults.mutations import BASES, MARKER, OUTSIDE, Bomb, Case, Corpus, bent_image, shard_of
from tests.faults.promises import LOSSLESS, SAME, Done, check_picture, check_shard, key_of, listed, protected
from tests.support.samples import tar_bytes
from tests.support.uploads import fake_deltas

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200, method="thread"),  # the signal is for single inputs
    pytest.mark.filterwarnings("ignore::UserWarning"),  # Pillow's, of metadata: they do not stop a real run either
]

SEED = int(os.environ.get("SCUMBLE_FUZZ_SEED", "1"))
SHARDS, IMAGES, PER_SHARD, UPLOADED = 2_000, 2_000, 8, 320
SECONDS = 60  # for one input


@contextlib.contextmanager
def watched(what: object) -> Iterator[None]:
    """Name the input in whatever goes wrong, and give it a minute."""

    def late(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# --- the runs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for outputs; afterwards nothing may lie in the working folder, in scratch, or outside."""
    assert not os.path.lexists(OUTSIDE)
    for name in ("work", "scratch", "out"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    yield tmp_path / "out"
    assert not list((tmp_path / "work").iterdir())
    assert not list((tmp_path / "scratch").iterdir())
    assert not os.path.lexists(OUTSIDE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "scratch", "work"]


def outcome_of(rejections: Sequence[Rejection], *more: Hashable) -> Hashable:
    """What two inputs have in common that did the same: reasons, and their details without what varies."""
    return (*more, *sorted({(one.reason.value, re.sub(r"[^a-z ]+", "", one.detail)[:40]) for one in rejections}))


def test_the_bombs_would_be_seen_if_anything_unpickled_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Bomb())).close()
    assert (tmp_path / MARKER).exists()


def test_this_file_tries_more_than_two_thousand_inputs() -> None:
    assert SHARDS + IMAGES + UPLOADED >= 2_000


def test_the_checks_notice_what_is_unprotected_changed_lost_or_outside(tmp_path: Path) -> None:
    data = shard_of(Case("gnu"))
    good = protected(data, tmp_path / "shard", LOSSLESS)
    check_shard(data, good)
    members = [(name, body or b"") for name, body in listed(good.output)[0]]
    originals = dict(listed(data)[0])
    wrong = {
        "unprotected": [(name, (originals[name] or b"") if name == "s0.png" else body) for name, body in members],
        "changed": [(name, b"?" if name == "s0.cls" else body) for name, body in members],
        "lost": [(name, body) for name, body in members if key_of(name)[0] != "s0"],
        "twice": [*members, *(one for one in members if key_of(one[0])[0] == "s0")],
        "outside": [(f"../{name}" if name == "s0.png" else name, body) for name, body in members],
        "another": [(name, dict(members)["s3.png"] if name == "s0.png" else body) for name, body in members],
    }
    for instead in wrong.values():
        with pytest.raises(AssertionError):
            check_shard(data, Done(tar_bytes(list(instead)), good.rejections))
    with pytest.raises(AssertionError):
        check_shard(data, Done(good.output, ()))


def test_no_mutated_shard_gets_anything_past_the_rules(sandbox: Path) -> None:
    corpus, tried = Corpus(BASES, SEED), set()
    while len(tried) < SHARDS:
        case = corpus.draw()
        data = shard_of(case)
        if (digest := hashlib.sha256(data).digest()) in tried:
            continue
        tried.add(digest)
        with watched(case):
            done = protected(data, sandbox / "shard", (LOSSLESS, SAME)[len(tried) % 2])
            check_shard(data, done)
        corpus.learn(case, outcome_of(done.rejections, len(done.output) > tarfile.RECORDSIZE))
        assert os.listdir(sandbox) == ["shard"]
    assert len(corpus.seen) > 100  # not all of them end at the first checksum
    seen = {reason for outcome in corpus.seen for reason, _ in cast(tuple[Any, ...], outcome)[1:]}
    assert seen >= {reason.value for reason in Reason} - {"animated", "too-many-pixels", "too-costly", "unchanged"}


@pytest.fixture(scope="module")
def natives(native_uploads: Path) -> dict[str, bytes]:
    """Name -> a real upload."""
    with tarfile.open(native_uploads / "native-uploads.tar") as tar:
        return {info.name: cast(IO[bytes], tar.extractfile(info)).read() for info in tar if info.isreg()}


def image_of(case: Case, natives: dict[str, bytes]) -> bytes:
    data = natives[case.base]
    for rng in case.rngs():
        data = bent_image(data, rng)
    return data


def drawn(corpus: Corpus, natives: dict[str, bytes], tried: set[bytes], prefix: str) -> dict[str, tuple[Case, bytes]]:
    """Some images that were not tried before, by a name that ends like their base's."""
    found: dict[str, tuple[Case, bytes]] = {}
    while len(found) < PER_SHARD:
        case = corpus.draw()
        data = image_of(case, natives)
        if (digest := hashlib.sha256(data).digest()) not in tried:
            tried.add(digest)
            suffix = case.base.rpartition(".")[2] if len(tried) % 4 else "jpg"
            found[f"{prefix}{len(found)}.{suffix}"] = case, data
    return found


def test_no_mutated_image_leaves_unprotected(sandbox: Path, natives: dict[str, bytes]) -> None:
    corpus, tried = Corpus(list(natives), SEED), set[bytes]()
    while len(tried) < IMAGES:
        chosen = drawn(corpus, natives, tried, "i")
        data = tar_bytes([(name, data) for name, (_, data) in chosen.items()])
        with watched([case for case, _ in chosen.values()]):
            done = protected(data, sandbox / "shard", (LOSSLESS, SAME)[len(tried) // PER_SHARD % 2])
            check_shard(data, done)
        for name, (case, _) in chosen.items():
            why = [one for one in done.rejections if one.key == key_of(name)[0]]
            corpus.learn(case, outcome_of(why, "" if why else case.base))
    assert len(corpus.seen) > 40


ODD = (
    "a\\b{}",
    "c\nd{}",
    "e\u2028f{}",
    "~{}",
    " {}",
    "{}?versionId=1.png",
    "deep/er/{}",
    "日本/{}",
    "{}.jpg.png",
    ".{}",
)


def fill(folder: Path, natives: dict[str, bytes], corpus: Corpus, tried: set[bytes]) -> None:
    """Uploads: mutated images and shards under ordinary and odd names, links to a secret and to nowhere."""
    shards = Corpus(BASES, SEED + 1)
    for number in range(UPLOADED // PER_SHARD):
        for name, (_, data) in drawn(corpus, natives, tried, f"{number}-").items():
            odd = ODD[number % len(ODD)].format(name) if name.startswith(f"{number}-0") else name
            path = folder / odd
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        case = shards.draw()
        (folder / f"{number}.tar{'.gz' if case.base.endswith('gz') else ''}").write_bytes(shard_of(case))
    (folder / "link.jpg").symlink_to(folder / "0-1.jpg")
    (folder / "nowhere.png").symlink_to(OUTSIDE)
    os.mkfifo(folder / "pipe.png")


def protected_units(folder: Path, output: Path, settings: Settings) -> Iterator[tuple[Unit, UnitResult]]:
    """What the job of new uploads does between its listing and its commits."""
    places = Places(Store(str(folder)), Store(str(output)), settings, "f" * 64)

    def fault(name: str) -> tuple[Reason, str] | None:
        is_long = places.output.too_long(output_name(name, settings.encode))
        return fault_of(name) or ((Reason.UNUSABLE_NAME, is_long) if is_long else None)

    listing = sorted(places.source.walk())
    items = changes(listing, (), now=0, settle_s=0, fault=fault, tally=Tally())
    for unit in units_of(items, max_images=PER_SHARD, max_bytes=1 << 20):
        with watched(unit):
            yield unit, protect_unit(unit, places, fake_deltas(), threads=2)


@pytest.mark.parametrize("settings", [LOSSLESS, SAME], ids=["lossless", "same"])
def test_no_mutated_upload_leaves_unprotected(
    sandbox: Path, tmp_path_factory: pytest.TempPathFactory, natives: dict[str, bytes], settings: Settings
) -> None:
    source, tried = tmp_path_factory.mktemp("in"), set[bytes]()
    corpus = Corpus(sorted(name for name, data in natives.items() if len(data) < 50_000), SEED + len(settings.encode))
    fill(source, natives, corpus, tried)
    written: set[str] = set()
    for unit, result in protected_units(source, sandbox, settings):
        assert not result.moved
        assert not result.failed
        assert sorted(row.name for row in result.commit.rows) == sorted(item.name for item in unit.items)
        if result.refused:
            written.add(layout.upload_quarantine(unit.id))
        for row in result.commit.rows:
            assert bool(row.output) != bool(row.reason)
            if not row.output:
                continue
            written.add(row.output)
            before, after = (source / row.name).read_bytes(), (sandbox / row.output).read_bytes()
            assert hashlib.sha256(after).hexdigest() == row.output_sha256
            with watched(row.name):
                if unit.is_shard:
                    check_shard(before, Done(after, result.refused))
                else:
                    assert after != before
                    check_picture(after, [before])
    there = {str(path.relative_to(sandbox)) for path in sandbox.rglob("*") if not path.is_dir()}
    assert there == written
    assert len(written) > 100
