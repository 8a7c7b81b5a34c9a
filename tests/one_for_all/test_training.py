"""The universal generator, its training and its protection file: sizes, bounds, restarts, data-parallel steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing

from pipeline.clusters.clustering import fit_clusters
from pipeline.deltas.load import load_cluster_protection, load_protection
from pipeline.deltas.picture_deltas import DeltaRequest
from pipeline.deltas.universal.deltas import UniversalDeltas
from pipeline.deltas.universal.generator import UniversalGenerator, bounded_output
from pipeline.deltas.universal.shape import BOUNDS
from pipeline.errors import ConflictError, InputError, PromiseError, SettingsError
from pipeline.one_for_all.finish import finished_protection
from pipeline.one_for_all.pictures import read_squares
from pipeline.one_for_all.settings import OneForAllSettings, one_for_all_settings
from pipeline.one_for_all.training import TrainingImages, UniversalFit
from pipeline.records import Rejection, Sample
from pipeline.relearning.arms import protected_tests
from pipeline.settings import ApplySettings
from pipeline.surrogates.concepts import ConceptBank, bank_for, class_names, imagenet_bank
from pipeline.surrogates.surrogate import load_surrogate
from tests.support.samples import image_bytes, noise, read, tar_bytes

SURROGATE = "timm:test_resnet.random-0"
SIDE = 32
SMALL = OneForAllSettings(
    input="-", output="-", surrogate=SURROGATE, surrogate_size=SIDE, side=SIDE, width=2, blocks=1, near=2,
    batch_size=8, max_steps=6, lr=1e-3,
)  # fmt: skip


@pytest.fixture(scope="module")
def surrogate():
    return load_surrogate(SURROGATE, weights=None, size=SIDE, device="cpu")


def pictures(count: int = 24, side: int = 36) -> TrainingImages:
    rng = torch.Generator().manual_seed(1)
    return TrainingImages(torch.randint(0, 256, (count, 3, side, side), generator=rng, dtype=torch.uint8))


def bank(surrogate, count: int = 12) -> torch.Tensor:
    return torch.randn(count, surrogate.dimension, generator=torch.Generator().manual_seed(2))


def fitted(surrogate, **changed) -> UniversalFit:
    fit = UniversalFit(pictures(), surrogate, bank(surrogate), replace(SMALL, **changed))
    fit.advance(fit.steps)
    return fit


def protection_of(fit: UniversalFit, surrogate):
    rows = bank(surrogate)
    names = tuple(f"concept {number}" for number in range(len(rows)))
    return finished_protection(fit, ConceptBank(names, rows.numpy()), "0" * 64)


# --- the generator


def test_the_full_generator_has_the_size_of_the_released_one():
    with torch.device("meta"):
        generator = UniversalGenerator.__new__(UniversalGenerator)
        UniversalGenerator.__init__(generator, 512)
    assert sum(parameter.numel() for parameter in generator.parameters()) == 121_133_699


def test_every_entry_of_the_embedding_is_repeated_over_the_whole_grid():
    """Permuting the embedding's entries together with the fusion layer's weights changes nothing."""
    generator = UniversalGenerator(5, width=2, blocks=1).eval()
    images, embeddings = torch.rand(2, 3, 32, 32), torch.randn(2, 5)
    before = generator(images, embeddings)
    order = torch.tensor([3, 1, 4, 0, 2])
    with torch.no_grad():
        weight = generator.fusion[0].weight
        weight[:, 16:] = weight[:, 16:][:, order]
    assert torch.allclose(generator(images, embeddings[:, order]), before, atol=1e-5)


@pytest.mark.parametrize("side", [16, 32, 72])
def test_images_of_any_multiple_of_eight_come_back_in_their_size(side):
    assert UniversalGenerator(3, width=1, blocks=1)(torch.rand(2, 3, side, side), torch.rand(2, 3)).shape[2:] == (
        side,
        side,
    )


def test_bounds_are_what_their_names_say():
    raw = torch.tensor([-9.0, -0.01, 0.0, 0.02, 9.0]).reshape(1, 1, 1, 5).expand(1, 3, 5, 5)
    epsilon = 8 / 255
    assert torch.allclose(bounded_output(raw, epsilon, "eps_tanh"), epsilon * torch.tanh(raw))
    assert torch.allclose(
        bounded_output(raw, epsilon, "tanh_clamp")[0, 0, 0],
        torch.tensor([-epsilon, -0.01, 0, 0.02, epsilon]),
        atol=1e-4,
    )
    large = torch.randn(2, 3, 224, 224)
    assert torch.allclose(bounded_output(large, epsilon, "l2").flatten(1).norm(dim=1), torch.tensor(16.0), atol=1e-3)


# --- training


@pytest.mark.parametrize("loss", ["logratio", "paper_detached", "fixed_lambda", "code_pairs", "code_diag"])
def test_training_moves_embeddings_towards_the_opposite_concept(surrogate, loss):
    fit = fitted(surrogate, loss=loss, epsilon=32 / 255, lr=1e-2, max_steps=40, epochs=100, near=3)
    first, last = slice(0, 5), slice(-5, None)
    if loss.startswith("code"):  # its reciprocal changes sign with the similarity: only that it runs
        assert np.isfinite(fit.curves["loss"]).all()
        return
    rise = {
        name: np.mean(fit.curves[name][last]) - np.mean(fit.curves[f"{name}_clean"][last])
        for name in ("near", "opposite")
    }
    assert rise["opposite"] > 0
    assert rise["opposite"] > np.mean(fit.curves["opposite"][first]) - np.mean(fit.curves["opposite_clean"][first])
    assert rise["near"] < 0


@pytest.mark.parametrize("select_by", ["perturbed_embedding", "label"])
def test_targets_may_be_chosen_otherwise(surrogate, select_by):
    images = TrainingImages(pictures().pixels, torch.arange(24) % 12)
    fit = UniversalFit(images, surrogate, bank(surrogate), replace(SMALL, select_by=select_by))
    fit.advance(2)
    assert len(fit.curves["loss"]) == 2


def test_a_training_that_goes_on_from_its_state_ends_as_one_that_was_never_stopped(surrogate):
    whole = fitted(surrogate)
    stopped = UniversalFit(pictures(), surrogate, bank(surrogate), SMALL)
    stopped.advance(3)
    resumed = UniversalFit(pictures(), surrogate, bank(surrogate), SMALL)
    resumed.load(stopped.state())
    resumed.advance(100)
    assert resumed.step == whole.step == 6
    for name, value in whole.generator.state_dict().items():
        assert torch.equal(value, resumed.generator.state_dict()[name]), name


def test_a_step_in_parts_is_a_step_but_for_the_batch_statistics(surrogate):
    one, parts = (UniversalFit(pictures(), surrogate, bank(surrogate), replace(SMALL, accumulate=n)) for n in (1, 2))
    for fit in (one, parts):
        fit.generator.eval()  # statistics of the batch would differ
        fit.generator.train = lambda mode=True: None  # type: ignore[method-assign]
        fit.advance(1)
    assert one.curves["near"] == pytest.approx(parts.curves["near"], abs=1e-5)
    gradients = [torch.cat([p.grad.flatten() for p in fit.generator.parameters()]) for fit in (one, parts)]
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-6)


NO_GRADIENT = ("generator/fusion.0.bias", "generator/fusion.1.running_mean")


def train_one_of_two(rank: int, folder: str) -> None:
    """A process of a group of two, on the global batch that one process has alone."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    surrogate = load_surrogate(SURROGATE, weights=None, size=SIDE, device="cpu")
    for loss in ("logratio", "code_pairs"):
        fit = UniversalFit(pictures(), surrogate, bank(surrogate), replace(SMALL, loss=loss, accumulate=2, max_steps=4))
        fit.advance(4)
        torch.save({**fit.state()}, f"{folder}/{loss}-{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_take_the_steps_of_one(surrogate, tmp_path: Path):
    """Tolerance 1e-4 of the weights: sums are added in another order, and Adam divides by small numbers.

    The bias before a normalisation has no gradient but rounding, which Adam blows up to whole steps: it is left out,
    and with it the mean that it shifts.
    """
    multiprocessing.spawn(train_one_of_two, (str(tmp_path),), nprocs=2)
    for loss in ("logratio", "code_pairs"):
        alone = fitted(surrogate, loss=loss, accumulate=2, max_steps=4)
        first, second = (torch.load(tmp_path / f"{loss}-{rank}.pt", weights_only=True) for rank in (0, 1))
        for name, value in alone.state().items():
            if name.startswith("generator/") and name not in NO_GRADIENT and value.is_floating_point():
                assert torch.equal(first[name], second[name]), name
                assert torch.allclose(first[name], value, atol=1e-4), name
        assert torch.allclose(first["curve/loss"], alone.state()["curve/loss"], atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "count", "error", "words"),
    [
        ({"near": 12}, 12, SettingsError, "only 12 concepts"),
        ({"select_by": "label"}, 12, SettingsError, "needs a .cls label"),
        ({"batch_size": 32}, 12, InputError, "only 24 images, fewer"),
    ],
)
def test_what_does_not_fit_is_refused(surrogate, changed, count, error, words):
    with pytest.raises(error, match=words):
        UniversalFit(pictures(), surrogate, bank(surrogate, count), replace(SMALL, **changed))


def test_a_label_beyond_the_bank_is_refused(surrogate):
    labelled = replace(pictures(), labels=torch.arange(len(pictures().pixels)))
    with pytest.raises(InputError, match="label 23 is no row of the concept bank, which has 12"):
        UniversalFit(labelled, surrogate, bank(surrogate, 12), replace(SMALL, select_by="label"))


def test_a_bank_of_another_surrogate_is_refused(surrogate):
    with pytest.raises(SettingsError, match="do not match the surrogate's"):
        UniversalFit(pictures(), surrogate, torch.randn(12, 7), SMALL)


def test_a_protection_survives_its_file_and_gives_the_same_deltas(surrogate):
    protection = protection_of(fitted(surrogate), surrogate)
    data = protection.to_bytes()
    again = load_protection(data)
    assert again.to_bytes() == data
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    asked = [DeltaRequest("a", picture, 40, 50)]
    ours, theirs = (UniversalDeltas(one, surrogate).for_pictures(asked)[0] for one in (protection, again))
    assert np.array_equal(ours.delta.levels, theirs.delta.levels)
    assert ours.cluster == theirs.cluster


def test_a_universal_generator_is_no_set_of_cluster_deltas(surrogate):
    with pytest.raises(InputError, match="not cluster deltas"):
        load_cluster_protection(protection_of(fitted(surrogate), surrogate).to_bytes())


def test_another_surrogate_is_refused(surrogate):
    other = load_surrogate("timm:test_resnet.random-1", weights=None, size=SIDE, device="cpu")
    with pytest.raises(ConflictError, match="fitted for surrogate"):
        UniversalDeltas(protection_of(fitted(surrogate), surrogate), other)


@pytest.mark.parametrize("bound", BOUNDS)
def test_deltas_of_every_size_are_whole_levels_within_epsilon(surrogate, bound):
    fit = fitted(surrogate, bound=bound)
    with torch.no_grad():
        for parameter in fit.generator.parameters():
            parameter.mul_(8)  # as saturated as it can be
    deltas = UniversalDeltas(protection_of(fit, surrogate), surrogate)
    rng = np.random.default_rng(0)
    sizes = [(32, 32), (1, 1), (7, 200), (33, 31), (500, 375)]
    asked = [DeltaRequest(str(size), rng.integers(0, 256, (*size, 3), np.uint8), *size) for size in sizes]
    for one, answer in zip(asked, deltas.for_pictures(asked), strict=True):
        assert answer.delta.levels.shape == (one.height, one.width, 3)
        assert answer.delta.levels.dtype == np.int16
        assert np.abs(answer.delta.levels).max() <= 8
    assert max(np.abs(answer.delta.levels).max() for answer in deltas.for_pictures(asked)) == 8


def test_small_pictures_may_be_seen_as_they_are(surrogate):
    fit = fitted(surrogate)
    with torch.no_grad():
        fit.generator.up[-1].weight.mul_(30)  # so that whole levels differ
    protection = replace(protection_of(fit, surrogate), side=64)
    rng = np.random.default_rng(0)
    sizes = [(32, 32), (20, 13), (70, 70)]
    asked = [DeltaRequest(str(size), rng.integers(0, 256, (*size, 3), np.uint8), *size) for size in sizes]
    native = UniversalDeltas(protection, surrogate, small_images="native")
    ours, theirs = native.for_pictures(asked), UniversalDeltas(protection, surrogate).for_pictures(asked)
    assert [one.delta.levels.shape[:2] for one in ours] == sizes
    assert not np.array_equal(ours[0].delta.levels, theirs[0].delta.levels)
    assert np.array_equal(ours[2].delta.levels, theirs[2].delta.levels)  # not small
    features = torch.from_numpy(surrogate.embed_pictures([asked[0].small]))
    alone = native.deltas(torch.from_numpy(asked[0].small).permute(2, 0, 1)[None], features)
    assert np.abs(ours[0].delta.levels - (alone[0] * 255).round().permute(1, 2, 0).numpy()).max() <= 1

    tested = [Sample("a", {"png": image_bytes(asked[0].small)})]
    writing = ApplySettings(encode="lossless", small_images="native")
    tests, _ = protected_tests(tested, ["a"], native, settings=writing, side=32, size="native", num_groups=None)
    expected = np.clip(asked[0].small.astype(int) + ours[0].delta.levels, 0, 255)
    assert np.array_equal(tests.own[0].transpose(1, 2, 0), expected)


@pytest.mark.parametrize("count", [1, 15, 17])
def test_the_number_of_threads_changes_no_bit_of_a_delta(surrogate, count):
    fit = fitted(surrogate, width=16, blocks=2, max_steps=1)
    deltas, rng = UniversalDeltas(protection_of(fit, surrogate), surrogate), torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 64, 64), generator=rng, dtype=torch.uint8)
    features, before = torch.randn(count, surrogate.dimension, generator=rng), torch.get_num_threads()
    made = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            made.append(deltas.deltas(images, features))
    finally:
        torch.set_num_threads(before)
    assert len(made[0]) == count
    assert all(torch.equal(others, made[0]) for others in made[1:])


def test_the_delta_depends_on_the_picture_and_not_on_its_company(surrogate):
    deltas = UniversalDeltas(protection_of(fitted(surrogate), surrogate), surrogate)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    features = torch.randn(3, surrogate.dimension)
    together = deltas.deltas(images, features)
    alone = torch.cat([deltas.deltas(images[row : row + 1], features[row : row + 1]) for row in range(3)])
    assert torch.allclose(together, alone, atol=1e-6)
    assert not torch.allclose(together[0], together[1], atol=1e-6)
    assert not torch.allclose(deltas.deltas(images, features.flip(0)), together, atol=1e-6)


def test_broken_weights_are_refused_before_a_picture_is_touched(surrogate):
    fit = fitted(surrogate)
    with torch.no_grad():
        next(fit.generator.parameters()).fill_(float("nan"))
    deltas = UniversalDeltas(protection_of(fit, surrogate), surrogate)
    with pytest.raises(PromiseError, match="non-finite"):
        deltas.for_pictures([DeltaRequest("a", np.zeros((32, 32, 3), np.uint8), 32, 32)])


@pytest.mark.parametrize(
    "changes",
    [{"side": 0}, {"side": 33}, {"side": "x"}, {"bound": "foo"}, {"epsilon": True}, {"epsilon": 1.0}]
    + [{"epsilon": 0.5}, {"width": -1}, {"blocks": 0}, {"width": 4.5}],
)
def test_a_generator_that_cannot_be_is_refused_when_it_is_read(surrogate, changes):
    good = protection_of(fitted(surrogate), surrogate)
    assert load_protection(good.to_bytes()).sha256 == good.sha256
    with pytest.raises(InputError, match="not a protection file"):
        load_protection(replace(good, **changes).to_bytes())


# --- settings and concepts


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"loss": "logratoi"}, "did you mean logratio"),
        ({"side": 50}, "multiple of 8"),
        ({"epsilon": 8.0}, "between 1/255 and 127/255"),
        ({"epsilon": 0.5}, "between 1/255 and 127/255"),
        ({"batch_size": 10, "accumulate": 4}, "not a multiple"),
        ({"widht": 4}, "did you mean width"),
        ({"output": ""}, "--output is missing"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(given, words):
    with pytest.raises(SettingsError, match=words):
        one_for_all_settings({"input": ("a",), "output": "b.safetensors"} | given)


@pytest.mark.parametrize(("name", "count"), [("imagenet", 1000), ("cifar100", 100), ("pets", 37)])
def test_the_names_that_ship_are_all_there(name, count):
    names = class_names(name)
    assert len(names) == count
    assert len(set(names)) >= count - 1  # ImageNet has two cranes
    assert all(one == one.strip() and "_" not in one for one in names)


def test_a_classifier_is_a_bank_of_its_own_classes(surrogate):
    found = bank_for(None, surrogate, weights=None)
    assert surrogate.head is not None
    assert np.array_equal(found.embeddings, surrogate.head[0])


def test_the_classes_of_imagenet_by_their_names_are_the_rows_of_a_classifier(surrogate):
    lite = load_surrogate("timm:tf_efficientnet_lite0", weights=None, size=64, device="cpu")
    found = bank_for("imagenet", lite, weights=None)
    assert np.array_equal(found.embeddings, lite.head[0])
    assert (found.names[134], found.names[517]) == ("crane", "crane")
    assert imagenet_bank().of(["maillot, tank suit", "harp", "gong"]) == pytest.approx(lite.head[0][[639, 594, 577]])


def test_names_without_a_text_tower_are_looked_up_or_refused(tmp_path):
    surrogate = load_surrogate("timm:tf_efficientnet_lite0", weights=None, size=64, device="cpu")
    (tmp_path / "names.txt").write_text("beagle\nPersian cat\ntench\n")
    found = bank_for(str(tmp_path / "names.txt"), surrogate, weights=None)
    assert found.names == ("beagle", "Persian cat", "tench")
    assert surrogate.head is not None
    assert np.array_equal(found.embeddings[2], surrogate.head[0][0])
    with pytest.raises(InputError, match="not in the concept bank"):
        bank_for("cifar100", surrogate, weights=None)
    with pytest.raises(InputError, match="neither one of head, imagenet, cifar100, pets nor a readable file"):
        bank_for("nowhere", surrogate, weights=None)


def test_the_training_images_are_near_their_centroids(surrogate):
    protection = protection_of(fitted(surrogate), surrogate)
    features = surrogate.embed_pictures([one.permute(1, 2, 0).numpy() for one in pictures().pixels])
    clusters, distances = protection.clustering.assign(features)
    assert (distances <= protection.clustering.distance_p99[clusters] * 1.05).mean() > 0.9
    assert len(fit_clusters([features], "features", None, 1, restarts=1, seed=0).clustering.centroids) == 1


def test_what_a_training_cannot_read_is_left_out_and_named_and_a_damaged_shard_refused():
    def squares(samples, share=1.0):
        return read_squares(
            samples, "a.tar", "in/a.tar", side=8, share=share, seed=0, max_pixels=1 << 20, with_labels=False
        )

    members = [("k0.png", image_bytes(noise(8, 8))), ("k1.png", b"no picture"), ("k2.txt", b"no image")]
    samples = read(tar_bytes(members))
    found = squares(samples)
    assert found.pixels.shape == (1, 3, 8, 8)
    (left,) = found.left_out
    assert left.count == 2
    assert left.said.startswith("in/a.tar: 2 not read: k1 (")
    assert squares(samples, share=0.0).left_out == ()  # what is not asked for is not missed
    cut = read(tar_bytes(members)[:700])
    assert isinstance(cut[-1], Rejection)
    with pytest.raises(InputError, match=r"^in/a\.tar: the shard ends at .*; restore the shard or remove it$"):
        squares(cut, share=0.0)
