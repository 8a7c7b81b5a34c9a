"""Deltas of single images: each within its bound, made from its own pixels and key alone, towards its target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch.nn import functional as F

from pipeline.clusters.clustering import Clustering, fit_clusters
from pipeline.deltas.artefact import artefact_to_bytes, read_header, read_tensors
from pipeline.deltas.load import load_cluster_protection
from pipeline.deltas.picture_deltas import ProtectedPicture, SampleDeltas, protect_pictures
from pipeline.deltas.protection import Protection
from pipeline.deltas.samplewise.distilled import DistilledGenerator, DistilledNetwork
from pipeline.deltas.samplewise.kinds import PER_PICTURE, PictureGenerator
from pipeline.deltas.samplewise.proxy_network import ProxyNetwork
from pipeline.deltas.samplewise.sample_steps import SampleGenerator, SampleSteps
from pipeline.deltas.samplewise.step_views import Draws, StepViews
from pipeline.errors import InputError, PromiseError, SettingsError
from pipeline.fitting.assemble import fitted_protection
from pipeline.fitting.fit import FitImages, FittedDeltas
from pipeline.fitting.proxy_training import ProxyTraining
from pipeline.fitting.sample_fit import SampleFit
from pipeline.pictures.augment import ColourChanges, Views, recoloured, take
from pipeline.records import Rejection, Sample
from pipeline.relearning.arms import protected_tests
from pipeline.relearning.regimes.adversarial import pgd
from pipeline.settings import Settings, settings_from
from pipeline.surrogates.embed import embed_shard
from pipeline.surrogates.surrogate import load_surrogate
from tests.deltas.test_picture_deltas import SETTINGS, samples
from tests.support.samples import image_bytes

SIDE, CLUSTERS, EPSILON = 16, 3, 16 / 255
CHOICES = Settings(generator="sample", clusters=CLUSTERS, steps=12, proxies=2, robust_proxies=0, proxy_steps=60, seed=5)


def striped(count: int, seed: int = 0) -> FitImages:
    """Noisy grey stripes in three directions, one for each cluster, of any phase."""
    rng = torch.Generator().manual_seed(seed)
    clusters = torch.arange(count) % CLUSTERS
    ways = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.7, 0.7]])[clusters]
    at = torch.arange(SIDE).float()
    place = ways[:, :1, None] * at[:, None] + ways[:, 1:, None] * at
    waves = torch.sin(1.2 * place + 6.28 * torch.rand(count, 1, 1, generator=rng))
    pixels = 128 + 12 * waves[:, None] + 12 * torch.randn(count, 3, SIDE, SIDE, generator=rng)
    return FitImages(pixels.clamp(0, 255).to(torch.uint8), clusters)


def squares(images: FitImages) -> NDArray[np.uint8]:
    return images.pixels.permute(0, 2, 3, 1).contiguous().numpy()


@pytest.fixture(scope="module")
def fitted() -> FittedDeltas:
    fit = SampleFit(striped(96), CLUSTERS, CHOICES)
    fit.advance(1_000)
    return fit.result()


@pytest.fixture(scope="module")
def protection(fitted: FittedDeltas) -> Protection:
    return fitted_protection(fitted, clustering_of_noise(), CHOICES, "tiny", "f" * 64)


def clustering_of_noise() -> Clustering:
    points = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float16)
    return fit_clusters([points], "features", None, CLUSTERS, restarts=1, seed=0).clustering


def steps_of(protection: Protection, **changes: object) -> SampleSteps:
    assert isinstance(protection.sample, SampleGenerator)
    return SampleSteps(replace(protection.sample, **changes), protection.targets, protection.epsilon)  # type: ignore[arg-type]


def made(steps: SampleSteps, images: FitImages, rows: list[int]) -> NDArray[np.int8]:
    return steps.levels(squares(images)[rows], images.clusters[rows].tolist(), [f"k{row}" for row in rows])


def test_a_delta_depends_on_its_own_pixels_key_and_cluster_alone(protection: Protection) -> None:
    images, steps = striped(40, seed=1), steps_of(protection)
    whole = made(steps, images, list(range(40)))
    order = np.random.default_rng(0).permutation(40).tolist()
    np.testing.assert_array_equal(made(steps, images, order), whole[order])
    np.testing.assert_array_equal(made(steps, images, [7]), whole[[7]])
    for threads in (2, 3, 5, 24):
        torch.set_num_threads(threads)  # _one_thread puts it back
        np.testing.assert_array_equal(made(steps, images, order[:9]), whole[order[:9]])


def test_another_key_and_another_seed_give_another_delta(protection: Protection) -> None:
    one = squares(striped(3))[:1]
    steps = steps_of(protection)
    first, second = (steps.levels(one, [0], [key]) for key in ("a", "b"))
    assert np.mean(first == second) < 0.9
    third = steps_of(protection, seed=6).levels(one, [0], ["a"])
    assert np.mean(first == third) < 0.9


def test_levels_keep_the_bound_and_are_grey_unless_plain(protection: Protection) -> None:
    images = striped(6)
    levels = made(steps_of(protection), images, list(range(6)))
    assert 1 <= np.abs(levels.astype(int)).max() <= 16
    assert (levels == levels[:, :1]).all()
    plain = made(steps_of(protection, plain=True), images, list(range(6)))
    assert np.abs(plain.astype(int)).max() <= 16
    assert (plain != plain[:, :1]).any()


def test_they_move_a_network_that_was_never_seen_and_noise_of_the_same_size_does_not(protection: Protection) -> None:
    images = striped(48, seed=2)
    levels = made(steps_of(protection), images, list(range(48)))
    stranger = ProxyTraining(
        striped(96, seed=3), CLUSTERS, colour_robust=True, seed=9, device=torch.device("cpu"), least_steps=60
    )
    while not stranger.is_done:
        stranger.advance()
    targets = torch.tensor(protection.targets)[images.clusters]

    def share(delta: NDArray[np.int8]) -> float:
        changed = (images.pixels + torch.from_numpy(delta).to(torch.int16)).clamp(0, 255).float() / 255
        with torch.no_grad():
            return float((stranger.network.head(stranger.features(changed)).argmax(1) == targets).float().mean())

    noise = np.random.default_rng(0).choice([-16, 16], (48, 1, SIDE, SIDE)).astype(np.int8).repeat(3, 1)
    assert share(levels) > 0.6
    assert share(noise) < 0.4


def test_a_robust_proxy_errs_less_on_images_moved_against_it() -> None:
    images, tests = striped(96), striped(96, seed=4)
    accuracy = []
    for radius in (0.0, 8 / 255):
        proxy = ProxyTraining(
            images,
            CLUSTERS,
            colour_robust=False,
            seed=1,
            device=torch.device("cpu"),
            least_steps=150,
            radius=radius,
        )
        while not proxy.is_done:
            proxy.advance()
        network = proxy.network.eval()
        moved = pgd(
            *(network, tests.pixels / 255, tests.clusters),
            epsilon=6 / 255,
            step=2 / 255,
            steps=8,
            offset=torch.zeros(96, 3, SIDE, SIDE),
        )
        with torch.no_grad():
            accuracy.append(float((network(moved).argmax(1) == tests.clusters).float().mean()))
    assert accuracy[1] > accuracy[0] + 0.2


def test_views_are_those_that_a_trainer_would_see() -> None:
    draws = [Draws.of(SIDE, 24, plain=False, rng=torch.Generator().manual_seed(row)) for row in range(3)]
    images = torch.rand(3, 3, SIDE, SIDE)
    views = StepViews(draws, torch.device("cpu"))
    kinds = set()
    for step in range(24):
        for row, draw in enumerate(draws):
            seen = take(images[row : row + 1], Views(draw.views.rows[step, None], draw.views.columns[step, None]))
            smooth = int(draw.smooth[step])
            kinds.add((smooth, bool(draw.coloured[step])))
            if smooth == 1:
                seen = F.avg_pool2d(seen, 3, stride=1, padding=1, count_include_pad=False)
            if smooth == 2:
                seen = F.interpolate(F.avg_pool2d(seen, 2), scale_factor=2, mode="nearest")
            if draw.coloured[step]:
                seen = recoloured(seen, ColourChanges(draw.colours.mix[step, None], draw.colours.turn[step, None]))
            torch.testing.assert_close(views.seen(images, step)[row], seen[0], rtol=0, atol=1e-5)
    assert len(kinds) == 6


def test_batch_normalisation_put_into_convolutions_changes_no_logit(fitted: FittedDeltas) -> None:
    network = ProxyNetwork(CLUSTERS, SIDE)
    start = "proxies.1."
    network.load_state_dict({n.removeprefix(start): v for n, v in fitted.extra.items() if n.startswith(start)})
    network.eval()
    images = striped(8).pixels.float() / 255
    with torch.no_grad():
        whole, rounded = network.body(images), network(images)
        network.fuse()
        torch.testing.assert_close(network.body(images), whole, rtol=1e-4, atol=1e-4)  # in float32
        torch.testing.assert_close(network(images), rounded, rtol=0.02, atol=0.02)  # bfloat16, where there is any
    assert rounded.std() > 0.1


def test_a_fit_that_was_stopped_goes_on_to_the_same_bytes(fitted: FittedDeltas) -> None:
    first, second = (SampleFit(striped(96), CLUSTERS, CHOICES) for _ in range(2))
    first.advance(70)  # in the middle of the second proxy
    second.load(load(save(first.state())))
    for fit in (first, second):
        fit.advance(1_000)
    assert second.result().to_bytes() == first.result().to_bytes()
    assert FittedDeltas.from_bytes(fitted.to_bytes()).to_bytes() == fitted.to_bytes()
    assert float(fitted.moved.mean()) > float(fitted.before.mean())


def test_one_file_holds_it_and_what_does_not_fit_is_refused(protection: Protection) -> None:
    data = protection.to_bytes()
    again = load_cluster_protection(data)
    assert again.to_bytes() == data
    assert again.needs_pixels
    assert not again.needs_key
    images = striped(5, seed=4)
    np.testing.assert_array_equal(
        made(steps_of(again), images, list(range(5))), made(steps_of(protection), images, list(range(5)))
    )
    with pytest.raises(PromiseError, match="sample k: its delta depends on its pixels"):
        again.delta_for(0, "k", 8, 8)
    with pytest.raises(InputError, match="not a protection file, or truncated"):
        load_cluster_protection(data[:-100])
    with pytest.raises(ValueError, match="does not match its parts"):
        replace(protection, sample=None)


def damaged(protection: Protection, name: str, change: Callable[[NDArray[Any]], NDArray[Any]]) -> bytes:
    """Its file with one tensor changed."""
    data = protection.to_bytes()
    tensors = read_tensors(data)
    tensors[name] = change(tensors[name])
    return artefact_to_bytes(read_header(data), tensors)


@pytest.mark.parametrize("kind", PER_PICTURE)
def test_networks_and_headers_that_do_not_fit_are_refused_in_one_line(kind: str) -> None:
    parts = ("uc", kind, "tiny", EPSILON, clustering_of_noise(), (1, 2, 0), None, "f" * 64)
    whole = Protection(*parts, sample=random_generator(kind))  # type: ignore[arg-type]
    last = "distilled.last.bias" if kind == "distilled" else "proxies.0.body.0.weight"
    for name, change in (
        (last, lambda array: array[:0]),
        (last, lambda array: array + np.nan),
        ("clustering.centroids", lambda array: array + np.nan),
        ("clustering.centroids", lambda array: array[:, 1:]),
        ("clustering.feature_means", lambda array: array[1:]),
        ("targets", lambda array: array[1:]),
    ):
        with pytest.raises(InputError, match="not a protection file, or truncated"):
            load_cluster_protection(damaged(whole, name, change))
    header, tensors = read_header(whole.to_bytes()), read_tensors(whole.to_bytes())
    for changed in ({"side": 0}, {"side": 17}, {"side": "32"}, {"plain": 1}, {"seed": None}, {"side": 1_000_000}):
        wrong = artefact_to_bytes(header | {"sample": header["sample"] | changed}, tensors)
        with pytest.raises(InputError, match="not a protection file, or truncated"):
            load_cluster_protection(wrong)
    for epsilon in (0.001, 0.9, -1):
        with pytest.raises(InputError, match=f"epsilon {epsilon} is not between 1/255 and 127/255"):
            load_cluster_protection(artefact_to_bytes(header | {"epsilon": epsilon}, tensors))
    with pytest.raises(InputError, match="bytes"):
        read_header(whole.to_bytes()[:-1])


def random_generator(kind: str) -> PictureGenerator:
    """With networks that were not trained."""
    network = ProxyNetwork(CLUSTERS, SIDE) if kind == "sample" else DistilledNetwork(CLUSTERS, SIDE, plain=False)
    weights = {name: value.numpy() for name, value in network.state_dict().items()}
    if kind == "sample":
        return SampleGenerator(SIDE, 3, False, 0, (weights,))
    return DistilledGenerator(SIDE, False, 0, weights)


@pytest.mark.parametrize("kind", PER_PICTURE)
def test_uploads_and_a_run_make_the_same_bytes(kind: str) -> None:
    surrogate = load_surrogate("timm:test_resnet.random-0", weights=None, size=32, device="cpu")
    features, _, _ = embed_shard(samples(), surrogate, shard="s", batch_size=8, threads=1, max_pixels=1_000_000)
    clustering = fit_clusters([features.values], "features", None, CLUSTERS, restarts=2, seed=0).clustering
    parts = ("uc", kind, surrogate.id, EPSILON, clustering, (1, 2, 0), None, "f" * 64)
    protection = Protection(*parts, sample=random_generator(kind))  # type: ignore[arg-type]
    clusters = dict(zip(features.keys, clustering.assign(features.values)[0].tolist(), strict=True))
    of_a_run = protect_pictures(
        samples(), SampleDeltas(protection, None), settings=SETTINGS, batch_size=16, clusters=clusters
    )
    of_uploads = protect_pictures(samples(), SampleDeltas(protection, surrogate), settings=SETTINGS, batch_size=5)
    for one, other in zip(of_a_run, of_uploads, strict=True):
        assert isinstance(one, ProtectedPicture)
        assert isinstance(other, ProtectedPicture)
        assert one.cluster == other.cluster == clusters[one.done.sample.key]
        assert dict(one.done.sample.members) == dict(other.done.sample.members)
        assert 0 < one.done.max_abs_delta <= 16
    missing = {key: cluster for key, cluster in clusters.items() if key != "003"}
    left = list(
        protect_pictures(samples(), SampleDeltas(protection, None), settings=SETTINGS, batch_size=16, clusters=missing)
    )
    assert isinstance(left[3], Rejection)
    assert sum(isinstance(one, Rejection) for one in left) == 1


def test_options_of_other_generators_are_refused() -> None:
    for given, words in (
        ({"generator": "sample", "distance": "l2"}, "--distance has no effect with --generator sample"),
        ({"generator": "sample", "delta_size": 33}, "--delta-size must be even"),
        ({"generator": "sample", "optimise_through": "surrogate"}, "use --optimise-through proxy"),
        (
            {"generator": "direct", "proxies": 2},
            "--proxies only applies to --generator distilled and sample, not direct",
        ),
        (
            {"generator": "direct", "robust_proxies": 1},
            "--robust-proxies only applies to --generator distilled and sample, not direct",
        ),
        ({"proxies": 2, "robust_proxies": 3}, "--robust-proxies 3 exceeds --proxies 2"),
    ):
        with pytest.raises(SettingsError, match=words):
            settings_from(given)


def test_the_evaluation_gives_test_images_the_deltas_that_steps_make_for_them(fitted: FittedDeltas) -> None:
    surrogate = load_surrogate("timm:test_resnet.random-1", weights=None, size=32, device="cpu")
    images, keys = striped(6, seed=9), tuple("abcdef")
    features = surrogate.embed_pictures(list(squares(images))).astype(np.float16)
    clustering = fit_clusters([features], "features", None, CLUSTERS, restarts=1, seed=0).clustering
    protection = fitted_protection(fitted, clustering, CHOICES, surrogate.id, "f" * 64)
    given = [Sample(key, {"png": image_bytes(one)}) for key, one in zip(keys, squares(images), strict=True)]
    tests, clusters = protected_tests(
        given, keys, SampleDeltas(protection, surrogate), settings=SETTINGS, side=SIDE, size="native", num_groups=None
    )
    own, wrong = tests.own, tests.wrong
    assert clusters.tolist() == clustering.assign(features)[0].tolist()
    levels = steps_of(protection).levels(squares(images), clustering.assign(features)[0].tolist(), keys)
    pixels = images.pixels.numpy().astype(int)
    assert np.array_equal(own, np.clip(pixels + levels, 0, 255))
    assert np.array_equal(wrong, np.clip(pixels + np.roll(levels, 1, axis=0), 0, 255))
    assert not np.array_equal(own, wrong)
