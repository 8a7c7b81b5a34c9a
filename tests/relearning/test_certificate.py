"""What an audit certifies: the figures by hand, what is missing said, and the collection known again by its bytes."""

from __future__ import annotations

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import layout
from pipeline.errors import InputError
from pipeline.relearning.evaluation import CLEAN, CLEAN_PART
from pipeline.relearning.presets import AUDIT_CPU
from pipeline.relearning.report.certificate import (
    Certificate,
    Certificates,
    CertifiedFit,
    Visibility,
    certify,
    collection_digest,
    fit_at,
    lacking,
    scores_of,
    visibility_of,
)
from pipeline.storage.store import Store
from tests.relearning.test_report import row

SEEN = Visibility(200, 30.0, 27.5, 0.93, 0.88)


def audit(**accuracy: float) -> list[dict[str, Any]]:
    """Three fits and two trainings of every regime of the small battery: .3 protected, .6 clean, unless given."""
    rows = []
    for regime in AUDIT_CPU:
        last = accuracy.get(regime.replace("-", "_"), 0.3)
        rows += [
            row("uc", regime, seed, last + 0.01 * fit, fit=fit, seconds=20.0) for fit in range(3) for seed in (0, 1)
        ]
        rows += [row(CLEAN, regime, seed, 0.6, seconds=10.0) for seed in (0, 1)]
    return rows


def certified(rows: list[dict[str, Any]]) -> Certificate:
    fits = [CertifiedFit(f"s3://art/{n}", "f" * 64, "p" * 64, collection_digest([("a.tar", str(n))]), 1) for n in "123"]
    return certify(rows, "uc", epsilon=16 / 255, visibility=SEEN, fits=fits, settings={"epochs": 12})


def test_the_worst_case_is_the_largest_mean_over_fits_and_seeds() -> None:
    rows = audit(nt_cg=0.42)
    rows += [row("uc", "nt", 0, 0.99, share="samples:0.5"), row(CLEAN_PART, "nt", 0, 0.99, share="samples:0.5")]
    rows += [row("uc", "nt", 0, 0.99, labelling="random:5")]
    found = certified(rows)
    assert (found.worst.regime, found.worst.accuracy) == ("nt-cg", pytest.approx(0.43))
    assert found.worst.fits == pytest.approx((0.42, 0.43, 0.44))
    assert (found.worst.seconds, found.clean.seconds, found.clean.accuracy) == (20.0, 10.0, pytest.approx(0.6))
    assert (found.battery, found.seeds, len(found.accuracies)) == ("audit-cpu", 2, len(AUDIT_CPU))
    assert [one.clean for one in found.accuracies] == pytest.approx([0.6] * len(AUDIT_CPU))


def test_nothing_is_certified_before_battery_fits_and_trainings_are_complete() -> None:
    rows = audit()
    assert lacking(rows, "uc", 3, "original") == ""
    assert lacking([r for r in rows if r["regime"] != "adabn"], "uc", 3, "original") == (
        "the audit-cpu battery lacks adabn"
    )
    assert lacking([r for r in rows if r["fit"] < 2], "uc", 2, "original") == "3 fits are needed; there are 2"
    one_lost = [r for r in rows if (r["protection"], r["regime"], r["fit"], r["seed"]) != ("uc", "nt", 2, 1)]
    assert lacking(one_lost, "uc", 3, "original") == "nt on uc (small): 2 trainings per fit are needed"
    diverged = [{**r, "diverged": r["protection"] == CLEAN and r["regime"] == "subtract"} for r in rows]
    assert lacking(diverged, "uc", 3, "original") == "subtract on clean (small): 2 trainings per fit are needed"
    third = [{**r, "seed": 2} for r in rows if r["seed"] == 0]
    one_fit = [{**r, "diverged": (r["protection"], r["fit"]) == ("uc", 2)} for r in (*rows, *third)]
    assert "on uc (small): 2 trainings per fit are needed" in lacking(one_fit, "uc", 3, "original")
    assert "lacks" in lacking([r for r in rows if r["protection"] == CLEAN], "uc", 3, "original")


def test_a_certificate_is_read_back_and_knows_its_collections() -> None:
    written = Certificates((certified(audit()),))
    found = Certificates.from_bytes(written.to_bytes(), "c.json")
    assert found.to_bytes() == written.to_bytes()
    known = found.of(collection_digest([("a.tar", "2")]))
    assert known is not None
    assert known[1] == 2
    assert found.of(collection_digest([("a.tar", "4")])) is None
    with pytest.raises(InputError, match=r"c\.json is damaged"):
        Certificates.from_bytes(json.dumps({"certificates": [{}]}).encode(), "c.json")


def test_the_page_names_figures_and_fits_and_escapes_names() -> None:
    evil = replace(certified(audit(nt_cg=0.42)), protection="<b>uc</b>")
    page = Certificates((evil,)).page()
    assert "&lt;b&gt;uc&lt;/b&gt;: at most 43.0 % relearned, against 60.0 % from clean images" in page
    assert all(words in page for words in ("42.0 % to 44.0 %", "16/255", "s3://art/3"))
    assert not any(words in page for words in ("http://", "https://", "<script"))


def test_the_digest_of_a_collection_is_that_of_its_shards_in_any_order() -> None:
    expected = sha256(b'[["a.tar","1"],["b.tar","2"]]').hexdigest()
    assert collection_digest([("b.tar", "2"), ("a.tar", "1")]) == expected
    assert collection_digest([("b.tar", "2"), ("a.tar", "3")]) != expected


def test_visibility_by_hand() -> None:
    before = np.full((3, 3, 16, 16), 100, np.uint8)
    after = before.copy()
    after[1] += 16
    scores = scores_of(before[1:2], after[1:2])
    assert scores[0][0] == pytest.approx(20 * np.log10(255 / 16))
    found = visibility_of([(20.0, 0.8), (30.0, 0.9), (40.0, 1.0)])
    assert (found.images, found.psnr_median, found.ssim_median) == (3, 30.0, pytest.approx(0.9))
    assert (found.psnr_p1, found.ssim_p1) == (pytest.approx(20.2), pytest.approx(0.802))  # a fiftieth of the way up


def test_no_fit_where_no_run_was(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with pytest.raises(InputError, match=f"{layout.RUN} not found"):
        fit_at(store, "x")
