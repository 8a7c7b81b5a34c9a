"""What a dry run of an evaluation says: images times epochs over the speed of one trial among others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from jobs.shared.inputs import list_labelled
from pipeline.relearning import estimate
from pipeline.relearning.evaluation import evaluation_from
from tests.support.runs import write_collection


@pytest.mark.parametrize("workers", [None, 1, 2])
def test_a_training_is_timed_on_as_many_threads_as_a_trial_gets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int | None
) -> None:
    write_collection(tmp_path / "clean", shards=2, per_shard=20, side=32)
    write_collection(tmp_path / "test", shards=1, per_shard=8, side=32)
    seen: list[int] = []

    def trained(*_: Any, **__: Any) -> SimpleNamespace:
        seen.append(torch.get_num_threads())
        return SimpleNamespace(images_per_second=50.0)

    monkeypatch.setattr(estimate, "train_target", trained)
    monkeypatch.setattr("pipeline.relearning.estimate.available_cpus", lambda: 6)
    given = {"clean": f"{tmp_path}/clean", "test": f"{tmp_path}/test", "output": f"{tmp_path}/out", "workers": workers}
    settings = evaluation_from({**given, "seeds": (0, 1, 2), "epochs": 5})
    stores = {"clean": list_labelled(settings.clean), "test": list_labelled(settings.test)}
    before = torch.get_num_threads()
    found = estimate.estimate_evaluation(settings, stores, 32, {})
    assert seen == [{None: 1, 1: 6, 2: 3}[workers]]
    assert torch.get_num_threads() == before
    assert found.trials == 3
    assert found.images["clean"] == pytest.approx(40, rel=0.1)
    assert found.seconds == pytest.approx(3 * 5 * found.images["clean"] / 50.0)
