"""Labellings, their overlap with clusters, and shares: hand-computed values, scikit-learn, and what must never be."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_mutual_info_score, mutual_info_score

from pipeline.errors import InputError, SettingsError
from pipeline.relearning.labels.concepts import group_concepts, grouping_quality
from pipeline.relearning.labels.labellings import make_labelling
from pipeline.relearning.labels.names import parse_labelling
from pipeline.relearning.labels.overlap import conditional_entropy, joint_counts, overlap
from pipeline.relearning.shares import parse_share, protected_mask
from pipeline.surrogates.concepts import ConceptBank, bank_bytes, imagenet_bank, read_bank, text_bank

KEYS = [f"sample-{number:05d}" for number in range(1000)]


# ---- overlap


def test_names_of_classes_that_do_not_occur_change_no_labelling_but_those_of_names() -> None:
    names = [f"class {number}" for number in range(1000)]
    labels = [0, 1, 2, 3] * 5
    assert make_labelling("original", labels, seed=0, class_names=names).num_classes == 4
    with_names, without = (make_labelling("groups:2", labels, seed=0, class_names=some) for some in (names, None))
    np.testing.assert_array_equal(with_names.labels, without.labels)


def test_overlap_is_what_a_hand_computes():
    clusters = [0, 0, 0, 0, 1, 1, 1, 1]
    labels = [0, 0, 0, 1, 1, 1, 2, 2]
    found = overlap(clusters, labels)
    assert found.shortcut_accuracy == Fraction(3 + 2, 8)
    assert found.purity == found.shortcut_accuracy
    first = 0.75 * math.log2(4 / 3) + 0.25 * 2  # of labels 3 : 1
    counts = joint_counts(clusters, labels)
    whole = conditional_entropy(counts.sum(axis=0, keepdims=True))
    assert conditional_entropy(counts) == pytest.approx((first + 1) / 2)
    assert whole == pytest.approx(2 * 3 / 8 * math.log2(8 / 3) + 0.25 * 2)
    assert whole - conditional_entropy(counts) == pytest.approx(mutual_info_score(clusters, labels) / math.log(2))
    assert found.ami == pytest.approx(adjusted_mutual_info_score(clusters, labels))


def test_clusters_that_are_the_labels_tell_all_and_one_cluster_tells_the_majority():
    labels = np.repeat([3, 5, 9], [5, 3, 2])
    same = overlap((labels * 7) % 11, labels)
    assert same.shortcut_accuracy == 1
    assert same.ami == pytest.approx(1)
    one = overlap(np.zeros(10, int), labels)
    assert one.shortcut_accuracy == 0.5
    assert one.ami == pytest.approx(0)


def test_balanced_classes_bound_the_shortcut_by_clusters_over_classes():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(37), 20)
    for _ in range(5):
        assert overlap(rng.integers(0, 10, len(labels)), labels).shortcut_accuracy <= 10 / 37
    assert overlap(labels % 10, labels).shortcut_accuracy == pytest.approx(10 / 37)


def test_overlap_refuses_what_is_not_one_cluster_per_label():
    with pytest.raises(ValueError, match="must be equally long and not empty"):
        overlap([0, 1], [0])
    with pytest.raises(ValueError, match="must be equally long and not empty"):
        overlap([], [])


# ---- shares


def test_half_of_the_samples_are_chosen_by_key_whatever_their_order():
    labels = np.arange(1000) % 10
    mask = protected_mask("samples:0.5", KEYS, labels, seed=1)
    assert mask.dtype == bool
    assert mask.sum() == 500
    assert (protected_mask("samples:0.5", KEYS[::-1], labels, seed=1)[::-1] == mask).all()
    assert 150 < (protected_mask("samples:0.5", KEYS, labels, seed=2) & mask).sum() < 350


def test_half_of_the_classes_are_protected_whole_and_the_others_not_at_all():
    labels = np.random.default_rng(0).integers(0, 10, 1000)
    mask = protected_mask("classes:0.5", KEYS, labels, seed=1)
    shares = [mask[labels == one].mean() for one in range(10)]
    assert sorted(shares) == [0] * 5 + [1] * 5
    chosen = {tuple(np.unique(labels[protected_mask("classes:0.5", KEYS, labels, seed=s)])) for s in range(5)}
    assert len(chosen) > 1


@pytest.mark.parametrize("kind", ["samples", "classes"])
def test_a_larger_share_contains_the_smaller_and_one_is_all(kind):
    labels = np.arange(1000) % 10
    masks = [protected_mask(f"{kind}:{share}", KEYS, labels, seed=4) for share in ("0.2", "0.4", "0.9", "1")]
    assert [mask.mean() for mask in masks] == [0.2, 0.4, 0.9, 1]
    for smaller, larger in zip(masks, masks[1:], strict=False):
        assert not (smaller & ~larger).any()


@pytest.mark.parametrize(
    ("share", "message"),
    [
        ("half", "--shares 'half' is neither samples:SHARE nor classes:SHARE"),
        ("sample:0.5", r"did you mean samples\?"),
        ("samples:half", "'half' is not a number above 0 and at most 1, as in samples:0.5"),
        ("samples:0", "'0' is not a number above 0"),
        ("classes:1.5", "'1.5' is not a number above 0"),
        ("samples:nan", "'nan' is not a number above 0"),
    ],
)
def test_a_share_that_is_none_is_refused(share, message):
    with pytest.raises(SettingsError, match=message):
        parse_share(share)


def test_a_share_that_would_be_nothing_or_everything_is_refused():
    for share, rounded in (("classes:0.1", "none"), ("classes:0.9", "all")):
        with pytest.raises(SettingsError, match=f"share {share}: of 3 classes this rounds to {rounded}"):
            protected_mask(share, KEYS[:6], [0, 1, 2, 0, 1, 2], seed=0)


# ---- labellings


def test_random_labels_are_balanced_in_every_cluster_and_belong_to_the_key():
    clusters = np.random.default_rng(0).choice(7, 1000, p=[0.3, 0.3, 0.2, 0.1, 0.05, 0.04, 0.01])
    found = make_labelling("random:3", np.zeros(1000, int), seed=1, keys=KEYS, clusters=clusters)
    for cluster in range(7):
        counts = np.bincount(found.labels[clusters == cluster], minlength=3)
        assert counts.max() - counts.min() <= 1
    assert overlap(clusters, found.labels).ami == pytest.approx(0, abs=0.005)
    order = np.random.default_rng(1).permutation(1000)
    again = make_labelling(
        "random:3", np.zeros(1000, int), seed=1, keys=[KEYS[i] for i in order], clusters=clusters[order]
    )
    assert (again.labels == found.labels[order]).all()
    other = make_labelling("random:3", np.zeros(1000, int), seed=2, keys=KEYS, clusters=clusters)
    assert (other.labels == found.labels).mean() == pytest.approx(1 / 3, abs=0.06)
    with pytest.raises(ValueError, match="does not follow classes"):
        found.relabel([0])


def test_original_labels_stay_and_test_images_follow():
    found = make_labelling("original", torch.tensor([2, 0, 1, 2]), seed=0)
    assert found.labels.tolist() == [2, 0, 1, 2]
    assert found.labels.dtype == np.int64
    assert found.num_classes == 3
    assert found.relabel([1, 1, 2]).tolist() == [1, 1, 2]


def test_groups_of_classes_are_equal_and_take_the_split_that_clusters_know_least_of():
    labels = np.repeat(np.arange(4), 50)
    clusters = labels // 2  # a split of classes 0, 1 from 2, 3 is the clusters themselves
    found = make_labelling("groups:2", labels, seed=0, clusters=clusters)
    assert sorted(np.bincount(found.groups)) == [2, 2]
    assert found.groups[0] != found.groups[1]
    assert found.groups[2] != found.groups[3]
    assert found.quality == {"mutual_information": pytest.approx(0)}
    assert overlap(clusters, found.labels).shortcut_accuracy == 0.5
    assert (found.relabel(labels) == found.labels).all()
    assert make_labelling("groups:2", labels, seed=0).quality == {}


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_superclasses_come_from_a_file_by_name_or_index(tmp_path, suffix):
    path = tmp_path / f"super{suffix}"
    path.write_text(json.dumps({"truck": "vehicle", "cat": "animal", "2": "vehicle"}))
    found = make_labelling(f"superclasses:{path}", [0, 1, 2, 1], seed=0, class_names=["cat", "truck", "ship"])
    assert found.labels.tolist() == [0, 1, 1, 1]
    assert found.num_classes == 2
    path.write_text(json.dumps({"0": "x", "1": "y", "2": "x"}))
    assert make_labelling(f"superclasses:{path}", [0, 1, 2], seed=0).groups.tolist() == [0, 1, 0]


def test_yaml_indices_are_indices(tmp_path):
    path = tmp_path / "super.yaml"
    path.write_text("0: x\n1: y\n2: x\n")
    assert make_labelling(f"superclasses:{path}", [0, 1, 2], seed=0).groups.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"cat": "a", "ship": "b"}', "no superclass for 1 of 3 classes, e.g. 'truck'"),
        ('{"cat": "a", "ship": "b", "trucks": "b"}', r"unknown class 'trucks'; did you mean truck\?"),
        ('{"cat": "a", "ship": "a", "truck": "a"}', "all classes share one superclass"),
        ('["cat"]', "is not a mapping from class"),
        ('{"cat": ["a"]}', "is not a mapping from class"),
        ("{", "cannot be read as JSON or YAML"),
    ],
)
def test_a_file_of_superclasses_that_does_not_fit_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "super.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        make_labelling(f"superclasses:{path}", [0, 1, 2], seed=0, class_names=["cat", "truck", "ship"])
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_a_missing_file_of_superclasses_is_refused(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        make_labelling(f"superclasses:{tmp_path / 'none.yaml'}", [0, 1], seed=0)


# ---- concepts


def far_groups() -> ConceptBank:
    """Six concepts in three pairs on a line: 0, 1; 10, 11; 100, 102."""
    places = np.array([[0], [1], [10], [11], [100], [102]], np.float32)
    return ConceptBank(("pear", "apple, pome", "oak", "beech tree", "car", "sports car"), places)


def test_concepts_are_grouped_by_their_embeddings():
    names = ["oak", "car", "Apple", "sports_car", "pear", "beech-tree"]
    found = make_labelling("concepts:3", np.arange(6), seed=0, class_names=names, bank=far_groups())
    assert found.groups.tolist() == [0, 1, 2, 1, 2, 0]
    assert found.num_classes == 3
    # means 0.5, 10.5, 101: 2 * 0.25 + 2 * 0.25 + 2 * 1
    assert found.quality["sse"] == pytest.approx(3)


def test_quality_is_the_papers_definition():
    points = far_groups().embeddings
    groups = np.array([0, 0, 1, 1, 2, 2])
    found = grouping_quality(points, groups)
    own = np.array([1, 1, 1, 1, 2, 2])
    nearest = np.array([10.5, 9.5, 9.5, 10.5, 89.5, 91.5])  # mean distance to the pair that is next
    assert found["silhouette"] == pytest.approx(np.mean((nearest - own) / np.maximum(nearest, own)))
    means, centre = np.array([0.5, 10.5, 101]), 224 / 6
    between = 2 * ((means - centre) ** 2).sum()
    assert found["calinski_harabasz"] == pytest.approx((between / 2) / (3 / 3))


def test_groups_are_those_of_the_seed_and_number_as_they_first_occur():
    points = np.random.default_rng(0).standard_normal((40, 4)).astype(np.float32)
    groups = group_concepts(points, 6, seed=35)
    assert (groups == group_concepts(points, 6, seed=35)).all()
    _, first = np.unique(groups, return_index=True)
    assert (np.diff(first) > 0).all()
    with pytest.raises(SettingsError, match="2 distinct concepts can form 2 to 1 groups, not 2"):
        group_concepts(np.repeat(points[:2], 5, axis=0), 2, seed=0)


def test_a_name_finds_whole_names_then_synonyms_then_last_words():
    bank = far_groups()
    found = bank.of(["car", "pome", "tree", "apple, pome", "SPORTS CAR"])
    assert found[:, 0].tolist() == [100, 1, 11, 1, 102]
    twice = ConceptBank(("husky, Eskimo dog", "sheep dog"), np.array([[2.0], [4.0]], np.float32))
    assert twice.of(["dog"])[0, 0] == 3
    with pytest.raises(InputError, match=r"2 of 3 classes are not in the concept bank: aple, ship; did you mean apple"):
        bank.of(["aple", "ship", "oak"])


def test_a_bank_goes_through_a_file_and_other_files_are_refused(tmp_path):
    path = tmp_path / "bank.safetensors"
    path.write_bytes(bank_bytes(far_groups()))
    again = read_bank(path)
    assert again.names == far_groups().names
    assert (again.embeddings == far_groups().embeddings).all()
    for content in (b"no bank", b""):
        path.write_bytes(content)
        with pytest.raises(InputError, match="is not a concept bank"):
            read_bank(path)
    with pytest.raises(InputError, match="is not a concept bank"):
        read_bank(tmp_path / "none")
    with pytest.raises(InputError, match="one embedding per name; it has 1 names"):
        ConceptBank(("a",), np.zeros((2, 3), np.float32))
    with pytest.raises(InputError, match="finite"):
        ConceptBank(("a",), np.full((1, 3), np.nan, np.float32))


def test_the_built_in_bank_knows_imagenet_and_puts_like_to_like():
    bank = imagenet_bank()
    assert bank.embeddings.shape == (1000, 1280)
    # Imagenette's ten classes, by synonym and by WordNet id
    names = ["tench", "English springer", "cassette player", "chain saw", "church", "French horn", "garbage truck"]
    names += ["gas pump", "golf ball", "n03888257"]
    assert bank.of(names).shape == (10, 1280)
    pairs = ["beagle", "basset", "trombone", "French horn", "trailer truck", "garbage truck"]
    groups = make_labelling("concepts:3", np.arange(6), seed=0, class_names=pairs).groups
    assert groups.tolist() == [0, 0, 1, 1, 2, 2]


def test_a_text_tower_gives_what_open_clip_gives():
    import open_clip

    bank = text_bank(["guinea_pig", "oak"], "open_clip:ViT-S-32-alt/random-3", template="a photo of a {}")
    again = text_bank(["oak"], "open_clip:ViT-S-32-alt/random-3")
    assert bank.names == ("guinea_pig", "oak")
    np.testing.assert_allclose(bank.embeddings[1:], again.embeddings, atol=1e-5)
    assert np.abs(np.linalg.norm(bank.embeddings, axis=1) - 1).max() > 0.01  # not normalised
    from pipeline.hashing import derive

    torch.manual_seed(derive(0, "text tower weights", "random-3"))
    network = open_clip.create_model("ViT-S-32-alt").eval()
    with torch.inference_mode():
        expected = network.encode_text(open_clip.get_tokenizer("ViT-S-32-alt")(["a photo of a guinea pig"]))
    np.testing.assert_allclose(bank.embeddings[:1], expected.numpy(), atol=1e-5)


def test_a_text_tower_that_is_none_is_refused():
    with pytest.raises(SettingsError, match="not of the form open_clip:ViT-B-32/openai"):
        text_bank(["oak"], "timm:tf_efficientnet_lite0")
    with pytest.raises(SettingsError, match="lacks a {} for the name"):
        text_bank(["oak"], "open_clip:ViT-S-32-alt/random-0", template="a photo")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("orignal", r"unknown labelling 'orignal'; choose from original, random:N.*did you mean original\?"),
        ("original:3", "write it as original"),
        ("concepts", "write it as concepts:N"),
        ("concepts:few", "'few' is not a number of classes \\(2 or more\\)"),
        ("random:1", "'1' is not a number of classes \\(2 or more\\)"),
        ("superclasses:", "write it as superclasses:FILE"),
    ],
)
def test_a_labelling_that_is_none_is_refused(name, message):
    with pytest.raises(SettingsError, match=message):
        parse_labelling(name)


def test_a_labelling_says_what_it_lacks():
    labels = [0, 1, 2]
    with pytest.raises(SettingsError, match="random:2 needs the keys"):
        make_labelling("random:2", labels, seed=0)
    with pytest.raises(SettingsError, match="concepts:2 needs the class names"):
        make_labelling("concepts:2", labels, seed=0)
    with pytest.raises(SettingsError, match="3 classes, but only 2 class names"):
        make_labelling("original", labels, seed=0, class_names=["a", "b"])
    with pytest.raises(SettingsError, match="groups:4: there are only 3 classes"):
        make_labelling("groups:4", labels, seed=0)
    with pytest.raises(SettingsError, match=r"concepts:6: 3 distinct concepts can form 2 to 2 groups, not 6"):
        make_labelling("concepts:6", labels, seed=0, class_names=["oak", "pear", "car"], bank=far_groups())
