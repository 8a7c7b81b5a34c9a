"""The pictures that a universal generator is trained on: their labels, their number, and copies among them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from jobs.one_for_all.steps import UniversalTraining, count_images
from pipeline.errors import InputError, SettingsError
from pipeline.measures.estimate import count_samples
from pipeline.one_for_all.pictures import read_squares
from pipeline.one_for_all.settings import one_for_all_settings
from pipeline.one_for_all.training import TrainingImages, UniversalFit
from pipeline.records import File, LooseImage, Shard
from pipeline.storage.store import Store
from pipeline.surrogates.surrogate import load_surrogate
from tests.one_for_all.test_training import SIDE, SMALL, SURROGATE, bank, protection_of
from tests.support.samples import image_bytes, noise, read, tar_bytes


def test_a_negative_label_is_no_row_of_the_concept_bank() -> None:
    samples = read(tar_bytes([("k0.png", image_bytes(noise(8, 8))), ("k0.cls", b"-1")]))
    with pytest.raises(InputError, match=r"^in/a\.tar: k0 has the label -1; --select-by label needs rows from 0 on$"):
        read_squares(samples, "a.tar", "in/a.tar", side=8, share=1.0, seed=0, max_pixels=1 << 20, with_labels=True)


def test_inputs_of_unlike_files_are_counted_each_by_its_own(tmp_path: Path) -> None:
    sources = []
    for name, side, count in (("small", 8, 60), ("large", 200, 6)):
        data = tar_bytes([(f"k{row}.png", image_bytes(noise(side, side))) for row in range(count)])
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.tar").write_bytes(data)
        sources.append((Store(str(tmp_path / name)), [Shard("a.tar", len(data), "")]))
    settings = SimpleNamespace(max_member_bytes=1 << 28)
    for ordered in (sources, sources[::-1]):
        run = cast(UniversalTraining, SimpleNamespace(sources=tuple(ordered), settings=settings))
        assert count_images(run) == pytest.approx(66, rel=0.2)
    loose = LooseImage("a", (File("a.jpg", 10, "1"),)), LooseImage("b", (File("b.jpg", 90_000, "1"),))
    unit = Shard("unit", 90_010, "", loose)
    assert count_samples(Store("nowhere"), [unit, unit], max_member_bytes=1) == 4


def test_copies_of_two_pictures_do_not_end_a_finished_training() -> None:
    surrogate: Any = load_surrogate(SURROGATE, weights=None, size=SIDE, device="cpu")
    rng = torch.Generator().manual_seed(1)
    two = torch.randint(0, 256, (2, 3, 36, 36), generator=rng, dtype=torch.uint8)
    fit = UniversalFit(TrainingImages(two.repeat(120, 1, 1, 1)), surrogate, bank(surrogate), SMALL)
    fit.advance(fit.steps)
    clustering = protection_of(fit, surrogate).clustering
    assert len(clustering.centroids) <= 2


def test_workers_that_would_share_a_gpu_are_refused_before_the_start() -> None:
    given = {"input": "a", "output": "b", "gpus_per_worker": 0.5}
    with pytest.raises(SettingsError, match="--gpus-per-worker: workers that share a GPU cannot train together; use 1"):
        one_for_all_settings(given)
    assert one_for_all_settings(given | {"workers": 1}).gpus_per_worker == 0.5
    assert one_for_all_settings(given | {"gpus_per_worker": 2.0}).gpus_per_worker == 2
