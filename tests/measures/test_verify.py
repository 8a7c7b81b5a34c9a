"""Whatever is done to a protected shard after its commit is found, and named by shard and key."""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace

import numpy as np
import pytest

from pipeline.measures.verify import Expected, ShardCheck, verify_shard
from pipeline.records import Commit
from pipeline.settings import Settings
from tests.support.samples import image_bytes, noise, tar_bytes

KEYS = ("a", "b", "c", "d")
ORIGINALS = {key: noise(12, 10, seed=number).clip(20, 235) for number, key in enumerate(KEYS)}
DELTA = (16 * np.random.default_rng(5).choice([-1, 1], (12, 10, 3))).astype(np.int16)
PROTECTED = {key: (pixels + DELTA).astype(np.uint8) for key, pixels in ORIGINALS.items()}

Members = list[tuple[str, bytes]]


def members(pictures: dict[str, np.ndarray]) -> Members:
    found: Members = []
    for key, pixels in pictures.items():
        found += (f"{key}.png", image_bytes(pixels)), (f"{key}.json", key.encode())
    return found


def commit_of(data: bytes, **changed: int) -> Commit:
    sane = Commit(
        fingerprint="f",
        shard="one.tar",
        input_size=0,
        input_etag="",
        output_size=len(data),
        output_sha256=hashlib.sha256(data).hexdigest(),
        protection_sha256="",
        num_protected=4,
        num_quarantined=0,
        num_members=8,
        input_image_bytes=0,
        output_image_bytes=0,
        max_abs_delta=16,
        quarantine={},
        clusters={},
        seconds={},
    )
    return replace(sane, **changed)  # type: ignore[arg-type]


def check(output: Members, original: Members | None = None, quarantined: set[str] | None = None) -> ShardCheck:
    """The check of a shard whose commit says what it really holds."""
    data = tar_bytes(output)
    commit = commit_of(data, num_members=len(output), num_protected=len({name[0] for name, _ in output}))
    source = io.BytesIO(tar_bytes(original or members(ORIGINALS)))
    settings = Settings(epsilon=16 / 255)
    return verify_shard(
        Expected.of(commit), io.BytesIO(data), source, quarantined or set(), settings=settings, decode_share=1.0
    )


def test_an_untouched_shard_has_no_problem_and_its_largest_change_is_epsilon():
    found = check(members(PROTECTED))
    assert found.problems == []
    assert (found.num_samples, found.num_decoded, found.num_exact) == (4, 4, 4)
    assert found.max_exact_delta == 16


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"output_size": 1}, "bytes: found"),
        ({"output_sha256": "0" * 64}, "SHA-256: found"),
        ({"num_protected": 5}, "samples: found 4, but the record says 5"),
        ({"num_members": 9}, "members: found 8, but the record says 9"),
    ],
)
def test_what_the_commit_says_otherwise_is_a_problem(changed, words):
    data = tar_bytes(members(PROTECTED))
    settings = Settings(epsilon=16 / 255)
    found = verify_shard(
        Expected.of(commit_of(data, **changed)), io.BytesIO(data), None, set(), settings=settings, decode_share=0.0
    )
    (problem,) = found.problems
    assert problem.startswith("one.tar: ")
    assert words in problem


def test_a_flipped_byte_behind_the_end_of_the_archive_is_found():
    data = tar_bytes(members(PROTECTED))
    commit = commit_of(data)
    flipped = data[:-1] + b"\x01"
    found = verify_shard(Expected.of(commit), io.BytesIO(flipped), None, set(), settings=Settings(), decode_share=0.0)
    assert any(problem.startswith("one.tar: SHA-256: found") for problem in found.problems)


def test_one_level_beyond_epsilon_in_one_pixel_is_found():
    beyond = {key: pixels.copy() for key, pixels in PROTECTED.items()}
    beyond["c"][3, 4, 1] = ORIGINALS["c"][3, 4, 1] + 17
    found = check(members(beyond))
    assert found.problems == ["one.tar key c: a pixel differs by 17 levels; epsilon allows 16"]


def test_an_image_that_went_through_unprotected_is_found():
    leaked = members(PROTECTED)
    leaked[2] = ("b.png", image_bytes(ORIGINALS["b"]))
    assert check(leaked).problems == ["one.tar key b: the image is unprotected: its bytes are identical to the input's"]


def test_an_image_that_was_only_written_anew_is_found():
    again = image_bytes(ORIGINALS["b"], compress_level=1)
    assert again != image_bytes(ORIGINALS["b"])
    problems = check([*members(PROTECTED)[:2], ("b.png", again), *members(PROTECTED)[3:]]).problems
    assert problems == ["one.tar key b: the image is unprotected: its pixels are those of the input"]


def test_a_sidecar_that_changed_or_went_missing_is_found():
    touched = members(PROTECTED)
    touched[1] = ("a.json", b"A")
    assert check(touched).problems == ["one.tar key a: member json differs from the input"]
    (first, second) = check([one for one in members(PROTECTED) if one[0] != "d.json"]).problems
    assert first == "one.tar key d: member json differs from the input"
    assert second.startswith("one.tar key d: has members ['png']")


def test_a_lost_sample_is_a_problem_unless_quarantine_names_it():
    without = [one for one in members(PROTECTED) if not one[0].startswith("c")]
    (lost,) = check(without).problems
    assert lost == "one.tar key c: is in the input, but neither in the output nor in quarantine"
    assert check(without, quarantined={"c"}).problems == []


def test_a_lost_last_sample_is_found_too():
    without = [one for one in members(PROTECTED) if not one[0].startswith("d")]
    assert "one.tar key d: is in the input, but neither in the output nor in quarantine" in check(without).problems


def test_another_size_and_a_broken_file_are_found():
    smaller = PROTECTED | {"b": PROTECTED["b"][:6]}
    assert check(members(smaller)).problems[0].startswith("one.tar key b: is (6, 10, 3), but the input is (12, 10, 3)")
    broken = members(PROTECTED)
    broken[6] = ("d.png", broken[6][1][:60])
    assert check(broken).problems[0].startswith("one.tar key d: cannot be decoded")


def test_only_a_share_is_decoded_and_always_the_same():
    data = tar_bytes(members(PROTECTED))
    counts = [
        verify_shard(
            Expected.of(commit_of(data)), io.BytesIO(data), None, set(), settings=Settings(), decode_share=share
        ).num_decoded
        for share in (0.0, 0.5, 0.5, 1.0)
    ]
    assert (counts[0], counts[3]) == (0, 4)
    assert counts[1] == counts[2] <= 4


@pytest.mark.parametrize("with_originals", [True, False])
def test_a_sidecar_that_may_not_leave_is_found_even_where_it_is_as_in_the_input(with_originals):
    mask = image_bytes(ORIGINALS["b"])
    ours = members(PROTECTED)[:4] + [("b.seg.png", mask), ("b.ppm", b"P6")] + members(PROTECTED)[4:]
    theirs = members(ORIGINALS)[:4] + [("b.seg.png", mask), ("b.ppm", b"P6")] + members(ORIGINALS)[4:]
    data = tar_bytes(ours)

    def problems(*keep):
        return verify_shard(
            Expected.of(commit_of(data, num_members=10)),
            io.BytesIO(data),
            io.BytesIO(tar_bytes(theirs)) if with_originals else None,
            set(),
            settings=Settings(keep_sidecar=keep),
            decode_share=1.0,
        ).problems

    assert problems()[0].startswith("one.tar key b: several-images: members png, seg.png")
    (found,) = problems("seg.png")
    assert found.startswith("one.tar key b: unknown-sidecar: member ppm is not one of the text formats")
    assert problems("seg.png", "ppm") == []


def test_an_output_may_be_far_larger_than_an_input_may_be() -> None:
    """A flat picture is a small PNG until a delta is added."""
    flat = np.full((64, 64, 3), 128, np.uint8)
    moved = flat + np.random.default_rng(0).integers(-16, 17, flat.shape)
    original, protected = image_bytes(flat), image_bytes(moved.astype(np.uint8))
    limit = len(original) + 1
    assert len(protected) > 2 * limit
    data = tar_bytes([("1.png", protected)])
    found = verify_shard(
        Expected.of(commit_of(data, num_members=1, num_protected=1)),
        io.BytesIO(data),
        io.BytesIO(tar_bytes([("1.png", original)])),
        set(),
        settings=Settings(max_member_bytes=limit),
        decode_share=1.0,
    )
    assert found.problems == []
    assert found.max_exact_delta == 16
