"""What an evaluation cannot do is said before anything is trained, and mostly before anything is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import InputError, SettingsError
from pipeline.relearning.checks import check_regime, check_shares, check_targets
from pipeline.relearning.evaluation import evaluation_from
from pipeline.relearning.labels.files import read_label_files
from pipeline.relearning.labels.labellings import make_labelling

GIVEN = {"clean": "c", "test": "t", "output": "o"}


@pytest.mark.parametrize(
    "name",
    [
        *("st+simclr", "simclr+st-cg[reduce=pca2]", "delta-jitter+epic", "epic+delta-jitter", "st+epic"),
        *("epic+st-full[reduce=pca2]", "epic+friendly-noise", "friendly-noise+epic", "friendly-noise+delta-jitter"),
    ],
)
def test_regimes_that_break_each_other_are_not_joined(name: str) -> None:
    with pytest.raises(SettingsError, match="do not work together"):
        check_regime(name)
    for part in name.split("+"):
        check_regime(part)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        *((f"{one}+at", "loss") for one in ("ueraser", "mixup", "opa", "shortcut-net", "simclr")),
        *(("cutmix+mixup", "loss"), ("at+ueraser-max", "loss"), ("st+st-cg", "schedule")),
    ],
)
def test_two_regimes_of_which_only_one_would_be_tried_are_not_joined(name: str, what: str) -> None:
    one, other = name.split("+")
    with pytest.raises(SettingsError, match=f"{one} and {other} each have their own {what}; evaluate them one by one"):
        check_regime(name)


def test_a_regime_that_needs_held_out_images_is_refused_without_any() -> None:
    for name in ("adabn", "dfr", "early-stop", "few-clean", "cg+adabn"):
        with pytest.raises(SettingsError, match="needs clean images that are not test images; there are none"):
            check_regime(name, has_holdout=False)
    check_regime("nt", has_holdout=False)


def test_targets_are_built_at_the_side_they_will_see_and_asked_by_every_regime() -> None:
    check_targets(["small", "vit-14a"], ["nt", "st[reduce=pca2]"], 3, 32)
    with pytest.raises(SettingsError, match="patches of 4 px, but 50 px is not a multiple of that"):
        check_targets(["small", "vit-14a"], ["nt"], 3, 50)
    for regime in ("adabn", "iss-gray+adabn"):
        check_targets(["small"], [regime], 3, 32)
        with pytest.raises(SettingsError, match="'adabn' needs a target with batch normalisation; this one has none"):
            check_targets(["small", "vit-14a"], ["nt", regime], 3, 32)


def test_a_share_that_rounds_to_nothing_is_refused() -> None:
    labels = np.arange(40) % 4
    keys = [f"{number}" for number in range(40)]
    check_shares(["samples:0.1", "classes:0.25", "samples:1"], keys, labels)
    with pytest.raises(SettingsError, match="of 4 classes this rounds to none"):
        check_shares(["samples:0.1", "classes:0.1"], keys, labels)


@pytest.mark.parametrize(
    ("labelling", "classes", "content", "words"),
    [
        ("concepts:2", None, None, "labelling concepts:2 needs the class names: add --classes FILE"),
        ("original", "names.txt", None, "names.txt cannot be read as text, UTF-8 (No such file or directory"),
        ("original", "names.txt", b"\xff\xfe\xfa", "names.txt cannot be read as text, UTF-8 ("),
        ("superclasses:none.yaml", None, None, "none.yaml cannot be read as JSON or YAML"),
    ],
)
def test_files_of_labels_are_read_at_the_start(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    labelling: str,
    classes: str | None,
    content: bytes | None,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if classes and content:
        Path(classes).write_bytes(content)
    with pytest.raises((InputError, SettingsError)) as refused:
        read_label_files([labelling], classes, None)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_was_read_is_all_that_a_labelling_needs(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("cat\ntruck\n\nship\n")
    (tmp_path / "super.yaml").write_text("cat: animal\ntruck: machine\n2: machine\n")
    name = f"superclasses:{tmp_path / 'super.yaml'}"
    files = read_label_files(["original", name], str(tmp_path / "names.txt"), None)
    (tmp_path / "super.yaml").unlink()
    assert files.class_names == ("cat", "truck", "ship")
    found = make_labelling(
        name, [0, 1, 2, 1], seed=0, class_names=files.class_names, superclasses=files.superclasses[name]
    )
    assert found.labels.tolist() == [0, 1, 1, 1]


def test_workers_and_gpus_are_no_negative_numbers() -> None:
    for given, words in (({"workers": 0}, "--workers"), ({"gpus_per_worker": -1.0}, "--gpus-per-worker")):
        with pytest.raises(SettingsError, match=words):
            evaluation_from({**GIVEN, **given})
