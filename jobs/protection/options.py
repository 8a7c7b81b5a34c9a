"""The flags of a protection run, in groups; pipeline.settings defines what they mean together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jobs.shared.cli import Parser, defaults_of, given_options
from pipeline.errors import SettingsError
from pipeline.quantities import parse_bytes, parse_epsilon
from pipeline.settings import PRESETS, Settings, check, settings_from

KEEP_SIDECAR = """\
copy members such as seg.png unchecked; any other sample that holds more than its image and text (cls, txt, json, csv,
xml, yaml, ...), or a picture hidden in that text, goes to quarantine"""
DESCRIPTION = """\
Protect a collection, a folder of pictures or WebDataset shards, with Unlearnable Clusters.

  python jobs/protect_imagenet.py --input photos/ --output protected/ --surrogate timm:tf_efficientnet_lite0
  python jobs/protect_imagenet.py --input 's3://art/raw/train-{000..127}.tar' --output s3://art/protected --dry-run
  ray job submit --working-dir . -- python jobs/protect_imagenet.py --config protect.yaml

Run the same command again after any interruption: it resumes to byte-identical output and recomputes no committed
shard.
"""
EPILOG = """\
exit codes: 0 done, 1 input or run error, 2 usage, 3 done, but more was quarantined than --max-quarantine allows

Protection raises the cost of unauthorised training; it is no guarantee. Keep your originals.
"""


def image_count(text: str) -> int | str:
    """A number, or 'all': None here would be an option that is not given."""
    return text if text == "all" else int(text)


def pixels(text: str) -> float:
    """A change of a pixel, like 4/255. Raises ValueError."""
    try:
        return parse_epsilon(text)
    except SettingsError:
        raise ValueError(text) from None


def protection_parser() -> Parser:
    """All options of a protection run; none has a default here, so that it is known which ones were given."""
    usage = "protect_imagenet.py --input URL --output URL [options]"
    parser = Parser(
        prog="protect_imagenet.py",
        usage=usage,
        description=DESCRIPTION,
        epilog=EPILOG,
        defaults=defaults_of(Settings) | {"preset": "scumble", "steps": None},
    )
    _where(parser)
    _surrogate(parser)
    _delta(parser)
    add_files(parser)
    add_run(parser)
    _research(parser)
    return parser


def _where(parser: Parser) -> None:
    add = parser.add_argument_group("where").add_argument
    add(
        "--input",
        metavar="URL",
        help="folder, s3:// prefix, glob or brace pattern of images or .tar / .tar.gz shards; read only",
    )
    add("--output", metavar="URL", help="folder or s3:// prefix for protected copies; must lie outside the input")
    add("--config", metavar="FILE", help="YAML file of options (`epsilon: 8/255`); the command line overrides it")
    add("--preset", choices=sorted(PRESETS), help="scumble, or the settings of a paper")
    add("--protection", metavar="FILE", help="apply this protection.safetensors instead of fitting a new one")


def _surrogate(parser: Parser) -> None:
    add = parser.add_argument_group("surrogate and clusters").add_argument
    add(
        "--method",
        choices=["uc", "one-for-all"],
        help="uc: Unlearnable Clusters (Zhang et al., CVPR 2023); one-for-all: a universal generator (Chen et al. "
        "2024) trained by train_one_for_all.py and passed as --protection",
    )
    add(
        "--surrogate",
        metavar="NAME",
        help="open_clip:MODEL/PRETRAINED, torchvision:MODEL/WEIGHTS or timm:MODEL; timm:tf_efficientnet_lite0 is "
        "built in and needs no download",
    )
    add("--surrogate-weights", metavar="FILE", help="safetensors file with the surrogate's weights")
    add(
        "--surrogate-size",
        type=int,
        metavar="PIXELS",
        help="side of embedded images (default: 160 for images below 96 pixels, else as it was trained)",
    )
    add("--clusters", type=int, metavar="P", help="number of clusters (default: one per 600 images, between 10 and 40)")
    add("--cluster-images", type=int, metavar="N", help="fit k-means on at most N images, assign the rest")


def _delta(parser: Parser) -> None:
    add = parser.add_argument_group("delta").add_argument
    add("--epsilon", type=parse_epsilon, metavar="E", help="bound on the change of every pixel")
    add("--generator", choices=["distilled", "sample", "direct", "network", "texture"], help="what produces delta")
    add("--fit-images", type=image_count, metavar="N|all", help="images to fit deltas on")
    add(
        "--steps",
        type=int,
        metavar="N",
        help="optimiser steps (default: distilled at most 1500, sample 30 per image, else 100)",
    )
    epochs = "passes over the images to fit on, in place of --steps; uc-paper: 50, 10 in the paper for ImageNet"
    add("--epochs", type=int, metavar="E", help=epochs)
    add("--robust-proxies", type=int, metavar="N", help="how many of the proxies to train on adversarial examples")
    flat = "share of epsilon where a picture is flat, below 1 to spare skies and skin (distilled, sample)"
    add("--flat-share", type=float, metavar="SHARE", help=flat)
    add("--key-file", metavar="FILE", help="secret of --generator texture, at least 16 bytes; never stored")
    add("--seed", type=int, metavar="N", help="seed of every random draw")


def add_picture_options(add: Callable[..., Any]) -> None:
    """What every job that writes pictures takes.

    add  add_argument of a group
    """
    small = "how a universal generator sees images of at most 64 px: enlarged, or as they are"
    add("--small-images", choices=["resize", "native"], help=small)
    add("--encode", metavar="HOW", help="same: as it came, JPEGs with their own tables; lossless: PNG; jpeg:Q")
    kept = "what to keep of EXIF and XMP; colour profile and orientation are always kept"
    add("--metadata", choices=["keep", "strip-gps", "strip"], help=kept)
    add("--keep-sidecar", nargs="+", action="extend", metavar="SUFFIX", help=KEEP_SIDECAR)


def add_files(parser: Parser) -> None:
    """How pictures are read and written."""
    add = parser.add_argument_group("files").add_argument
    add(
        "--size", choices=["native", "224"], help="keep the size of each image, or resize and crop to 224 px as UC does"
    )
    add_picture_options(add)
    add("--max-pixels", type=int, metavar="N", help="quarantine larger images")
    add("--max-member-bytes", type=parse_bytes, metavar="SIZE", help="quarantine larger members")


def add_run(parser: Parser) -> None:
    """How a run proceeds."""
    add = parser.add_argument_group("run").add_argument
    add("--workers", type=int, metavar="N", help="processes per stage (default: one per CPU, or per GPU share)")
    add("--gpus-per-worker", type=float, metavar="G", help="GPU share of each worker; 0: CPUs only")
    add("--max-quarantine", type=float, metavar="SHARE", help="exit with 3 if a larger share of samples is quarantined")
    add("--overwrite", action="store_true", default=None, help="delete what another run left in --output, then start")
    estimated = "print the plan with time and cost, estimated from a few images; write nothing"
    add("--dry-run", action="store_true", default=None, help=estimated)
    add("--profile", action="store_true", default=None, help="print where each worker spent its time, stage by stage")
    add("--price-per-gpu-hour", type=float, metavar="PRICE", help="for the cost in --dry-run; GPUs count while in use")
    add("--price-per-cpu-hour", type=float, metavar="PRICE", help="likewise for each CPU")
    add("--debug", action="store_true", default=None, help="show tracebacks and Ray's own logs")


def _research(parser: Parser) -> None:
    add = parser.add_argument_group("research options", "for experiments and the papers' settings").add_argument
    add("--cluster-space", choices=["smoothed", "features"], help="average features over neighbours, or not (UC)")
    add("--restarts", type=int, metavar="N", help="k-means starts; the one with the lowest inertia is kept")
    add("--permutation", choices=["next", "far"], help="target cluster: the next index, or one far away")
    add("--optimise-through", choices=["proxy", "surrogate"], help="network whose features delta moves")
    add("--train-images", choices=["cluster", "all"], help="images that each generator is trained on")
    add("--distance", choices=["kl", "cosine", "l2"], help="distance to the target centroid")
    add("--bound", choices=["project", "tanh_clamp", "eps_tanh", "clamp_ste"], help="how delta is kept within epsilon")
    add(
        "--plain",
        action="store_true",
        default=None,
        help="no colour augmentation: stronger, but colour jitter defeats it",
    )
    add("--delta-size", type=int, metavar="PIXELS", help="side of delta before it is resized to the image's size")
    add("--proxies", type=int, metavar="N", help="networks that deltas are optimised through, sample-wise or distilled")
    add("--proxy-steps", type=int, metavar="N", help="training steps of each proxy, at least; fewer fit less well")
    add("--batch-size", type=int, metavar="N", help="images per step")
    add("--fit-threads", type=int, metavar="N", help="CPU threads of each fit; changes the last bits of the result")
    add("--step-size", type=pixels, metavar="S", help="largest step of --generator direct (default: 0.15 epsilon)")
    add("--generator-lr", type=float, metavar="RATE", help="learning rate of --generator network (default: 0.0001)")


def parse_settings(argv: list[str] | None) -> Settings:
    """Command line over settings file over preset. Raises SettingsError."""
    given: dict[str, Any] = given_options(protection_parser(), argv)
    for required in ("input", "output"):
        check(bool(given.get(required)), f"--{required} is missing (see --help)")
    if given.get("fit_images") == "all":
        given["fit_images"] = None
    preset = given.pop("preset", "scumble")
    return settings_from(given, preset=preset)
