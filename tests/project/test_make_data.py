"""make_data.py on sets of the same layout that are made here: what it chooses."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.packing.arrays import cifar_batch
from tests import make_data
from tests.support.batches import as_python_2_wrote_it
from tests.support.data import set_at_hand
from tests.support.samples import read

UNKNOWN = -1


@pytest.fixture
def batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six batches of noise, 300 images each, of which 200 are at hand; 60 of a class to train on, 40 to test."""
    monkeypatch.setattr(make_data, "AT_HAND", {number: 200 for number in (1, 2, 3, 4, 5, 0)})
    monkeypatch.setattr(make_data, "CIFAR10_TRAIN", 60)
    monkeypatch.setattr(make_data, "CIFAR10_TEST", 40)
    rng = np.random.default_rng(0)
    folder = tmp_path / "batches"
    folder.mkdir()
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        pixels = rng.integers(0, 256, (300, 3072)).astype(np.uint8)
        (folder / name).write_bytes(as_python_2_wrote_it(pixels, [index % 10 for index in range(300)]))
    return folder


def labels_and_origins(folder: Path, part: str) -> list[tuple[int, str]]:
    found = []
    for path in sorted(folder.glob(f"*-{part}-*")):
        for sample in read(path.read_bytes()):
            found.append((int(sample.members["cls"]), sample.members["json"].decode()))
    return found


def test_cifar10_is_cut_by_class_in_the_order_of_its_batches(batches: Path, tmp_path: Path) -> None:
    make_data.main(["--cifar10", str(batches), "--output", str(tmp_path / "data")])
    folder = tmp_path / "data" / "cifar10"
    train, test = (labels_and_origins(folder, part) for part in ("train", "test"))
    assert Counter(label for label, _ in train) == dict.fromkeys(range(10), 60)
    assert Counter(label for label, _ in test) == dict.fromkeys(range(10), 40)
    assert Counter(origin.split()[1].split("[")[0] for _, origin in train) == {
        f"data_batch_{number}": 200 for number in (1, 2, 3)
    }
    assert Counter(origin.split()[1].split("[")[0] for _, origin in test) == {"test_batch": 200, "data_batch_4": 200}
    sample = read((folder / "cifar10-train-000000.tar.gz").read_bytes())[0]
    _, origin = sample.members["json"].decode().split("CIFAR-10 ")
    name, index = origin.rstrip('"}]').split("[")
    pixels, _, _ = cifar_batch((batches / name).read_bytes(), name)
    assert sample.key == "c10-train-00000"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample.members["webp"]))), pixels[int(index)])


def photograph(path: Path, side: int, mode: str, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3)).astype(np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, "JPEG")


def test_imagenette_is_squeezed_and_grey_files_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_data, "IMAGENETTE_TRAIN", 2)
    monkeypatch.setattr(make_data, "IMAGENETTE_TEST", 1)
    for part in ("train", "val"):
        for wnid in make_data.IMAGENETTE:
            for number in range(3):
                mode = "L" if number == 0 else "RGB"
                photograph(tmp_path / "given" / part / wnid / f"{wnid}_{number}.JPEG", 160, mode, number)
    make_data.main(["--imagenette", str(tmp_path / "given"), "--output", str(tmp_path / "data")])
    (path,) = (tmp_path / "data" / "imagenette").glob("*-train-*")
    samples = read(path.read_bytes())
    assert Counter(sample.members["cls"] for sample in samples) == {str(n).encode(): 2 for n in range(10)}
    assert not [sample for sample in samples if b"_0.JPEG" in sample.members["json"]]
    assert Image.open(io.BytesIO(samples[0].members["jpg"])).size == (144, 144)
    with tarfile.open(path) as tar:
        assert tar.getnames()[:3] == ["inette-train-00000.jpg", "inette-train-00000.cls", "inette-train-00000.json"]


def test_tiny_imagenet_takes_its_labels_from_the_annotations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_data, "TINY_IMAGENET", ["n01443537", "n01629819"])
    monkeypatch.setattr(make_data, "TINY_TRAIN", 2)
    monkeypatch.setattr(make_data, "TINY_TEST", 1)
    given = tmp_path / "given"
    for label, wnid in enumerate(["n01443537", "n01629819", "n99999999"]):
        for number in range(2):
            photograph(given / "train" / wnid / "images" / f"{wnid}_{number}.JPEG", 64 - 32 * number, "RGB", number)
        photograph(given / "val" / "images" / f"val_{label}.JPEG", 64, "RGB", label)
    (given / "words.txt").write_text("n01443537\tgoldfish, Carassius auratus\nn01629819\tsalamander\n")
    (given / "val" / "val_annotations.txt").write_text(
        "val_0.JPEG\tn01443537\t0\t0\t1\t1\nval_1.JPEG\tn01629819\t0\t0\t1\t1\nval_2.JPEG\tn99999999\t0\t0\t1\t1\n"
    )
    make_data.main(["--tiny-imagenet", str(given), "--output", str(tmp_path / "data")])
    test = labels_and_origins(tmp_path / "data" / "tinyimagenet32", "test")
    assert sorted(label for label, _ in test) == [0, 1]
    assert '"label":"goldfish"' in min(test)[1]
    samples = read((tmp_path / "data/tinyimagenet32/tinyimagenet32-train-000000.tar.gz").read_bytes())
    kept = next(sample for sample in samples if b"n01443537_1.JPEG" in sample.members["json"])
    assert kept.members["jpg"] == (given / "train/n01443537/images/n01443537_1.JPEG").read_bytes()


def test_too_few_images_end_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "train" / "n01440764").mkdir(parents=True)
    with pytest.raises(SystemExit, match="n01440764 has 0 images in colour; 70 are needed"):
        make_data.main(["--imagenette", str(tmp_path), "--output", str(tmp_path / "data")])


@pytest.mark.slow
def test_the_cut_is_that_of_the_published_results(tmp_path: Path) -> None:
    """Batches rebuilt from the set at hand give its samples again: keys, order, classes and pixels."""
    folder = set_at_hand("cifar10")
    names = {number: f"data_batch_{number}" if number else "test_batch" for number in range(6)}
    pixels = {name: np.zeros((4000, 3072), np.uint8) for name in names.values()}
    labels = {name: [UNKNOWN] * 4000 for name in names.values()}
    wanted = {}
    for part in ("train", "test"):
        for path in sorted(folder.glob(f"cifar10-{part}-*.tar.gz")):
            for sample in read(path.read_bytes()):
                (image,) = (data for suffix, data in sample.members.items() if suffix in ("webp", "png"))
                wanted[sample.key] = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))
                name, _, index = sample.members["json"].decode().partition("CIFAR-10 ")[2].partition("[")
                row = int(index.partition("]")[0])
                pixels[name][row] = wanted[sample.key].transpose(2, 0, 1).reshape(-1)
                labels[name][row] = int(sample.members["cls"])
    left = Counter(dict.fromkeys(range(10), make_data.CIFAR10_TRAIN + make_data.CIFAR10_TEST))
    left.subtract(label for label in labels["test_batch"] if label != UNKNOWN)
    for number, count in make_data.AT_HAND.items():
        rows = labels[names[number]]
        for row in range(count):
            # whose label the set does not tell was passed over: its class had all it needed by then
            rows[row] = min(left, key=lambda label: left[label]) if rows[row] == UNKNOWN else rows[row]
            left[rows[row]] -= number > 0
    given = tmp_path / "batches"
    given.mkdir()
    for name in names.values():
        (given / name).write_bytes(as_python_2_wrote_it(pixels[name], labels[name]))
    make_data.main(["--cifar10", str(given), "--output", str(tmp_path / "data")])
    made = {}
    for path in sorted((tmp_path / "data" / "cifar10").glob("*.tar.gz")):
        for sample in read(path.read_bytes()):
            made[sample.key] = np.asarray(Image.open(io.BytesIO(sample.members["webp"])).convert("RGB"))
    assert made.keys() == wanted.keys()
    assert all(np.array_equal(made[key], image) for key, image in wanted.items())
