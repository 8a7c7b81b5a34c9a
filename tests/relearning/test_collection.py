"""What trainers load: every labelled image once, aligned by key, held-out images out of all trainings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import InputError, SettingsError
from pipeline.hashing import derive
from pipeline.records import Shard
from pipeline.relearning.checks import check_regime
from pipeline.relearning.collection import (
    Collection,
    check_unlike,
    holdout_mask,
    join,
    like_clean,
    load_labelled,
    smallest_hashes,
)
from pipeline.relearning.evaluation import CLEAN, CLEAN_PART, Trial, evaluation_from
from pipeline.relearning.presets import PRESETS, RECIPES, recipe_settings
from pipeline.storage.store import Store
from tests.support.samples import image_bytes, noise, tar_bytes

A = Shard("a.tar", 0, "")


def collection(count: int, first: int = 0) -> Collection:
    images = np.stack([noise(8, 8, seed=n) for n in range(first, first + count)]).transpose(0, 3, 1, 2)
    keys = tuple(f"k{n}" for n in range(first, first + count))
    return Collection(np.ascontiguousarray(images), np.arange(count, dtype=np.int64) % 3, keys)


def written(folder: Path, members: list[tuple[str, bytes]]) -> Store:
    folder.mkdir(exist_ok=True)
    (folder / "a.tar").write_bytes(tar_bytes(members))
    return Store(str(folder))


def test_pictures_of_the_wanted_side_come_back_to_the_byte(tmp_path):
    pixels = [noise(32, 32, seed=n) for n in range(3)]
    members = [
        (f"{n}.{kind}", data) for n, p in enumerate(pixels) for kind, data in (("png", image_bytes(p)), ("cls", b"2"))
    ]
    found = load_labelled(written(tmp_path, members), [A], side=32)
    assert found.keys == ("0", "1", "2")
    assert found.labels.tolist() == [2, 2, 2]
    assert np.array_equal(found.images, np.stack(pixels).transpose(0, 3, 1, 2))


@pytest.mark.parametrize("label", [None, b"cat", b"-1", b""])
def test_a_sample_without_a_usable_label_is_refused_by_name(tmp_path, label):
    members = [("7.png", image_bytes(noise(8, 8)))] + ([] if label is None else [("7.cls", label)])
    with pytest.raises(InputError, match=r"a\.tar: 7 has no usable \.cls label"):
        load_labelled(written(tmp_path, members), [A], side=32)


def test_what_cannot_be_read_is_left_out_counted_and_named(tmp_path):
    good = [("1.png", image_bytes(noise(8, 8))), ("1.cls", b"0")]
    broken = [(f"{n}.png", b"no picture") for n in range(2, 5)]
    more = [("5.cls", b"1"), ("no-suffix", b""), ("6.png", good[0][1]), ("6.cls", b"1")]
    store = written(tmp_path, [*good, *broken, *more])
    found = load_labelled(store, [A], side=32)
    assert found.keys == ("1", "6")
    (left,) = found.left_out
    assert left.count == 5
    assert left.said.startswith(f"{store.url}/a.tar: 5 not read: 2 (")
    assert "no-suffix (" in left.said
    assert join([found, replace(found, keys=("7", "8"), left_out=())], "here").left_out == found.left_out
    hashes = {key: derive(0, "relearning-images", key) for key in ("2", "3", "4", "5", "no-suffix")}
    half = load_labelled(store, [A], side=32, limit=sorted(hashes.values())[2])
    assert [left.count for left in half.left_out] == [3]  # of a sample, only what is in it counts


def test_a_damaged_shard_is_refused_because_nobody_knows_what_was_in_it(tmp_path):
    store = written(tmp_path, [("1.png", image_bytes(noise(8, 8))), ("1.cls", b"0")])
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:700])
    with pytest.raises(InputError, match=r"a\.tar: the shard ends at .*; restore the shard or remove it$"):
        load_labelled(store, [A], side=32)


def test_a_shard_of_which_a_sample_has_nothing_is_none_the_worse(tmp_path):
    store = written(tmp_path, [("1.png", image_bytes(noise(8, 8))), ("1.cls", b"0")])
    nothing = load_labelled(store, [A], side=32, limit=-1)
    assert join([nothing, load_labelled(store, [A], side=32)], "here").keys == ("1",)
    with pytest.raises(InputError, match="here: no sample has both an image and a label"):
        join([nothing], "here")


def test_a_key_in_two_shards_is_refused():
    with pytest.raises(InputError, match="key k0 occurs twice"):
        join([collection(2), collection(2)], "here")
    assert join([collection(2), collection(2, first=2)], "here").keys == ("k0", "k1", "k2", "k3")


def test_protected_images_find_their_originals_whatever_the_order():
    clean = collection(6)
    shuffled = clean.rows(np.array([4, 0, 3]))
    assert like_clean(shuffled, clean, "uc").tolist() == [4, 0, 3]


def test_protected_keys_and_labels_that_clean_does_not_have_are_refused():
    clean = collection(4)
    with pytest.raises(InputError, match="uc: 2 of its keys are not in --clean, e.g. k4"):
        like_clean(collection(6), clean, "uc")
    wrong = replace(clean, labels=clean.labels[::-1].copy())
    with pytest.raises(InputError, match=r"uc: key k\d has label \d+, but \d+ in --clean"):
        like_clean(wrong, clean, "uc")


def test_test_images_that_are_trained_on_are_refused():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 3, 8, 8)).astype(np.uint8)
    labels, keys = np.arange(20) % 2, tuple(map(str, range(20)))
    clean = Collection(images, labels, keys)
    others = rng.integers(0, 256, (20, 3, 8, 8)).astype(np.uint8)
    others[0] = images[3]  # a copy, as real sets have
    check_unlike(clean, Collection(others, labels, keys))
    others[1] = images[7]
    with pytest.raises(SettingsError, match=r"--test and --clean hold the same pictures \(2 of 20, e\.g\. 0\)"):
        check_unlike(clean, Collection(others, labels, keys))


def test_the_digest_sees_every_pixel_label_and_key():
    first = collection(4)
    pixels = first.images.copy()
    pixels[3, 2, 7, 7] ^= 1
    labels = first.labels.copy()
    labels[0] = 2
    others = [replace(first, images=pixels), replace(first, labels=labels), replace(first, keys=(*first.keys[:3], "x"))]
    assert len({one.digest() for one in [first, *others]}) == 4
    assert collection(4).digest() == first.digest()


def test_the_holdout_is_a_share_of_the_keys_and_does_not_depend_on_their_order():
    keys = [f"image{n}" for n in range(4000)]
    mask = holdout_mask(keys, 0.1)
    assert 0.08 < mask.mean() < 0.12
    assert holdout_mask(keys[::-1], 0.1)[::-1].tolist() == mask.tolist()
    assert (holdout_mask(keys, 0.05) <= mask).all()


GIVEN = {"clean": "a", "test": "b", "output": "c", "protected": {"uc": "d", "sp": "e"}}
DIGESTS = {CLEAN: "0", CLEAN_PART: "3", "uc": "1", "sp": "2"}


def test_every_combination_is_one_trial_and_the_control_is_run_once_for_all_shares():
    settings = evaluation_from(
        {**GIVEN, "regimes": ("nt", "nt-cg"), "seeds": (0, 1, 2), "shares": ("samples:1", "samples:0.5")}
    )
    trials = settings.trials(DIGESTS, {"original": "l"})
    per_cell = 1 + 2 * 2 + 1  # clean, two protections at two shares, what the half leaves clean
    assert len(trials) == 2 * 3 * per_cell
    assert len({trial.key for trial in trials}) == len(trials)
    assert [t.share for t in trials if t.protection == CLEAN_PART] == ["samples:0.5"] * 6
    assert {t.data for t in trials if t.protection == CLEAN_PART} == {"3"}


TRIAL = Trial(
    protection="uc",
    target="small",
    regime="nt",
    labelling="original",
    share="samples:1",
    seed=0,
    epochs=2,
    recipe="fast",
    data="d",
    labels="l",
)


def test_a_trial_is_its_content():
    trial = TRIAL
    assert trial.key == replace(trial).key
    changed = [
        replace(trial, seed=1),
        replace(trial, epochs=3),
        replace(trial, data="e"),
        replace(trial, share="classes:1"),
    ]
    assert len({one.key for one in [trial, *changed]}) == 5


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"protected": {"clean": "x"}}, "the name 'clean' is reserved"),
        ({"shares": ("half",)}, "--shares 'half' is neither samples:SHARE nor classes:SHARE"),
        ({"shares": ("samples:0",)}, "above 0 and at most 1"),
        ({"recipe": "fst"}, "did you mean fast"),
        ({"seeds": (0, 0)}, "--seeds contains duplicates"),
        ({"epochs": 0}, "--epochs 0"),
        ({"side": 16}, "--side 16"),
        ({"regims": ("nt",)}, "did you mean regimes"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(changed, words):
    with pytest.raises(SettingsError, match=words) as refused:
        evaluation_from({**GIVEN, **changed})
    assert "\n" not in str(refused.value)


def test_an_unknown_preset_is_refused_with_near_matches():
    with pytest.raises(SettingsError, match="did you mean smoke"):
        evaluation_from(GIVEN, "smok")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_names_regimes_that_exist_once_each(name):
    for regime in evaluation_from(GIVEN, name).regimes:
        check_regime(regime)


def test_a_recipe_with_other_settings_is_another_one_and_says_which():
    plain, changed = evaluation_from(GIVEN), evaluation_from({**GIVEN, "lr": 0.05, "batch_size": 32, "weight_decay": 0})
    assert plain.changed_recipe == "fast"
    assert changed.changed_recipe == "fast[batch_size=32,lr=0.05,weight_decay=0]"
    assert recipe_settings(changed.changed_recipe) == {"batch_size": 32, "lr": 0.05, "weight_decay": 0.0}
    on_paper = recipe_settings(evaluation_from({**GIVEN, "batch_size": 256}, "one-for-all-paper").changed_recipe)
    assert on_paper == RECIPES["one-for-all-paper"] | {"batch_size": 256}
    keys = [{trial.key for trial in each.trials(DIGESTS, {"original": "l"})} for each in (plain, changed)]
    assert keys[0].isdisjoint(keys[1])
    for given, words in (
        ({"lr": 0.0}, "--lr 0.0 is not above 0"),
        ({"batch_size": 1}, "--batch-size must be at least 2"),
    ):
        with pytest.raises(SettingsError, match=words):
            evaluation_from({**GIVEN, **given})


def test_the_papers_presets_have_their_targets_and_settings():
    """Dang et al. 2023, Table II; Chen et al. 2024, section 4; the code of Zhang et al. 2023."""
    st, uc, ofa = (evaluation_from(GIVEN, name) for name in ("st-paper", "uc-paper", "one-for-all-paper"))
    assert st.targets == ("resnet18", "resnet50", "vgg16", "densenet121", "wrn-28-10", "wrn-34-10")
    assert len(ofa.targets) == 6
    assert {"vgg16", "vit-14a"} < set(ofa.targets)
    for originals, name in ((("mixup", "cutmix", "cutout"), uc), (("mixup",), ofa)):
        assert set(originals) < set(name.regimes)
    assert (recipe_settings("uc-paper")["normalise"], recipe_settings("one-for-all-paper")["normalise"]) == (
        *("half", "none"),
    )


def test_a_range_of_labellings_is_one_of_each():
    settings = evaluation_from({"clean": "a", "test": "b", "output": "c", "labellings": ("original", "concepts:5-7")})
    assert settings.labellings == ("original", "concepts:5", "concepts:6", "concepts:7")
    with pytest.raises(SettingsError, match="the range is empty"):
        evaluation_from({"clean": "a", "test": "b", "output": "c", "labellings": ("concepts:7-5",)})


def test_a_sample_is_the_same_images_however_they_are_sharded(tmp_path):
    store = Store(str(tmp_path))
    everything = [(f"k{n}", n) for n in range(40)]
    parts = {"one.tar": everything, "a.tar": everything[:13], "b.tar": everything[13:]}
    for name, rows in parts.items():
        members = [(f"{k}.png", image_bytes(noise(32, 32, seed=n))) for k, n in rows]
        labels = [(f"{k}.cls", str(n % 3).encode()) for k, n in rows]
        store.put(name, tar_bytes([pair for both in zip(members, labels, strict=True) for pair in both]))
    whole = load_labelled(store, [Shard("one.tar", 0, "")], side=32)
    hashes = smallest_hashes(store, [Shard("one.tar", 0, "")], 10)
    assert smallest_hashes(store, [Shard("b.tar", 0, ""), A], 10) == hashes == sorted(hashes)
    chosen = load_labelled(store, [Shard("one.tar", 0, "")], side=32, limit=hashes[-1])
    split = [load_labelled(store, [Shard(name, 0, "")], side=32, limit=hashes[-1]) for name in ("a.tar", "b.tar")]
    assert join(split, "two").digest() == chosen.digest()
    assert len(chosen) == 10
    assert chosen.digest() == whole.rows(np.isin(whole.keys, chosen.keys)).digest()
    fewer = load_labelled(store, [Shard("one.tar", 0, "")], side=32, limit=hashes[4])
    assert set(fewer.keys) < set(chosen.keys)
    assert smallest_hashes(store, [Shard("one.tar", 0, "")], 99)[:10] == hashes
