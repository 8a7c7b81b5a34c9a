"""The benchmark that compares encodings starts from JPEGs as people have them, with their labels."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, JpegImagePlugin

from pipeline.records import Sample
from pipeline.shards.tar import read_samples
from tests.bench.encoded_copies import jpegs, median_size
from tests.support.runs import write_collection


def test_pictures_become_jpegs_and_labels_stay(tmp_path: Path) -> None:
    write_collection(tmp_path / "in", shards=2, per_shard=5, side=32)
    found = jpegs(f"{tmp_path}/in/*.tar", tmp_path / "out")
    assert found == f"{tmp_path / 'out'}/*.tar"
    sizes, modes = [], set()
    for name in sorted(path.name for path in (tmp_path / "in").glob("*.tar")):
        with (tmp_path / "in" / name).open("rb") as before, (tmp_path / "out" / name).open("rb") as after:
            pairs = list(
                zip(*(read_samples(stream, max_member_bytes=1 << 24) for stream in (before, after)), strict=True)
            )
        assert len(pairs) == 5
        for original, copy in pairs:
            assert isinstance(original, Sample)
            assert isinstance(copy, Sample)
            assert (copy.key, copy.members["cls"]) == (original.key, original.members["cls"])
            picture = Image.open(io.BytesIO(copy.members["jpg"]))
            assert isinstance(picture, JpegImagePlugin.JpegImageFile)
            assert picture.size == (32, 32)
            assert picture.mode == "L" or JpegImagePlugin.get_sampling(picture) == 2  # 4:2:0
            modes.add(picture.mode)
            sizes.append(len(copy.members["jpg"]))
    assert "RGB" in modes
    assert median_size(tmp_path / "out") == sorted(sizes)[4] / 2 + sorted(sizes)[5] / 2
