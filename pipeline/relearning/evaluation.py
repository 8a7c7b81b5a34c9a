"""What an evaluation runs: one trial per combination of protection, target, regime, labelling, share and seed."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.hashing import canonical, sha256
from pipeline.relearning.presets import PRESETS, RECIPES, changed_recipe
from pipeline.relearning.regime_names import AVATAR
from pipeline.relearning.shares import parse_share
from pipeline.settings import check, check_choice, check_least, settings_of_kind

COMPUTATION = 4  # part of every trial's key: to be raised with any change to what a trial computes
CLEAN = "clean"  # the name of the control in every table
CLEAN_PART = "clean-part"  # trained on what a share below 1 leaves unprotected, of the images that all copies have
WHOLE = "samples:1"

# below the output
RESULTS, HISTORIES, REPORT, SETTINGS = "results.parquet", "histories.parquet", "report.html", "evaluation.json"
TRIALS = "trials"

SELF_PAIRS, PURIFY, LEAKED_PAIRS = "self-pairs", "purify", "leaked-pairs"
_KNOWING_DELTAS = ("delta-known", SELF_PAIRS, PURIFY, AVATAR, "le", LEAKED_PAIRS)
SHARED_DENOISERS = (SELF_PAIRS, PURIFY, AVATAR)  # one for the whole evaluation; leaked pairs train one per trial

_WITHOUT_PAIRS = (
    "regime 'self-pairs' needs --pairs OTHER=THEIRS: protect other pictures with a different seed "
    "(protect_imagenet.py --input OTHER --output THEIRS --seed 1), then pass both"
)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training. Its key is a digest of all its fields and of COMPUTATION, so that identical trials run only once.

    fit     index of the protection's fit, from 0; 0 for controls
    share   "samples:S" or "classes:S": the share of the training images that is protected; the rest stays clean
    data    digest of the images and, if the regime cleans them with a denoiser, of that denoiser
    labels  digest of the labels under the labelling
    """

    protection: str
    fit: int = 0
    target: str
    regime: str
    labelling: str
    share: str
    seed: int
    epochs: int
    recipe: str
    data: str
    labels: str

    @property
    def key(self) -> str:
        """Twenty hex digits."""
        return sha256(canonical({**asdict(self), "computation": COMPUTATION}))[:20]

    @property
    def arm(self) -> str:
        """Name of the protected collection in EvaluationSettings.arms."""
        return arm_name(self.protection, self.fit)

    @property
    def result(self) -> str:
        """Path of its row below the output once it has finished."""
        return f"{TRIALS}/{self.key}.json"

    @property
    def checkpoint(self) -> str:
        """Path of its latest checkpoint until then."""
        return f"{TRIALS}/{self.key}.pt"

    @property
    def name(self) -> str:
        """A description for people."""
        rest = "" if self.labelling == "original" else f", {self.labelling}"
        rest += "" if self.share == WHOLE else f", {self.share} protected"
        return f"{self.regime} on {self.arm} ({self.target}, seed {self.seed}{rest})"


def arm_name(protection: str, fit: int) -> str:
    """Display name of one fit of a protection: 'uc', 'uc, fit 2', …"""
    return protection if fit == 0 else f"{protection}, fit {fit + 1}"


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """All settings of an evaluation. Raises SettingsError, one line that names the option.

    protected      name -> URLs of the fits of one protection, each a copy of the whole collection
    batch_size     in place of the recipe's, as are lr and weight_decay
    side           of what targets see, in pixels; None: the median of the clean ones, at most 224
    images         train on at most this many, chosen by the hash of their keys; None: all
    pairs          URLs of other pictures and of an adversary's protected copies of them, to train denoisers on
    classes        file with the names of classes 0, 1, …, one per line
    concepts       bank of embeddings of class names
    holdout        share of the clean training images held out for early stopping, AdaBN and last-layer refits
    """

    clean: str
    test: str
    output: str
    protected: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    targets: tuple[str, ...] = ("small",)
    regimes: tuple[str, ...] = ("nt",)
    labellings: tuple[str, ...] = ("original",)
    shares: tuple[str, ...] = (WHOLE,)
    seeds: tuple[int, ...] = (0,)
    epochs: int = 12
    recipe: str = "fast"
    batch_size: int | None = None
    lr: float | None = None
    weight_decay: float | None = None
    side: int | None = None
    images: int | None = None
    pairs: tuple[str, str] | None = None
    classes: str | None = None
    concepts: str | None = None
    holdout: float = 0.05
    workers: int | None = None
    gpus_per_worker: float = 0.0
    dry_run: bool = False
    debug: bool = False

    def __post_init__(self) -> None:
        for name in ("targets", "regimes", "labellings", "shares", "seeds"):
            values = getattr(self, name)
            check(bool(values), f"--{name} is empty")
            check(len(set(values)) == len(values), f"--{name} contains duplicates: {', '.join(map(str, values))}")
        check(self.images is None or self.images >= 2, f"--images {self.images} is less than 2")
        check(self.epochs >= 1, f"--epochs {self.epochs} is less than 1")
        check(0 < self.holdout < 0.5, f"--holdout {self.holdout} is not between 0 and 0.5")
        check(self.side is None or 32 <= self.side <= 1024, f"--side {self.side} is not between 32 and 1024")
        for name in (CLEAN, CLEAN_PART, "test"):
            check(name not in self.protected, f"--protected: the name {name!r} is reserved; choose another")
        for name, urls in self.protected.items():
            check(len(set(urls)) == len(urls), f"--protected {name} lists the same URL twice: {', '.join(urls)}")
        check_choice("recipe", self.recipe, sorted(RECIPES))
        check_least(self, {"batch_size": 2, "weight_decay": 0, "workers": 1, "gpus_per_worker": 0})
        check(self.lr is None or self.lr > 0, f"--lr {self.lr} is not above 0")
        for share in self.shares:
            parse_share(share)
        parts = {part for regime in self.regimes for part in plain_parts(regime)}
        check(self.pairs is not None or SELF_PAIRS not in parts, _WITHOUT_PAIRS)
        uses = f"--pairs is only used by the regimes {', '.join(SHARED_DENOISERS)}; add one of them to --regimes"
        check(self.pairs is None or bool(self.denoisers()), uses)

    @property
    def arms(self) -> dict[str, str]:
        """arm_name of every fit of every protection -> its URL."""
        return {arm_name(name, fit): url for name, urls in self.protected.items() for fit, url in enumerate(urls)}

    @property
    def changed_recipe(self) -> str:
        """The recipe of all trials; recipe_settings tells what it is."""
        names = ("batch_size", "lr", "weight_decay")
        return changed_recipe(self.recipe, {name: getattr(self, name) for name in names})

    def denoisers(self) -> list[str]:
        """Which of SHARED_DENOISERS the regimes need."""
        used = {name for regime in self.regimes for name in denoisers_of(regime)}
        return [name for name in SHARED_DENOISERS if name in used]

    def trials(
        self, digests: Mapping[str, str], labels: Mapping[str, str], denoisers: Mapping[str, str] | None = None
    ) -> list[Trial]:
        """All trials.

        digests    CLEAN, CLEAN_PART and every arm -> digest of its training and test images
        labels     labelling -> digest of its labels
        denoisers  regime without its number -> digest of its denoiser, or of how it trains one

        The clean control runs once per target, regime, labelling and seed, whatever the shares; every share below 1
        also gets a CLEAN_PART.
        """
        trials = []
        combinations = itertools.product(self.targets, self.regimes, self.labellings, self.seeds)
        for target, regime, labelling, seed in combinations:
            arms = [(CLEAN, 0, WHOLE)]
            arms += [
                (name, fit, share)
                for name, urls in self.protected.items()
                for fit in range(len(urls))
                for share in self.shares
            ]
            arms += [(CLEAN_PART, 0, share) for share in self.shares if parse_share(share)[1] < 1]
            for protection, fit, share in arms:
                trials.append(
                    Trial(
                        protection=protection,
                        fit=fit,
                        target=target,
                        regime=regime,
                        labelling=labelling,
                        share=share,
                        seed=seed,
                        epochs=self.epochs,
                        recipe=self.changed_recipe,
                        data=_seen(digests[arm_name(protection, fit)], regime, denoisers or {}),
                        labels=labels[labelling],
                    )
                )
        return trials


def plain_parts(regime: str) -> list[str]:
    """The names joined in a regime, without numbers and options: 'leaked-pairs:100+cg' -> leaked-pairs, cg."""
    return [re.split(r"[\[:]", part)[0] for part in regime.split("+")]


def denoisers_of(regime: str) -> list[str]:
    """The names in a regime, each as that of the denoiser it cleans with, if it does: le -> avatar."""
    return [AVATAR if part == "le" else part for part in plain_parts(regime)]


def needs_deltas(regime: str) -> bool:
    """True if the regime, or what it reports, uses the true delta of every training image."""
    return any(part in _KNOWING_DELTAS for part in plain_parts(regime))


def _seen(data: str, regime: str, denoisers: Mapping[str, str]) -> str:
    """Digest of the training data, combined with the denoiser's if the regime uses one."""
    used = [denoisers[name] for name in denoisers_of(regime) if name in denoisers]
    return sha256("\n".join([data, *used]).encode()) if used else data


def evaluation_from(given: Mapping[str, Any], preset: str | None = None) -> EvaluationSettings:
    """Settings from a preset, overridden by the given options. Raises SettingsError, with near matches."""
    if preset is not None:
        check_choice("preset", preset, sorted(PRESETS))
    merged = dict(PRESETS[preset]) if preset else {}
    merged |= given
    if "labellings" in merged:
        merged["labellings"] = tuple(name for text in merged["labellings"] for name in _swept(text))
    return settings_of_kind(EvaluationSettings, merged, required=("clean", "test", "output"))


def _swept(labelling: str) -> list[str]:
    """'concepts:5-36' -> 'concepts:5' … 'concepts:36'; other labellings are left alone."""
    match = re.fullmatch(r"(concepts|groups|random):(\d+)-(\d+)", labelling)
    if match is None:
        return [labelling]
    first, last = int(match[2]), int(match[3])
    check(first <= last, f"--labellings {labelling!r}: the range is empty")
    return [f"{match[1]}:{number}" for number in range(first, last + 1)]
