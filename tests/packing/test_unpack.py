"""unpack.py from end to end, in this process: the files that shards were made of, and what protection changed."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from PIL.ExifTags import Base

from jobs import pack, unpack
from pipeline import layout
from pipeline.records import read_quarantine
from pipeline.shards.photographs import photograph
from pipeline.storage.store import Store
from tests.support import runs
from tests.support.packed import digests, jpeg, photos, write
from tests.support.samples import image_bytes, noise, tar_bytes
from tests.support.uploads import small_protection


def run(source: Path, output: Path, *options: str) -> int:
    return pack.main(["--input", str(source), "--output", str(output), *options])


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "_scumble" not in path.parts
    }


def test_packing_and_unpacking_give_the_folder_again(tmp_path: Path) -> None:
    source = photos(tmp_path / "in")
    write(source, {"a/a.jpg": jpeg(1), "a/A.jpg": jpeg(2), "a/a.png": image_bytes(noise(4, 4)), "c/ü.v2.webp": jpeg(3)})
    assert run(source, tmp_path / "shards", "--shuffle", "0", "--shard-images", "5") == 0
    for _ in range(2):
        assert unpack.main(["--input", str(tmp_path / "shards"), "--output", str(tmp_path / "back")]) == 0
    assert tree(tmp_path / "back") == tree(source)
    assert not (tmp_path / "back/labels.csv").exists()


def test_labels_that_no_folder_tells_come_back_as_a_table(tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"x/0.jpg": jpeg(0), "x/1.jpg": jpeg(1)})
    (tmp_path / "t.csv").write_text('path,label\nx/0.jpg,"a, b"\nx/1.jpg,c\n')
    assert run(source, tmp_path / "shards", "--labels", str(tmp_path / "t.csv")) == 0
    assert unpack.main(["--input", str(tmp_path / "shards"), "--output", str(tmp_path / "back")]) == 0
    with (tmp_path / "back/labels.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["path", "label"], ["x/0.jpg", "a, b"], ["x/1.jpg", "c"]]


def test_what_a_json_says_beyond_path_and_class_is_unpacked(tmp_path: Path) -> None:
    image = image_bytes(noise(4, 4))
    told = b'{"path": "x/0.png", "class": "x", "url": "u", "w": null}'
    members: list[tuple[str | tarfile.TarInfo, bytes]] = [("0.png", image), ("0.json", told)]
    members += [("1.png", image), ("1.json", b'{"path": "x/1.png", "class": "x", "w": 5}')]
    members += [("2.png", image), ("2.json", b'{"path": "x/2.png", "class": "y"}')]
    members += [("2.cls", b"0"), ("labels.png", image), ("labels.csv", b"mine")]
    write(tmp_path / "in", {"s.tar": tar_bytes(members)})
    assert unpack.main(["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]) == 3
    found = tree(tmp_path / "out")
    assert {name for name in found if not name.endswith(".png")} == {"x/0.json", "x/1.json", "labels.csv"}
    assert found["x/0.json"] == told
    assert found["labels.csv"].startswith(b"path,label\n")
    refused = read_quarantine(Store(str(tmp_path / "out")), layout.pack_quarantine("s.tar"))
    assert [(one.key, one.reason.value) for one in refused] == [("labels.csv", "unusable-name")]
    assert unpack.main(["--input", str(tmp_path / "in"), "--output", str(tmp_path / "p"), "--format", "parquet"]) == 0
    assert pq.read_table(tmp_path / "p/s.parquet")["w"].to_pylist() == [None, 5, None, None]


def test_unpacking_never_leaves_its_folder_nor_overwrites(tmp_path: Path) -> None:
    def sample(key: str, path: object, data: bytes) -> list[tuple[str | tarfile.TarInfo, bytes]]:
        return [(f"{key}.png", data), (f"{key}.json", json.dumps({"path": path}).encode())]

    one, two = (image_bytes(noise(4, 4, seed=seed)) for seed in (1, 2))
    members = sample("0", "../../out.png", one) + sample("1", "/abs.png", one) + sample("2", "a.png", one)
    members += (
        sample("3", "a.png", two) + sample("4", "_scumble/pack/run.json.png", one) + sample("5", "a.png/b.png", one)
    )
    members += sample("6", 7, one) + sample("7", "b.jpg", one) + [("8.txt", b"no image")]
    write(tmp_path / "in", {"s.tar": tar_bytes(members)})
    assert unpack.main(["--input", str(tmp_path / "in"), "--output", str(tmp_path / "deep/out")]) == 3
    assert tree(tmp_path / "deep/out") == {"a.png": one, "6.png": one, "b.jpg.png": one}
    assert {path.name for path in tmp_path.iterdir()} == {"in", "deep"}
    refused = read_quarantine(Store(str(tmp_path / "deep/out")), layout.pack_quarantine("s.tar"))
    assert [one.reason.value for one in refused] == [
        *("unsafe-name", "unsafe-name", "duplicate-member", "unsafe-name", "unusable-name", "no-image")
    ]


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_json_that_no_column_fits_is_unpacked_all_the_same(tmp_path: Path, kind: str) -> None:
    image = image_bytes(noise(4, 4))
    odd = [
        '{"x": 1e999, "class": "\\ud800"}',
        '{"x": 1' + "0" * 40 + "}",
        '{"x": [1, {"y": null}], "label": 3}',
        "[1]",
        "{",
        "\xff",
    ]
    odd += ['{"x": null, "image": 1, "\\ud800": "\\ud800"}', "[" * 100_000]
    members: list[tuple[str | tarfile.TarInfo, bytes]] = []
    for n, text in enumerate(odd):
        members += [(f"{n}.png", image), (f"{n}.cls", b"1"), (f"{n}.json", text.encode("latin-1"))]
    write(tmp_path / "in", {"s.tar": tar_bytes(members)})
    assert unpack.main(["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--format", kind]) == 0
    written = [data for name, data in tree(tmp_path / "out").items() if name.endswith(".png")]
    if kind == "parquet":
        written = [one["bytes"] for one in pq.read_table(tmp_path / "out/s.parquet")["image"].to_pylist()]
    assert written == [image] * len(odd)


def test_shards_without_a_commit_are_not_unpacked(tmp_path: Path) -> None:
    source = photos(tmp_path / "in")
    assert run(source, tmp_path / "shards", "--shard-images", "5") == 0
    (tmp_path / "shards" / layout.pack_commit("shard-000001.tar")).unlink()
    code, said = runs.refusal(unpack.main, "--input", str(tmp_path / "shards"), "--output", str(tmp_path / "back"))
    assert (code, said) == (
        1,
        f"error: {tmp_path}/shards: 1 of 3 shards have no commit, e.g. shard-000001.tar: finish the run that writes "
        "them\n",
    )


def test_a_bucket_is_packed_and_unpacked_like_a_folder(bucket: str, tmp_path: Path) -> None:
    source = photos(tmp_path / "in")
    store = Store(f"{bucket}/in")
    for name, data in tree(source).items():
        store.put(name, data)
    assert pack.main(["--input", store.url, "--output", f"{bucket}/out", "--shard-images", "5"]) == 0
    assert run(source, tmp_path / "out", "--shard-images", "5") == 0
    there = Store(f"{bucket}/out")
    assert {name: hashlib.sha256(there.read(name)).hexdigest() for name in digests(tmp_path / "out")} == digests(
        tmp_path / "out"
    )
    assert unpack.main(["--input", f"{bucket}/out", "--output", f"{bucket}/back"]) == 0
    back = Store(f"{bucket}/back")
    assert {name: back.read(name) for name in back.names() if not name.startswith("_scumble")} == tree(source)


@pytest.mark.ray
@pytest.mark.slow
def test_a_folder_that_is_packed_protected_and_unpacked_differs_within_epsilon_alone(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[Base.Artist] = "somebody"
    for n in range(24):
        path = tmp_path / "in" / "ab"[n % 2] / f"{n:02d}.{('png', 'JPEG')[n % 3 == 0]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph("coffee")[10 * n : 10 * n + 48, 10 * n : 10 * n + 64]).save(path, exif=exif)
    options = ["--shuffle", "1", "--shard-images", "9", "--ray", "--workers", "1"]
    command = [sys.executable, str(runs.ROOT / "jobs/pack.py"), "--input", str(tmp_path / "in")]
    subprocess.run([*command, "--output", str(tmp_path / "shards"), *options], check=True, timeout=300)
    assert run(tmp_path / "in", tmp_path / "here", *options[:4]) == 0
    assert digests(tmp_path / "shards") == digests(tmp_path / "here")
    (tmp_path / "p.safetensors").write_bytes(small_protection().to_bytes())
    given = ("--protection", str(tmp_path / "p.safetensors"))
    done = runs.protect(str(tmp_path / "shards"), str(tmp_path / "protected"), *given)
    assert done.returncode == 0, done.stderr
    assert unpack.main(["--input", str(tmp_path / "protected"), "--output", str(tmp_path / "out")]) == 0
    assert tree(tmp_path / "out").keys() == tree(tmp_path / "in").keys()
    changes = []
    for name, original in tree(tmp_path / "in").items():
        before, after = (Image.open(io.BytesIO(data)) for data in (original, tree(tmp_path / "out")[name]))
        assert (after.size, after.format) == (before.size, before.format)
        assert after.getexif()[Base.Artist] == "somebody"
        if name.endswith(".png"):
            changes.append(np.abs(np.asarray(after).astype(int) - np.asarray(before)).max())
    assert 0 < max(changes) <= 16
