"""Every format that pack reads, made by hand or by other libraries; and files that strangers made to do harm."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io
from PIL import Image

from jobs import pack, unpack
from pipeline import layout
from pipeline.errors import InputError
from pipeline.packing.arrays import cifar_batch
from pipeline.packing.pickled import unpickled
from pipeline.records import Sample, read_quarantine
from pipeline.storage.store import Store
from tests.support import runs
from tests.support.batches import as_python_2_wrote_it, names_as_python_2_wrote_them
from tests.support.packed import about, jpeg, packed, write
from tests.support.samples import image_bytes, noise, tar_bytes

WNIDS = ("n01440764", "n02119789", "n04254777")


def run(source: Path, output: Path, *options: str) -> int:
    return pack.main(["--input", str(source), "--output", str(output), *options])


def refused(source: Path, *options: str) -> str:
    """The one line that ends a run before anything is written."""
    output = source.parent / "refused"
    code, said = runs.refusal(pack.main, "--input", str(source), "--output", str(output), *options)
    assert code in (1, 2)
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert not output.exists()
    return said.removeprefix("error: ").rstrip("\n")


def listed(output: Path) -> dict[str, str]:
    """Reasons of what was passed over."""
    found = read_quarantine(Store(str(output)), layout.PACK_PASSED_OVER)
    return {one.key: one.reason.value for one in found}


def pixels(sample: Sample) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(sample.members["png"])))


# --- ImageNet's archives


def imagenet_train(path: Path) -> dict[str, bytes]:
    """A tar of class tars, not in alphabetical order, as published; returns its images by path."""
    images = {f"{wnid}/{wnid}_{n}.JPEG": jpeg(n + 100 * k) for k, wnid in enumerate(WNIDS[::-1]) for n in range(3)}
    tars: list[tuple[str | tarfile.TarInfo, bytes]] = [
        (f"{wnid}.tar", tar_bytes([(p.partition("/")[2], d) for p, d in images.items() if p.startswith(wnid)]))
        for wnid in WNIDS[::-1]
    ]
    path.write_bytes(tar_bytes(tars))
    return images


def test_imagenet_s_training_archive_is_read_where_it_lies(tmp_path: Path) -> None:
    images = imagenet_train(tmp_path / "train.tar")
    assert run(tmp_path / "train.tar", tmp_path / "out") == 0
    samples = packed(tmp_path / "out")
    assert {str(about(one)["path"]): one.members["jpeg"] for one in samples} == images
    assert all(one.members["cls"] == str(WNIDS.index(one.key[:9])).encode() for one in samples)
    assert run(tmp_path / "train.tar", tmp_path / "two", "--first-classes", "2", "--shuffle", "1") == 0
    assert {one.key[:9] for one in packed(tmp_path / "two")} == set(WNIDS[:2])
    with tarfile.open(tmp_path / "train.tar") as tar:
        tar.extractall(tmp_path / "tars", filter="data")
    assert run(tmp_path / "tars", tmp_path / "apart") == 0
    assert {str(about(one)["path"]): one.members["jpeg"] for one in packed(tmp_path / "apart")} == images


def imagenet_val(folder: Path) -> list[str]:
    """Six validation images, the kit's numbers for their classes, and meta.mat; returns the classes by number."""
    names = [f"ILSVRC2012_val_0000000{n}.JPEG" for n in range(1, 7)]
    write(folder, {"val.tar": tar_bytes([(name, jpeg(n)) for n, name in enumerate(names)][::-1])})
    numbers = [3, 1, 2, 2, 1, 3]
    (folder / "truth.txt").write_text("".join(f"{n}\n" for n in numbers))
    by_number = [WNIDS[1], WNIDS[2], WNIDS[0]]
    rows = [(n + 1, wnid, 0) for n, wnid in enumerate(by_number)] + [(4, "n00001740", 3)]
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    scipy.io.savemat(folder / "meta.mat", {"synsets": np.array(rows, dtype=kinds)})
    (folder / "synsets.txt").write_text("".join(f"{wnid} words, more\n" for wnid in by_number))
    return [by_number[n - 1] for n in numbers]


@pytest.mark.parametrize("synsets", ["meta.mat", "synsets.txt"])
def test_validation_images_get_the_labels_of_the_training_classes(tmp_path: Path, synsets: str) -> None:
    classes = imagenet_val(tmp_path)
    truth = ["--ground-truth", str(tmp_path / "truth.txt"), "--synsets", str(tmp_path / synsets)]
    assert run(tmp_path / "val.tar", tmp_path / "out", *truth) == 0
    found = {int(one.key[-8:]): (about(one)["class"], int(one.members["cls"])) for one in packed(tmp_path / "out")}
    assert found == {n: (wnid, WNIDS.index(wnid)) for n, wnid in enumerate(classes, start=1)}


def test_a_ground_truth_that_would_give_wrong_labels_is_refused(tmp_path: Path) -> None:
    imagenet_val(tmp_path)
    truth = ["--ground-truth", str(tmp_path / "truth.txt")]
    assert refused(tmp_path / "val.tar", *truth).endswith("add --synsets FILE, the meta.mat of the development kit")
    (tmp_path / "sorted.txt").write_text("\n".join(WNIDS))
    assert "is in alphabetical order" in refused(
        tmp_path / "val.tar", *truth, "--synsets", str(tmp_path / "sorted.txt")
    )
    (tmp_path / "truth.txt").write_text("1\n2\n3\n")
    said = refused(tmp_path / "val.tar", *truth, "--synsets", str(tmp_path / "synsets.txt"))
    assert said.startswith("--ground-truth has 3 lines, of which none is that of ILSVRC2012_val_00000006.JPEG")
    (tmp_path / "meta.mat").write_bytes((tmp_path / "meta.mat").read_bytes()[:200])
    assert "not the kit's meta.mat" in refused(tmp_path / "val.tar", *truth, "--synsets", str(tmp_path / "meta.mat"))


def test_of_a_truncated_archive_what_is_whole_is_packed_and_the_rest_named(tmp_path: Path) -> None:
    images = imagenet_train(tmp_path / "train.tar")
    data = (tmp_path / "train.tar").read_bytes()
    second = data.index(f"{WNIDS[1]}_1.JPEG".encode())
    (tmp_path / "cut.tar").write_bytes(data[: second + 600])
    assert run(tmp_path / "cut.tar", tmp_path / "out") == 3
    whole = {f"{WNIDS[2]}/{WNIDS[2]}_{n}" for n in range(3)} | {f"{WNIDS[1]}/{WNIDS[1]}_0"}
    samples = packed(tmp_path / "out")
    assert {one.key for one in samples} == whole
    assert all(one.members["jpeg"] == images[str(about(one)["path"])] for one in samples)
    reasons = listed(tmp_path / "out")
    assert reasons[f"{WNIDS[1]}/{WNIDS[1]}_1.JPEG"] == "truncated-shard"
    assert reasons["cut.tar"] == "truncated-shard"


def test_members_that_lead_elsewhere_are_named_and_not_packed(tmp_path: Path) -> None:
    link, device = tarfile.TarInfo("a/link.jpg"), tarfile.TarInfo("a/device.jpg")
    link.type, link.linkname, device.type = tarfile.SYMTYPE, "/etc/passwd", tarfile.CHRTYPE
    members: list[tuple[str | tarfile.TarInfo, bytes]] = [
        *(("../up.jpg", b"x"), ("/root.jpg", b"x"), ("a/../../b.jpg", b"x"), (link, b""), (device, b"")),
        *(("a/one.jpg", b"1"), ("a/one.jpg", b"2"), ("a/One.jpg", b"3"), ("a/zero.jpg", b"")),
    ]
    write(tmp_path, {"in.tar": tar_bytes(members)})
    assert run(tmp_path / "in.tar", tmp_path / "out") == 3
    assert {str(about(one)["path"]): one.members["jpg"] for one in packed(tmp_path / "out")} == {
        "a/one.jpg": b"1",
        "a/One.jpg": b"3",
    }
    assert listed(tmp_path / "out") == {
        "../up.jpg": "unsafe-name",
        "/root.jpg": "unsafe-name",
        "a/../../b.jpg": "unsafe-name",
        "a/link.jpg": "not-a-file",
        "a/device.jpg": "not-a-file",
        "a/zero.jpg": "empty",
        "a/one.jpg": "duplicate-member",
    }


def test_archives_that_pack_does_not_read_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {"a.tar.gz": b"", "b.tar": b"\x1f\x8b" + bytes(1000), "c.tar": b"no archive" * 100})
    assert "is compressed: unpack it first" in refused(tmp_path / "a.tar.gz")
    assert "is gzipped: run gunzip first" in refused(tmp_path / "b.tar")
    assert "no images (jpg, png, webp); 1 cannot be packed" in refused(tmp_path / "c.tar")
    write(tmp_path, {"shard.tar": tar_bytes([("0.jpg", jpeg(0)), ("0.cls", b"1")])})
    assert "it is a shard already" in refused(tmp_path / "shard.tar")


# --- arrays


def cifar(folder: Path) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made = {}
    for name in ("data_batch_1", "data_batch_2", "test_batch"):
        made[name] = rng.integers(0, 256, (6, 3072)).astype(np.uint8)
        write(folder, {name: as_python_2_wrote_it(made[name], [n % 3 for n in range(6)])})
    write(folder, {"batches.meta": names_as_python_2_wrote_them(b"label_names", [b"cat", b"ship", b"dog"])})
    return made


def test_cifar_s_batches_become_png_with_the_exact_pixels(tmp_path: Path) -> None:
    made = cifar(tmp_path / "in")
    assert "add --split train or --split test" in refused(tmp_path / "in")
    assert run(tmp_path / "in", tmp_path / "out", "--split", "train") == 0
    samples = packed(tmp_path / "out")
    assert len(samples) == 12
    for one in samples:
        batch, _, row = one.key.partition("/")[2].rpartition("-")
        expected = made[batch][int(row)].reshape(3, 32, 32).transpose(1, 2, 0)
        assert np.array_equal(pixels(one), expected)
        assert int(one.members["cls"]) == int(row) % 3
        assert about(one)["class"] == ("cat", "ship", "dog")[int(row) % 3]
    assert run(tmp_path / "in", tmp_path / "test", "--split", "test", "--shuffle", "0") == 0
    assert {one.key.partition("-")[0].partition("/")[2] for one in packed(tmp_path / "test")} == {"test_batch"}


def test_a_batch_as_numpy_writes_it_today_is_read_as_well() -> None:
    values = np.arange(2 * 3072, dtype=np.uint32).astype(np.uint8).reshape(2, 3072)
    batch = {b"data": values, b"fine_labels": [4, 5], b"coarse_labels": [0, 1], b"filenames": [b"a.png", b"b.png"]}
    for protocol in range(2, 5):
        arrays = cifar_batch(pickle.dumps(batch, protocol=protocol), "here")
        assert np.array_equal(arrays.pixels[1, 0, 0], values[1, [0, 1024, 2048]])
        assert arrays.labels == [4, 5]
        assert arrays.about == {"filename": ["a.png", "b.png"], "coarse_label": [0, 1]}
    by_columns = pickle.dumps({b"data": np.asfortranarray(values), b"labels": [0, 1]}, protocol=2)
    assert np.array_equal(cifar_batch(by_columns, "here").pixels[1, 0, 0], values[1, [0, 1024, 2048]])


class Calls:
    """Pickles to a call of anything."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_would_run_something_is_refused(tmp_path: Path, protocol: int) -> None:
    cifar(tmp_path / "in")
    hostile = [
        Calls(os.mkdir, str(tmp_path / "ran")),
        Calls(eval, f"__import__('os').mkdir('{tmp_path}/ran')"),
        Calls(getattr, np.ndarray, "tofile"),
        Calls(np.load, str(tmp_path / "in/data_batch_1")),
        Calls(np.zeros, 1 << 50),
    ]
    for one in hostile:
        data = pickle.dumps({b"data": one, b"labels": []}, protocol=protocol)
        write(tmp_path, {"in/data_batch_1": data})
        assert "which has no place in a data set" in refused(tmp_path / "in", "--split", "train")
        write(tmp_path, {"in/batches.meta": data})
        assert "which has no place in a data set" in refused(tmp_path / "in", "--split", "test")
    assert not (tmp_path / "ran").exists()


def test_damaged_pickles_end_in_one_kind_of_error() -> None:
    good = as_python_2_wrote_it(np.zeros((3, 3072), np.uint8), [0, 1, 2])
    rng = random.Random(0)
    for _ in range(3000):
        bad = bytearray(good[: rng.choice((len(good), rng.randrange(len(good))))])
        for _ in range(rng.randrange(1, 5)):
            at = rng.choice((rng.randrange(200), rng.randrange(len(bad) or 1), -rng.randrange(1, 60))) % (len(bad) or 1)
            bad[at : at + 1] = rng.choice(
                (b"", bytes([rng.randrange(256)]), rng.choice((b"R", b"b", b"c", b"\x8d", b"(")))
            )
        try:
            arrays = cifar_batch(bytes(bad), "here")
        except InputError:
            continue
        assert arrays.pixels.shape[1:] == (32, 32, 3)
        assert len(arrays.labels) == len(arrays.pixels)


def test_an_array_that_claims_more_than_it_has_allocates_nothing() -> None:
    small = as_python_2_wrote_it(np.zeros((1, 3072), np.uint8), [0])
    claims = small.replace((3072).to_bytes(4, "little"), (1 << 30).to_bytes(4, "little"), 1)
    with pytest.raises(InputError, match="whose shape does not fit its bytes"):
        unpickled(claims, "here")


@pytest.mark.parametrize(
    ("arrays", "options"),
    [
        ({"x_train": (5, 9, 7), "y_train": (5,), "x_test": (2, 9, 7), "y_test": (2,)}, ["--split", "train"]),
        ({"train_images": (5, 9, 7, 3), "train_labels": (5, 1), "val_images": (1, 9, 7, 3)}, []),
        ({"images": (5, 3, 9, 7), "labels": (5,)}, []),
        ({"data": (5, 9, 7, 1), "labels": (5,)}, []),
    ],
)
def test_npz_files_of_every_common_form(tmp_path: Path, arrays: dict[str, tuple[int, ...]], options: list[str]) -> None:
    rng = np.random.default_rng(0)
    made = {
        name: rng.integers(0, 256, shape).astype(np.uint8) if len(shape) > 2 else np.arange(shape[0]).reshape(shape) % 3
        for name, shape in arrays.items()
    }
    np.savez_compressed(tmp_path / "set.npz", **made)
    assert run(tmp_path / "set.npz", tmp_path / "out", *options) == 0
    samples = sorted(packed(tmp_path / "out"), key=lambda one: one.key[-6:])
    images = next(iter(made.values()))
    images = images.transpose(0, 2, 3, 1) if images.shape[1] == 3 else images
    assert [int(one.members["cls"]) for one in samples] == [0, 1, 2, 0, 1]
    for one, image in zip(samples, images, strict=True):
        assert np.array_equal(pixels(one), image.squeeze())


def npy(header: str, body: bytes) -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + body


def test_npz_files_that_are_none_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    np.savez(path, images=np.zeros((2, 4, 4), np.uint8), labels=np.array([{}, {}], dtype=object))
    assert "labels is no array of numbers" in refused(path)
    np.savez(path, images=np.zeros((2, 4, 4)), labels=np.zeros(2, int))
    assert "images must be uint8 [n, H, W] or [n, H, W, C], not float64 [2, 4, 4]" in refused(path)
    np.savez(path, images=np.zeros((2, 4, 4), np.uint8), labels=np.zeros(3, int))
    assert "2 images need as many labels" in refused(path)
    np.savez(path, images=np.zeros((2, 4, 4), np.uint8), labels=np.array([0, -1]))
    assert "labels must lie between 0 and 1,000,000, not -1 to 0" in refused(path)
    np.savez(path, x_train=np.zeros((2, 4, 4), np.uint8), y_train=np.zeros(2, int), x_test=0, y_test=0)
    assert "add --split train or --split test" in refused(path)
    path.write_bytes(path.read_bytes()[:300])
    assert "not an .npz file of arrays" in refused(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        shape = f"({1 << 40}, 64, 64)"
        archive.writestr("images.npy", npy(f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}", b"0"))
        archive.writestr("labels.npy", npy("{'descr': '<i8', 'fortran_order': False, 'shape': (0,), }", b""))
    assert "does not fit its header" in refused(path)


# --- Parquet


def hugging_face(
    path: Path, rows: list[tuple[bytes | None, int]], names: list[str] | None = None, **more: object
) -> None:
    """A file as `datasets` writes it, several row groups."""
    image = pa.array(
        [{"bytes": data, "path": f"{n}.jpg"} for n, (data, _) in enumerate(rows)],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    table = pa.table({"image": image, "label": pa.array([label for _, label in rows], pa.int64()), **more})
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=4)


def test_parquet_as_hugging_face_writes_it_and_back(tmp_path: Path) -> None:
    rows = [(jpeg(n), n % 3) for n in range(10)]
    names = ["zebra", "ant", "bee"]
    hugging_face(tmp_path / "in/data/train-00000-of-00002.parquet", rows[:6], names, score=[0.5 * n for n in range(6)])
    hugging_face(
        tmp_path / "in/data/train-00001-of-00002.parquet", rows[6:], names, score=[0.5 * n for n in range(6, 10)]
    )
    hugging_face(tmp_path / "in/data/test-00000-of-00001.parquet", rows[:1], names, score=[0.0])
    assert "has the splits test, train: add --split NAME" in refused(tmp_path / "in")
    for order in ([], ["--shuffle", "5"]):
        output = tmp_path / f"out{len(order)}"
        assert run(tmp_path / "in", output, "--split", "train", "--shard-images", "4", *order) == 0
        samples = packed(output)
        found = {one.members["jpg"]: (int(one.members["cls"]), about(one)["class"]) for one in samples}
        assert found == {data: (label, names[label]) for data, label in rows}
        assert {about(one)["score"] for one in samples} == {0.5 * n for n in range(10)}
    assert packed(tmp_path / "out0")[7].key == "data/train-00001-of-00002/00000001"
    back = tmp_path / "back"
    assert unpack.main(["--input", str(tmp_path / "out0"), "--output", str(back), "--format", "parquet"]) == 0
    tables = [pq.read_table(path) for path in sorted(back.glob("*.parquet"))]
    again = [row for table in tables for row in table.to_pylist()]
    assert [(row["image"]["bytes"], row["label"], row["class"], row["score"]) for row in again] == [
        (data, label, names[label], 0.5 * n) for n, (data, label) in enumerate(rows)
    ]
    assert run(back, tmp_path / "again") == 0
    assert [one.members["jpg"] for one in packed(tmp_path / "again")] == [data for data, _ in rows]


def test_parquet_like_laion_with_captions(tmp_path: Path) -> None:
    columns = {"url": ["u0", "u1"], "caption": ["a cat", None], "jpg": [jpeg(0), image_bytes(noise(4, 4))]}
    pq.write_table(pa.table({**columns, "embedding": [[1.0], [2.0]]}), tmp_path / "in.parquet")
    assert run(tmp_path / "in.parquet", tmp_path / "out") == 0
    one, two = packed(tmp_path / "out")
    assert (one.members["jpg"], one.members["txt"], about(one)["url"]) == (columns["jpg"][0], b"a cat", "u0")
    assert sorted(two.members) == ["json", "png"]


def test_rows_without_an_image_are_named(tmp_path: Path) -> None:
    hugging_face(tmp_path / "in.parquet", [(jpeg(0), 0), (None, 1), (b"", 0), (b"GIF89a....", 0), (bytes(9000), 0)])
    assert run(tmp_path / "in.parquet", tmp_path / "out", "--max-member-bytes", "4k") == 3
    assert len(packed(tmp_path / "out")) == 1
    found = read_quarantine(Store(str(tmp_path / "out")), layout.pack_quarantine("shard-000000.tar"))
    assert [one.reason.value for one in found] == ["no-image", "empty", "unsupported-format", "too-large"]


def test_a_damaged_row_group_costs_its_rows_only(tmp_path: Path) -> None:
    rows = [(jpeg(n), 0) for n in range(12)]
    hugging_face(tmp_path / "in.parquet", rows)
    column = pq.ParquetFile(tmp_path / "in.parquet").metadata.row_group(1).column(0)
    data = bytearray((tmp_path / "in.parquet").read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    (tmp_path / "in.parquet").write_bytes(data)
    assert run(tmp_path / "in.parquet", tmp_path / "out") == 3
    assert [one.members["jpg"] for one in packed(tmp_path / "out")] == [rows[n][0] for n in (0, 1, 2, 3, 8, 9, 10, 11)]
    found = read_quarantine(Store(str(tmp_path / "out")), layout.pack_quarantine("shard-000000.tar"))
    assert [one.key for one in found] == [f"in/0000000{n}" for n in (4, 5, 6, 7)]


def test_parquet_of_wrong_types_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"image": ["a.jpg"], "label": [0]}), path)
    assert "no column with the bytes of images among image: string, label: int64" in refused(path)
    pq.write_table(pa.table({"url": ["u"], "caption": ["c"]}), path)
    assert "it has URLs: download the images first" in refused(path)
    hugging_face(path, [(jpeg(0), 7)], ["only"])
    assert "label 7 is none of 1 classes" in refused(path)
    hugging_face(path, [(jpeg(0), -5)])
    assert "labels must lie between" in refused(path)
    path.write_bytes(path.read_bytes()[:-20])
    assert "not Parquet, or damaged" in refused(path)
    hugging_face(tmp_path / "two/a.parquet", [(jpeg(0), 0)])
    hugging_face(tmp_path / "two/b.parquet", [(jpeg(0), 0)], other=[1])
    assert "has other columns than a.parquet: pack them apart" in refused(tmp_path / "two")


def test_options_of_another_format_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {"in/a/0.jpg": jpeg(0), "t.txt": b"n01440764\n", "x.jpg": b"x"})
    assert refused(tmp_path / "in", "--ground-truth", str(tmp_path / "t.txt")).startswith("--ground-truth is for tar; ")
    assert refused(tmp_path / "x.jpg").endswith("is a file: expected a folder, or a .tar, .npz or .parquet")
    assert "no images (jpg, png, webp), 1 other files" in refused(write(tmp_path / "none", {"a.txt": b"x"}))
    (tmp_path / "void").mkdir()
    assert refused(tmp_path / "void").endswith("is empty; check the path")
    assert "not found" in refused(tmp_path / "gone")


def test_single_files_in_a_bucket_are_read_like_local_ones(bucket: str, tmp_path: Path) -> None:
    imagenet_train(tmp_path / "in.tar")
    hugging_face(tmp_path / "in.parquet", [(jpeg(n), n % 2) for n in range(9)])
    np.savez(tmp_path / "in.npz", images=np.arange(128, dtype=np.uint8).reshape(2, 8, 8), labels=np.arange(2))
    for kind in ("tar", "parquet", "npz"):
        local = tmp_path / f"in.{kind}"
        Store(f"{bucket}/sets").put(local.name, local.read_bytes())
        assert run(local, tmp_path / kind, "--shuffle", "2", "--shard-images", "4") == 0
        there = Store(f"{bucket}/{kind}")
        given = [
            "--input",
            f"{bucket}/sets/{local.name}",
            "--output",
            there.url,
            "--shuffle",
            "2",
            "--shard-images",
            "4",
        ]
        assert pack.main(given) == 0
        for path in sorted((tmp_path / kind).glob("*.tar")):
            assert there.read(path.name) == path.read_bytes()
