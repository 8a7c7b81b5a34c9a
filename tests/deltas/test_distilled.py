"""Distilled deltas: what one pass of a trained network gives is bounded, each image's own, and moves other networks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save

from pipeline.deltas.load import load_cluster_protection
from pipeline.deltas.protection import Protection
from pipeline.deltas.samplewise.distilled import DistilledGenerator, DistilledNetwork
from pipeline.deltas.samplewise.kinds import maker_of
from pipeline.errors import InputError, SettingsError
from pipeline.fitting.assemble import fitted_protection
from pipeline.fitting.distilled_fit import DistilledFit
from pipeline.fitting.fit import FittedDeltas
from pipeline.fitting.proxy_training import ProxyTraining
from pipeline.settings import Settings, settings_from
from tests.deltas.test_sample_steps import CLUSTERS, EPSILON, clustering_of_noise, squares, striped

CHOICES = Settings(
    generator="distilled",
    clusters=CLUSTERS,
    steps=80,
    proxies=2,
    robust_proxies=0,
    proxy_steps=60,
    seed=5,
    given=frozenset({"steps"}),
)


@pytest.fixture(scope="module")
def fitted() -> FittedDeltas:
    fit = DistilledFit(striped(96), CLUSTERS, CHOICES)
    while not fit.is_done:
        fit.advance(50)
    return fit.result()


@pytest.fixture(scope="module")
def protection(fitted: FittedDeltas) -> Protection:
    return fitted_protection(fitted, clustering_of_noise(), CHOICES, "tiny", "f" * 64)


def made(protection: Protection, rows: list[int], seed: int = 1, prefix: str = "k") -> NDArray[np.int8]:
    images = striped(40, seed=seed)
    assert protection.sample is not None
    maker = maker_of(protection.sample, protection.targets, protection.epsilon)
    return maker.levels(squares(images)[rows], images.clusters[rows].tolist(), [f"{prefix}{row}" for row in rows])


def test_a_delta_depends_on_its_own_pixels_key_and_cluster_alone(protection: Protection) -> None:
    whole = made(protection, list(range(40)))
    order = np.random.default_rng(0).permutation(40).tolist()
    np.testing.assert_array_equal(made(protection, order), whole[order])
    np.testing.assert_array_equal(made(protection, [7]), whole[[7]])
    for threads in (2, 3, 5, 24):
        torch.set_num_threads(threads)  # _one_thread puts it back
        np.testing.assert_array_equal(made(protection, order[:9]), whole[order[:9]])
    assert (made(protection, [7], prefix="other") != whole[[7]]).any()


def test_no_number_of_threads_changes_a_bit_of_what_the_network_answers() -> None:
    torch.manual_seed(0)
    network = DistilledNetwork(CLUSTERS, 64, plain=False).to(memory_format=torch.channels_last).requires_grad_(False)
    given = torch.rand(16, 3, 64, 64), torch.rand(16, 1, 64, 64), torch.arange(16) % CLUSTERS
    torch.set_num_threads(1)
    expected = network(*given)
    for threads in (2, 3, 5, 6, 24):  # _one_thread puts it back
        torch.set_num_threads(threads)
        assert torch.equal(network(*given), expected)


def test_levels_keep_the_bound_and_are_grey_unless_plain(protection: Protection) -> None:
    levels = made(protection, list(range(40)))
    assert 8 < np.abs(levels.astype(int)).max() <= 16
    assert (levels == levels[:, :1]).all()
    for side in (18, 66):  # halves that are odd, on single pixels and on blocks of four
        network = DistilledNetwork(CLUSTERS, side, plain=True)
        with torch.no_grad():
            raw = network(torch.rand(2, 3, side, side), torch.rand(2, 1, side, side), torch.tensor([0, 2]))
        assert raw.shape == (2, 3, side, side)
        assert raw.abs().max() <= 1


def test_they_move_a_network_that_was_never_seen(protection: Protection, fitted: FittedDeltas) -> None:
    images = striped(40, seed=1)
    levels = made(protection, list(range(40)))
    stranger = ProxyTraining(
        striped(96, seed=3), CLUSTERS, colour_robust=True, seed=9, device=torch.device("cpu"), least_steps=60
    )
    while not stranger.is_done:
        stranger.advance()
    targets = torch.tensor(protection.targets)[images.clusters]
    changed = (images.pixels + torch.from_numpy(levels).to(torch.int16)).clamp(0, 255).float() / 255
    with torch.no_grad():
        moved = stranger.network.head(stranger.features(changed)).argmax(1) == targets
    assert float(moved.float().mean()) > 0.6
    assert float(fitted.moved.mean()) > float(fitted.before.mean()) + 0.4
    assert fitted.losses.shape == (CLUSTERS, CHOICES.steps)
    assert fitted.losses[:, -10:].mean() < 0.7 * fitted.losses[:, :10].mean()


def test_a_fit_goes_on_from_a_checkpoint_to_the_same_bytes() -> None:
    choices = replace(CHOICES, steps=10, proxies=1)
    whole = DistilledFit(striped(96), CLUSTERS, choices)
    states = []
    for steps in (30, 34, 1_000):  # within the proxy's steps, within the network's, to the end
        whole.advance(steps)
        states.append((whole.progress, save(whole.state())))
    assert [progress for progress, _ in states] == [pytest.approx(30 / 70), pytest.approx(64 / 70), 1.0]
    for progress, state in states[:2]:
        again = DistilledFit(striped(96), CLUSTERS, choices)
        again.load(load(state))
        assert again.progress == progress
        again.advance(1_000)
        assert again.result().to_bytes() == whole.result().to_bytes()


def test_the_file_holds_the_network_and_no_proxies(protection: Protection) -> None:
    data = protection.to_bytes()
    again = load_cluster_protection(data)
    assert isinstance(again.sample, DistilledGenerator)
    assert again.to_bytes() == data
    np.testing.assert_array_equal(made(again, [3]), made(protection, [3]))
    assert not any(name.startswith("proxies") for name in load(data))
    assert sum(array.size for array in again.sample.weights.values()) < 1_000_000
    assert again.epsilon == EPSILON
    with pytest.raises(InputError):
        load_cluster_protection(data.replace(b"distilled.", b"dis_illed."))


def test_options_that_have_no_effect_are_refused() -> None:
    with pytest.raises(SettingsError, match="--batch-size has no effect with --generator distilled"):
        settings_from({"generator": "distilled", "batch_size": 8})
    with pytest.raises(SettingsError, match="even for --generator distilled"):
        settings_from({"generator": "distilled", "delta_size": 33})


@pytest.mark.parametrize(("images", "steps"), [(40, 300), (2_000, 500), (6_000, 1_500), (10_000, 1_500)])
def test_small_collections_take_fewer_steps_unless_told(images: int, steps: int) -> None:
    assert settings_from({"generator": "distilled"}).for_images(images).steps == steps
    assert settings_from({"generator": "distilled", "steps": 20}).for_images(images).steps == 20
