"""The flags for training a universal generator; pipeline.one_for_all.settings defines what they mean."""

from __future__ import annotations

from jobs.shared.cli import Parser, defaults_of, given_options
from pipeline.one_for_all.settings import OneForAllSettings, one_for_all_settings
from pipeline.quantities import parse_epsilon

DESCRIPTION = """\
Train one generator that makes the delta of any image in a single pass (One for All, Chen et al. 2024): it pulls the
embedding of the protected image towards the concept that fits least, and away from those that fit best.

  python jobs/train_one_for_all.py --input photos/ --output universal.safetensors --width 16 --blocks 2 --side 64 \\
      --surrogate timm:tf_efficientnet_lite0 --surrogate-size 64 --max-steps 2000
  python jobs/protect_imagenet.py --protection universal.safetensors --input ... --output ...

Run the same command again after any interruption: training resumes from the last checkpoint, beside the output.
"""
EPILOG = """\
exit codes: 0 done, 1 failed, 2 usage

The defaults are the paper's: 121 million parameters, which need a GPU. A protection trained on one collection is meant
to work on others; jobs/evaluate_relearning.py measures how well it does.
"""


def one_for_all_parser() -> Parser:
    """All options; none has a default here, so that it is known which ones were given."""
    parser = Parser(
        prog="train_one_for_all.py",
        usage="train_one_for_all.py --input URL [URL ...] --output FILE [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
        defaults=defaults_of(OneForAllSettings),
    )
    _where(parser)
    _objective(parser)
    _training(parser)
    _run(parser)
    _research(parser)
    return parser


def _where(parser: Parser) -> None:
    add = parser.add_argument_group("where").add_argument
    add(
        "--input",
        metavar="URL",
        nargs="+",
        action="extend",
        help="folders, s3:// prefixes or patterns of images or shards",
    )
    add(
        "--output",
        metavar="FILE",
        help="the protection, a .safetensors file or s3:// object; its report goes beside it",
    )
    add("--config", metavar="FILE", help="YAML file of options; the command line overrides it")
    add("--images", type=int, metavar="N", help="train on about N of the images (default: all)")


def _objective(parser: Parser) -> None:
    add = parser.add_argument_group("objective").add_argument
    add("--surrogate", metavar="NAME", help="encoder whose embeddings are moved")
    add("--surrogate-weights", metavar="FILE", help="safetensors file with the surrogate's weights")
    add("--surrogate-size", type=int, metavar="PIXELS", help="side of embedded images (default: as it was trained)")
    banks = "head (the surrogate's classes), imagenet, cifar100, pets, a file of names, or a safetensors bank"
    add("--concepts", metavar="BANK", help=f"{banks} (default: head, or imagenet without one)")
    add("--epsilon", type=parse_epsilon, metavar="E", help="bound on the change of every pixel")


def _training(parser: Parser) -> None:
    add = parser.add_argument_group("generator and training").add_argument
    add("--width", type=int, metavar="N", help="channels of the first layer")
    add("--blocks", type=int, metavar="N", help="residual blocks")
    add("--side", type=int, metavar="PIXELS", help="side of the images it sees (default: the surrogate's input)")
    add("--epochs", type=int, metavar="N", help="passes over the images")
    add("--max-steps", type=int, metavar="N", help="stop after N steps, whatever --epochs says")
    add("--batch-size", type=int, metavar="N", help="images per step, over all workers")
    add("--accumulate", type=int, metavar="N", help="compute each step in N parts, to save memory")
    add("--lr", type=float, metavar="RATE", help="learning rate of Adam at the start of a cosine schedule")
    add("--seed", type=int, metavar="N", help="seed of weights, order and crops")


def _run(parser: Parser) -> None:
    add = parser.add_argument_group("run").add_argument
    add("--workers", type=int, metavar="N", help="data-parallel processes (default: one per GPU, or one)")
    add("--gpus-per-worker", type=float, metavar="G", help="GPUs of each worker; 0: CPUs only")
    add("--checkpoint-every", type=float, metavar="SECONDS", help="how much an interruption can cost at most")
    add("--max-pixels", type=int, metavar="N", help="skip larger images")
    add("--overwrite", action="store_true", default=None, help="replace an existing output")
    estimated = "print steps, memory and time, estimated from a step on a few images; write nothing"
    add("--dry-run", action="store_true", default=None, help=estimated)
    add("--debug", action="store_true", default=None, help="show tracebacks and Ray's own logs")


def _research(parser: Parser) -> None:
    add = parser.add_argument_group("research options", "readings of the paper, for experiments").add_argument
    losses = "logratio, paper_detached, fixed_lambda, code_pairs or code_diag"
    add("--loss", metavar="NAME", help=losses)
    add("--bound", metavar="NAME", help="how delta is kept within epsilon: eps_tanh, tanh_clamp or l2")
    chosen = "what chooses an image's concepts: clean_embedding, perturbed_embedding or label"
    add("--select-by", metavar="WHAT", help=chosen)
    add("--near", type=int, metavar="K", help="number of similar concepts to push away from")
    add("--weight-decay", type=float, metavar="W", help="L2 penalty in Adam; the released code has 5e-4")


def parse_one_for_all(argv: list[str] | None) -> OneForAllSettings:
    """Command line over settings file over defaults. Raises SettingsError."""
    given = given_options(one_for_all_parser(), argv)
    if "input" in given:
        given["input"] = tuple(given["input"])
    return one_for_all_settings(given)
