"""Which member of a sample is its image, which sidecars are allowed, and decoding it.

Sidecars are passed through unchanged, so they must not contain a second, unprotected copy. A sidecar is passed on if

- its last extension is one of TEXT_SUFFIXES, and
- it is plain text without a picture in it: see `pipeline.pictures.formats.hidden_in`.

Anything else (masks, thumbnails, arrays, video, archives, pickles, unknown extensions) sends the sample to quarantine,
unless the user vouches for it with `--keep-sidecar SUFFIX`: members with that suffix, such as seg.png, are passed on
unchecked. `verify` applies the same rule to an output.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass

from pipeline.errors import Reason, SampleError
from pipeline.pictures.formats import DECODED, hidden_in, kind_of
from pipeline.pictures.picture import Picture, decode, resize_and_crop
from pipeline.records import IMAGE_SUFFIXES, Rejection, Sample
from pipeline.settings import ApplySettings

TEXT_SUFFIXES = frozenset(
    ("cls", "cls2", "id", "idx", "inx", "index", "txt", "text", "transcript", "caption", "captions", "tags", "label")
    + ("labels", "lang", "url", "json", "jsn", "jsonl", "ndjson", "geojson", "csv", "tsv", "xml", "yaml", "yml", "toml")
)


def image_suffix(sample: Sample, keep: Collection[str] | None = None) -> str:
    """Suffix of the member that is the sample's image, judged by name.

    keep  suffixes, in lower case, that are not the image; None = unknown: among several images, choose the one without
          a dot in its suffix, so that samples written with --keep-sidecar can be read
    Raises SampleError if there is no image, or more than one.
    """
    images = [name for name in sample.members if extension(name) in IMAGE_SUFFIXES and name.lower() not in (keep or ())]
    if keep is None and len(images) > 1:
        images = [name for name in images if "." not in name] or images
    if len(images) == 1:
        return images[0]
    if images:
        hint = f"; --keep-sidecar {images[-1].lower()} passes on a mask unchanged" if "." in images[-1] else ""
        raise SampleError(Reason.SEVERAL_IMAGES, f"members {', '.join(images)}{hint}")
    for name, data in sample.members.items():
        if kind_of(data) is not None:
            raise SampleError(
                Reason.UNSUPPORTED_FORMAT, f"member {name} ({kind_of(data)}) cannot be protected under this name"
            )
    raise SampleError(Reason.NO_IMAGE, f"no jpg, jpeg, png or webp among {', '.join(sample.members)}")


def check_sidecars(sample: Sample, image: str, keep: Collection[str]) -> None:
    """Raise SampleError, naming the member, if a sidecar may not be passed on."""
    for name, data in sample.members.items():
        if name == image or name.lower() in keep:
            continue
        if kind_of(data) in DECODED:
            raise SampleError(Reason.SEVERAL_IMAGES, f"member {name} is also a picture ({kind_of(data)})")
        known = extension(name) in TEXT_SUFFIXES
        why = hidden_in(data) if known else "is not one of the text formats that are passed on"
        if why is not None:
            raise SampleError(
                Reason.UNKNOWN_SIDECAR, f"member {name} {why}; --keep-sidecar {name.lower()} vouches for it"
            )


@dataclass(frozen=True)
class Opened:
    """A sample with its image decoded, and the seconds that took."""

    sample: Sample
    suffix: str
    picture: Picture
    seconds: float


def picture_of(sample: Sample, *, max_pixels: int) -> Picture:
    """Decode a sample's image. Raises SampleError."""
    suffix = image_suffix(sample)
    return decode(sample.members[suffix], max_pixels=max_pixels, suffix=suffix)


def open_sample(sample: Sample, *, settings: ApplySettings) -> Opened:
    """Decode a sample's image, at the size in which it will be written.

    Raises SampleError, also for a sidecar that may not be passed on.
    """
    started = time.perf_counter()
    suffix = image_suffix(sample, settings.keep_sidecar)
    check_sidecars(sample, suffix, settings.keep_sidecar)
    picture = decode(sample.members[suffix], max_pixels=settings.max_pixels, suffix=suffix)
    if settings.size == "224":
        picture = resize_and_crop(picture)
    return Opened(sample, suffix, picture, time.perf_counter() - started)


def extension(suffix: str) -> str:
    """What follows the last dot, in lower case."""
    return suffix.rpartition(".")[2].lower()


def rejection_of(sample: Sample, error: SampleError) -> Rejection:
    """The quarantine entry for a sample; names the image member if there is one."""
    pictures = [suffix for suffix in sample.members if extension(suffix) in IMAGE_SUFFIXES]
    member = f"{sample.key}.{(pictures or list(sample.members))[0]}"
    return Rejection(sample.key, member, error.reason, error.detail)
