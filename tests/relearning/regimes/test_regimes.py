"""Every regime trains, the same every time; image changes agree with Pillow, SciPy, torchvision and torchattacks."""

from __future__ import annotations

import colorsys
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn
from torch.nn import functional as F

from jobs.evaluation.options import evaluation_parser
from pipeline.errors import SettingsError
from pipeline.relearning.denoisers import disentangle
from pipeline.relearning.denoisers.denoiser import Denoiser, UNet
from pipeline.relearning.regime_names import FILTER_NAMES, NUMBERED_NAMES, REGIME_NAMES
from pipeline.relearning.regimes import FILTERS, NUMBERED, REGIMES, Knowledge, find_regime
from pipeline.relearning.regimes.adversarial import pgd
from pipeline.relearning.regimes.recovery.opa import linear_directions, project_out
from pipeline.relearning.train import TargetScore, train_target
from pipeline.relearning.training import Labelled, Recipe, ScoredOn, Training

SEES_MORE = {  # regime: what it needs beside the protected images
    "early-stop": "clean images",
    "dfr": "clean images",
    "adabn": "clean images",
    "few-clean": "clean images",
    "delta-known": "true delta",
    "self-pairs": "denoiser",
    "purify": "denoiser",
    "avatar": "denoiser",
    "le": "denoiser",
    "leaked-pairs:9": "true delta",
}
UNTRAINED = dict.fromkeys(("self-pairs", "purify", "avatar"), Denoiser(UNet(8).state_dict(), 8, 0.0, 0, ""))
PART = sorted(name for name in REGIMES if not name.startswith("st")) + ["highpass:4", "lowpass:8"]


def pictures(count: int, seed: int) -> Tensor:
    """Smooth random pictures, uint8 [count, 3, 32, 32]."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.uniform(0, 255, (count, 3, 6, 6)).astype(np.float32))
    return F.interpolate(coarse, size=32, mode="bilinear").to(torch.uint8)


def unit(count: int, seed: int) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=generator(seed))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def knowledge(images: Tensor) -> Knowledge:
    return Knowledge(
        num_groups=3,
        clean_images=pictures(48, seed=5),
        clean_labels=torch.arange(48) % 3,
        deltas=torch.ones(images.shape, dtype=torch.int16),
        images=images,
        denoisers=UNTRAINED,
    )


def train(name: str, *, epochs: int = 1, seed: int = 0) -> TargetScore:
    images, labels = pictures(40, seed=0), torch.arange(40) % 3
    regime = find_regime(name, knowledge(images))
    test = pictures(24, seed=1)
    return train_target(
        Labelled(images, labels),
        ScoredOn(Labelled(test, torch.arange(24) % 3)),
        regime=regime,
        seed=seed,
        recipe=Recipe(epochs=epochs),
    )


@pytest.mark.parametrize("name", PART)
def test_every_regime_trains_and_the_same_seed_gives_the_same_run(name, monkeypatch):
    monkeypatch.setattr(disentangle, "EPOCHS", 2)  # of d-vae, whose autoencoders take the time
    torch.manual_seed(1)
    first = train(name)
    assert len(first.history) == 1
    assert not first.diverged
    torch.manual_seed(2)
    again = train(name)
    assert again.history == first.history
    assert again.accuracy_last == first.accuracy_last


def test_the_help_names_every_regime():
    named = set(re.findall(r"[a-z][a-z0-9.-]*", evaluation_parser().epilog))
    assert {name.removesuffix("-train") for name in (*REGIMES, *FILTERS)} <= named


def test_every_name_that_options_take_is_a_regime_and_every_regime_has_one():
    assert [set(names) for names in (REGIME_NAMES, FILTER_NAMES, NUMBERED_NAMES)] == [
        set(kind) for kind in (REGIMES, FILTERS, NUMBERED)
    ]


def test_two_regimes_can_be_joined():
    for name in (
        "iss-gray+early-stop",
        "cg+at",
        "opa+adabn",
        "iss-jpeg10-train+ueraser-lite",
        "lowpass:8+shortcut-net",
    ):
        assert train(name).regime == name


@pytest.mark.parametrize("name", ["highpass", "lowpass:", "highpass:fine", "lowpass:-8", "lowpass:0", "highpass:nan"])
def test_a_filter_without_a_sensible_number_says_in_one_line_what_it_takes(name):
    expected = rf"^regime '{name}' needs a positive number of cycles per image, e.g. {name.split(':')[0]}:8$"
    with pytest.raises(SettingsError, match=expected):
        find_regime(f"cg+{name}")


def test_a_filter_is_called_by_its_number_and_no_other_regime_takes_one():
    assert find_regime("highpass:16.50").name == "highpass:16.5"
    with pytest.raises(SettingsError, match=r"unknown regime 'highpas:8' in .* did you mean highpass:8"):
        find_regime("highpas:8")
    with pytest.raises(SettingsError, match=r"unknown regime 'equalise:8'.* did you mean equalise"):
        find_regime("equalise:8")


@pytest.mark.parametrize("name", SEES_MORE)
def test_a_regime_without_what_it_needs_says_so_in_one_line(name):
    with pytest.raises(SettingsError, match=f"regime '{name}' needs .*{SEES_MORE[name]}") as caught:
        find_regime(name)
    assert "\n" not in str(caught.value)


def test_clean_images_without_their_labels_are_refused():
    with pytest.raises(SettingsError, match="needs labels for 4 clean images; there are none"):
        find_regime("dfr", Knowledge(clean_images=pictures(4, 0)))
    assert find_regime("adabn", Knowledge(clean_images=pictures(4, 0))).name == "adabn"


# --- adversarial training -------------------------------------------------------------------------------------------


def tiny_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 4)).eval()


def test_pgd_is_that_of_torchattacks():
    torchattacks = pytest.importorskip("torchattacks", reason="needs torchattacks to compare with")
    network, images, labels = tiny_network(), unit(6, 1), torch.arange(6) % 4
    attack = torchattacks.PGD(network, eps=8 / 255, alpha=2 / 255, steps=10, random_start=True)
    torch.manual_seed(3)
    expected = attack(images, labels)
    torch.manual_seed(3)
    offset = torch.empty_like(images).uniform_(-8 / 255, 8 / 255)
    found = pgd(network, images, labels, epsilon=8 / 255, step=2 / 255, steps=10, offset=offset)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("name", "epsilon"), [("at", 4 / 255), ("at-8", 8 / 255), ("at-16", 16 / 255)])
def test_adversarial_training_sees_only_moved_images_within_the_bound_and_worse_ones(name, epsilon):
    seen, modes = [], []

    class Watched(Training):
        def scores(self, images: Tensor) -> Tensor:
            seen.append(images.detach().clone())
            modes.append(self.network.training)
            return super().scores(images)

    images, labels = pictures(8, 0), torch.arange(8) % 4
    regime = find_regime(name)
    training = fresh_training(Watched, images, labels, regime)
    training.network.train()
    clean = images.float() / 255
    regime.loss(training, clean, labels, generator(0))
    assert modes == [False] * 10 + [True]
    moved = seen[-1]
    assert float((moved - clean).abs().max()) == pytest.approx(epsilon, abs=1e-6)
    assert float((seen[0] - clean).abs().max()) <= epsilon + 1e-6
    assert moved.min() >= 0
    assert moved.max() <= 1
    training.network.eval()
    assert F.cross_entropy(training.scores(moved), labels) > F.cross_entropy(training.scores(clean), labels)


def fresh_training(kind, images, labels, regime):
    from pipeline.relearning.targets import build_target
    from pipeline.relearning.training import Recipe

    network = build_target("small", 4, 32, seed=0)
    return kind(network, images, labels, regime, Recipe(epochs=1), 0, torch.device("cpu"))


# --- colour ---------------------------------------------------------------------------------------------------------


def test_the_papers_cg_jitters_four_of_five_images_and_greys_one_of_five():
    red = torch.tensor([0.4, 0.25, 0.3]).view(1, 3, 1, 1).expand(3000, 3, 2, 2)
    torch.manual_seed(0)
    seen = find_regime("cg-paper").batch(red, generator(0))[:, :, 0, 0]
    is_grey = (seen.amax(1) - seen.amin(1)) < 1e-5
    assert float(is_grey.float().mean()) == pytest.approx(0.2, abs=0.03)
    assert float((seen - red[0, :, 0, 0]).abs().amax(1).lt(1e-5).float().mean()) == pytest.approx(0.2 * 0.8, abs=0.03)
    hues = np.array([colorsys.rgb_to_hsv(*colour)[0] for colour in seen[~is_grey].tolist()])
    turned = (hues - colorsys.rgb_to_hsv(0.4, 0.25, 0.3)[0] + 0.5) % 1 - 0.5
    assert 0.09 < np.abs(turned).max() < 0.101
    assert seen.amax(1).min() > 0.4 * 0.6 * 0.6  # brightness and contrast take 40 % off at most, each


# --- compression and blur -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["iss-jpeg10", "iss-gray", "iss-bits2"])
def test_the_train_form_changes_training_images_alike_and_leaves_test_images(name):
    images, labels = pictures(4, 0), torch.zeros(4)
    both, train_only = find_regime(name), find_regime(f"{name}-train")
    squeezed = both.prepare(images, labels, seed=0)
    assert torch.equal(train_only.prepare(images, labels, seed=0), squeezed)
    assert torch.equal(both.prepare_test(images), squeezed)
    assert torch.equal(train_only.prepare_test(images), images)
    assert not torch.equal(squeezed, images)


def test_jpeg_is_pillows():
    images = pictures(3, 0)
    file = io.BytesIO()
    Image.fromarray(images[2].permute(1, 2, 0).numpy()).save(file, "JPEG", quality=10)
    found = find_regime("iss-jpeg10-train").prepare(images, torch.zeros(3), seed=0)
    assert np.array_equal(found[2].permute(1, 2, 0).numpy(), np.asarray(Image.open(file)))


def test_two_bits_leave_the_nearest_of_four_levels():
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    found = find_regime("iss-bits2").prepare_test(every)[0, 0].flatten().int()
    assert found.unique().tolist() == [0, 85, 170, 255]
    assert int((found - torch.arange(256)).abs().max()) <= 42


@pytest.mark.parametrize(("name", "sigma"), [("smooth-0.5", 0.5), ("smooth-1", 1.0), ("smooth-2", 2.0)])
def test_smoothing_is_scipys_gaussian_filter_on_training_images_alone(name, sigma):
    images = pictures(3, 0)
    regime = find_regime(name)
    found = regime.prepare(images, torch.zeros(3), seed=0).numpy().astype(float)
    expected = gaussian_filter(images.numpy().astype(float), (0, 0, sigma, sigma), mode="mirror", truncate=4)
    assert np.abs(found - expected).max() <= 0.51
    assert regime.prepare_test(images) is images


def test_the_released_smoothing_has_the_published_weights():
    point = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    point[:, :, :, 16] = 255  # a line: the filter's one-dimensional weights
    found = find_regime("smooth-uc").prepare(point, torch.zeros(1), seed=0)[0, 0, 16] / 255
    weights = torch.tensor([0.106, 0.140, 0.166, 0.175, 0.166, 0.140, 0.106])
    assert torch.allclose(found[13:20], weights, atol=0.003)
    assert found[:13].sum() + found[20:].sum() == 0


# --- orthogonal projection ------------------------------------------------------------------------------------------


def test_projection_takes_linearly_separable_noise_out():
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(0, 4, 1500))
    noise = torch.from_numpy(16 * rng.choice([-1, 1], (4, 3, 32, 32)))
    clean = pictures(1500, 0).clamp(40, 215)
    protected = (clean.int() + noise[labels]).to(torch.uint8)
    directions = linear_directions(protected, labels, seed=0)
    assert torch.allclose(directions.T @ directions, torch.eye(4), atol=1e-5)
    projected = project_out(protected.flatten(1).float(), directions)
    assert float((projected @ directions).abs().max()) < 0.05  # of pixels in 0 ... 255, vectors of length 7,000

    def share_left(images: Tensor) -> float:
        centred = noise.float() - noise.float().mean(0)
        means = torch.stack([images[labels == c].float().mean(0) for c in range(4)])
        return float(((means - means.mean(0)) * centred).sum() / centred.square().sum())

    cleaned = find_regime("opa").prepare(protected, labels, seed=0)
    assert share_left(protected) == pytest.approx(1, abs=0.1)
    assert abs(share_left(cleaned)) < 0.2
    assert cleaned.dtype == torch.uint8
    assert float((cleaned.float() - protected.float()).abs().mean()) < 25
