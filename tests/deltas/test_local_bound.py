"""Deltas that spare flat parts of a picture: the bound at each pixel, and deltas of both kinds that keep it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.deltas.artefact import artefact_to_bytes, read_header, read_tensors
from pipeline.deltas.load import load_cluster_protection
from pipeline.deltas.protection import Protection
from pipeline.deltas.samplewise.kinds import PER_PICTURE, PictureGenerator, maker_of
from pipeline.deltas.samplewise.local_bound import WINDOW, local_bound
from pipeline.errors import InputError, SettingsError
from pipeline.fitting.assemble import fitted_protection
from pipeline.fitting.distilled_fit import DistilledFit
from pipeline.fitting.sample_fit import SampleFit
from pipeline.settings import Settings
from tests.deltas.test_sample_steps import CLUSTERS, EPSILON, SIDE, clustering_of_noise, random_generator, striped

FLAT_SHARE = 0.25
GREY_LEVELS = 16 * FLAT_SHARE


def half_flat() -> NDArray[np.uint8]:
    """One picture [1, SIDE, SIDE, 3]: one grey on the left, random pixels on the right."""
    picture = np.full((1, SIDE, SIDE, 3), 128, np.uint8)
    right = (SIDE, SIDE - SIDE // 2, 3)
    picture[0, :, SIDE // 2 :] = np.random.default_rng(0).integers(0, 256, right, np.uint8)
    return picture


def flat_columns() -> slice:
    """Columns whose windows see one grey alone."""
    return slice(0, SIDE // 2 - WINDOW // 2)


def test_it_is_linear_in_the_standard_deviation_of_luma_around_a_pixel() -> None:
    images = np.random.default_rng(1).random((2, 3, 12, 12)) * np.array([0.1, 0.5])[:, None, None, None]
    found = local_bound(torch.from_numpy(images).float(), EPSILON, FLAT_SHARE)
    luma = np.tensordot([0.299, 0.587, 0.114], images, (0, 1))
    padded = np.pad(luma, ((0, 0), (2, 2), (2, 2)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5), axis=(1, 2))
    deviation = windows.std(axis=(3, 4))
    assert (deviation[0] < EPSILON).all()
    assert (deviation[1] > EPSILON).any()
    expected = EPSILON * (0.25 + 0.75 * np.minimum(deviation / EPSILON, 1))
    assert isinstance(found, torch.Tensor)
    np.testing.assert_allclose(found[:, 0].numpy(), expected, atol=1e-5)


def test_it_is_epsilon_everywhere_unless_asked_for() -> None:
    assert local_bound(torch.rand(1, 3, 8, 8), EPSILON, 1.0) == EPSILON


@pytest.mark.parametrize("kind", PER_PICTURE)
def test_deltas_keep_to_it(kind: str) -> None:
    fit_of = {"sample": SampleFit, "distilled": DistilledFit}[kind]
    settings = Settings(
        generator=kind,  # type: ignore[arg-type]
        clusters=CLUSTERS,
        steps=12,
        proxies=1,
        robust_proxies=0,
        proxy_steps=20,
        flat_share=FLAT_SHARE,
        given=frozenset({"steps"}),
    )
    fit = fit_of(striped(96), CLUSTERS, settings)
    while not fit.is_done:
        fit.advance(50)
    protection = fitted_protection(fit.result(), clustering_of_noise(), settings, "tiny", "f" * 64)
    kept = load_cluster_protection(protection.to_bytes())
    assert kept.sample is not None
    assert kept.sample.flat_share == FLAT_SHARE
    levels = np.abs(maker_of(kept.sample, kept.targets, kept.epsilon).levels(half_flat(), [0], ["a"]).astype(int))
    assert 0 < levels[..., flat_columns()].max() <= GREY_LEVELS
    assert GREY_LEVELS < levels.max() <= 16


@pytest.mark.parametrize("kind", PER_PICTURE)
def test_a_lower_share_lowers_deltas_in_flat_parts_alone(kind: str) -> None:
    whole = random_generator(kind)

    def made(generator: PictureGenerator) -> NDArray[np.int8]:
        return maker_of(generator, range(CLUSTERS), EPSILON).levels(half_flat(), [1], ["a"])

    busy = slice(SIDE // 2 + WINDOW // 2, SIDE)
    if kind == "distilled":  # the steps for one pixel depend on all others
        np.testing.assert_array_equal(made(replace(whole, flat_share=0.5))[..., busy], made(whole)[..., busy])
    flat = [np.abs(made(replace(whole, flat_share=share))[..., flat_columns()]).mean() for share in (1.0, 0.5, 0.1)]
    assert flat[0] > flat[1] > flat[2]


def test_older_files_know_one_bound_and_a_share_that_is_none_is_refused() -> None:
    parts = ("uc", "distilled", "tiny", EPSILON, clustering_of_noise(), (1, 2, 0), None, "f" * 64)
    kept = Protection(*parts, sample=random_generator("distilled")).to_bytes()  # type: ignore[arg-type]
    header, tensors = read_header(kept), read_tensors(kept)
    older = {name: value for name, value in header["sample"].items() if name != "flat_share"}
    read = load_cluster_protection(artefact_to_bytes(header | {"sample": older}, tensors))
    assert read.sample is not None
    assert read.sample.flat_share == 1.0
    for share in (0.0, 1.5, float("nan"), 1, "0.5"):
        wrong = artefact_to_bytes(header | {"sample": header["sample"] | {"flat_share": share}}, tensors)
        with pytest.raises(InputError, match="not a protection file, or truncated"):
            load_cluster_protection(wrong)
    for share in (0.0, -1.0, 1.1, float("nan")):
        with pytest.raises(SettingsError, match="--flat-share is above 0 and at most 1"):
            Settings(flat_share=share)
    with pytest.raises(SettingsError, match="--flat-share only applies to --generator distilled and sample"):
        Settings(generator="direct", flat_share=0.5, given=frozenset({"flat_share"}))
