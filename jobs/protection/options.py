"""The flags of a protection run, written out and grouped. What they mean together is settled in pipeline.settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jobs.shared.cli import Parser, given_options
from pipeline.errors import SettingsError
from pipeline.settings import DEFAULT_SURROGATE, PRESETS, Settings, check, parse_epsilon, settings_from

KEEP_SIDECAR = """\
members such as seg.png that leave as they are, without a look; all other samples with anything beside the image but
text (cls, txt, json, csv, xml, yaml, …), or with a picture hidden in that text, go to quarantine"""
DESCRIPTION = """\
Protect a collection of WebDataset shards with Unlearnable Clusters.

  python jobs/protect_imagenet.py --input photos/ --output protected/ --surrogate timm:tf_efficientnet_lite0
  python jobs/protect_imagenet.py --input 's3://art/raw/train-{000..127}.tar' --output s3://art/protected --dry-run
  ray job submit --working-dir . -- python jobs/protect_imagenet.py --config protect.yaml

Start the same command again to go on after any interruption: what is committed is never computed again.
"""
EPILOG = """\
exit codes: 0 done, 1 input or run error, 2 usage, 3 done with more quarantine than --max-quarantine allows

Protected images raise the cost of unauthorised training; they are no guarantee. Keep your originals.
"""


def image_count(text: str) -> int | None:
    """'all' or a number."""
    return None if text == "all" else int(text)


def pixels(text: str) -> float:
    """A change of a pixel, like 4/255. Raises ValueError."""
    try:
        return parse_epsilon(text)
    except SettingsError:
        raise ValueError(text) from None


def protection_parser() -> Parser:
    """All options of a protection run; none has a default here, so that what was given can be told apart."""
    usage = "protect_imagenet.py --input URL --output URL [options]"
    parser = Parser(prog="protect_imagenet.py", usage=usage, description=DESCRIPTION, epilog=EPILOG)
    _where(parser)
    _clusters(parser)
    _delta(parser)
    _files(parser)
    _run(parser)
    return parser


def _where(parser: Parser) -> None:
    group = parser.add_argument_group("where")
    add = group.add_argument
    add("--input", metavar="URL", help="folder, s3:// prefix, glob or brace pattern of .tar / .tar.gz shards")
    add("--output", metavar="URL", help="folder or s3:// prefix for protected shards; never inside the input")
    add("--config", metavar="FILE", help="YAML file of options (`epsilon: 8/255`); the command line wins over it")
    add("--preset", choices=sorted(PRESETS), help="scumble (default), or a paper's settings")
    add("--protection", metavar="FILE", help="apply this protection.safetensors instead of fitting a new one")


def _clusters(parser: Parser) -> None:
    group = parser.add_argument_group("surrogate and clusters")
    add = group.add_argument
    add(
        "--method",
        choices=["uc", "one-for-all"],
        help="uc: Unlearnable Clusters (Zhang et al., CVPR 2023), the default; one-for-all: a universal generator "
        "(Chen et al. 2024), trained by train_one_for_all.py and given as --protection",
    )
    add(
        "--surrogate",
        metavar="NAME",
        help=f"open_clip:MODEL/PRETRAINED, torchvision:MODEL/WEIGHTS or timm:MODEL (default {DEFAULT_SURROGATE}); "
        "timm:tf_efficientnet_lite0 is built in and needs no download",
    )
    add("--surrogate-weights", metavar="FILE", help="safetensors file with the surrogate's weights")
    add("--surrogate-size", type=int, metavar="PIXELS", help="side of what is embedded (default: the weights' own)")
    add("--clusters", type=int, metavar="P", help="number of clusters (default: one for 600 images, between 10 and 40)")
    add("--cluster-space", choices=["smoothed", "features"], help="smoothed: neighbours averaged; features: as in UC")
    add("--restarts", type=int, metavar="N", help="k-means starts, the lowest inertia is kept (default 24)")
    add("--cluster-images", type=int, metavar="N", help="k-means fits on at most so many, assigns the rest (50000)")


def _delta(parser: Parser) -> None:
    group = parser.add_argument_group("delta")
    add = group.add_argument
    add("--epsilon", type=parse_epsilon, metavar="E", help="bound on every pixel's change, e.g. 8/255 (default 16/255)")
    add("--generator", choices=["sample", "direct", "network", "texture"], help="what makes delta (default sample)")
    add("--optimise-through", choices=["proxy", "surrogate"], help="whose features delta moves (default proxy)")
    add("--plain", action="store_true", default=None, help="no colour augmentation: stronger, but falls to it")
    add("--permutation", choices=["next", "far"], help="target clusters: next index (default) or far apart")
    add("--train-images", choices=["cluster", "all"], help="images that each generator sees (default all)")
    add("--distance", choices=["kl", "cosine", "l2"], help="distance to the target centroid (default l2)")
    add("--bound", choices=["project", "tanh_clamp", "eps_tanh", "clamp_ste"], help="how delta is kept within epsilon")
    add("--delta-size", type=int, metavar="PIXELS", help="side at which delta is made, before it is laid at full size")
    add("--fit-images", type=image_count, metavar="N|all", help="images that deltas are fitted on (default 10000)")
    add(
        "--steps",
        type=int,
        metavar="N",
        help="optimiser steps (default: sample 30 for each image, others 100)",
    )
    add("--proxies", type=int, metavar="N", help="networks that --generator sample steps through (default 3)")
    add("--robust-proxies", type=int, metavar="N", help="of them, trained on adversarial examples (default 1)")
    add("--batch-size", type=int, metavar="N", help="images per step (default 256)")
    add("--fit-threads", type=int, metavar="N", help="CPU threads of each fit; decides the last bits (default 2)")
    add("--step-size", type=pixels, metavar="S", help="largest sign step of a direct delta (default 0.15 epsilon)")
    add("--generator-lr", type=float, metavar="RATE", help="learning rate of --generator network (default 1e-4)")
    add("--key-file", metavar="FILE", help="secret for --generator texture, at least 16 bytes; never stored")
    add("--seed", type=int, metavar="N", help="seed of every random draw (default 0)")


def add_picture_options(add: Callable[..., Any]) -> None:
    """What every job that writes pictures takes. add  add_argument of a group"""
    small = "a universal generator sees images of at most 64 px enlarged (default), or as they are"
    add("--small-images", choices=["resize", "native"], help=small)
    add("--encode", metavar="HOW", help="same: JPEG q95, PNG, lossless WebP (default) | lossless: PNG | jpeg:QUALITY")
    kept = "EXIF and XMP; colours and orientation are always kept"
    add("--metadata", choices=["keep", "strip-gps", "strip"], help=kept)
    add("--keep-sidecar", nargs="+", action="extend", metavar="SUFFIX", help=KEEP_SIDECAR)


def _files(parser: Parser) -> None:
    group = parser.add_argument_group("files")
    add = group.add_argument
    add("--size", choices=["native", "224"], help="keep each image's size (default), or resize and crop as UC does")
    add_picture_options(add)
    add("--max-pixels", type=int, metavar="N", help="larger images go to quarantine (default 100000000)")
    add("--max-member-bytes", type=int, metavar="N", help="larger members go to quarantine (default 256 MiB)")


def _run(parser: Parser) -> None:
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--workers", type=int, metavar="N", help="processes per stage (default: one per CPU, or per GPU share)")
    add("--gpus-per-worker", type=float, metavar="G", help="GPU share of each worker (default 0: CPUs only)")
    add("--max-quarantine", type=float, metavar="SHARE", help="exit with 3 above this share of samples (default 0.01)")
    add("--overwrite", action="store_true", default=None, help="remove what another run left in --output, then start")
    add(
        "--dry-run", action="store_true", default=None, help="print the plan, time and cost, from a few measured images"
    )
    add("--profile", action="store_true", default=None, help="print where each worker's time went, stage by stage")
    add("--price-per-gpu-hour", type=float, metavar="MONEY", help="for the cost in the plan, of GPUs while in use")
    add("--price-per-cpu-hour", type=float, metavar="MONEY", help="the same of each CPU")
    add("--debug", action="store_true", default=None, help="Ray's own logs, and tracebacks")


def parse_settings(argv: list[str] | None) -> Settings:
    """Command line over settings file over preset. Raises SettingsError."""
    given: dict[str, Any] = given_options(protection_parser(), argv)
    for required in ("input", "output"):
        check(bool(given.get(required)), f"--{required} is missing (see --help)")
    preset = given.pop("preset", "scumble")
    return settings_from(given, preset=preset)
