"""Means over fits and seeds, their spread and the relearned accuracy by hand; Parquet read back by pyarrow."""

from __future__ import annotations

import io
import json
import math
import statistics
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError
from pipeline.relearning.evaluation import CLEAN, CLEAN_PART, Trial
from pipeline.relearning.report.results import (
    HISTORY_SCHEMA,
    SCHEMA,
    MeanAccuracy,
    histories_to_parquet,
    mean_accuracies,
    read_row,
    relearned,
    results_from_parquet,
    results_to_parquet,
)
from pipeline.storage.store import Store


def row(protection, regime, seed, last, **changed):
    return {
        "key": f"{protection}{regime}{seed}",
        "protection": protection,
        "fit": 0,
        "target": "small",
        "regime": regime,
        "labelling": "original",
        "share": "samples:1",
        "seed": seed,
        "accuracy_last": last,
        "diverged": False,
        "history": [],
    } | changed


def test_a_seed_mean_is_the_mean_and_the_sample_deviation():
    rows = [row("uc", "nt", seed, last) for seed, last in enumerate((0.2, 0.3, 0.7))]
    (found,) = mean_accuracies(rows, ("regime",)).values()
    assert found.mean == pytest.approx(0.4)
    assert found.sd == pytest.approx(math.sqrt((0.04 + 0.01 + 0.09) / 2))
    assert found.sd == pytest.approx(statistics.stdev((0.2, 0.3, 0.7)))
    assert (found.num_trials, found.num_diverged) == (3, 0)


def test_one_seed_has_no_spread_and_diverged_trials_are_only_counted():
    rows = [row("uc", "nt", 0, 0.5), row("uc", "nt", 1, 0.9, diverged=True), row("uc", "at", 0, 0.1, diverged=True)]
    assert mean_accuracies(rows, ("regime",)) == {
        ("nt",): MeanAccuracy(0.5, None, 1, 1, (0.5,)),
        ("at",): MeanAccuracy(None, None, 0, 1),
    }


def test_fits_are_averaged_alike_and_the_spread_is_that_of_their_seeds():
    rows = [row("uc", "nt", seed, last) for seed, last in ((0, 0.30), (1, 0.34))]  # mean .32, sum of squares 8e-4
    rows += [row("uc", "nt", seed, last, fit=1) for seed, last in ((0, 0.39), (1, 0.42), (2, 0.45))]  # .42, 18e-4
    rows += [row("uc", "nt", 0, 0.40, fit=2), row("uc", "nt", 1, 0.0, fit=2, diverged=True)]
    (found,) = mean_accuracies(rows, ("regime",)).values()
    assert found.fits == pytest.approx((0.32, 0.42, 0.40))
    assert found.mean == pytest.approx(0.38)
    assert found.sd == pytest.approx(math.sqrt(26e-4 / 3))  # six trials, a mean taken from each of three fits
    assert (found.num_trials, found.num_diverged) == (6, 1)
    worst = relearned([*rows, row("uc", "cg", 0, 0.41)], "uc")
    assert (worst.regime, worst.fits) == ("cg", (0.41,))


def test_cells_are_what_the_columns_tell_apart():
    rows = [row("uc", "nt", 0, 0.1), row("uc", "cg", 0, 0.2), row("uc", "nt", 0, 0.3, target="resnet18")]
    assert set(mean_accuracies(rows, ("regime", "target"))) == {("nt", "small"), ("cg", "small"), ("nt", "resnet18")}
    assert mean_accuracies(rows, ())[()].mean == pytest.approx(0.2)


def test_relearned_accuracy_is_the_largest_seed_mean_not_the_largest_trial():
    rows = [
        *(row("uc", "nt", 0, 0.1), row("uc", "nt", 1, 0.9)),  # .5
        *(row("uc", "cg", 0, 0.55), row("uc", "cg", 1, 0.65)),  # .6
        *(row("uc", "cg", 0, 0.7, target="resnet18"), row("uc", "cg", 1, 0.72, target="resnet18")),  # .71
        row("uc", "at", 0, 0.99, diverged=True),
        row("uc", "st", 0, 0.95, labelling="concepts:20"),
        row("uc", "st", 0, 0.95, share="samples:0.5"),
        row("sp", "st", 0, 0.95),
    ]
    found = relearned(rows, "uc")
    assert found.accuracy == pytest.approx(0.71)
    assert found.sd == pytest.approx(math.sqrt(0.0002))
    assert (found.regime, found.target) == ("cg", "resnet18")
    assert found.num_regimes == 3  # nt, cg, and at, which was tried
    assert relearned(rows, "uc", share="samples:0.5").accuracy == 0.95
    assert relearned(rows, "uc", labelling="concepts:20").regime == "st"


def test_the_clean_control_stands_beside_every_share_and_its_part_only_beside_its_own():
    rows = [row(CLEAN, "nt", 0, 0.9), row(CLEAN_PART, "nt", 0, 0.7, share="samples:0.5")]
    assert relearned(rows, CLEAN, share="samples:0.5").accuracy == 0.9
    assert relearned(rows, CLEAN_PART, share="samples:0.5").accuracy == 0.7
    assert relearned(rows, CLEAN_PART) is None


def test_nothing_finished_means_no_relearned_accuracy():
    assert relearned([], "uc") is None
    assert relearned([row("uc", "nt", 0, 0.5, diverged=True)], "uc") is None
    assert relearned([row("uc", "nt", 0, 0.0)], "uc").accuracy == 0.0


def test_results_come_back_from_parquet_as_they_went_in():
    rows = [
        row("uc", "nt", 1, 0.25, accuracy_own_delta=0.75, num_train=4750, device="cpu", purity=0.4),
        row("uc", "nt", 0, 0.5, diverged=True, unknown="left out"),
        row(CLEAN, "nt", 0, np.float64(0.875)),
    ]
    back = results_from_parquet(results_to_parquet(rows))
    assert [(one["protection"], one["seed"]) for one in back] == [(CLEAN, 0), ("uc", 0), ("uc", 1)]
    assert set(back[0]) == set(SCHEMA.names)
    for one in back:
        (origin,) = [r for r in rows if r["key"] == one["key"]]
        assert one == {name: origin.get(name) for name in SCHEMA.names}
    assert relearned(back, "uc") == relearned(rows, "uc")
    assert results_from_parquet(results_to_parquet([])) == []


def test_histories_have_a_row_per_epoch_and_figures_are_strict_json():
    history = [
        {"loss": 2.3, "accuracy_train": 0.1, "accuracy_test": 0.2, "accuracy_holdout": None, "figures": {}},
        {
            "loss": float("nan"),
            "accuracy_train": 0.3,
            "accuracy_test": 0.4,
            "accuracy_holdout": 0.5,
            "figures": {"count": 2.0, "acm": float("nan")},
        },
    ]
    rows = [row("uc", "st", 0, 0.4, history=history), row(CLEAN, "nt", 0, 0.9)]
    table = pq.read_table(io.BytesIO(histories_to_parquet(rows)))
    assert table.schema.equals(HISTORY_SCHEMA)
    first, second = table.to_pylist()
    assert (first["key"], first["epoch"], first["accuracy_test"], first["accuracy_holdout"]) == ("ucst0", 1, 0.2, None)
    assert (second["epoch"], second["accuracy_holdout"]) == (2, 0.5)
    assert math.isnan(second["loss"])

    def refuse(name):
        raise AssertionError(name)

    assert json.loads(first["figures"]) == {}
    assert json.loads(second["figures"], parse_constant=refuse) == {"acm": None, "count": 2.0}


def trial_and_row() -> tuple[Trial, dict[str, Any]]:
    names = {"protection": "uc", "target": "small", "regime": "nt", "labelling": "original", "share": "samples:1"}
    trial = Trial(**names, seed=0, epochs=2, recipe="fast", data="d" * 64, labels="l" * 64)
    epoch = {"loss": 0.5, "accuracy_train": 0.5, "accuracy_test": 0.5, "accuracy_holdout": None, "figures": {"e": 0.1}}
    figures = {"accuracy_last": 0.5, "diverged": False, "num_train": 9, "num_classes": 3, "seconds": 1.5}
    return trial, asdict(trial) | {"key": trial.key, "history": [epoch, epoch]} | figures


def test_the_row_of_a_trial_is_what_was_written_whatever_columns_a_later_version_adds(tmp_path):
    store, (trial, row) = Store(str(tmp_path)), trial_and_row()
    store.put(trial.result, json.dumps(row).encode())
    assert read_row(store, trial) == row
    store.put(trial.result, json.dumps(row | {"more": 1}).encode())
    assert read_row(store, trial)["accuracy_last"] == 0.5


@pytest.mark.parametrize(
    "damage",
    [
        lambda row: b"",
        lambda row: json.dumps(row).encode()[:-9],
        lambda row: b"[" * 100_000,
        lambda row: json.dumps([row]).encode(),
        lambda row: json.dumps(row).encode().replace(b'"uc"', b'"\xff"'),
        lambda row: json.dumps(row | {"seed": 1}).encode(),
        lambda row: json.dumps(row | {"accuracy_last": None}).encode(),
        lambda row: json.dumps(row | {"accuracy_last": "much"}).encode(),
        lambda row: json.dumps(row | {"history": [7]}).encode(),
        lambda row: json.dumps(row | {"history": [{"loss": 1.0}]}).encode(),
        lambda row: json.dumps({name: value for name, value in row.items() if name != "seconds"}).encode(),
    ],
)
def test_the_row_of_another_trial_or_a_damaged_one_is_refused_in_one_line(tmp_path, damage):
    store, (trial, row) = Store(str(tmp_path)), trial_and_row()
    store.put(trial.result, damage(row))
    with pytest.raises(InputError) as caught:
        read_row(store, trial)
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    assert line.startswith(f"{store.url}/{trial.result} is damaged or from another version of Scumble (")
    assert line.endswith("): restore it, or delete it to run that trial again")
