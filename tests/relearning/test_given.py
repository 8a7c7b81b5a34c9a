"""A folder of pictures is loaded as the same pictures in shards are: labels, samples, copies under other names."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import pack
from jobs.shared.inputs import list_labelled
from pipeline import layout
from pipeline.deltas.apply import LaidDeltas, protect_shard
from pipeline.errors import InputError
from pipeline.records import Shard
from pipeline.relearning.collection import Collection, join, like_clean, load_labelled, median_side, smallest_hashes
from pipeline.relearning.labels.given import class_numbers
from pipeline.runs.fingerprint import Ingredients
from pipeline.runs.run_record import RunRecord
from pipeline.runs.transaction import ShardTransaction
from pipeline.settings import Settings
from pipeline.shards.inputs import resolve_input
from pipeline.storage.store import Store
from tests.support.packed import photos, write
from tests.support.samples import ExtremeDeltas, image_bytes, noise

PNG = image_bytes(noise(40, 36))


def loaded(folder: Path, limit: int | None = None) -> Collection:
    store, shards = list_labelled(str(folder))
    classes = class_numbers({"clean": shards})
    return join([load_labelled(store, [one], side=32, limit=limit, classes=classes) for one in shards], "here")


def test_class_folders_give_the_labels_and_the_pictures_that_packing_them_gives(tmp_path: Path) -> None:
    source = photos(tmp_path / "in", "cab")
    assert pack.main(["--input", str(source), "--output", str(tmp_path / "packed"), "--shard-images", "5"]) == 0
    ours = loaded(source)
    assert ours.keys == tuple(f"{name}/deep/{number}" for name in "abc" for number in range(4))
    assert ours.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert ours.digest() == loaded(tmp_path / "packed").digest()
    hashes = [smallest_hashes(*list_labelled(str(folder)), 5) for folder in (source, tmp_path / "packed")]
    assert hashes[0] == hashes[1]
    assert loaded(source, hashes[0][-1]).digest() == loaded(tmp_path / "packed", hashes[0][-1]).digest()


def test_numbers_beside_all_images_are_their_labels_wherever_they_lie(tmp_path: Path) -> None:
    write(tmp_path, {"b/1.png": PNG, "b/1.cls": b"7", "2.PNG": PNG, "2.cls": b"0", "a/3.png": PNG, "a/3.cls": b"5"})
    found = loaded(tmp_path)
    assert dict(zip(found.keys, found.labels.tolist(), strict=True)) == {"2": 0, "a/3": 5, "b/1": 7}
    store, shards = list_labelled(str(tmp_path))
    assert median_side(store, shards) == 36


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a/1.png": PNG, "2.png": PNG}, "clean: 2.png has no label: put it into the folder of its class, or a number"),
        ({"a/1.png": PNG, "a/2.png": PNG, "a/2.cls": b"0"}, "clean: 1 images have no .cls beside them, e.g. a/1.png"),
        (
            {"a/1.png": PNG, "a.tar": b"0"},
            "clean: 1 images have no .cls beside them, e.g. a/1.png, but a.tar is a shard",
        ),
        ({"train/a/1.png": PNG, "val/a/1.png": PNG}, "clean has the splits train, val, which are no classes: evaluate"),
        ({"1.png": PNG, "1.cls": b"cat"}, "1 has no usable .cls label"),
    ],
)
def test_pictures_without_a_label_are_refused_by_name(tmp_path: Path, files: dict[str, bytes], words: str) -> None:
    write(tmp_path, files)
    with pytest.raises(InputError) as refused:
        loaded(tmp_path)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_collections_whose_labels_mean_different_things_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "clean", {"a/1.png": PNG, "b/1.png": PNG})
    write(tmp_path / "other", {"a/1.png": PNG, "c/1.png": PNG})
    write(tmp_path / "numbers", {"a/1.png": PNG, "a/1.cls": b"0"})
    _, clean = list_labelled(str(tmp_path / "clean"))
    _, other = list_labelled(str(tmp_path / "other"))
    _, numbers = list_labelled(str(tmp_path / "numbers"))
    assert class_numbers({"clean": clean, "test": clean}) == {"a": 0, "b": 1}
    assert class_numbers({"clean": numbers, "test": [Shard("a.tar", 0, "")]}) == {}
    with pytest.raises(InputError, match="test: 1 of its folders are no classes of clean, e.g. c"):
        class_numbers({"clean": clean, "test": other})
    for pair in ({"clean": clean, "test": numbers}, {"test": numbers, "clean": clean}):
        with pytest.raises(InputError, match=r"^clean is labelled by its folders, test by numbers \(\.cls\)"):
            class_numbers(pair)


def test_only_the_images_of_a_sample_are_read(tmp_path: Path) -> None:
    write(tmp_path, {f"a/{number}.png": image_bytes(noise(32, 32, seed=number)) for number in range(20)})
    store, shards = list_labelled(str(tmp_path))
    (limit,) = smallest_hashes(store, shards, 1)
    (chosen,) = loaded(tmp_path, limit).keys
    for path in tmp_path.rglob("*.png"):
        if path.stem != Path(chosen).name:
            path.write_bytes(b"")
    found = [load_labelled(store, [one], side=32, limit=limit, classes={"a": 0}) for one in shards]
    assert [one.keys for one in found if len(one)] == [(chosen,)]
    assert not any(one.left_out for one in found)


@pytest.mark.parametrize("encode", ["same", "lossless"])
def test_copies_find_their_originals_whatever_they_are_called_now(tmp_path: Path, encode: str) -> None:
    """a.jpg becomes a.jpg.png when it is written without loss; and a key that two originals share is one's alone."""
    pixels = noise(40, 40)
    originals = {"a/1.png": image_bytes(pixels), "a/1.jpg": image_bytes(pixels, "JPEG"), "a/2.jpg": b"broken"}
    write(tmp_path / "in", originals | {"a/2.png": image_bytes(pixels), "b/3.jpg": image_bytes(pixels, "JPEG")})
    clean = resolve_input(str(tmp_path / "in"))
    protect(tmp_path / "in", tmp_path / "out", encode)
    (tmp_path / "out/a/4.png").write_bytes(PNG)  # left by a run that was killed
    ours, theirs = loaded(tmp_path / "out"), loaded(tmp_path / "in")
    assert ours.keys == ("a/1.jpg", "a/1.png", "a/2.png", "b/3")
    assert theirs.keys == ours.keys
    assert like_clean(ours, theirs, "uc").tolist() == [0, 1, 2, 3]
    assert sum(len(unit.images) for unit in clean.shards) == 5
    _, part = list_labelled(f"{tmp_path}/out/*/1.*")  # a pattern still chooses
    assert sorted(image.key for unit in part for image in unit.images) == ["a/1.jpg", "a/1.png"]


def protect(source: Path, output: Path, encode: str) -> None:
    """What a run would write and commit of a folder."""
    listing, settings, store = resolve_input(str(source)), Settings(encode=encode), Store(str(output))
    clusters = {image.key: 0 for unit in listing.shards for image in unit.images}
    ingredients = Ingredients({}, "l", "w", None, None, "cpu", {})
    store.create(layout.RUN, RunRecord("f" * 64, ingredients, "in", len(listing.shards), 0).to_bytes())
    transaction = ShardTransaction(listing.store, store, "f", "p", settings.max_member_bytes, encode)
    for unit in listing.shards:
        transaction.run(
            unit,
            lambda samples, writer: protect_shard(
                samples, writer, LaidDeltas(ExtremeDeltas()), clusters, settings=settings
            ),
        )
