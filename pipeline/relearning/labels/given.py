"""The labels that a collection comes with: a number in the `.cls` beside each image, or the folder that it lies in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from pipeline.errors import InputError
from pipeline.packing.folder import check_no_splits
from pipeline.packing.items import class_folder
from pipeline.records import LooseImage, Sample, Shard
from pipeline.shards.names import stem_of
from pipeline.shards.samples import label_of

Classes = Mapping[str, int]  # class folder -> label; {}: labels are numbers in .cls files


def class_numbers(collections: Mapping[str, Sequence[Shard]]) -> Classes:
    """How the images of an evaluation are labelled: {} by number, else by their first folders, as when packing.

    collections  name -> shards and units of loose images; the first decides which classes there are

    Folders are numbered in sorted order. Raises InputError for collections of which some are labelled by number and
    others by folder, and for class folders that the first collection lacks.
    """
    folders = {name: class_folders(shards, name) for name, shards in collections.items()}
    first, classes = next(iter(folders.items()))
    for name, found in folders.items():
        if bool(found) != bool(classes):
            by_folder, by_number = (name, first) if found else (first, name)
            raise InputError(
                f"{by_folder} is labelled by its folders, {by_number} by numbers (.cls), and which number is which "
                "folder is not known: use both as folders, or pack both into shards"
            )
        if unknown := sorted(set(found) - set(classes)):
            raise InputError(
                f"{name}: {len(unknown):,} of its folders are no classes of {first}, e.g. {unknown[0]}: "
                "the first folder of an image is its class"
            )
    return {name: number for number, name in enumerate(classes)}


def class_folders(shards: Sequence[Shard], where: str) -> tuple[str, ...]:
    """The classes of a collection, sorted, if its images are labelled by their first folders; () if by number.

    where  the collection, for messages
    Raises InputError for images without a label, and if only a part of the images has a `.cls`.
    """
    tars = [shard.name for shard in shards if not shard.images]
    by_folder = [image for shard in shards for image in shard.images if not _has_number(image)]
    if not by_folder:
        return ()
    named = by_folder[0].files[0].name
    if (tar := next(iter(tars), None)) is not None or len(by_folder) < sum(len(shard.images) for shard in shards):
        other = f"{tar} is a shard, whose labels are numbers" if tar else "others have one"
        raise InputError(f"{where}: {len(by_folder):,} images have no .cls beside them, e.g. {named}, but {other}")
    if (bare := next((image for image in by_folder if not class_folder(image.key)), None)) is not None:
        raise InputError(
            f"{where}: {bare.files[0].name} has no label: put it into the folder of its class, or a number into "
            f"{stem_of(bare.files[0].name)}.cls"
        )
    classes = {class_folder(image.key) for image in by_folder}
    check_no_splits(classes, where, "evaluate one of them, as in --clean PHOTOS/train --test PHOTOS/val")
    return tuple(sorted(classes))


def given_label(sample: Sample, classes: Classes, where: str) -> int:
    """The label of a sample. Raises InputError, naming it, if it has none."""
    return classes[class_folder(sample.key)] if classes else label_of(sample, where)


def _has_number(image: LooseImage) -> bool:
    return "cls" in _suffixes(image)


def _suffixes(image: LooseImage) -> Iterator[str]:
    """Suffixes of its files, as they are in its sample."""
    start = len(stem_of(image.files[0].name)) + 1
    return (file.name[start:] for file in image.files)
