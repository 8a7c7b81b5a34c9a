"""Object names: which are shards or images, what images are called in the output, which names are never used."""

from __future__ import annotations

import mimetypes
import re

from pipeline.errors import Reason
from pipeline.records import IMAGE_SUFFIXES
from pipeline.settings import jpeg_quality
from pipeline.storage.listings import SHARD_SUFFIXES

_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\\]")
_NOT_UTF8 = re.compile("[\ud800-\udfff]")
_OTHER_ARCHIVES = re.compile(  # including split archives and incomplete downloads
    r"\.(tar\.([a-z]?z\d?|lz4|lzma|lzo|zstd?|bz|br|[0-9]+|part[0-9]*|gz\.(part)?[0-9]*|crdownload|aria2|tmp)"
    r"|t[bxlz]z2?|tb2|tzst|taz|zip|7z|rar|cpio)$"
)
_PICTURES = re.compile(  # also unfinished downloads, and names cut from a URL: photo.jpg_large, photo.jpg?w=800
    r"\.(jpe|jfif?|jif|tiff?|gif|bmp|dib|hei[cf]s?|hif|avifs?|apng|jp[2fmx]|j2[ck]|jpc|jxl|jxr|wdp|qoi|exr|p[bgnp]m|tga|dds"
    r"|psd|psb|xcf|dng|cr[23w]|nef|nrw|arw|sr2|orf|rw2|raf|pef|srw"
    r"|(jpe?g|png|webp)(_large|_orig|[?:;@&%!][^./]*|\.(gz|bz2|xz|zst|part|crdownload|tmp)))$"
)
_CUT_BY_S3FS = "?versionId="


def is_shard(name: str) -> bool:
    """True for the name of a readable tar, ignoring case."""
    return name.lower().endswith(SHARD_SUFFIXES)


def fault_of(name: str) -> tuple[Reason, str] | None:
    """Why an object with this name is never read or written, or None."""
    parts = name.split("/")
    if ".." in parts or "." in parts or "" in parts:
        return Reason.UNSAFE_NAME, "the name leaves its prefix, or would change in a file system"
    if _UNSAFE.search(name):
        return Reason.UNSAFE_NAME, "the name contains a backslash or a control character"
    if _CUT_BY_S3FS in name:
        return Reason.UNSAFE_NAME, f"the name contains {_CUT_BY_S3FS}, which clients mistake for a version and strip"
    if _NOT_UTF8.search(name):
        return Reason.UNUSABLE_NAME, "the name is not UTF-8"
    return None


def extension_of(name: str) -> str:
    """What follows the last dot of the base name, in lower case; "" if there is none."""
    base = name.rpartition("/")[2]
    return base.rpartition(".")[2].lower() if "." in base else ""


def is_of_the_system(name: str) -> bool:
    """True for files that Macs, Windows and NFS leave in any folder; none of them is a picture."""
    base = name.rpartition("/")[2]
    return base in (".DS_Store", "Thumbs.db", "desktop.ini") or base.startswith(("._", ".nfs"))


def is_image(name: str) -> bool:
    """True for the name of an image that can be protected, ignoring case."""
    return extension_of(name) in IMAGE_SUFFIXES


def unread(name: str) -> tuple[Reason, str] | None:
    """Why a file that by its name is a picture, or holds some, is not read; None for any other."""
    if _OTHER_ARCHIVES.search(name.lower()):
        return Reason.UNSUPPORTED_FORMAT, "repack it as .tar or .tar.gz"
    if _PICTURES.search(name.lower()):
        return Reason.UNSUPPORTED_FORMAT, "convert it to JPEG, PNG or WebP"
    return None


def stem_of(name: str) -> str:
    """An image's name without its image extensions: a.jpg and a.jpg.png are both `a`."""
    while is_image(name):
        name = name.rpartition(".")[0]
    return name


def sample_name(name: str) -> tuple[str, str]:
    """(key, suffix) of a loose image, split at the last dot, so that only `a.jpg` and `a.png` can share a key."""
    stem, _, extension = name.rpartition(".")
    return stem or name, extension


def output_name(name: str, encode: str) -> str:
    """Name of a loose image in the output; unique for every image.

    `same` keeps every name. If the format may change, the new extension is appended (`a.jpg` -> `a.jpg.png`) unless the
    name already ends with it; a name with two image extensions (`a.jpg.png`) gets a third, because another image may
    become that name.
    """
    if encode == "same":
        return name
    fitting = ("png",) if jpeg_quality(encode) is None else ("jpg", "jpeg")
    stem, _, extension = name.rpartition(".")
    if extension.lower() in fitting and not is_image(stem):
        return name
    return f"{name}.{fitting[0]}"


def content_type(name: str) -> str | None:
    """Media type by extension, e.g. image/png, or None."""
    return mimetypes.types_map.get("." + extension_of(name)) or {"webp": "image/webp"}.get(extension_of(name))
