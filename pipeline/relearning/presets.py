"""The presets of an evaluation: which regimes, targets, seeds and epochs; and the recipes of the papers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The regimes that no other dominates. Filters at 16 cycles only matter above 32 px, which cannot show finer detail.
AUDIT = (
    *("nt", "nt-cg", "st-cg", "st-full", "at", "at-8", "ueraser-lite", "ueraser", "opa", "mixup", "cutmix"),
    *("iss-gray", "iss-jpeg10", "iss-jpeg10-train", "iss-jpeg10+nt-cg"),
    *("equalise", "spectral", "highpass:4", "highpass:16", "lowpass:8", "lowpass:16"),
    *("subtract", "subtract+cg", "delta-jitter", "shortcut-net", "adabn", "early-stop", "dfr"),
)

# t-SNE after every epoch would take longer than the epochs. At 32 px a low-pass at 8 cycles leaves what 16 px would
# show: still a picture, but only half the frequencies that a delta can use.
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
        "targets": ("resnet18", "resnet50", "vgg16", "densenet121", "wrn-28-10", "wrn-34-10"),
        "regimes": ("nt", "cg-paper", "st", "st-cg[cg=paper]", "st-full[cg=paper]"),
        "seeds": (0,),
        "epochs": 60,
        "recipe": "st-paper",
    },
    "uc-paper": {
        "targets": ("resnet18", "efficientnet_b1", "regnet_x_1_6gf"),
        # the augmentations as their authors meant them, and as the released code has them
        "regimes": ("nt", "mixup", "mixup-uc", "cutmix", "cutmix-uc", "cutout", "cutout-uc", "smooth-1", "smooth-uc"),
        "seeds": (0,),
        "epochs": 90,
        "recipe": "uc-paper",
        "side": 224,
    },
    "one-for-all-paper": {
        "targets": ("resnet18", "resnet50", "vgg16", "vit-14a", "mobilenet_v2", "shufflenet_v2_x1_0"),
        "regimes": ("nt", "mixup", "mixup-14a", "smooth-1", "opa"),
        "labellings": ("original", "concepts:20"),
        "seeds": (0,),
        "epochs": 200,
        "recipe": "one-for-all-paper",
        "side": 224,
    },
}

# Settings of pipeline.relearning.training.Recipe; 'fast' is its defaults
RECIPES: dict[str, dict[str, Any]] = {
    "fast": {},
    "st-paper": {"lr": 0.1, "schedule": "cosine", "nesterov": False, "label_smoothing": 0.0, "batch_size": 128},
    "uc-paper": {"lr": 0.1, "schedule": "cosine", "nesterov": False, "label_smoothing": 0.0, "batch_size": 512}
    | {"normalise": "half", "keep_last": True, "oversize": 256 / 224},  # random windows of 224 out of 256 px
    "one-for-all-paper": {
        "lr": 0.1,
        "schedule": "cosine",
        "nesterov": False,
        "label_smoothing": 0.0,
        "batch_size": 64,  # for Pets, Flowers and Cars; 256 for Food-101, SUN397 and CIFAR
        "weight_decay": 3e-5,
        "normalise": "none",
        "keep_last": True,
    },
}


def changed_recipe(recipe: str, changes: Mapping[str, Any]) -> str:
    """The name of a recipe with other settings: 'fast[batch_size=64,lr=0.1]'; the recipe's own without any."""
    given = ",".join(f"{name}={value}" for name, value in sorted(changes.items()) if value is not None)
    return f"{recipe}[{given}]" if given else recipe


def recipe_settings(name: str) -> dict[str, Any]:
    """The settings of a recipe by a name that changed_recipe may have made."""
    recipe, _, changes = name.removesuffix("]").partition("[")
    pairs = [change.split("=") for change in changes.split(",") if change]
    return RECIPES[recipe] | {key: int(value) if key == "batch_size" else float(value) for key, value in pairs}
