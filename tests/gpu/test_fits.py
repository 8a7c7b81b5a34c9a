"""Fits of Unlearnable Clusters on a GPU: the effect that the CPU's have, exact resumption, the same pixels laid."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load, save

from pipeline.clusters.clustering import Clustering, ClusterSpace
from pipeline.deltas.apply import LaidDeltas, protect_sample
from pipeline.deltas.protection import Protection
from pipeline.deltas.samplewise.distilled import DistilledGenerator, DistilledNetwork
from pipeline.deltas.samplewise.kinds import maker_of
from pipeline.fitting.cluster_fit import Aims, ClusterFit, NetworkShape
from pipeline.fitting.direct_fit import ProxyFit
from pipeline.fitting.distilled_fit import DistilledFit
from pipeline.fitting.fit import Fit, FitImages
from pipeline.fitting.sample_fit import SampleFit
from pipeline.records import Sample
from pipeline.settings import EMBEDDED_SURROGATE, Settings, settings_from
from pipeline.surrogates.surrogate import Surrogate, load_surrogate
from tests.support.samples import image_bytes, noise, stripes

CLUSTERS = 4
# SHA-256 of the pixels that the test below writes, as a CPU of the year 2026 made them
PIXELS_SHA256 = "c65efcc2e8fef40b4cde991b709dc7cf6725e37ff2ec236bc5838470a6b6665f"
LEARNT = 30  # steps in which a proxy learns the stripes


def images() -> FitImages:
    return FitImages(*stripes(128, 0))


def proxy_fit(device: str) -> Fit:
    settings = Settings(generator="direct", steps=12, batch_size=16, proxy_steps=LEARNT)
    return ProxyFit(images(), CLUSTERS, settings, device)


def cluster_fit(generator: str) -> Callable[[str], Fit]:
    def made(device: str) -> Fit:
        surrogate = load_surrogate(EMBEDDED_SURROGATE, weights=None, size=64, device=device)
        settings = settings_from(
            {"generator": generator, "optimise_through": "surrogate", "steps": 6, "batch_size": 16}
        )
        aims = Aims(means_of(surrogate), [1, 2, 3, 0])
        return ClusterFit(0, images(), surrogate, aims, settings, device, shape=NetworkShape(8, 1))

    return made


def means_of(surrogate: Surrogate) -> torch.Tensor:
    return torch.randn(CLUSTERS, surrogate.dimension, generator=torch.Generator().manual_seed(0))


def picture_fit(kind: type[SampleFit], **choices: Any) -> Callable[[str], Fit]:
    settings = settings_from({"proxies": 2, "robust_proxies": 1, "proxy_steps": LEARNT, "steps": 6} | choices)
    return lambda device: kind(images(), CLUSTERS, settings, device)


FITS = {
    "proxy": proxy_fit,
    "direct": cluster_fit("direct"),
    "network": cluster_fit("network"),
    "sample": picture_fit(SampleFit, generator="sample"),
    "distilled": picture_fit(DistilledFit, generator="distilled"),
}


def finished(fit: Fit) -> bytes:
    while not fit.is_done:
        fit.advance(50)
    return fit.result().to_bytes()


def test_a_protection_is_laid_to_the_same_pixels_on_every_machine(device: str) -> None:
    levels = np.random.default_rng(3).integers(-16, 17, (CLUSTERS, 3, 48, 48)).astype(np.int8)
    rows = np.eye(CLUSTERS, dtype=np.float32)
    protection = Protection(
        method="uc",
        generator="direct",
        surrogate_id="gold",
        epsilon=16 / 255,
        clustering=Clustering(ClusterSpace(), rows, rows, rows[:, 0]),
        targets=(1, 2, 3, 0),
        levels=levels,
        fingerprint="gold",
    )
    total = hashlib.sha256()
    for number, (height, width) in enumerate(((5, 3), (32, 32), (47, 301), (375, 500))):
        sample = Sample(f"{number}", {"png": image_bytes(noise(height, width, seed=number))})
        done = protect_sample(sample, LaidDeltas(protection), number, settings=Settings())
        total.update(np.asarray(Image.open(io.BytesIO(done.sample.members["png"]))).tobytes())
    assert total.hexdigest() == PIXELS_SHA256


def test_a_fit_comes_as_near_to_its_targets_as_on_the_cpu(device: str) -> None:
    left = {}
    settings = Settings(generator="direct", steps=40, batch_size=64, proxy_steps=LEARNT)
    for place in {"cpu", device}:
        fit = ProxyFit(images(), CLUSTERS, settings, place)
        while not fit.is_done:
            fit.advance(50)
        losses = fit.result().losses
        left[place] = float((losses[:, -5:].mean(1) / losses[:, :5].mean(1)).mean())
    assert left["cpu"] < 0.9, "the fit of the CPU comes no nearer"
    assert left[device] == pytest.approx(left["cpu"], abs=0.1)


@pytest.mark.parametrize("name", [name for name in FITS if name != "network"])  # see pipeline.fitting.fit.Fit
def test_a_fit_that_is_resumed_ends_with_the_same_bytes(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.fitting.proxy_training.EPOCHS", 2)  # it need not have learnt
    whole = finished(FITS[name](device))
    fit = FITS[name](device)
    fit.advance(3)
    again = FITS[name](device)
    again.load(load(save(fit.state())))  # through a file, as after a kill
    assert finished(again) == whole


def test_a_distilled_network_makes_nearly_the_deltas_of_the_cpu(device: str) -> None:
    torch.manual_seed(0)
    network = DistilledNetwork(CLUSTERS, 32, plain=False)
    with torch.no_grad():
        network.last.weight.mul_(20)  # as large deltas as a trained one makes
    weights = {name: value.numpy() for name, value in network.state_dict().items()}
    generator = DistilledGenerator(32, False, 0, weights)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)
    clusters, keys = [row % CLUSTERS for row in range(40)], [str(row) for row in range(40)]
    made = [
        maker_of(generator, [1, 2, 3, 0], 16 / 255, place).levels(pixels, clusters, keys).astype(int)
        for place in ("cpu", device)
    ]
    assert np.abs(made[0]).mean() > 4
    assert np.abs(made[0] - made[1]).mean() < 0.5  # of levels of 1/255: bfloat16 rounds differently
