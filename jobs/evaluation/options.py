"""The flags of a relearning evaluation, written out and grouped; what they mean is settled in pipeline.relearning."""

from __future__ import annotations

import re
from typing import Any

from jobs.shared.cli import Parser, given_options
from pipeline.errors import SettingsError
from pipeline.relearning.evaluation import PRESETS, RECIPES, EvaluationSettings, evaluation_from
from pipeline.relearning.labels.names import parse_labelling
from pipeline.relearning.regime_names import parse_regime
from pipeline.relearning.targets import parse_target

DESCRIPTION = """\
Train target models on clean and on protected images, under every regime that an adversary would try, and report
what each relearned. The relearned accuracy of a protection is the worst case over regimes of the seed mean.

  python jobs/evaluate_relearning.py --preset smoke --clean photos/train --test photos/test \\
      --protected uc=protected/ --output evaluation/
  python jobs/evaluate_relearning.py --preset audit --gpus-per-worker 1 --clean 's3://art/raw/train-*.tar' …

Start the same command again to go on: finished trials are kept, unfinished ones go on from their last epoch.
"""
EPILOG = """\
exit codes: 0 done, 1 a trial failed, 2 usage or data that do not fit

regimes, at most two joined by +, as in iss-gray+st-cg:
  ordinary      nt, dropout, weight-decay, early-stop, simclr
  staged        st, st-cg, st-full, with options as in st-cg[kappa=2,cg=paper]
  adversarial   at, at-8, at-16 (bounds of 4, 8 and 16 of 255)
  augmented     nt-cg (cg), cg-paper, mixup, cutmix, cutout, randaugment, autoaugment, trivialaugment, ueraser,
                ueraser-lite, ueraser-max, mixup-uc, cutmix-uc, cutout-uc, mixup-14a
  compressed    iss-jpeg10, iss-gray, iss-bits2, and with -train on training images alone
  smoothed      smooth-0.5, smooth-1, smooth-2, smooth-uc, on training images alone
  filtered      equalise, spectral, highpass:C, lowpass:C (C cycles per image, any number above 0)
  looked for    subtract, subtract-label, subtract-blind, delta-jitter, opa, shortcut-net
  cleaned       self-pairs, purify, leaked-pairs:N (a denoiser, see below)
  told more     adabn, dfr, few-clean (clean images), delta-known (the deltas)

An adversary may protect other pictures with this product and train a denoiser on the pairs; these two commands do so:

  python jobs/protect_imagenet.py --input other/ --output theirs/ --seed 1 …
  python jobs/evaluate_relearning.py --pairs other/=theirs/ --regimes self-pairs,self-pairs+cg …

The keys of both collections must agree; the pictures must not be those of --clean or --test, and need no labels.

The audit presets, with three fits of a protection (--protected NAME=URL,URL,URL), leave a certificate:
certificate.json and certificate.html beside the report.
A regime that was not tried may get more out of the images than any of these.
"""


def named_urls(text: str) -> tuple[str, tuple[str, ...]]:
    """NAME=URL, or NAME=URL,URL,…; a comma within braces or brackets belongs to its URL."""
    name, _, rest = text.partition("=")
    urls = tuple(part.strip() for part in re.split(r",(?![^\[]*\])(?![^{]*\})", rest))
    if not name or not all(urls):
        raise ValueError(text)
    return name, urls


def two_urls(text: str) -> tuple[str, str]:
    """OTHER=THEIRS; with more than one = nobody could tell where the first URL ends."""
    first, found, second = text.partition("=")
    if not found or not first or not second or "=" in second:
        raise ValueError(text)
    return first, second


def words(text: str) -> tuple[str, ...]:
    """Separated by commas; those inside of [ ] belong to one word."""
    return tuple(part.strip() for part in re.split(r",(?![^\[]*\])", text) if part.strip())


def numbers(text: str) -> tuple[int, ...]:
    """Integers between commas."""
    return tuple(int(part) for part in words(text))


def evaluation_parser() -> Parser:
    """All options; none has a default here, so that what was given can be told apart."""
    usage = (
        "evaluate_relearning.py --clean URL --protected NAME=URL[,URL …] [NAME=URL …] --test URL --output URL [options]"
    )
    parser = Parser(prog="evaluate_relearning.py", usage=usage, description=DESCRIPTION, epilog=EPILOG)
    _data(parser)
    _trials(parser)
    _run(parser)
    return parser


def _data(parser: Parser) -> None:
    add = parser.add_argument_group("data").add_argument
    add("--clean", metavar="URL", help="the originals: shards with a .cls label beside each image")
    copies = "protected copies, each with a name; several URLs are fits of one protection, with other seeds"
    add("--protected", metavar="NAME=URL[,URL]", type=named_urls, nargs="+", action="extend", help=copies)
    add("--test", metavar="URL", help="clean test images: never trained on, never tuned on")
    add("--output", metavar="URL", help="folder or s3:// prefix for results.parquet, histories.parquet and report.html")
    pairs = "other pictures, and their copies that an adversary protected: for self-pairs and purify"
    add("--pairs", metavar="OTHER=THEIRS", type=two_urls, help=pairs)
    add("--side", type=int, metavar="PIXELS", help="side of all images (default: the clean ones' median, at most 224)")
    add("--images", type=int, metavar="N", help="train on at most N of the images, chosen by key (default: all)")
    add("--holdout", type=float, metavar="SHARE", help="of the originals, for early stop and the like (default 0.05)")
    add("--classes", metavar="FILE", help="the name of class 0, 1, … on each line, for superclasses and concepts")
    add("--concepts", metavar="FILE", help="safetensors bank of names and embeddings (default: ImageNet's, built in)")
    add("--config", metavar="FILE", help="YAML file of options; the command line wins over it")


def _trials(parser: Parser) -> None:
    add = parser.add_argument_group("trials: every combination is one").add_argument
    add("--preset", choices=sorted(PRESETS), help="smoke: minutes on two cores; audit: the battery that counts")
    add("--targets", type=words, metavar="A,B", help="small, resnet18, vit-14a, …, pretrained:NAME, probe:NAME")
    add("--regimes", type=words, metavar="A,B", help="nt, st-cg, at, equalise, lowpass:8, subtract+cg, … (see below)")
    add("--labellings", type=words, metavar="A,B", help="original, random:N, superclasses:FILE, concepts:5-36")
    add("--shares", type=words, metavar="A,B", help="protected part: samples:0.5, classes:0.5 (default samples:1)")
    add("--seeds", type=numbers, metavar="0,1,2", help="of training: order, augmentation, weights")
    add("--epochs", type=int, metavar="N", help="of every training (default 12)")
    add("--recipe", choices=sorted(RECIPES), help="optimiser settings: fast (default) or a paper's")


def _run(parser: Parser) -> None:
    add = parser.add_argument_group("run").add_argument
    add("--workers", type=int, metavar="N", help="trials at once (default: one per CPU, or per GPU share)")
    add("--gpus-per-worker", type=float, metavar="G", help="GPU share of each trial (default 0: CPUs only)")
    add("--dry-run", action="store_true", default=None, help="print trials, memory and time, from a measured trial")
    add("--debug", action="store_true", default=None, help="Ray's own logs, and tracebacks")


def parse_evaluation(argv: list[str] | None) -> EvaluationSettings:
    """Command line over settings file over preset. Raises SettingsError."""
    given: dict[str, Any] = given_options(evaluation_parser(), argv)
    pairs, preset = given.pop("protected", []), given.pop("preset", None)
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SettingsError(f"--protected: the name {twice[0]!r} stands for two collections")
    settings = evaluation_from({**given, "protected": dict(pairs)}, preset)
    for target in settings.targets:
        parse_target(target)
    for regime in settings.regimes:
        parse_regime(regime)
    for labelling in settings.labellings:
        parse_labelling(labelling)
    return settings
