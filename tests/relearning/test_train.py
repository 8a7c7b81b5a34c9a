"""The trainer: learns what can be learnt, nothing from noise, the same every time, and falls for a real shortcut."""

from __future__ import annotations

import copy
import io
import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from pipeline.errors import SettingsError
from pipeline.relearning.denoisers.denoiser import Denoiser, UNet
from pipeline.relearning.regimes import REGIMES, Knowledge, Regime, find_regime
from pipeline.relearning.targets import build_target
from pipeline.relearning.train import TargetScore, train_target
from pipeline.relearning.training import Labelled, Recipe, ScoredOn, Training, recipe_of
from tests.support.samples import stripes

CPU = torch.device("cpu")


def train(images: Tensor, labels: Tensor, *, regime: str = "nt", epochs: int = 6, seed: int = 0) -> TargetScore:
    test_images, test_labels = stripes(200, seed=99)
    return train_target(
        Labelled(images, labels),
        ScoredOn(Labelled(test_images, test_labels)),
        regime=find_regime(regime),
        seed=seed,
        recipe=Recipe(epochs=epochs),
    )


def test_an_easy_set_is_learnt():
    score = train(*stripes(512, seed=0))
    assert score.accuracy_last > 0.9
    assert score.accuracy_best >= score.accuracy_last
    assert len(score.history) == 6
    assert not score.diverged


def test_random_labels_teach_nothing():
    images, labels = stripes(512, seed=0)
    mixed = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    assert train(images, mixed).accuracy_last == pytest.approx(0.25, abs=0.15)


def test_the_same_seed_gives_the_same_run_whatever_the_global_generator_says():
    images, labels = stripes(192, seed=0)
    torch.manual_seed(1)
    first = train(images, labels, regime="nt-cg", epochs=2, seed=5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = train(images, labels, regime="nt-cg", epochs=2, seed=5)
    assert first.history == again.history
    assert torch.equal(state, torch.get_rng_state())
    assert train(images, labels, regime="nt-cg", epochs=2, seed=6).history != first.history


def test_a_recipe_decides_the_last_batch_and_the_normalisation():
    images, labels = stripes(70, seed=0)
    network = build_target("small", 4, 32, seed=0)
    made = {
        kind: Training(network, images, labels, Regime(), Recipe(batch_size=32, keep_last=keep, normalise=kind), 0, CPU)
        for kind, keep in (("train", False), ("half", True), ("none", True))
    }
    assert [each.num_batches for each in made.values()] == [2, 3, 3]
    assert (
        Training(network, images[:65], labels[:65], Regime(), Recipe(batch_size=32, keep_last=True), 0, CPU).num_batches
        == 2
    )
    batch = images[:4].float() / 255
    assert torch.equal(made["half"].normalise(batch), 2 * batch - 1)
    assert torch.equal(made["none"].normalise(batch), batch)
    seen = []
    made["half"].regime.batch = lambda views, _: seen.append(len(views)) or views
    made["half"].run_epoch(0)
    assert seen == [32, 32, 6]


def framed(images: Tensor) -> Tensor:
    """The images 2 px wider at every edge but 3 at the right and the bottom: 37 px, of which the recipe shows 32."""
    wide = torch.randint(256, (len(images), 3, 37, 37), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    wide[..., 2:34, 2:34] = images
    return wide


def test_images_kept_larger_are_trained_on_by_random_windows_and_tested_on_their_centre():
    """Zhang et al. 2023: RandomCrop(224) and RandomHorizontalFlip after Resize(256), CenterCrop(224) for tests."""
    paper = recipe_of("uc-paper")
    assert paper.kept_side(224) == 256
    assert all(paper.seen_side(paper.kept_side(side)) == side for side in range(32, 1025))
    images, labels = stripes(64, seed=0)
    wide = framed(images)
    network = build_target("small", 4, 32, seed=0)
    training = Training(network, wide, labels, Regime(), replace(paper, batch_size=32), 0, CPU)
    assert torch.equal(training.central(wide), transforms.center_crop(wide, [32, 32]))
    assert torch.equal(training.central(wide), images)
    seen: list[Tensor] = []
    training.regime.batch = lambda views, _: seen.append(views.mul(255).round().to(torch.uint8)) or views  # type: ignore
    training.run_epoch(0)
    crops = {
        crop.numpy().tobytes(): (index, row, column, flipped)
        for index, image in enumerate(wide)
        for row, column in itertools.product(range(6), repeat=2)
        for window in [image[:, row : row + 32, column : column + 32]]
        for flipped, crop in enumerate((window.contiguous(), window.flip(2)))
    }
    found = [crops[view.contiguous().numpy().tobytes()] for batch in seen for view in batch]
    assert {index for index, *_ in found} == set(range(64))
    assert {row for _, row, *_ in found} == {column for _, _, column, _ in found} == set(range(6))
    assert 16 <= sum(flipped for *_, flipped in found) <= 48


@pytest.mark.parametrize(
    ("regime", "target"), [("nt", "vit-14a"), ("simclr", "vit-14a"), ("dfr", "vit-14a"), ("adabn", "small")]
)
def test_no_regime_shows_a_target_more_than_the_windows_of_images_kept_larger(regime: str, target: str):
    images, labels = stripes(64, seed=0)
    known = Knowledge(clean_images=framed(images[:32]), clean_labels=labels[:32], images=framed(images))
    sides: list[int] = []

    def watch(training: Training) -> None:
        training.network.register_forward_pre_hook(lambda _, given: sides.append(given[0].shape[-1]))

    score = train_target(
        Labelled(framed(images), labels),
        ScoredOn(Labelled(framed(images), labels)),
        regime=find_regime(regime, known),
        seed=0,
        target=target,
        recipe=replace(recipe_of("uc-paper"), epochs=1),
        on_epoch=watch,
    )
    assert set(sides) == {32}  # and vit-14a takes no other
    assert 0 <= score.accuracy_last <= 1


def test_training_leaves_the_images_as_they_were():
    images, labels = stripes(128, seed=0)
    before = images.clone()
    for regime in ("nt", "subtract+cg"):
        train(images, labels, regime=regime, epochs=1)
    assert torch.equal(images, before)


def test_progress_is_told_after_every_epoch():
    images, labels = stripes(64, seed=0)
    told: list[tuple[int, int]] = []
    train_target(
        Labelled(images, labels),
        ScoredOn(Labelled(images, labels)),
        regime=Regime(),
        seed=0,
        on_epoch=lambda training: told.append(len(training.history)),
        recipe=Recipe(epochs=2),
    )
    assert told == [1, 2]


def test_the_target_has_the_published_size_and_a_stride_for_larger_images():
    parameters = sum(p.numel() for p in build_target("small", 10, 32, seed=0).parameters())
    assert parameters == pytest.approx(0.38e6, rel=0.02)
    small, large = build_target("small", 10, 32, seed=0).eval(), build_target("small", 10, 64, seed=0).eval()
    assert small.stem(torch.zeros(1, 3, 32, 32)).shape == large.stem(torch.zeros(1, 3, 64, 64)).shape
    assert large(torch.zeros(2, 3, 72, 72)).shape == (2, 10)


def test_images_that_are_not_uint8_or_lack_labels_are_refused():
    images, labels = stripes(64, seed=0)
    with pytest.raises(ValueError, match="images must be uint8"):
        train(images.float(), labels)
    with pytest.raises(ValueError, match="63 labels for 64 images"):
        train(images, labels[:63])


def test_jpeg_regime_is_pillows_jpeg_on_train_and_test():
    images, labels = stripes(4, seed=0)
    file = io.BytesIO()
    Image.fromarray(images[1].permute(1, 2, 0).numpy()).save(file, "JPEG", quality=10)
    expected = np.asarray(Image.open(file))
    regime = find_regime("iss-jpeg10")
    for prepared in (regime.prepare(images, labels, seed=0), regime.prepare_test(images)):
        assert np.array_equal(prepared[1].permute(1, 2, 0).numpy(), expected)


def test_gray_regime_is_pillows_gray():
    images, _ = stripes(4, seed=0)
    grey = find_regime("iss-gray").prepare_test(images)
    expected = np.asarray(Image.fromarray(images[2].permute(1, 2, 0).numpy()).convert("L"), dtype=int)
    for channel in grey[2].numpy().astype(int):
        assert np.abs(channel - expected).max() <= 1  # Pillow truncates, we round


def test_the_informed_adversary_takes_a_shared_delta_off_again():
    rng = np.random.default_rng(0)
    images = rng.integers(60, 196, (600, 3, 32, 32))
    groups = rng.integers(0, 3, 600)
    delta = 16 * np.sign(rng.standard_normal((3, 3, 32, 32)))
    protected = torch.from_numpy((images + delta[groups]).astype(np.uint8))
    for name, labels in (("subtract-blind", groups * 0), ("subtract-label", groups), ("subtract", groups)):
        regime = find_regime(name, Knowledge(num_groups=3))
        cleaned = regime.prepare(protected, torch.from_numpy(labels), seed=0).numpy().astype(int)
        left = np.sqrt(np.mean((cleaned - images) ** 2))
        assert left < 0.6 * 16, name


def test_colour_regime_keeps_range_and_shape_and_greys_about_half():
    images = torch.rand(400, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    seen = find_regime("nt-cg").batch(images, torch.Generator().manual_seed(1))
    assert seen.shape == images.shape
    assert seen.min() >= 0
    assert seen.max() <= 1
    greyed = ((seen[:, 0] - seen[:, 1]).abs().amax((1, 2)) < 1e-5).float().mean()
    assert float(greyed) == pytest.approx(0.5, abs=0.1)


def test_an_unknown_regime_is_refused_with_near_matches():
    with pytest.raises(SettingsError, match=r"unknown regime 'nt-gc' in 'nt-gc'.*did you mean.*nt-cg"):
        find_regime("nt-gc")
    with pytest.raises(SettingsError, match="at most two"):
        find_regime("iss-gray+iss-jpeg10+cg")
    assert find_regime("subtract+cg").name == "subtract+cg"
    images = stripes(2, 0)[0]
    known = Knowledge(
        clean_images=images,
        clean_labels=torch.zeros(2, dtype=torch.int64),
        deltas=images.short(),
        denoisers=dict.fromkeys(("self-pairs", "purify", "avatar"), Denoiser(UNet(8).state_dict(), 8, 0.0, 0, "")),
    )
    assert all(find_regime(name, known).prepare_test(images).shape == (2, 3, 32, 32) for name in REGIMES)


@pytest.mark.parametrize("regime", ["nt-cg", "friendly-noise", "epic"])
def test_a_training_that_goes_on_from_its_state_ends_as_one_that_was_never_stopped(regime):
    images, labels = stripes(192, seed=0)
    test_images, test_labels = stripes(64, seed=9)
    states = []

    def run(**options):
        return train_target(
            Labelled(images, labels),
            ScoredOn(Labelled(test_images, test_labels)),
            regime=find_regime(regime),
            seed=3,
            **options,
            recipe=Recipe(epochs=4),
        )

    def keep(training: Training) -> None:
        file = io.BytesIO()
        torch.save(training.state(), file)
        states.append(file.getvalue())

    whole = run(on_epoch=keep)
    resumed = run(resume=torch.load(io.BytesIO(states[1]), weights_only=True))
    assert resumed.history == whole.history
    assert resumed.accuracy_last == whole.accuracy_last


def test_all_that_a_regime_does_is_timed_and_the_network_it_leaves_is_scored_on_the_held_out_images():
    images, labels = stripes(96, seed=0)
    held = Labelled(*stripes(48, seed=7))

    class Slow(Regime):
        def prepare(self, images: Tensor, labels: Tensor, *, seed: int) -> Tensor:
            time.sleep(0.5)
            return images

        def finish(self, training: Training) -> None:
            time.sleep(0.5)
            for parameter in training.network.parameters():
                parameter.data.zero_()  # from now on every image is of the first class

    def run(states: list[dict[str, object]], **options) -> TargetScore:
        return train_target(
            Labelled(images, labels),
            ScoredOn(Labelled(*stripes(64, seed=9)), held),
            regime=Slow(),
            seed=3,
            recipe=Recipe(epochs=2),
            on_epoch=lambda training: states.append(copy.deepcopy(training.state())),
            **options,
        )

    states: list[dict[str, object]] = []
    score = run(states)
    epochs = states[-1]["train_seconds"]
    assert score.seconds >= epochs + 1
    assert score.accuracy_holdout == float((held.labels == 0).float().mean()) != score.history[-1].accuracy_holdout
    resumed = run([], resume=states[0])
    assert resumed.seconds >= 1  # what came before the restart counts once
    assert states[0]["seconds"] >= 0.5
