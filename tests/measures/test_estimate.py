"""The prediction counts what is there, and its factors are those of the files that would be written."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.clusters.clustering import Clustering, ClusterSpace
from pipeline.deltas.apply import check_writable
from pipeline.deltas.protection import Protection
from pipeline.deltas.samplewise.proxy_network import ProxyNetwork
from pipeline.deltas.samplewise.sample_steps import SampleGenerator
from pipeline.deltas.universal.deltas import UniversalDeltas
from pipeline.errors import InputError
from pipeline.measures.estimate import COUNTED_SAMPLES, Estimate, bytes_per_sample, estimate, first_usable
from pipeline.records import Sample, Shard
from pipeline.settings import EMBEDDED_SURROGATE, Settings, clusters_for
from pipeline.storage.store import Store
from pipeline.surrogates.surrogate import Surrogate, load_surrogate
from tests.support.samples import image_bytes, noise, tar_bytes
from tests.support.universal import untrained


@pytest.fixture(scope="module")
def surrogate() -> Surrogate:
    torch.set_num_threads(1)
    return load_surrogate(EMBEDDED_SURROGATE, weights=None, size=64, device="cpu")


def predicted(data: bytes, surrogate: Surrogate, total: int | None = None, **settings: object) -> Estimate:
    """The estimate for a collection of one shard."""
    chosen = Settings(**settings)  # type: ignore[arg-type]
    return estimate(*first_of(data, keep_sidecar=chosen.keep_sidecar), total or len(data), surrogate, chosen)


def first_of(*shards: bytes, keep_sidecar: Sequence[str] = ()) -> tuple[list[Sample], float]:
    with TemporaryDirectory() as folder:
        for number, data in enumerate(shards):
            (Path(folder) / f"{number}.tar").write_bytes(data)
        store = Store(folder)
        plan = [Shard(f"{number}.tar", len(data), "") for number, data in enumerate(shards)]
        settings = Settings(keep_sidecar=tuple(keep_sidecar))
        few = first_usable(store, plan, max_member_bytes=1 << 28, use=lambda sample: check_writable(sample, settings))
        return few, bytes_per_sample(store, plan, max_member_bytes=1 << 28)


def test_a_shard_that_is_read_whole_gives_the_number_of_images_exactly(surrogate):
    data = tar_bytes([(f"{n}.png", image_bytes(noise(20, 30, seed=n))) for n in range(50)])
    found = predicted(data, surrogate)
    assert found.images == 50
    assert found.sides == (20, 30)
    assert found.clusters == clusters_for(50, "direct")


def test_ten_times_the_bytes_are_ten_times_the_images(surrogate):
    data = tar_bytes([(f"{n}.png", image_bytes(noise(20, 30, seed=n))) for n in range(50)])
    assert predicted(data, surrogate, 10 * len(data)).images == 500


def test_of_a_long_shard_only_the_beginning_is_read():
    small = image_bytes(noise(8, 8))
    data = tar_bytes([(f"{n:05}.png", small) for n in range(3 * COUNTED_SAMPLES)])
    stream = io.BytesIO(data)
    source: Any = SimpleNamespace(open=lambda name: nullcontext(stream))
    each = bytes_per_sample(source, [Shard("a.tar", len(data), "")], max_member_bytes=1 << 28)
    assert stream.tell() < len(data) / 2
    assert abs(len(data) / each - 3 * COUNTED_SAMPLES) < 0.05 * 3 * COUNTED_SAMPLES


def test_flat_pictures_grow_and_noise_hardly_does(surrogate):
    flat = tar_bytes([(f"{n}.png", image_bytes(np.full((64, 64, 3), 100, np.uint8))) for n in range(4)])
    full = tar_bytes([(f"{n}.png", image_bytes(noise(64, 64, seed=n))) for n in range(4)])
    assert predicted(flat, surrogate).output_factor > 1.5
    assert 0.9 < predicted(full, surrogate).output_factor < 1.1


def test_more_workers_divide_what_they_share_and_not_the_start():
    found = Estimate(1_000, (10, 10), 1.0, 10, embed=0.02, apply=0.03, fit=100.0)
    one, four = found.stage_seconds(1), found.stage_seconds(4)
    assert one["embed"] == pytest.approx(20)
    assert one["apply"] == pytest.approx(30)
    assert four["embed"] == pytest.approx(5)
    assert four["fit"] == one["fit"] == 100
    assert four["start-up"] == one["start-up"]


def test_what_cannot_be_decoded_is_passed_over_in_search_of_images_to_measure(surrogate):
    broken = tar_bytes([(f"{n}.jpg", b"no image") for n in range(70)])
    few, each = first_of(broken, tar_bytes([(f"x{n}.png", image_bytes(noise(20, 30, seed=n))) for n in range(5)]))
    assert [sample.key for sample in few] == [f"x{n}" for n in range(5)]
    assert each == len(broken) / 70
    assert estimate(few, each, len(broken), surrogate, Settings()).sides == (20, 30)


def test_what_a_run_would_refuse_is_passed_over_in_search_of_images_to_measure():
    with_arrays = []
    for number in range(40):
        with_arrays += [(f"{number}.png", image_bytes(noise(20, 30))), (f"{number}.npy", b"an array")]
    few, _ = first_of(tar_bytes([*with_arrays, ("x.png", image_bytes(noise(20, 30)))]))
    assert [sample.key for sample in few] == ["x"]


def test_a_shard_without_samples_says_nothing_of_their_size():
    full = tar_bytes([(f"{n}.png", image_bytes(noise(20, 30, seed=n))) for n in range(50)])
    _, each = first_of(tar_bytes([]), full)
    assert each == len(full) / 50


def test_no_usable_image_is_refused(surrogate):
    with pytest.raises(InputError, match="none of the first 2 samples"):
        predicted(tar_bytes([("a.jpg", b"no"), ("b.json", b"{}")]), surrogate)


def test_what_goes_to_quarantine_as_a_whole_is_refused_with_its_reason(surrogate):
    image = image_bytes(noise(9, 9, 4))
    masked = tar_bytes([("a.png", image), ("a.seg.png", image)])
    with pytest.raises(InputError, match="none of the first 1 samples can be protected.*--keep-sidecar seg.png"):
        predicted(masked, surrogate)
    assert predicted(masked, surrogate, keep_sidecar=["seg.png"]).images == 1
    with pytest.raises(
        InputError, match="last error: unsupported-format: a JPEG cannot keep the picture's transparency"
    ):
        predicted(tar_bytes([("a.png", image)]), surrogate, encode="jpeg:90")
    with pytest.raises(InputError, match="last error: unknown-sidecar: member npy"):
        predicted(tar_bytes([("a.png", image), ("a.npy", b"")]), surrogate)


def test_the_cost_is_of_what_is_in_use():
    found = Estimate(3_600, (10, 10), 1.0, 10, embed=1.0, apply=2.0, fit=1800.0)
    gpu, cpu = found.hours(2, Settings(gpus_per_worker=0.5, fit_threads=2))
    assert gpu == pytest.approx(0.5 * (1.0 + 0.5))  # an hour of embedding over both, half an hour of one fit
    overhead = found.stage_seconds(2)["cluster"] + found.stage_seconds(2)["start-up"]
    assert cpu == pytest.approx(1.0 + 2.0 + 2 * 0.5 + 2 * overhead / 3600)
    assert found.hours(2, Settings())[0] == 0
    universal = found.hours(2, Settings(method="one-for-all", gpus_per_worker=1.0))
    assert universal[0] == pytest.approx(2.0)
    sample_wise = replace(found, makes_deltas=True).hours(2, Settings(gpus_per_worker=1.0))
    assert sample_wise[0] == pytest.approx(found.hours(2, Settings(gpus_per_worker=1.0))[0] + 2.0)


def test_fits_of_single_clusters_are_shared_by_workers_and_cost_the_same():
    found = Estimate(1000, (10, 10), 1.0, clusters=10, embed=0.0, apply=0.0, fit=36_000.0, fits=10)
    settings = Settings(optimise_through="surrogate", generator="direct")
    assert [found.stage_seconds(workers)["fit"] for workers in (1, 4, 20)] == [36_000, 9_000, 3_600]
    hours = [found.hours(workers, settings)[1] for workers in (1, 10)]
    fixed = [sum(found.stage_seconds(n)[stage] for stage in ("cluster", "start-up")) * n / 3600 for n in (1, 10)]
    assert [total - rest for total, rest in zip(hours, fixed, strict=True)] == pytest.approx([20.0, 20.0])


def test_of_a_universal_generator_its_own_pass_is_counted_and_no_stage_embeds(surrogate, monkeypatch):
    data = tar_bytes([(f"{n}.png", image_bytes(noise(40, 40, seed=n))) for n in range(8)])
    given = untrained(surrogate)
    settings = Settings(method="one-for-all", protection="p.safetensors", epsilon=given.epsilon)
    passes = []
    made = UniversalDeltas.for_pictures

    def slow(deltas, requests):
        passes.append(len(requests))
        time.sleep(0.2 * len(requests))
        return made(deltas, requests)

    monkeypatch.setattr(UniversalDeltas, "for_pictures", slow)
    found = estimate(*first_of(data), len(data), surrogate, settings, given)
    assert passes == [1, 4]
    assert found.embed == 0
    assert 0.2 < found.apply < 0.4
    assert predicted(data, surrogate, protection="p.safetensors").apply < 0.2


@pytest.mark.parametrize("workers", [None, 2])
def test_models_are_timed_on_as_many_threads_as_a_worker_gets(surrogate, monkeypatch, workers):
    seen = []
    embed = surrogate.embed_pictures
    monkeypatch.setattr(surrogate, "embed_pictures", lambda some: seen.append(torch.get_num_threads()) or embed(some))
    monkeypatch.setattr("pipeline.measures.estimate.available_cpus", lambda: 6)
    data = tar_bytes([(f"{n}.png", image_bytes(noise(40, 40, seed=n))) for n in range(4)])
    predicted(data, surrogate, protection="p.safetensors", workers=workers)
    assert set(seen) == {1 if workers is None else 3}


def sample_wise(side: int, steps: int, clusters: int = 3) -> Protection:
    """A protection whose proxies have learned nothing."""
    points = np.random.default_rng(0).normal(size=(clusters, 8)).astype(np.float32)
    weights = {name: value.numpy() for name, value in ProxyNetwork(clusters, side).state_dict().items()}
    return Protection(
        method="uc",
        generator="sample",
        surrogate_id="tiny",
        epsilon=16 / 255,
        clustering=Clustering(ClusterSpace(), points, points, np.ones(clusters, np.float32)),
        targets=(*range(1, clusters), 0),
        levels=None,
        fingerprint="f" * 64,
        sample=SampleGenerator(side, steps, plain=False, seed=0, proxies=(weights,)),
    )


def test_a_given_protection_that_makes_deltas_image_by_image_costs_what_its_own_steps_take(surrogate, monkeypatch):
    data = tar_bytes([(f"{n}.png", image_bytes(noise(40, 40, seed=n))) for n in range(8)])
    monkeypatch.setattr("pipeline.measures.estimate._proxy_seconds", lambda side, settings: side / 1000)
    steps = 25
    fitted = predicted(data, surrogate, generator="sample", steps=steps, clusters=3)
    assert fitted.makes_deltas
    plain = predicted(data, surrogate, protection="p.safetensors")
    settings = Settings(protection="p.safetensors", steps=7)
    found = estimate(*first_of(data), len(data), surrogate, settings, sample_wise(side=40, steps=steps))
    assert found.apply == pytest.approx(fitted.apply, rel=0.1)
    assert found.apply > 10 * plain.apply
    assert (found.makes_deltas, found.clusters, found.fit) == (True, 3, 0)
    assert not plain.makes_deltas


def test_a_given_protection_of_shared_deltas_takes_no_steps(surrogate, monkeypatch):
    monkeypatch.setattr("pipeline.measures.estimate._proxy_seconds", lambda side, settings: 1e9)
    data = tar_bytes([(f"{n}.png", image_bytes(noise(40, 40, seed=n))) for n in range(8)])
    shared = replace(
        sample_wise(side=40, steps=9), generator="direct", sample=None, levels=np.zeros((3, 3, 40, 40), np.int8)
    )
    settings = Settings(protection="p.safetensors", generator="sample")
    found = estimate(*first_of(data), len(data), surrogate, settings, shared)
    assert found.apply < 1
    assert not found.makes_deltas
