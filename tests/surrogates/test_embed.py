"""One shard through the surrogate: what comes out, in which order, and how much is held on the way."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.errors import InputError, Reason
from pipeline.pictures.picture import decode_rgb
from pipeline.records import Rejection, Sample
from pipeline.surrogates import embed
from pipeline.surrogates.embed import embed_shard
from pipeline.surrogates.surrogate import Surrogate, load_surrogate
from tests.support.samples import image_bytes, noise


@pytest.fixture(scope="module")
def surrogate() -> Surrogate:
    """A network of two layers' size would do; this is the smallest that ships."""
    return load_surrogate("timm:tf_efficientnet_lite0", weights=None, size=32, device="cpu")


def sample(number: int, height: int = 40, width: int = 50) -> Sample:
    return Sample(f"{number:04d}", {"png": image_bytes(noise(height, width, seed=number)), "cls": b"1"})


def run(
    samples: list[Sample | Rejection], surrogate: Surrogate, batch_size: int = 4, threads: int = 3
) -> tuple[tuple[str, ...], NDArray[np.float16], list[Rejection]]:
    features, rejections, _ = embed_shard(
        samples, surrogate, shard="s.tar", batch_size=batch_size, threads=threads, max_pixels=10**6
    )
    assert features.shard == "s.tar"
    return features.keys, features.values, rejections


def test_features_are_the_surrogate_s_own_in_input_order(surrogate: Surrogate) -> None:
    samples = [sample(number, height=30 + 7 * (number % 5)) for number in range(11)]
    keys, values, rejections = run(list(samples), surrogate)
    assert keys == tuple(f"{number:04d}" for number in range(11))
    assert rejections == []
    for row, one in zip(values, samples, strict=True):
        pixels = decode_rgb(one.members["png"], at_least=surrogate.resize, max_pixels=10**6, suffix="png")
        np.testing.assert_allclose(row, surrogate.embed_pictures([pixels])[0], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("batch_size", "threads"), [(1, 1), (7, 1), (64, 4)])
def test_batches_and_threads_change_nothing_but_the_last_float_bits(
    surrogate: Surrogate, batch_size: int, threads: int
) -> None:
    samples = [sample(number) for number in range(9)]
    keys, values, _ = run(list(samples), surrogate)
    other_keys, other_values, _ = run(list(samples), surrogate, batch_size, threads)
    assert other_keys == keys
    np.testing.assert_allclose(other_values, values, rtol=2e-3, atol=2e-3)


def test_what_cannot_be_embedded_is_absent_and_has_a_reason(surrogate: Surrogate) -> None:
    broken = Sample("b", {"jpg": b"\xff\xd8\xff not a picture"})
    several = Sample("c", {"png": image_bytes(noise(8, 8)), "jpg": image_bytes(noise(8, 8), "JPEG")})
    before = Rejection("d", "d.png", Reason.TRUNCATED_SHARD, "ends early")
    bomb = Sample("e", {"png": image_bytes(np.zeros((1100, 1000, 1), np.uint8))})
    keys, values, rejections = run([sample(0), broken, several, sample(1), before, bomb], surrogate)
    assert keys == ("0000", "0001")
    assert len(values) == 2
    assert [(one.key, one.member, one.reason) for one in rejections] == [
        ("b", "b.jpg", Reason.UNDECODABLE),
        ("c", "", Reason.SEVERAL_IMAGES),
        ("d", "d.png", Reason.TRUNCATED_SHARD),
        ("e", "e.png", Reason.TOO_MANY_PIXELS),
    ]


def test_a_shard_without_samples_has_no_features(surrogate: Surrogate) -> None:
    keys, values, rejections = run([], surrogate)
    assert (keys, values.shape, rejections) == ((), (0, 1280), [])


def test_an_error_of_the_source_ends_the_shard(surrogate: Surrogate) -> None:
    def source() -> Iterator[Sample | Rejection]:
        yield sample(0)
        raise InputError("s.tar has changed since it was planned")

    before = threading.active_count()
    with pytest.raises(InputError, match="has changed"):
        embed_shard(source(), surrogate, shard="s.tar", batch_size=2, threads=2, max_pixels=10**6)
    assert threading.active_count() == before


def test_an_error_of_the_surrogate_leaves_no_thread_behind(
    surrogate: Surrogate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(pictures: object, clock: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(surrogate, "embed_pictures", fail)
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="out of memory"):
        run([sample(number) for number in range(40)], surrogate)
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


@pytest.mark.parametrize("threads", [1, 4])
def test_only_a_window_of_a_long_shard_is_held(
    surrogate: Surrogate, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """However slow the surrogate, reading and decoding stop some batches ahead of it."""
    taken, embedded, ahead, waiting = 0, 0, [], []
    data = image_bytes(noise(100, 100))

    def source() -> Iterator[Sample | Rejection]:
        nonlocal taken
        for number in range(300):
            taken += 1
            yield Sample(f"{number:04d}", {"png": data})

    def slow(pictures: list[NDArray[np.uint8]], clock: object) -> NDArray[np.float32]:
        nonlocal embedded
        time.sleep(0.02)
        embedded += len(pictures)
        ahead.append(taken - embedded)
        waiting.append(sum(picture.size for picture in pictures) // 3)
        return np.zeros((len(pictures), surrogate.dimension), np.float32)

    monkeypatch.setattr(surrogate, "embed_pictures", slow)
    monkeypatch.setattr(embed, "PIXELS_AHEAD", 50_000)  # five of these pictures
    keys, _, _ = run(source(), surrogate, batch_size=8, threads=threads)  # type: ignore[arg-type]
    assert len(keys) == 300
    assert max(ahead) <= 4 * 8 + threads
    assert max(waiting) <= 50_000


def test_one_picture_larger_than_the_window_still_goes_through(
    surrogate: Surrogate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed, "PIXELS_AHEAD", 100)
    keys, values, _ = run([sample(number) for number in range(12)], surrogate, threads=4)
    assert len(keys) == len(values) == 12


def test_the_time_is_accounted_for(surrogate: Surrogate) -> None:
    samples: list[Sample | Rejection] = [sample(number) for number in range(6)]
    _, _, seconds = embed_shard(samples, surrogate, shard="s", batch_size=2, threads=1, max_pixels=10**6)
    assert set(seconds.steps) == {"wait", "copy", "resize", "model"}
    assert all(spent > 0 for spent in (seconds.read, seconds.decode, *seconds.steps.values()))
