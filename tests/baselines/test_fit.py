"""Labels as clusters, and what a method is held to before its deltas are used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_tensors

from pipeline.baselines.base import NO_FIGURES, BaselineSettings, LabelledPictures
from pipeline.baselines.fit import checked_deltas, largest_change
from pipeline.baselines.given import GivenDeltas
from pipeline.baselines.labels import label_clustering, predicted
from pipeline.deltas.keyed import KeyedDeltas
from pipeline.errors import InputError, PromiseError
from pipeline.hashing import sha256
from pipeline.records import Features
from pipeline.surrogates.features import Assignment

GIVEN = LabelledPictures(np.zeros((4, 3, 8, 8), np.uint8), np.array([5, 2, 5, 9]), ("a", "b", "c", "d"))


class Constant:
    """Each label, or each picture, at its own number of levels."""

    bound = "linf"
    source = "a test"
    figures = NO_FIGURES

    def __init__(self, levels: list[int], *, per_sample: bool = False, dtype: type = np.int16) -> None:
        self.per_sample, self.levels, self.dtype = per_sample, levels, dtype
        self.seen: LabelledPictures

    def deltas(self, pictures, settings, told):
        self.seen = pictures
        return np.broadcast_to(np.array(self.levels, self.dtype)[:, None, None, None], (len(self.levels), 3, 8, 8))


def checked(method: Constant, num_labels: int = 12) -> np.ndarray:
    return checked_deltas(method, GIVEN, num_labels, BaselineSettings(8 / 255), lambda _: None)


def test_a_predicted_label_is_the_class_with_the_highest_score() -> None:
    weight = np.array([[1, 0], [0, 2], [-1, -1]], np.float32)
    features = Features("s", ("a", "b", "c", "d"), np.array([[1, 0], [0, 1], [0.5, 0.6], [-2, -2]], np.float16))
    # scores with the bias: 1 -.5 -.8, 0 1.5 -.8, .5 .7 -.9, -2 -4.5 4.2
    found = predicted(features, (weight, np.array([0, -0.5, 0.2], np.float32)))
    assert found.clusters.tolist() == [0, 1, 1, 2]
    assert found.keys == features.keys


def test_a_method_sees_labels_without_gaps_and_its_deltas_come_back_under_the_labels_of_the_collection() -> None:
    method = Constant([1, 2, 3])
    levels = checked(method)
    assert method.seen.labels.tolist() == [1, 0, 1, 2]
    assert levels.shape == (12, 3, 8, 8)
    assert levels.max((1, 2, 3)).tolist() == [0, 0, 1, 0, 0, 2, 0, 0, 0, 3, 0, 0]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Constant([1, 2]), r"deltas are int16 \(2, 3, 8, 8\), not int16 \(3, 3, 8, 8\)"),
        (Constant([1, 2, 3], per_sample=True), r"not int16 \(4, 3, 8, 8\)"),
        (Constant([1, 2, 3], dtype=np.float32), "deltas are float32"),
        (Constant([1, -9, 3]), "a delta has 9 levels; the bound is 8"),
        (Constant([1, 0, 3]), "the delta of label 5 changes nothing: fit it on more pictures of that label"),
    ],
)
def test_a_method_that_breaks_its_promises_ends_the_run(method: Constant, message: str) -> None:
    with pytest.raises(PromiseError, match=message):
        checked(method)


@pytest.mark.parametrize(("level", "epsilon"), [(0, 1 / 255), (-14, 14 / 255), (127, 127 / 255), (128, 1.0)])
def test_the_bound_of_a_method_that_has_none_is_what_came_out(level: int, epsilon: float) -> None:
    assert largest_change(np.array([[0, level]], np.int16)) == epsilon


@pytest.mark.parametrize("largest", [127, 255])
def test_keyed_deltas_come_back_by_key_and_at_any_size(largest: int) -> None:
    levels = np.random.default_rng(0).integers(-largest, largest + 1, (3, 3, 8, 8)).astype(np.int16)
    data = KeyedDeltas(["b", "ü/1", "a"], levels, 1.0).to_bytes()
    again = KeyedDeltas.from_bytes(data, 1.0, "there")
    assert (again.delta_for(0, "ü/1", 8, 8) == levels[1].transpose(1, 2, 0)).all()
    assert again.delta_for(0, "a", 5, 30).shape == (5, 30, 3)
    assert again.to_bytes() == data
    assert len(data) < 3 * 3 * 64 * (1 if largest == 127 else 2) + 300
    with pytest.raises(PromiseError, match="sample c has no delta of its own"):
        again.delta_for(0, "c", 8, 8)
    for damaged in (b"", data[:40], data[:-9], b"\xff" * 50):
        with pytest.raises(InputError, match="there is damaged"):
            KeyedDeltas.from_bytes(damaged, 1.0, "there")


def deltas_file(path: Path, name: str) -> str:
    """Two good deltas in a file of this name, or bytes that cannot be read."""
    levels = {"a": np.full((3, 8, 8), 2, np.int16), "b": np.full((3, 8, 8), -3, np.int16)}
    file = path / name
    if name == "good.npz":
        np.savez_compressed(file, **levels)
    elif name == "good.safetensors":
        save_file(levels, file)
    elif name == "damaged.npz":
        np.savez_compressed(file, **{key: np.random.default_rng(0).integers(0, 9, (3, 64, 64)) for key in levels})
        data = bytearray(file.read_bytes())
        data[2000:2100] = bytes(100)
        file.write_bytes(data)
    elif name == "array.npz":
        np.save(path / "array.npy", levels["a"])
        (path / "array.npy").rename(file)
    elif name == "bfloat16.safetensors":
        save_tensors({"a": torch.ones(3, 8, 8, dtype=torch.bfloat16)}, file)
    elif name == "folder":
        file.mkdir()
        (file / "a.npy").touch()
    else:
        file.touch()
    return str(file)


@pytest.mark.parametrize("name", ["good.npz", "good.safetensors"])
def test_given_deltas_are_read_by_key(tmp_path: Path, name: str) -> None:
    given = GivenDeltas(deltas_file(tmp_path, name))
    given.check(3 / 255)
    assert given.keys == ("a", "b")
    assert given.sha256 == sha256((tmp_path / name).read_bytes())
    keyed = given.of(Assignment("s", ("b",), np.zeros(1, np.int32), np.zeros(1, np.float32)), 3 / 255)
    assert (keyed.delta_for(0, "b", 8, 8) == -3).all()


@pytest.mark.parametrize(
    "name",
    ["empty.npz", "damaged.npz", "array.npz", "bfloat16.safetensors", "empty.safetensors", "folder"],
)
def test_deltas_that_cannot_be_read_are_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"^--deltas .*(cannot be read: |deltas are whole 8-bit levels)[^\n]*$"):
        GivenDeltas(deltas_file(tmp_path, name)).check(3 / 255)


def test_nothing_can_be_assigned_to_labels_by_its_features() -> None:
    assert label_clustering(3).centroids.shape == (3, 0)
