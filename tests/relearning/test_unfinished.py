"""What an unfinished run has written so far is not evaluated, certified or trained on as if it were the whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import pack, protect_imagenet
from jobs.shared.inputs import list_input, list_labelled
from pipeline import layout
from pipeline.errors import InputError
from pipeline.relearning.report.certificate import fit_at
from pipeline.runs.fingerprint import Ingredients
from pipeline.runs.run_record import RunRecord
from pipeline.settings import EMBEDDED_SURROGATE
from pipeline.storage.store import Store
from tests.support.packed import photos, write
from tests.support.samples import image_bytes, noise, tar_bytes


def protected(folder: Path, num_shards: int, committed: int) -> None:
    """As a run leaves its output that was stopped between two shards, the second of which is not committed yet."""
    shard = tar_bytes([("0.png", image_bytes(noise(32, 32))), ("0.cls", b"0")])
    ingredients = Ingredients({}, "l", "w", None, None, "cpu", {})
    write(folder, {f"{number}.tar": shard for number in range(min(num_shards, committed + 1))})
    write(folder, {layout.RUN: RunRecord("f" * 64, ingredients, "in", num_shards, 0).to_bytes()})
    write(folder, {layout.PROTECTION: b"p"})
    write(folder, {layout.commit(f"{number}.tar"): b"{}" for number in range(committed)})


@pytest.mark.parametrize(
    ("num_shards", "committed", "words"),
    [
        (3, 1, "2 of 3 shards have no commit, e.g. 1.tar: finish the run that writes them"),
        (2, 1, "1 of 2 shards have no commit, e.g. 1.tar: finish the run that writes them"),
        (2, 0, "2 of 2 shards have no commit, e.g. 0.tar: finish the run that writes them"),
    ],
)
def test_an_unfinished_protection_is_refused(tmp_path: Path, num_shards: int, committed: int, words: str) -> None:
    protected(tmp_path, num_shards, committed)
    for listed in (list_input, list_labelled):
        with pytest.raises(InputError, match=words):
            listed(str(tmp_path))
    with pytest.raises(InputError, match=f"x: {committed} of {num_shards} shards are committed; finish the run first"):
        fit_at(Store(str(tmp_path)), "x")


def test_a_finished_one_is_taken_and_a_pattern_still_chooses(tmp_path: Path) -> None:
    protected(tmp_path, 2, 2)
    assert [shard.name for shard in list_labelled(str(tmp_path))[1]] == ["0.tar", "1.tar"]
    assert [shard.name for shard in list_labelled(f"{tmp_path}/0.tar")[1]] == ["0.tar"]


def test_half_packed_shards_are_refused(tmp_path: Path) -> None:
    photos(tmp_path / "in", "ab")
    assert pack.main(["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--shard-images", "4"]) == 0
    assert len(list_labelled(str(tmp_path / "out"))[1]) == 2
    (tmp_path / "out" / layout.pack_commit("shard-000001.tar")).unlink()
    with pytest.raises(InputError, match=r"1 of 2 shards have no commit, e\.g\. shard-000001\.tar"):
        list_labelled(str(tmp_path / "out"))
    options = ["--input", str(tmp_path / "out"), "--output", str(tmp_path / "protected"), "--dry-run"]
    with pytest.raises(InputError, match="1 of 2 shards have no commit"):
        protect_imagenet.main([*options, "--surrogate", EMBEDDED_SURROGATE])
