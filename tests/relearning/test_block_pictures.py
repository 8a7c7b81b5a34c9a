"""Pictures of what single blocks make of images: the right block, the right epochs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from pipeline.relearning.regimes import Regime
from pipeline.relearning.targets import build_target
from pipeline.relearning.training import Recipe, Training
from tests.support.samples import stripes


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    import block_pictures

    yield block_pictures
    for name in ("block_pictures", "insights", "ratio", "shared_delta"):
        sys.modules.pop(name, None)


def test_blocks_of_resnet18_are_its_residual_blocks(pictures):
    network = build_target("resnet18", 10, 32, seed=0)
    found = [pictures.block_module(network, block) for block in range(1, 9)]
    kinds = {type(module).__name__ for module in found}
    assert len(kinds) == 1
    assert sum(type(module).__name__ in kinds for module in network.modules()) == 8
    assert [sum(value.numel() for value in module.parameters()) for module in found] == sorted(
        sum(value.numel() for value in module.parameters()) for module in found
    )
    with pytest.raises(ValueError, match="no block 9; this target has 8"):
        pictures.block_module(network, 9)


def test_outputs_are_those_that_the_layers_give_by_hand(pictures):
    images, labels = stripes(40, seed=0)
    network = build_target("small", 2, images.shape[-1], seed=0)
    training = Training(network, images, labels, Regime(), Recipe(), 0, torch.device("cpu"))
    made = pictures.outputs(training, 1, images)
    kept = []
    handle = network.get_submodule("stem.1").register_forward_hook(lambda *given: kept.append(given[2]))
    training.features(images)
    handle.remove()
    torch.testing.assert_close(torch.from_numpy(made), kept[0].flatten(1).float(), rtol=0.02, atol=0.02)


def test_a_picture_has_a_row_for_each_training(pictures, tmp_path):
    assert pictures.shown_epochs(12) == [1, 4, 6, 9, 12]
    assert pictures.shown_epochs(2) == [1, 2]
    one = {"epoch": 1, "points": [[0.0, 1.0], [2.0, 3.0]], "labels": [0, 11]}
    pictures.draw({"clean": [one, one], "sp": [one, one]}, tmp_path / "new" / "block.png")
    assert (tmp_path / "new" / "block.png").read_bytes().startswith(b"\x89PNG")
