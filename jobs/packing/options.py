"""The flags for packing and unpacking; pipeline.packing.settings defines what they mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from jobs.shared.cli import Parser, defaults_of, given_options
from pipeline.packing.settings import (
    Format,
    PackSettings,
    UnpackFormat,
    UnpackSettings,
    pack_settings,
    unpack_settings,
)
from pipeline.quantities import parse_bytes

PACK = """\
Pack a data set as it is published into WebDataset shards, which protect_imagenet.py and evaluate_relearning.py read.
Images are copied to the byte; arrays become PNG. Beside each image go its label (.cls) and where it is from (.json).

  python jobs/pack.py --input photos/ --output shards/
  python jobs/pack.py --input imagenette2-320/ --split train --output train/
  python jobs/pack.py --input ILSVRC2012_img_train.tar --output train/ --first-classes 100 --shuffle 0
  python jobs/pack.py --input ILSVRC2012_img_val.tar --output val/ --first-classes 100 \\
      --ground-truth ILSVRC2012_validation_ground_truth.txt --synsets meta.mat
  python jobs/pack.py --input cifar-10-batches-py/ --split train --output cifar/
  python jobs/pack.py --input s3://art/parquet/ --split train --output s3://art/shards --ray

Run the same command again after any interruption: it resumes to byte-identical output.
"""
PACK_END = """\
exit codes: 0 done, 1 input or run error, 2 usage, 3 done, but something that may hold images was not packed; it is
listed in OUTPUT/_scumble/pack/
"""
UNPACK = """\
Write what shards hold as files again: the folder tree that they were packed from, or Parquet with one file per shard.
An image whose format was changed gets another extension; nothing that exists is overwritten.

  python jobs/unpack.py --input protected/ --output folder/
  python jobs/unpack.py --input protected/ --output parquet/ --format parquet

Run the same command again after any interruption: it resumes.
"""
UNPACK_END = """\
exit codes: 0 done, 1 input or run error, 2 usage, 3 done, but something was not unpacked; it is listed in
OUTPUT/_scumble/pack/
"""


def pack_parser() -> Parser:
    """All options; none has a default here, so that it is known which ones were given."""
    usage = "pack.py --input URL --output URL [options]"
    parser = Parser(prog="pack.py", usage=usage, description=PACK, epilog=PACK_END, defaults=defaults_of(PackSettings))
    add = parser.add_argument_group("where").add_argument
    add("--input", metavar="URL", help="folder or s3:// prefix, or one .tar, .npz or .parquet; read only")
    add("--output", metavar="URL", help="folder or s3:// prefix for the shards, outside the input")
    add("--config", metavar="FILE", help="YAML file of options; the command line overrides it")
    add("--format", choices=get_args(Format), help="what the input is; auto: told by its names")
    add("--split", metavar="NAME", help="train, val, test, ...: a folder, a part of CIFAR, or files called like it")
    _labels(parser)
    _shards(parser)
    _run(parser.add_argument_group("run").add_argument, "print samples, classes, shards and bytes; write nothing")
    return parser


def _labels(parser: Parser) -> None:
    add = parser.add_argument_group("labels").add_argument
    table = "CSV with a header, or JSON lines, of path and label (default: the class is the first folder)"
    add("--labels", metavar="FILE", help=table)
    add("--ground-truth", metavar="FILE", help="classes of ImageNet's validation images, one a line")
    add("--synsets", metavar="FILE", help="meta.mat of ImageNet's development kit, which numbers the classes")
    add("--classes", metavar="FILE", help="pack these classes only, one a line; the first gets label 0")
    add("--first-classes", type=int, metavar="N", help="pack the first N classes only")
    add("--images", type=int, metavar="N", help="pack a hash-sample of N images, the same in every run")


def _shards(parser: Parser) -> None:
    add = parser.add_argument_group("shards").add_argument
    order = "shuffle by this seed, Parquet in blocks of 1,000 rows (default: as in the input)"
    add("--shuffle", type=int, metavar="SEED", help=order)
    add("--shard-images", type=int, metavar="N", help="images per shard at most")
    add("--shard-bytes", type=parse_bytes, metavar="SIZE", help="bytes per shard at most, by the sizes of images")
    add("--max-member-bytes", type=parse_bytes, metavar="SIZE", help="leave out larger images")


def _run(add: Callable[..., Any], dry_run: str) -> None:
    add("--ray", action="store_true", default=None, help="spread shards over a Ray cluster, or start a private one")
    add("--workers", type=int, metavar="N", help="processes of --ray (default: one per CPU)")
    add("--dry-run", action="store_true", default=None, help=dry_run)
    add("--debug", action="store_true", default=None, help="show tracebacks and Ray's own logs")


def unpack_parser() -> Parser:
    """All options; none has a default here, so that it is known which ones were given."""
    usage = "unpack.py --input URL --output URL [options]"
    parser = Parser(
        prog="unpack.py", usage=usage, description=UNPACK, epilog=UNPACK_END, defaults=defaults_of(UnpackSettings)
    )
    add = parser.add_argument_group("where").add_argument
    add("--input", metavar="URL", help="folder, s3:// prefix, glob or brace pattern of shards; read only")
    add("--output", metavar="URL", help="folder or s3:// prefix for the files, outside the input")
    add("--config", metavar="FILE", help="YAML file of options; the command line overrides it")
    add("--format", choices=get_args(UnpackFormat), help="files in folders, or one Parquet file per shard")
    add("--max-member-bytes", type=parse_bytes, metavar="SIZE", help="leave out larger members")
    _run(parser.add_argument_group("run").add_argument, "print shards and bytes; write nothing")
    return parser


def parse_pack(argv: list[str] | None) -> PackSettings:
    """Command line over settings file over defaults. Raises SettingsError."""
    return pack_settings(given_options(pack_parser(), argv))


def parse_unpack(argv: list[str] | None) -> UnpackSettings:
    """Command line over settings file over defaults. Raises SettingsError."""
    return unpack_settings(given_options(unpack_parser(), argv))
