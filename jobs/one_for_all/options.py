"""The flags of the training of a universal generator; what they mean is settled in pipeline.one_for_all.settings."""

from __future__ import annotations

from jobs.shared.cli import Parser, given_options
from pipeline.one_for_all.settings import OneForAllSettings, one_for_all_settings
from pipeline.settings import DEFAULT_SURROGATE, parse_epsilon

DESCRIPTION = """\
Train one generator that gives any image its delta in a single pass (One for All, Chen et al. 2024): the embedding of
the protected image is pulled to the concept that fits least, and away from those that fit best.

  python jobs/train_one_for_all.py --input photos/ --output universal.safetensors --width 16 --blocks 2 --side 64 \\
      --surrogate timm:tf_efficientnet_lite0 --surrogate-size 64 --max-steps 2000
  python jobs/protect_imagenet.py --protection universal.safetensors --input … --output …

Start the same command again to go on: the last checkpoint lies beside the output until the training is done.
"""
EPILOG = """\
exit codes: 0 done, 1 failed, 2 usage

The defaults are the paper's: 121 million parameters, which need a GPU. A protection that was trained on one collection
is meant to serve others; jobs/evaluate_relearning.py says how well it does.
"""


def one_for_all_parser() -> Parser:
    """All options; none has a default here, so that what was given can be told apart."""
    usage = "train_one_for_all.py --input URL [URL …] --output FILE [options]"
    parser = Parser(prog="train_one_for_all.py", usage=usage, description=DESCRIPTION, epilog=EPILOG)
    _where(parser)
    _objective(parser)
    _training(parser)
    _run(parser)
    return parser


def _where(parser: Parser) -> None:
    add = parser.add_argument_group("where").add_argument
    add("--input", metavar="URL", nargs="+", action="extend", help="folders, s3:// prefixes or patterns of shards")
    add("--output", metavar="FILE", help="the protection, a .safetensors file or s3:// object; its report beside it")
    add("--config", metavar="FILE", help="YAML file of options; the command line wins over it")
    add("--images", type=int, metavar="N", help="train on about N of the images (default: all)")


def _objective(parser: Parser) -> None:
    add = parser.add_argument_group("objective").add_argument
    add("--surrogate", metavar="NAME", help=f"encoder whose embeddings are moved (default {DEFAULT_SURROGATE})")
    add("--surrogate-weights", metavar="FILE", help="safetensors file with the surrogate's weights")
    add("--surrogate-size", type=int, metavar="PIXELS", help="side of what is embedded (default: the weights' own)")
    add("--concepts", metavar="BANK", help="head, imagenet, cifar100, pets, a file of names, or a safetensors bank")
    add("--template", metavar="TEXT", help="what is encoded for a name (default 'a photo of a {}')")
    add("--epsilon", type=parse_epsilon, metavar="E", help="bound on every pixel's change (default 8/255)")
    add("--bound", metavar="NAME", help="eps_tanh (default), tanh_clamp or l2: how the output is brought within it")
    add("--loss", metavar="NAME", help="logratio (default), paper_detached, fixed_lambda, code_pairs, code_diag")
    add("--select-by", metavar="WHAT", help="clean_embedding (default), perturbed_embedding or label: chooses concepts")
    add("--near", type=int, metavar="K", help="number of similar concepts to be pushed from (default 5)")


def _training(parser: Parser) -> None:
    add = parser.add_argument_group("generator and training").add_argument
    add("--width", type=int, metavar="N", help="channels of the first layer (default 64)")
    add("--blocks", type=int, metavar="N", help="residual blocks (default 24)")
    add("--side", type=int, metavar="PIXELS", help="side of the images it sees (default: the surrogate's input)")
    add("--epochs", type=int, metavar="N", help="passes over the images (default 200)")
    add("--max-steps", type=int, metavar="N", help="stop after so many steps, whatever the epochs (default 100000)")
    add("--batch-size", type=int, metavar="N", help="images of a step over all workers (default 32)")
    add("--accumulate", type=int, metavar="N", help="compute a step in so many parts, to save memory (default 1)")
    add("--lr", type=float, metavar="RATE", help="of Adam, falling along a cosine (default 1e-4)")
    add("--weight-decay", type=float, metavar="W", help="added to Adam's gradient (default 0; 5e-4 in released code)")
    add("--seed", type=int, metavar="N", help="of weights, order and crops (default 0)")


def _run(parser: Parser) -> None:
    add = parser.add_argument_group("run").add_argument
    add("--workers", type=int, metavar="N", help="data-parallel processes (default: one per GPU, or one)")
    add("--gpus-per-worker", type=float, metavar="G", help="GPUs of each worker (default 0: CPUs only)")
    add("--max-pixels", type=int, metavar="N", help="larger images are left out (default 100 million)")
    add("--overwrite", action="store_true", default=None, help="train anew over an existing output")
    add("--debug", action="store_true", default=None, help="Ray's own logs, and tracebacks")


def parse_one_for_all(argv: list[str] | None) -> OneForAllSettings:
    """Command line over settings file over defaults. Raises SettingsError."""
    given = given_options(one_for_all_parser(), argv)
    if "input" in given:
        given["input"] = tuple(given["input"])
    return one_for_all_settings(given)
