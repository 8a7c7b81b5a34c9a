"""Adversaries with a denoiser: what they may use, what they say of it, and that it is trained once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.denoisers import find_or_train
from pipeline.errors import InputError, SettingsError
from pipeline.relearning.arms import Arm, Labels
from pipeline.relearning.checks import check_labels, check_regime
from pipeline.relearning.collection import Collection
from pipeline.relearning.denoisers import denoiser as denoisers
from pipeline.relearning.denoisers.denoiser import Denoiser, DenoiserRecipe, UNet, denoise, gain_db
from pipeline.relearning.denoisers.pairs import check_other_pictures, denoiser_digest, pair_up, training_data
from pipeline.relearning.evaluation import CLEAN, Trial, evaluation_from
from pipeline.relearning.regimes import Knowledge, find_regime
from pipeline.relearning.regimes.recovery import purify
from pipeline.relearning.report.results import results_from_parquet, results_to_parquet
from pipeline.relearning.train import train_target
from pipeline.relearning.training import Labelled, Recipe, ScoredOn
from pipeline.relearning.trial import run_trial
from pipeline.shards.photographs import train_squares
from pipeline.storage.store import Store
from tests.relearning.test_collection import TRIAL
from tests.support.samples import stripes

TINY = DenoiserRecipe(width=8, batch_size=4, rates=(1e-3,), max_steps=4, every=2)
GIVEN = {"clean": "a", "test": "b", "output": "c", "protected": {"uc": "d"}}


def darkening(levels: float = 4) -> Denoiser:
    """A denoiser that sees a delta of so many levels in every pixel of every image."""
    weights = UNet(8).state_dict()
    weights["last.bias"] = torch.full((12,), 4 * levels / 255)
    return Denoiser({name: value.clone() for name, value in weights.items()}, 8, 7.5, 100, "d")


def bright(count: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(20, 230, (count, 3, 32, 32)).astype(np.uint8))


def collection(count: int, seed: int = 0, first: int = 0) -> Collection:
    labels = np.arange(count, dtype=np.int64) % 2
    return Collection(bright(count, seed).numpy(), labels, tuple(f"k{first + n}" for n in range(count)))


# --- the regimes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["self-pairs", "purify"])
def test_training_and_test_images_go_through_the_denoiser_and_so_does_the_clean_control(name):
    images = bright(12, 0)
    known = Knowledge(deltas=torch.zeros(images.shape, dtype=torch.int16), images=images, denoisers={name: darkening()})
    regime = find_regime(name, known)
    expected = images - 4
    assert torch.equal(regime.prepare(images, torch.zeros(12), seed=0), expected)
    assert torch.equal(regime.prepare_test(images), expected)
    assert regime.end_epoch(None, 0) == {"denoiser_own_db": 7.5}  # nothing to gain on clean images


def test_the_gain_here_is_that_of_the_protected_images_alone():
    clean = bright(10, 0)
    deltas = torch.full(clean.shape, 8, dtype=torch.int16)
    deltas[6:] = 0
    images = (clean.short() + deltas).to(torch.uint8)
    known = Knowledge(deltas=deltas, images=images, denoisers={"self-pairs": darkening()})
    regime = find_regime("self-pairs+cg", known)
    regime.prepare(images, torch.zeros(10), seed=0)
    assert regime.end_epoch(None, 0)["denoiser_here_db"] == pytest.approx(20 * np.log10(2))  # 8 levels become 4


def test_figures_are_in_every_epoch_and_a_joined_regime_trains():
    images, labels = stripes(64, 0)
    known = Knowledge(deltas=torch.ones(images.shape, dtype=torch.int16), images=images)
    regime = find_regime("self-pairs+cg", replace(known, denoisers={"self-pairs": darkening(0)}))
    score = train_target(
        Labelled(images, labels), ScoredOn(Labelled(*stripes(40, 1))), regime=regime, seed=0, recipe=Recipe(epochs=2)
    )
    assert score.regime == "self-pairs+cg"
    assert [epoch.figures["denoiser_own_db"] for epoch in score.history] == [7.5, 7.5]


def test_without_its_denoiser_a_regime_is_refused():
    with pytest.raises(SettingsError, match="regime 'purify' needs a denoiser trained for it; there is none"):
        find_regime("purify", Knowledge(denoisers={"self-pairs": darkening()}))


# --- leaked pairs ---------------------------------------------------------------------------------------------------


def test_leaked_pairs_are_those_of_the_smallest_hashes_whatever_the_order(monkeypatch):
    clean = bright(40, 0)
    deltas = torch.full(clean.shape, 8, dtype=torch.int16)
    deltas[30:] = 0  # not protected, so no pair
    images = (clean.short() + deltas).to(torch.uint8)
    keys = [f"k{n}" for n in range(40)]
    seen = []

    def watched(ours: Tensor, theirs: Tensor, **options: object) -> Denoiser:
        seen.append({bytes(one.numpy().tobytes()) for one in ours})
        assert torch.equal(theirs, ours + 8)
        return darkening()

    monkeypatch.setattr(purify, "train_denoiser", watched)
    for order in (torch.arange(40), torch.arange(40).flip(0)):
        known = Knowledge(deltas=deltas[order], images=images[order], keys=[keys[row] for row in order])
        regime = find_regime("leaked-pairs:6", known)
        assert torch.equal(regime.prepare(images[order], torch.zeros(40), seed=0), images[order] - 4)
        assert torch.equal(regime.prepare_test(images), images - 4)
        assert regime.end_epoch(None, 0)["denoiser_here_db"] == pytest.approx(20 * np.log10(2))
    assert len(seen[0]) == 6
    assert seen[0] == seen[1]
    assert seen[0] <= {bytes(one.numpy().tobytes()) for one in clean[:30]}


def test_leaked_pairs_teach_their_own_delta(monkeypatch):
    monkeypatch.setattr(purify, "DenoiserRecipe", lambda: replace(TINY, rates=(3e-3,), max_steps=60, every=30))
    clean = bright(24, 0)
    deltas = torch.full(clean.shape, 12, dtype=torch.int16)
    images = (clean.short() + deltas).to(torch.uint8)
    regime = find_regime("leaked-pairs:16", Knowledge(deltas=deltas, images=images, keys=[str(n) for n in range(24)]))
    cleaned = regime.prepare(images, torch.zeros(24), seed=0)
    figures = regime.end_epoch(None, 0)
    assert gain_db(images, cleaned, clean) > 3
    assert figures["denoiser_own_db"] > 3
    assert figures["denoiser_here_db"] > 3


def test_the_clean_control_has_no_pairs_and_stays_as_it_is():
    images = bright(6, 0)
    zeros = torch.zeros(images.shape, dtype=torch.int16)
    regime = find_regime("leaked-pairs:4", Knowledge(deltas=zeros, images=images, keys=list("abcdef")))
    assert torch.equal(regime.prepare(images, torch.zeros(6), seed=0), images)
    assert torch.equal(regime.prepare_test(images), images)
    assert regime.end_epoch(None, 0) == {}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("leaked-pairs", "regime 'leaked-pairs' in 'leaked-pairs': a number is required, as in leaked-pairs:16"),
        ("leaked-pairs:x+cg", "regime 'leaked-pairs:x' in 'leaked-pairs:x\\+cg': a number is required"),
        ("leaked-pairs:1", "regime 'leaked-pairs:1': at least 2 pairs are needed"),
        ("leaked-pair:9", "did you mean leaked-pairs:N"),
    ],
)
def test_a_number_that_is_none_is_refused_in_one_line(name, words):
    with pytest.raises(SettingsError, match=words):
        check_regime(name)


def test_more_pairs_than_images_are_refused_before_anything_is_trained():
    check_regime("leaked-pairs:100+cg")
    with pytest.raises(InputError, match="regime leaked-pairs:100\\+cg: only 99 training images are available"):
        check_labels("leaked-pairs:100+cg", np.zeros(99, np.int64))
    deltas = torch.zeros(4, 3, 32, 32, dtype=torch.int16)
    deltas[:2] = 1
    known = Knowledge(deltas=deltas, images=bright(4, 0), keys=list("abcd"))
    with pytest.raises(SettingsError, match="regime 'leaked-pairs:3': only 2 of the training images are protected"):
        find_regime("leaked-pairs:3", known).prepare(bright(4, 0), torch.zeros(4), seed=0)


# --- pairs ----------------------------------------------------------------------------------------------------------


def test_pairs_are_matched_by_key_and_copies_without_an_original_refused():
    clean = collection(5)
    shuffled = replace(clean.rows(np.array([4, 0, 2])), images=clean.images[[4, 0, 2]] + 1)
    ours, theirs = pair_up(clean, shuffled)
    assert np.array_equal(ours + 1, theirs)
    assert np.array_equal(ours, clean.images[[4, 0, 2]])
    words = "--pairs: 2 keys of the protected copies are not among the originals, e.g. k5"
    with pytest.raises(InputError, match=words):
        pair_up(clean, collection(7))


def test_pairs_of_the_pictures_that_are_evaluated_are_refused():
    pictures, test = collection(20, seed=0), collection(20, seed=1)
    check_other_pictures(collection(20, seed=2).images, pictures, test)
    with pytest.raises(InputError, match="--pairs: 3 of its 3 originals are in --clean or --test; .* leaked-pairs:N"):
        check_other_pictures(test.images[:3], pictures, test)


def test_without_pairs_noise_is_learnt_on_photographs_that_ship():
    clean, protected = training_data(8, None, is_noise=True)
    assert clean.shape == (1600, 3, 8, 8)
    assert protected is None
    assert np.array_equal(clean, train_squares(8, seed=0))
    assert len(np.unique(clean, axis=0)) > 1500
    pairs = collection(3).images, collection(3, seed=1).images
    assert training_data(32, pairs, is_noise=True) == (pairs[0], None)
    assert training_data(32, pairs, is_noise=False) == pairs


def test_the_digest_knows_pictures_copies_settings_and_seed():
    clean, copies = collection(3).images, collection(3, seed=1).images
    all_of_them = {
        denoiser_digest(clean, copies, TINY, 0),
        denoiser_digest(copies, copies, TINY, 0),
        denoiser_digest(clean, clean, TINY, 0),
        denoiser_digest(clean, None, TINY, 0),
        denoiser_digest(clean, copies, replace(TINY, every=1), 0),
        denoiser_digest(clean, copies, TINY, 1),
    }
    assert len(all_of_them) == 6
    assert denoiser_digest(clean.copy(), copies, replace(TINY), 0) in all_of_them


# --- the evaluation -------------------------------------------------------------------------------------------------


def test_self_pairs_without_pairs_and_pairs_without_their_regimes_are_refused():
    for regime in ("self-pairs", "self-pairs+cg"):
        with pytest.raises(SettingsError, match="'self-pairs' needs --pairs OTHER=THEIRS: .*protect_imagenet") as said:
            evaluation_from({**GIVEN, "regimes": ("nt", regime)})
        assert "\n" not in str(said.value)
    with pytest.raises(SettingsError, match="--pairs is only used by the regimes self-pairs, purify, avatar"):
        evaluation_from({**GIVEN, "pairs": ("e", "f")})
    assert evaluation_from({**GIVEN, "pairs": ("e", "f"), "regimes": ("purify+cg",)}).denoisers() == ["purify"]
    assert evaluation_from({**GIVEN, "regimes": ("nt", "leaked-pairs:9")}).denoisers() == []


def test_a_trial_with_other_pairs_is_another_trial_and_all_others_stay():
    regimes = ("nt", "self-pairs", "self-pairs+cg", "purify", "leaked-pairs:20")
    settings = evaluation_from({**GIVEN, "pairs": ("e", "f"), "regimes": regimes})
    digests, labels = {CLEAN: "0", "uc": "1"}, {"original": "l"}

    def keys(**cleaning: str) -> dict[tuple[str, str], str]:
        trials = settings.trials(digests, labels, {name.replace("_", "-"): value for name, value in cleaning.items()})
        return {(trial.regime, trial.protection): trial.key for trial in trials}

    one = keys(self_pairs="p", purify="q", leaked_pairs="r")
    other = keys(self_pairs="x", purify="q", leaked_pairs="r")
    assert {cell for cell in one if one[cell] != other[cell]} == {
        (regime, arm) for regime in ("self-pairs", "self-pairs+cg") for arm in ("uc", CLEAN)
    }
    assert {regime for regime, _ in one if one[regime, "uc"] != keys()[regime, "uc"]} == set(regimes[1:])
    assert one["nt", "uc"] == replace(TRIAL, epochs=12, data="1").key


def test_a_row_says_what_the_denoiser_gained_on_its_own_pictures_and_here():
    clean, test = collection(48), collection(24, seed=1)
    arm = Arm(replace(clean, images=clean.images + 8), np.arange(48))
    labels = Labels(clean.labels, test.labels, 2)
    shared = {"target": "small", "labelling": "original", "share": "samples:1", "seed": 0, "epochs": 1}
    shared |= {"recipe": "fast", "data": "d", "labels": "l"}

    def row(regime: str, arm: Arm | None) -> dict[str, object]:
        trial = Trial(protection="uc" if arm else CLEAN, regime=regime, **shared)
        given = {"holdout": 0.1, "device": "cpu", "denoisers": {"self-pairs": darkening()}}
        return run_trial(trial, clean, test, arm, labels, **given)

    cleaned = row("self-pairs+cg", arm)
    assert cleaned["denoiser_own_db"] == 7.5
    assert cleaned["denoiser_here_db"] == pytest.approx(20 * np.log10(2))
    control = row("self-pairs", None)
    assert (control["denoiser_own_db"], control["denoiser_here_db"]) == (7.5, None)
    (back,) = results_from_parquet(results_to_parquet([cleaned]))
    assert back["denoiser_here_db"] == cleaned["denoiser_here_db"]
    with pytest.raises(SettingsError, match="needs a denoiser"):
        row("purify", arm)


def test_a_restarted_evaluation_does_not_train_again_and_other_pairs_do(tmp_path: Path, monkeypatch):
    output, trainings = Store(str(tmp_path)), []
    given = denoisers.train_denoiser

    def counted(*pairs: Tensor | None, **options: object) -> Denoiser:
        trainings.append(pairs)
        return given(*pairs, **options)

    monkeypatch.setattr("actors.denoisers.train_denoiser", counted)
    copies = replace(collection(6), images=collection(6).images + 3)
    about = (output, 32, "cpu", torch.get_num_threads(), TINY)
    first, facts = find_or_train("self-pairs", *about, 2, collection(6), copies, collection(9, seed=4))
    assert (facts.is_new, facts.num_pictures, facts.digest) == (True, 6, first.digest)
    (file,) = (tmp_path / "denoisers").iterdir()
    assert file.name == f"{facts.digest[:20]}.safetensors"
    before = file.stat().st_mtime_ns
    again, facts = find_or_train("self-pairs", *about, 2, collection(6), copies, collection(9, seed=4))
    assert not facts.is_new
    assert again.to_bytes() == first.to_bytes()
    assert (len(trainings), file.stat().st_mtime_ns) == (1, before)
    find_or_train("purify", *about, 2, collection(6), copies, collection(9, seed=4))
    find_or_train("self-pairs", *about, 2, copies, copies, collection(9, seed=4))
    assert len(trainings) == 3
    assert trainings[1][1] is None
    assert len(list((tmp_path / "denoisers").iterdir())) == 3


def test_cleaning_keeps_shape_dtype_and_range():
    dark = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    assert torch.equal(denoise(darkening().network(torch.device("cpu")), dark), dark)
