"""The leaderboard: its pages say what its files say, and what cannot be compared never shares a table."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs.baselines.options import parse_baseline
from jobs.protection.options import parse_settings
from pipeline.baselines.methods import BASELINES
from pipeline.errors import InputError
from pipeline.relearning.presets import AUDIT, AUDIT_CPU
from tests.bench import leaderboard
from tests.bench.leaderboard import PAGES, Cell, Entry, pages, read_entries, tables
from tests.bench.rivals import OURS, ROOT, fit_command, parsed

ENTRY = Entry(
    method="one",
    source="somebody 2026",
    labels="none",
    data="tiny",
    epsilon=16.0,
    bound="linf",
    epochs=12,
    recipe="fast",
    side=32,
    images=100,
    clean_sha256="",
    computation=4,
    seeds=1,
    cells=tuple(Cell(regime, "small", (0.25, 0.3, 0.35), None, 0.6) for regime in AUDIT_CPU),
    psnr=25.0,
    ssim=0.9,
    hours=1.0,
    device="cpu",
    versions=("torch",),
    commit="0000000",
    collections=("a", "b", "c"),
    commands=("python",),
)


def worst(accuracy: float, **changes: object) -> Entry:
    """The entry with another accuracy under adversarial training."""
    cells = tuple(replace(cell, fits=(accuracy,) * 3) if cell.regime == "at" else cell for cell in ENTRY.cells)
    return replace(ENTRY, cells=cells, **changes)  # type: ignore[arg-type]


def test_the_pages_of_the_repository_are_made_from_its_files() -> None:
    made = pages(read_entries())
    for kind, path in PAGES.items():
        assert path.read_text() == made[kind], "run python tests/bench/leaderboard.py write"


def test_the_strongest_regime_decides_and_what_differs_in_anything_else_stands_apart() -> None:
    weak, strong = worst(0.5, method="weak"), worst(0.4, method="strong")
    other, elsewhere = worst(0.2, method="other", epsilon=8.0), worst(0.1, method="elsewhere", data="more")
    longer = worst(0.3, method="longer", epochs=60)
    larger = replace(strong, method="larger", cells=tuple(replace(c, target="resnet18") for c in strong.cells))
    whole = tuple(Cell(regime, "small", (0.25, 0.3, 0.35), None, 0.6) for regime in {*AUDIT, *AUDIT_CPU})
    wider = replace(ENTRY, method="wider", cells=whole)
    fewer = replace(worst(0.1, method="fewer"), images=50)
    free = replace(worst(0.1, method="free"), bound="l2")
    entries = [weak, other, strong, elsewhere, longer, larger, wider, fewer, free]
    found = [(str(contest), [each.method for each in ranked]) for contest, ranked, _ in tables(entries)]
    assert found == [
        ("more, epsilon 16/255: small, 12 epochs, audit-cpu; 100 images of 32 px", ["elsewhere"]),
        ("tiny, epsilon 8/255: small, 12 epochs, audit-cpu; 100 images of 32 px", ["other"]),
        ("tiny, epsilon 16/255: resnet18, 12 epochs, audit-cpu; 100 images of 32 px", ["larger"]),
        ("tiny, epsilon 16/255: small, 12 epochs, audit; 100 images of 32 px", ["wider"]),
        ("tiny, epsilon 16/255: small, 12 epochs, audit-cpu; 50 images of 32 px", ["fewer"]),
        ("tiny, epsilon 16/255: small, 12 epochs, audit-cpu; 100 images of 32 px", ["strong", "weak"]),
        ("tiny, epsilon 16/255: small, 60 epochs, audit-cpu; 100 images of 32 px", ["longer"]),
        ("tiny, budgets of their own: small, 12 epochs, audit-cpu; 100 images of 32 px", ["free"]),
    ]
    assert len({replace(entry, method="one").file for entry in entries}) == len(found) - 1  # data tell by their name
    assert (strong.worst.regime, strong.worst.mean, strong.clean) == ("at", pytest.approx(0.4), 0.6)
    text = pages([weak, strong])["md"]
    assert (
        "| 1 | strong (somebody 2026) | none | **40.0** (40.0 to 40.0 over 3 fits of 1 training) | at, small |" in text
    )
    assert "| 60.0 | 0.67 |" in text


def test_what_was_not_run_whole_is_shown_with_the_reason_and_not_ranked() -> None:
    partial = replace(ENTRY, cells=ENTRY.cells[1:], method="partial")
    few = replace(ENTRY, cells=tuple(replace(cell, fits=(0.1,)) for cell in ENTRY.cells), method="few")
    ((_, ranked, others),) = tables([partial, few, worst(0.9)])
    assert [entry.method for entry in ranked] == ["one"]
    copies = replace(ENTRY, collections=("a", "a", "a"))
    assert copies.lacks == "3 fits are needed; of some regimes there are 1"
    assert {entry.lacks for entry in others} == {
        f"regimes not run: {ENTRY.cells[0].regime}",
        "3 fits are needed; of some regimes there are 1",
    }
    for text in pages([partial, few]).values():
        assert "3 fits are needed" in text


def rows(protection: str, accuracy: float, **changes: object) -> list[dict[str, object]]:
    """One training under each regime of the battery, for each of two fits."""
    shared = {"protection": protection, "target": "small", "labelling": "original", "share": "samples:1", "seed": 0}
    shared |= {"epochs": 12, "diverged": False, "seconds": 1.0, "device": "cpu", "versions": "torch"}
    shared |= {"recipe": "fast", "side": 32, "num_train": 100}
    return [
        shared | {"regime": regime, "fit": fit, "accuracy_last": accuracy} | changes
        for regime in ("nt", "at")
        for fit in (0, 1)
    ]


def options() -> argparse.Namespace:
    words = {
        "method": "one",
        "source": "somebody",
        "labels": "none",
        "data": "tiny",
        "device": "",
        "commit": "0",
        "bound": "linf",
    }
    return argparse.Namespace(protection="uc", command=["python"], clean_sha256="", computation=4, **words)


def test_a_regime_whose_trainings_all_diverged_is_named_as_one_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaderboard, "load_protection", lambda data: SimpleNamespace(epsilon=16 / 255))
    score = SimpleNamespace(psnr=25.0, ssim=0.9)
    monkeypatch.setattr(leaderboard, "scores_from_parquet", lambda data, where: [score])
    fits = [SimpleNamespace(read=lambda name: b"", url="fit")]
    monkeypatch.setattr(leaderboard, "fit_at", lambda fit, url: SimpleNamespace(collection_sha256="a"))
    judged = [row | {"diverged": row["regime"] == "at"} for row in rows("uc", 0.3)]
    entry = leaderboard.entry_of([*judged, *rows("clean", 0.6)], fits, options())
    assert [(cell.regime, cell.fits, cell.clean) for cell in entry.cells] == [("nt", (0.3, 0.3), 0.6)]
    assert "at" in entry.lacks
    assert "not ranked" in pages([entry])["md"]
    with pytest.raises(ValueError, match=r"no training on clean images under at, small, that did not diverge"):
        leaderboard.entry_of([*rows("uc", 0.3), *rows("clean", 0.6, diverged=True)], fits, options())


def test_a_file_that_is_no_entry_or_has_anothers_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / ENTRY.file).write_bytes(ENTRY.to_bytes())
    assert read_entries(tmp_path) == [ENTRY]
    (tmp_path / "else.json").write_bytes(ENTRY.to_bytes())
    with pytest.raises(ValueError, match=r"it should be called tiny_16-255_small_12-epochs_audit-cpu_one_none\.json"):
        read_entries(tmp_path)
    (tmp_path / "else.json").write_bytes(b"{}")
    with pytest.raises(InputError, match=r"else\.json"):
        read_entries(tmp_path)


@pytest.mark.parametrize("method", [*BASELINES, OURS])
@pytest.mark.parametrize("labels", ["true", "cluster"])
def test_every_method_can_be_fitted_for_it_by_one_command(
    monkeypatch: pytest.MonkeyPatch, method: str, labels: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["rivals.py", "--output", "r", "--methods", method, "--device", "here"])
    _, job, *given = fit_command(parsed(), method, labels, 2, Path("r/2"))
    settings = parse_settings(given) if method == OURS else parse_baseline(given)
    assert (settings.seed, settings.output, settings.encode) == (2, "r/2", "lossless")
    assert (ROOT / job).is_file()
