"""Fits lower their loss, move images, keep the bound, and go on from any step to the same bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from pipeline.deltas.samplewise.proxy_network import ProxyNetwork
from pipeline.errors import ConflictError, InputError, PromiseError, SettingsError
from pipeline.fitting.cluster_fit import Aims, ClusterFit, NetworkShape
from pipeline.fitting.direct_fit import ProxyFit
from pipeline.fitting.fit import Fit, FitImages, FittedDeltas, merge
from pipeline.fitting.objective import feature_means
from pipeline.hashing import derive, torch_rng
from pipeline.schedules import one_cycle
from pipeline.settings import Settings

SIDE, CLUSTERS = 16, 3


class TinySurrogate(nn.Module):
    """Two random convolutions: enough of an encoder for a delta to move its features."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(0, "tiny"))
            self.body = nn.Sequential(
                nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU(), nn.Flatten(2)
            )
        self.requires_grad_(False)

    def embed(self, images: Tensor, *, resize: bool = False) -> Tensor:
        features: Tensor = self.body(images).mean(2)
        return features * 10


class BrokenSurrogate(TinySurrogate):
    """Features become nan after two steps."""

    calls = 0

    def embed(self, images: Tensor, *, resize: bool = False) -> Tensor:
        self.calls += 1
        return super().embed(images) * (math.nan if self.calls > 2 else 1.0)


def images(count: int = 90, side: int = SIDE) -> FitImages:
    """Noisy pictures of three colours, one for each cluster."""
    rng = torch_rng(0, "images")
    clusters = torch.arange(count) % CLUSTERS
    colours = torch.tensor([[0.45, 0.5, 0.5], [0.5, 0.56, 0.5], [0.5, 0.5, 0.55]])
    pixels = colours[clusters][:, :, None, None] + 0.1 * torch.randn(count, 3, side, side, generator=rng)
    return FitImages((pixels.clamp(0, 1) * 255).to(torch.uint8), clusters)


def means(given: FitImages, surrogate: TinySurrogate) -> Tensor:
    return feature_means(surrogate.embed(given.pixels[:, :, :SIDE, :SIDE].float() / 255), given.clusters, CLUSTERS)


def cluster_fit(
    cluster: int = 0, given: FitImages | None = None, surrogate: TinySurrogate | None = None, **choices: Any
) -> ClusterFit:
    given, surrogate = given or images(), surrogate or TinySurrogate()
    settings = Settings(
        **{"generator": "direct", "optimise_through": "surrogate", "steps": 40, "batch_size": 32} | choices
    )
    aims = Aims(means(given, surrogate), [1, 2, 0])
    return ClusterFit(cluster, given, surrogate, aims, settings, side=SIDE, shape=NetworkShape(width=4, blocks=1))


def network_fit(**choices: Any) -> ClusterFit:
    return cluster_fit(**{"generator": "network", "bound": "eps_tanh", "distance": "kl"} | choices)


def proxy_fit(**choices: Any) -> ProxyFit:
    """What is tested does not depend on how well the proxy has learned."""
    few = {"generator": "direct", "steps": 8, "batch_size": 32, "proxy_steps": 1}
    return ProxyFit(images(), CLUSTERS, Settings(**few | choices))


def finished(fit: Fit) -> FittedDeltas:
    while not fit.is_done:
        fit.advance(1000)
    return fit.result()


@pytest.mark.parametrize("make", [proxy_fit, cluster_fit, network_fit])
@pytest.mark.parametrize("stop", [0, 1, 5, 11, 17])
def test_a_fit_goes_on_from_a_saved_step_to_the_same_bits(make: Callable[..., Fit], stop: int) -> None:
    whole = finished(make())
    broken_off = make()
    broken_off.advance(stop)
    resumed = make()
    resumed.load(load(save(broken_off.state())))
    assert resumed.progress == broken_off.progress
    assert finished(resumed).to_bytes() == whole.to_bytes()


@pytest.mark.parametrize("make", [proxy_fit, cluster_fit, network_fit])
def test_torchs_global_generator_decides_nothing(make: Callable[..., Fit]) -> None:
    torch.manual_seed(1)
    first = finished(make()).to_bytes()
    torch.manual_seed(2)
    assert finished(make()).to_bytes() == first


@pytest.mark.parametrize("make", [proxy_fit, cluster_fit, network_fit])
def test_the_seed_decides_the_delta(make: Callable[..., Fit]) -> None:
    assert not torch.equal(finished(make(seed=0)).levels, finished(make(seed=1)).levels)


@pytest.mark.parametrize("epsilon", [16 / 255, 8 / 255, 0.05])
@pytest.mark.parametrize("make", [proxy_fit, cluster_fit, network_fit])
def test_no_delta_leaves_its_bound(make: Callable[..., Fit], epsilon: float) -> None:
    fitted = finished(make(epsilon=epsilon))
    assert fitted.levels.dtype == torch.int8
    assert fitted.levels.abs().max() <= epsilon * 255 + 1e-6
    assert (fitted.rms <= epsilon * 255 + 1e-6).all()
    assert fitted.levels.abs().max() > 1


@pytest.mark.parametrize("distance", ["l2", "kl", "cosine"])
def test_a_direct_delta_lowers_its_loss_and_moves_most_images(distance: str) -> None:
    fitted = finished(cluster_fit(distance=distance, train_images="cluster", epsilon=24 / 255))
    assert fitted.losses[0, -5:].mean() < 0.6 * fitted.losses[0, 0]  # the spread of the images remains
    assert fitted.before[0] < 0.4
    assert fitted.moved[0] > 0.7


@pytest.mark.parametrize("bound", ["tanh_clamp", "eps_tanh", "clamp_ste"])
def test_a_network_lowers_its_loss(bound: str) -> None:
    fitted = finished(network_fit(bound=bound, generator_lr=1e-2, batch_size=90, steps=60))
    assert fitted.losses[0, -5:].mean() < 0.8 * fitted.losses[0, :3].mean()
    assert set(fitted.extra) >= {"0/sigma", "0/generator.encoder.1.weight"}
    assert 0 <= fitted.clamped[0] <= 1


def test_a_fit_counts_moved_images_as_brute_force_does() -> None:
    given, surrogate = images(), TinySurrogate()
    fitted = finished(cluster_fit(2, given, surrogate))
    own = given.pixels[given.clusters == 2].float() / 255
    moved = surrogate.embed((own + fitted.levels[0].float() / 255).clamp(0, 1))
    centroids = means(given, surrogate)
    nearest = [min(range(3), key=lambda c: float((row - centroids[c]).norm())) for row in moved]
    assert fitted.targets == (0,)
    assert float(fitted.moved[0]) == pytest.approx(nearest.count(0) / len(nearest))


def test_a_larger_image_is_cropped_to_the_side_of_the_delta() -> None:
    fitted = finished(cluster_fit(given=images(side=20)))
    assert fitted.levels.shape == (1, 3, SIDE, SIDE)


def test_train_images_cluster_uses_no_image_of_another_cluster() -> None:
    given = images()
    changed = FitImages(given.pixels.clone(), given.clusters)
    changed.pixels[given.clusters != 0] = 0
    surrogate, outcome = TinySurrogate(), []
    for which in (given, changed):
        settings = Settings(
            generator="direct", optimise_through="surrogate", train_images="cluster", steps=10, batch_size=8
        )
        fit = ClusterFit(0, which, surrogate, Aims(means(given, surrogate), [1, 2, 0]), settings)
        outcome.append(finished(fit).to_bytes())
    assert outcome[0] == outcome[1]


def test_a_cluster_without_images_is_refused_or_fitted_on_all() -> None:
    given = FitImages(images().pixels, torch.ones(90, dtype=torch.int64))
    with pytest.raises(SettingsError, match="cluster 0 has no images to fit on"):
        cluster_fit(given=given, train_images="cluster")
    assert math.isnan(float(finished(cluster_fit(given=given)).moved[0]))


def test_a_broken_loss_stops_the_fit_before_the_update() -> None:
    fit = cluster_fit(1, surrogate=BrokenSurrogate())
    fit.advance(1)  # the feature means were the first call
    before = fit.state()["generator/net/delta"].clone()
    with pytest.raises(PromiseError, match="fitting cluster 1, step 1: the loss is not finite"):
        fit.advance(5)
    assert torch.equal(fit.state()["generator/net/delta"], before)


def test_joint_deltas_move_images_to_one_cycle_of_targets() -> None:
    fitted = finished(proxy_fit(steps=40, plain=True))
    assert fitted.targets == (1, 2, 0)
    assert fitted.clusters == (0, 1, 2)
    assert float(fitted.extra["proxy/accuracy"]) > 0.7
    assert fitted.losses.shape == (3, 40)
    assert (fitted.losses[:, -5:].mean(1) < fitted.losses[:, :3].mean(1)).all()
    assert fitted.moved.mean() > fitted.before.mean() + 0.3


def test_only_plain_deltas_are_coloured() -> None:
    grey, colour = finished(proxy_fit()).levels, finished(proxy_fit(plain=True)).levels
    assert torch.equal(grey[:, 0], grey[:, 1])
    assert torch.equal(grey[:, 0], grey[:, 2])
    assert not torch.equal(colour[:, 0], colour[:, 1])


def test_far_targets_have_no_fixed_point() -> None:
    fitted = finished(proxy_fit(permutation="far"))
    assert sorted(fitted.targets) == [0, 1, 2]
    assert all(cluster != target for cluster, target in enumerate(fitted.targets))


def test_a_checkpoint_of_another_fit_is_refused() -> None:
    state = proxy_fit().state()
    with pytest.raises(InputError, match="checkpoint of another fit: delta"):
        ProxyFit(images(side=24), CLUSTERS, Settings(generator="direct", steps=8)).load(state)
    with pytest.raises(InputError, match="checkpoint of another fit"):
        cluster_fit().load(network_fit(steps=41).state())


def test_files_of_single_clusters_make_one_whole() -> None:
    parts = [finished(cluster_fit(cluster, steps=3)) for cluster in (2, 0, 1)]
    whole = merge(FittedDeltas.from_bytes(part.to_bytes()) for part in parts)
    assert whole.clusters == (0, 1, 2)
    assert whole.targets == (1, 2, 0)
    assert torch.equal(whole.levels[2], parts[0].levels[0])
    with pytest.raises(ConflictError, match="fitted twice"):
        merge([parts[0], parts[0]])
    with pytest.raises(InputError, match="not a file of fitted deltas, or truncated"):
        FittedDeltas.from_bytes(parts[0].to_bytes()[:-10])


def test_fits_whose_steps_follow_their_own_images_make_one_whole_too() -> None:
    given = images()
    few = torch.cat(
        [torch.nonzero(given.clusters == cluster).flatten()[:count] for cluster, count in enumerate((7, 3, 2))]
    )
    given = FitImages(given.pixels[few], given.clusters[few])
    choices = {"train_images": "cluster", "epochs": 2, "batch_size": 2}
    parts = [finished(cluster_fit(cluster, given, **choices)) for cluster in (0, 1, 2)]
    widths = [part.losses.shape[1] for part in parts]
    assert widths == [8, 4, 2]  # two epochs of batches of two
    whole = merge(FittedDeltas.from_bytes(part.to_bytes()) for part in parts)
    for row, part in enumerate(parts):
        assert whole.losses[row].tolist()[: widths[row]] == part.losses[0].tolist()
        assert set(whole.losses[row].tolist()[widths[row] :]) <= {part.losses[0].tolist()[-1]}


def test_fit_images_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"pixels must be uint8 \[n, 3, S, S\]"):
        FitImages(torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="2 images"):
        FitImages(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))


def test_the_proxy_has_the_stated_layers() -> None:
    convolutions = 27 * 24 + 9 * (24 * 64 + 64 * 96 + 96 * 96 + 96 * 192)
    norms = 2 * (24 + 64 + 96 + 96 + 192)
    for side in (32, 72):
        network = ProxyNetwork(10, side)
        assert sum(p.numel() for p in network.parameters()) == convolutions + norms + 192 * 10 + 10
        assert network.features(torch.rand(2, 3, side, side)).shape == (2, 192)
    assert ProxyNetwork(10, 64).body[0].stride == (2, 2)
    assert ProxyNetwork(10, 63).body[0].stride == (1, 1)


def test_the_learning_rate_is_the_one_cycle_of_torch() -> None:
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.15)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.15, total_steps=2000, pct_start=0.25)
    for step in range(2000):
        assert 0.15 * one_cycle(step, 2000, 0.25) == pytest.approx(schedule.get_last_lr()[0], abs=6e-4)
        optimiser.step()
        if step < 1999:
            schedule.step()
