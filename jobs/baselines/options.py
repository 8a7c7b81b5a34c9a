"""The flags for published protections; pipeline.baselines.settings defines what they mean together."""

from __future__ import annotations

from jobs.protection.options import add_files, add_run, image_count
from jobs.shared.cli import Parser, defaults_of, given_options
from pipeline.baselines.methods import BASELINES
from pipeline.baselines.settings import BaselineRunSettings, baseline_settings
from pipeline.quantities import parse_epsilon
from pipeline.settings import check

DESCRIPTION = """\
Protect a collection with a method that others have published, to compare with: same shards, same report, same
verification as with Scumble's own protection.

  python jobs/protect_baseline.py --method sp --input train/ --output sp/
  python jobs/protect_baseline.py --method random --labels cluster --clusters 10 --input photos/ --output random/
  python jobs/protect_baseline.py --deltas rem.npz --epsilon 8/255 --input train/ --output rem/
  python jobs/evaluate_relearning.py --clean train/ --test test/ --protected uc=protected/ sp=sp/ --output evaluation/

Run the same command again after any interruption: it resumes to byte-identical output.
"""
EPILOG = """\
methods, and what bounds them:
{methods}

Deltas are computed at the side of the pictures, at most 224 pixels, and resized to pictures of other sizes. A method
that changes single pixels or filters pictures is what was published only where all are squares of that side.

exit codes: 0 done, 1 input or run error, 2 usage, 3 done, but more was quarantined than --max-quarantine allows
"""


def baseline_parser() -> Parser:
    """All options; none has a default here, so that it is known which ones were given."""
    parser = Parser(
        prog="protect_baseline.py",
        usage="protect_baseline.py --method NAME --input URL --output URL [options]",
        description=DESCRIPTION,
        epilog=EPILOG.format(methods="\n".join(f"  {name:<15} {entry.about}" for name, entry in BASELINES.items())),
        defaults=defaults_of(BaselineRunSettings),
    )
    _where(parser)
    _labels(parser)
    _deltas(parser)
    add_files(parser)
    add_run(parser)
    return parser


def _where(parser: Parser) -> None:
    add = parser.add_argument_group("where").add_argument
    add("--input", metavar="URL", help="folder, s3:// prefix, glob or brace pattern of images or shards; read only")
    add("--output", metavar="URL", help="folder or s3:// prefix for protected copies; must lie outside the input")
    add("--config", metavar="FILE", help="YAML file of options (`epsilon: 8/255`); the command line overrides it")


def _labels(parser: Parser) -> None:
    add = parser.add_argument_group("labels").add_argument
    groups = (
        "what the deltas follow: the .cls or class folder of an image, what the surrogate predicts, or its clusters"
    )
    add("--labels", choices=["true", "predicted", "cluster"], help=groups)
    add("--surrogate", metavar="NAME", help="encoder of predicted labels and clusters, as for protect_imagenet.py")
    add("--surrogate-weights", metavar="FILE", help="safetensors file with the surrogate's weights")
    add("--surrogate-size", type=int, metavar="PIXELS", help="side of embedded images")
    add("--clusters", type=int, metavar="P", help="number of clusters (default: as for protect_imagenet.py)")
    add("--cluster-images", type=int, metavar="N", help="fit k-means on at most N images, assign the rest")


def _deltas(parser: Parser) -> None:
    add = parser.add_argument_group("deltas").add_argument
    add("--method", choices=list(BASELINES), help="the published method; see below")
    own = "bound on the change of every pixel; not for methods with a budget of their own"
    add("--epsilon", type=parse_epsilon, metavar="E", help=own)
    given = (
        "deltas that were computed elsewhere, by key: .npz, .safetensors, or a folder of .npy; whole levels [3, H, W]"
    )
    add("--deltas", metavar="FILE", help=given)
    add("--delta-size", type=int, metavar="PIXELS", help="side of deltas (default: the pictures', at most 224)")
    trained = (
        "network that a method trains, as a target of evaluations: resnet18 as published unless given; small for CPUs"
    )
    add("--network", metavar="NAME", help=trained)
    add("--effort", type=float, metavar="SHARE", help="share of the published number of steps")
    fitted = "images to compute the deltas of labels on; deltas of single images need all"
    add("--fit-images", type=image_count, metavar="N|all", help=fitted)
    add("--seed", type=int, metavar="N", help="seed of every random draw")


def parse_baseline(argv: list[str] | None) -> BaselineRunSettings:
    """Command line over settings file over defaults. Raises SettingsError."""
    given = given_options(baseline_parser(), argv)
    for required in ("input", "output"):
        check(bool(given.get(required)), f"--{required} is missing (see --help)")
    if given.get("fit_images") == "all":
        given["fit_images"] = None
    return baseline_settings(given)
