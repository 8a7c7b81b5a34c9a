"""What an evaluation does: every combination of protection, target, regime, labelling, share and seed is one trial."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.fingerprint import canonical, sha256
from pipeline.relearning.shares import parse_share
from pipeline.settings import check, check_choice, settings_of_kind

CLEAN = "clean"  # the name of the control in every table
CLEAN_PART = "clean-part"  # trained on what a share below 1 leaves unprotected, alone
WHOLE = "samples:1"

# below the output
RESULTS, HISTORIES, REPORT, SETTINGS = "results.parquet", "histories.parquet", "report.html", "evaluation.json"
TRIALS = "trials"

SELF_PAIRS, PURIFY, LEAKED_PAIRS = "self-pairs", "purify", "leaked-pairs"
SHARED_DENOISERS = (SELF_PAIRS, PURIFY)  # one for all trials of an evaluation; leaked pairs make one for each trial

# What no other dominates. Filters at 16 cycles are for more than 32 px, which show nothing finer along an axis.
AUDIT = (
    *("nt", "nt-cg", "st-cg", "st-full", "at", "at-8", "ueraser-lite", "ueraser", "opa", "mixup", "cutmix"),
    *("iss-gray", "iss-jpeg10", "iss-jpeg10-train", "iss-jpeg10+nt-cg"),
    *("equalise", "spectral", "highpass:4", "highpass:16", "lowpass:8", "lowpass:16"),
    *("subtract", "subtract+cg", "delta-jitter", "shortcut-net", "adabn", "early-stop", "dfr"),
)

# t-SNE of every epoch would take longer than the epochs. At 32 px a low-pass at 8 cycles leaves what 16 px would show:
# half of what a delta can use, and still a picture.
AUDIT_CPU = (
    *("nt", "nt-cg", "st[reduce=pca2]", "st-cg[reduce=pca2]", "st-full[reduce=pca2]", "at", "ueraser-lite"),
    *("iss-jpeg10", "iss-jpeg10-train", "equalise", "lowpass:8", "subtract", "subtract+cg", "adabn", "early-stop"),
)

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {"targets": ("small",), "regimes": ("nt", "nt-cg"), "seeds": (0,), "epochs": 4},
    "audit": {"targets": ("resnet18",), "regimes": AUDIT, "seeds": (0, 1, 2), "epochs": 60},
    "audit-cpu": {
        "targets": ("small",),
        "regimes": AUDIT_CPU,
        "seeds": (0, 1),
        "epochs": 12,
    },
    "st-paper": {
        "targets": ("resnet18",),
        "regimes": ("nt", "cg-paper", "st", "st-cg[cg=paper]", "st-full[cg=paper]"),
        "seeds": (0,),
        "epochs": 60,
        "recipe": "st-paper",
    },
    "uc-paper": {
        "targets": ("resnet18", "efficientnet_b1", "regnet_x_1_6gf"),
        "regimes": ("nt", "mixup-uc", "cutmix-uc", "cutout-uc", "smooth-uc"),
        "seeds": (0,),
        "epochs": 90,
        "recipe": "uc-paper",
        "side": 224,
    },
    "one-for-all-paper": {
        "targets": ("resnet18", "resnet50", "vit-14a", "mobilenet_v2", "shufflenet_v2_x1_0"),
        "regimes": ("nt", "mixup-14a", "smooth-1", "opa"),
        "labellings": ("original", "concepts:20"),
        "seeds": (0,),
        "epochs": 200,
        "recipe": "one-for-all-paper",
        "side": 224,
    },
}

# Settings of pipeline.relearning.train.Recipe; None = as the network of a CPU record is trained
RECIPES: dict[str, dict[str, Any]] = {
    "fast": {},
    "st-paper": {"lr": 0.1, "schedule": "cosine", "nesterov": False, "label_smoothing": 0.0, "batch_size": 128},
    "uc-paper": {"lr": 0.1, "schedule": "cosine", "nesterov": False, "label_smoothing": 0.0, "batch_size": 512},
    "one-for-all-paper": {
        "lr": 0.1,
        "schedule": "cosine",
        "nesterov": False,
        "label_smoothing": 0.0,
        "batch_size": 64,
        "weight_decay": 3e-5,
    },
}

_WITHOUT_PAIRS = (
    "regime 'self-pairs' needs --pairs OTHER=THEIRS: protect other pictures with a seed of your own "
    "(protect_imagenet.py --input OTHER --output THEIRS --seed 1), then give both"
)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training. Its key is the digest of its content, the data's digest included: equal trials run once.

    fit     which of several fits of the protection, from 0; 0 for controls
    share   "samples:S" or "classes:S": the part of the training images that is protected; the rest stays clean
    data    digest of the images, and of the denoiser where the regime cleans them with one
    labels  digest of what the labelling made of their labels
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
        return sha256(canonical(asdict(self)))[:20]

    @property
    def arm(self) -> str:
        """The protected collection, by its name in EvaluationSettings.arms."""
        return arm_name(self.protection, self.fit)

    @property
    def result(self) -> str:
        """Where its row lies below the output, once it is finished."""
        return f"{TRIALS}/{self.key}.json"

    @property
    def checkpoint(self) -> str:
        """Where its last epoch lies while it is not."""
        return f"{TRIALS}/{self.key}.pt"

    @property
    def name(self) -> str:
        """For a person."""
        rest = "" if self.labelling == "original" else f", {self.labelling}"
        rest += "" if self.share == WHOLE else f", {self.share} protected"
        return f"{self.regime} on {self.arm} ({self.target}, seed {self.seed}{rest})"


def arm_name(protection: str, fit: int) -> str:
    """One fit of a protection, for tables of files and for a person: 'uc', 'uc, fit 2', …"""
    return protection if fit == 0 else f"{protection}, fit {fit + 1}"


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Every choice of an evaluation. Raises SettingsError, one line that names the option.

    protected      name -> URLs of the fits of one protection, each a copy of the whole collection
    side           pixels of all images, None: the median of the clean ones, at most 224
    images         train on at most so many, chosen by the hash of their keys; None: on all
    pairs          URLs of other pictures and of their copies that an adversary protected, for denoisers
    classes        file with the name of class 0, 1, … on each line; concepts  bank of embeddings of class names
    holdout        share of the clean training images that no one trains on: for early stop, AdaBN, last-layer refits
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
            check(len(set(values)) == len(values), f"--{name} names something twice: {', '.join(map(str, values))}")
        check(self.images is None or self.images >= 2, f"--images {self.images} is less than 2")
        check(self.epochs >= 1, f"--epochs {self.epochs} is less than 1")
        check(0 < self.holdout < 0.5, f"--holdout {self.holdout} is not between 0 and 0.5")
        check(self.side is None or 32 <= self.side <= 1024, f"--side {self.side} is not between 32 and 1024")
        for name in (CLEAN, CLEAN_PART, "test"):
            check(name not in self.protected, f"--protected: {name!r} is another collection; choose another")
        for name, urls in self.protected.items():
            check(len(set(urls)) == len(urls), f"--protected {name} names a fit twice: {', '.join(urls)}")
        check_choice("recipe", self.recipe, sorted(RECIPES))
        for share in self.shares:
            parse_share(share)
        parts = {part for regime in self.regimes for part in plain_parts(regime)}
        check(self.pairs is not None or SELF_PAIRS not in parts, _WITHOUT_PAIRS)
        uses = f"--pairs are for the regimes {' and '.join(SHARED_DENOISERS)}; add one of them to --regimes"
        check(self.pairs is None or not parts.isdisjoint(SHARED_DENOISERS), uses)

    @property
    def arms(self) -> dict[str, str]:
        """Every fit of every protection by its arm_name -> its URL."""
        return {arm_name(name, fit): url for name, urls in self.protected.items() for fit, url in enumerate(urls)}

    def denoisers(self) -> list[str]:
        """Which of SHARED_DENOISERS the regimes need."""
        parts = {part for regime in self.regimes for part in plain_parts(regime)}
        return [name for name in SHARED_DENOISERS if name in parts]

    def trials(
        self, digests: Mapping[str, str], labels: Mapping[str, str], denoisers: Mapping[str, str] | None = None
    ) -> list[Trial]:
        """All trials.

        digests    CLEAN and every arm -> digest of what is trained on and tested with it
        labels     labelling -> digest of the labels that it gives
        denoisers  regime without its number -> digest of the denoiser that it cleans with, or of how it makes one

        The clean control is run for every target, regime, labelling and seed, once, whatever the shares; beside
        every share below 1 stands CLEAN_PART.
        """
        found = []
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
                found.append(
                    Trial(
                        protection=protection,
                        fit=fit,
                        target=target,
                        regime=regime,
                        labelling=labelling,
                        share=share,
                        seed=seed,
                        epochs=self.epochs,
                        recipe=self.recipe,
                        data=_seen(
                            digests[CLEAN if protection == CLEAN_PART else arm_name(protection, fit)],
                            regime,
                            denoisers or {},
                        ),
                        labels=labels[labelling],
                    )
                )
        return found


def plain_parts(regime: str) -> list[str]:
    """The regimes that 'leaked-pairs:100+cg' joins, without numbers and options: leaked-pairs, cg."""
    return [re.split(r"[\[:]", part)[0] for part in regime.split("+")]


def _seen(data: str, regime: str, denoisers: Mapping[str, str]) -> str:
    """Digest of what is trained on: of the data alone, unless the regime sees them through a denoiser."""
    found = [denoisers[part] for part in plain_parts(regime) if part in denoisers]
    return sha256("\n".join([data, *found]).encode()) if found else data


def evaluation_from(given: Mapping[str, Any], preset: str | None = None) -> EvaluationSettings:
    """Settings from a preset, overlaid with options. Raises SettingsError, with near matches."""
    if preset is not None:
        check_choice("preset", preset, sorted(PRESETS))
    merged = dict(PRESETS[preset]) if preset else {}
    merged |= given
    if "labellings" in merged:
        merged["labellings"] = tuple(name for one in merged["labellings"] for name in _swept(one))
    return settings_of_kind(EvaluationSettings, merged, required=("clean", "test", "output"))


def _swept(labelling: str) -> list[str]:
    """concepts:5-36 -> concepts:5 … concepts:36; others as they are."""
    found = re.fullmatch(r"(concepts|groups|random):(\d+)-(\d+)", labelling)
    if found is None:
        return [labelling]
    first, last = int(found[2]), int(found[3])
    check(first <= last, f"--labellings {labelling!r} ends before it begins")
    return [f"{found[1]}:{number}" for number in range(first, last + 1)]
