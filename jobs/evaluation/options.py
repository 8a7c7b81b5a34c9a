"""The flags of a relearning evaluation, in groups; pipeline.relearning defines what they mean."""

from __future__ import annotations

import re
from typing import Any

from jobs.shared.cli import Parser, defaults_of, given_options
from pipeline.errors import SettingsError
from pipeline.relearning.evaluation import EvaluationSettings, evaluation_from
from pipeline.relearning.labels.names import parse_labelling
from pipeline.relearning.presets import PRESETS, RECIPES
from pipeline.relearning.regime_names import parse_regime
from pipeline.relearning.targets import parse_target

DESCRIPTION = """\
Train target models on clean and on protected images, under every regime that an adversary would try, and report what
each relearned. The relearned accuracy of a protection is the worst case over regimes of the mean over seeds.

  python jobs/evaluate_relearning.py --preset smoke --clean photos/train --test photos/test \\
      --protected uc=protected/ --output evaluation/
  python jobs/evaluate_relearning.py --preset audit --gpus-per-worker 1 --clean 's3://art/raw/train-*.tar' ...

Run the same command again after any interruption: finished trials are kept, others resume from their last epoch.
"""
EPILOG = """\
exit codes: 0 done, 1 a trial failed, 2 usage, or collections that do not match

targets: small, resnet18, resnet50, vgg16, densenet121, mobilenet_v2, efficientnet_b1, regnet_x_1_6gf,
  shufflenet_v2_x1_0, wrn-28-10, wrn-34-10, vit-14a, pretrained:SURROGATE (fine-tuned), probe:SURROGATE (its head alone)

regimes, at most two joined by +, as in iss-gray+st-cg:
  ordinary      nt, dropout, weight-decay, early-stop, simclr
  staged        st, st-cg, st-full, with options as in st-cg[kappa=2,cg=paper]
  adversarial   at, at-8, at-16 (bounds of 4, 8 and 16 of 255)
  augmented     nt-cg (cg), cg-paper, mixup, cutmix, cutout, randaugment, autoaugment, trivialaugment, ueraser,
                ueraser-lite, ueraser-max, mixup-uc, cutmix-uc, cutout-uc, mixup-14a, coin, rsk-ff
  one colour    jitter, grayscale, gamma, brightness, solarize, hue
  compressed    iss-jpeg10, iss-gray, iss-bits2, and with -train on training images alone
  smoothed      smooth-0.5, smooth-1, smooth-2, smooth-uc, on training images alone
  filtered      equalise, spectral, highpass:C, lowpass:C (C cycles per image, any number above 0)
  estimated     subtract, subtract-label, subtract-blind, delta-jitter, opa, shortcut-net
  poisons       epic, friendly-noise
  cleaned       self-pairs, purify, avatar, le, leaked-pairs:N (a denoiser, see below), d-vae
  informed      adabn, dfr, few-clean (clean images), delta-known (the deltas)

Of several options of a regime, as in st-cg[kappa=1.2],st-cg[kappa=2], the report also says which one an adversary
would choose on clean images that are held out from training (--holdout), and what that one reaches.

Labels are numbers in a .cls beside each image, in shards as in folders. If the pictures of a folder have none, the
first folder of a picture's path is its class, and classes are numbered in sorted order, as pack.py does it. All
collections must be labelled in the same way.

An adversary may protect other pictures with this product and train a denoiser on the pairs. This does the same:

  python jobs/protect_imagenet.py --input other/ --output theirs/ --seed 1 ...
  python jobs/evaluate_relearning.py --pairs other/=theirs/ --regimes self-pairs,self-pairs+cg ...

Both collections must have the same keys and share no picture with --clean or --test; they need no labels. To
train a denoiser or a diffusion model takes its own number of steps, whatever --epochs and --images say: see --dry-run.

The audit presets, given three fits of a protection (--protected NAME=URL,URL,URL), write a certificate:
certificate.json and certificate.html beside the report.
A regime that was not tried may recover more than any of these.
"""


def named_urls(text: str) -> tuple[str, tuple[str, ...]]:
    """NAME=URL or NAME=URL,URL,...; a comma within braces or brackets belongs to its URL."""
    name, _, rest = text.partition("=")
    urls = tuple(part.strip() for part in re.split(r",(?![^\[]*\])(?![^{]*\})", rest))
    if not name or not all(urls):
        raise ValueError(text)
    return name, urls


def two_urls(text: str) -> tuple[str, str]:
    """OTHER=THEIRS; refuses a second =, because it would be unclear where the first URL ends."""
    first, found, second = text.partition("=")
    if not found or not first or not second or "=" in second:
        raise ValueError(text)
    return first, second


def words(text: str) -> tuple[str, ...]:
    """Split at commas, but not within [ ]."""
    return tuple(part.strip() for part in re.split(r",(?![^\[]*\])", text) if part.strip())


def numbers(text: str) -> tuple[int, ...]:
    """Integers separated by commas."""
    return tuple(int(part) for part in words(text))


def evaluation_parser() -> Parser:
    """All options; none has a default here, so that it is known which ones were given."""
    usage = (
        "evaluate_relearning.py --clean URL --protected NAME=URL[,URL ...] [NAME=URL ...] --test URL --output URL "
        "[options]"
    )
    parser = Parser(
        prog="evaluate_relearning.py",
        usage=usage,
        description=DESCRIPTION,
        epilog=EPILOG,
        defaults=defaults_of(EvaluationSettings),
    )
    _data(parser)
    _trials(parser)
    _run(parser)
    _research(parser)
    return parser


def _data(parser: Parser) -> None:
    add = parser.add_argument_group("data").add_argument
    add("--clean", metavar="URL", help="the originals: shards, or a folder of pictures (labels: see below)")
    copies = "protected copies, each under a name; several URLs are fits of one protection with different seeds"
    add("--protected", metavar="NAME=URL[,URL]", type=named_urls, nargs="+", action="extend", help=copies)
    add("--test", metavar="URL", help="clean test images: never used for training or tuning")
    add("--output", metavar="URL", help="folder or s3:// prefix for results.parquet, histories.parquet and report.html")
    add(
        "--side",
        type=int,
        metavar="PIXELS",
        help="side of what targets see (default: median of the clean ones, at most 224)",
    )
    add("--images", type=int, metavar="N", help="train on at most N images, chosen by key (default: all)")
    add("--config", metavar="FILE", help="YAML file of options; the command line overrides it")


def _trials(parser: Parser) -> None:
    add = parser.add_argument_group("trials", "every combination is one trial").add_argument
    add("--preset", choices=sorted(PRESETS), help="smoke: minutes on two cores; audit: the battery that counts")
    add("--targets", type=words, metavar="A,B", help="small, resnet18, vit-14a, ... (see below)")
    add("--regimes", type=words, metavar="A,B", help="nt, st-cg, at, equalise, lowpass:8, subtract+cg, ... (see below)")
    add("--seeds", type=numbers, metavar="0,1,2", help="seeds of training: order, augmentation, weights")
    add("--epochs", type=int, metavar="N", help="epochs of every training")


def _run(parser: Parser) -> None:
    add = parser.add_argument_group("run").add_argument
    add("--workers", type=int, metavar="N", help="concurrent trials (default: one per CPU, or per GPU share)")
    add("--gpus-per-worker", type=float, metavar="G", help="GPU share of each trial; 0: CPUs only")
    measured = "print trials, memory and time, estimated from a trial that is run here; write nothing"
    add("--dry-run", action="store_true", default=None, help=measured)
    add("--debug", action="store_true", default=None, help="show tracebacks and Ray's own logs")


def _research(parser: Parser) -> None:
    add = parser.add_argument_group("research options", "other labels, shares, adversaries and recipes").add_argument
    add("--labellings", type=words, metavar="A,B", help="original, random:N, superclasses:FILE, concepts:5-36")
    add("--shares", type=words, metavar="A,B", help="how much is protected: samples:0.5, classes:0.5")
    add(
        "--pairs",
        metavar="OTHER=THEIRS",
        type=two_urls,
        help="other pictures and an adversary's protected copies (below)",
    )
    add("--classes", metavar="FILE", help="names of class 0, 1, ... one per line, for superclasses and concepts")
    add("--concepts", metavar="FILE", help="safetensors bank of names and embeddings (default: ImageNet's, built in)")
    add(
        "--holdout",
        type=float,
        metavar="SHARE",
        help="share of the originals set aside for early stopping and the like",
    )
    add("--recipe", choices=sorted(RECIPES), help="optimiser settings: fast, or those of a paper")
    add("--batch-size", type=int, metavar="N", help="images per step of a target (default: the recipe's)")
    add("--lr", type=float, metavar="RATE", help="largest learning rate of a target (default: the recipe's)")
    add("--weight-decay", type=float, metavar="W", help="weight decay of a target (default: the recipe's)")


def parse_evaluation(argv: list[str] | None) -> EvaluationSettings:
    """Command line over settings file over preset. Raises SettingsError."""
    given: dict[str, Any] = given_options(evaluation_parser(), argv)
    pairs, preset = given.pop("protected", []), given.pop("preset", None)
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SettingsError(f"--protected: the name {twice[0]!r} is given twice")
    settings = evaluation_from({**given, "protected": dict(pairs)}, preset)
    for target in settings.targets:
        parse_target(target)
    for regime in settings.regimes:
        parse_regime(regime)
    for labelling in settings.labellings:
        parse_labelling(labelling)
    return settings
