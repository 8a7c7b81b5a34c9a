"""What the trainer does under each regime, in a reader's words."""

from __future__ import annotations

_STAGED = "progressive staged training (shallow layers slowed where activations cluster too tightly)"
_WORDS = {
    "nt": "ordinary training",
    "nt-cg": "colour jitter and random grayscale",
    "cg": "colour jitter and random grayscale",
    "cg-paper": "colour jitter in 80 % and grayscale in 20 % of the images, as the ST paper has them",
    "iss-jpeg10": "JPEG at quality 10, training and test",
    "iss-gray": "grayscale, training and test",
    "iss-bits2": "two bits per channel, training and test",
    "iss-jpeg10-train": "JPEG at quality 10, training only",
    "iss-gray-train": "grayscale, training only",
    "iss-bits2-train": "two bits per channel, training only",
    "subtract": "delta estimated from the images, by label or blindly, and subtracted",
    "subtract-label": "delta estimated as the labels group the images, and subtracted",
    "subtract-blind": "delta estimated in groups found in the pixels, and subtracted",
    "at": "adversarial training, 4/255",
    "at-8": "adversarial training, 8/255",
    "at-16": "adversarial training, 16/255",
    "mixup": "images and labels mixed (Mixup)",
    "cutmix": "squares and labels mixed (CutMix)",
    "cutout": "a square of half the side cut out",
    "mixup-uc": "the weaker Mixup of the UC paper's code",
    "cutmix-uc": "the weaker CutMix of the UC paper's code",
    "cutout-uc": "the weaker Cutout of the UC paper's code",
    "mixup-14a": "channels mixed, as in the One-for-All paper's code",
    "opa": "what a linear classifier finds in the pixels is projected out",
    "ueraser-lite": "strong random augmentation",
    "ueraser": "strong augmentation, at first the hardest of five draws",
    "ueraser-max": "strong augmentation, the hardest of five draws",
    "adabn": "batch-norm statistics of clean images (needs clean images, no labels)",
    "delta-jitter": "estimated deltas of other groups added or subtracted at random",
    "delta-known": "the true delta subtracted (needs the deltas)",
    "few-clean": "fine-tuned on a few clean images (needs them)",
    "early-stop": "the epoch that is best on held-out clean images (needs them)",
    "dfr": "the last layer refitted on clean images (needs them)",
    "dropout": "half of the penultimate features dropped",
    "weight-decay": "ten times the weight decay",
    "randaugment": "RandAugment",
    "autoaugment": "AutoAugment",
    "trivialaugment": "TrivialAugment",
    "smooth-0.5": "training images blurred, sigma 0.5",
    "smooth-1": "training images blurred, sigma 1",
    "smooth-2": "training images blurred, sigma 2",
    "smooth-uc": "training images blurred, sigma 3, kernel 7 (the UC paper)",
    "equalise": "every image's smoothed spectrum set to the collection's mean, phases kept, training and test",
    "spectral": "peaks that one label's mean spectrum has over all others' cut down in its training images",
    "highpass": "frequencies up to {} cycles per image filtered out but for the mean, training and test",
    "lowpass": "frequencies above {} cycles per image filtered out, training and test",
    "shortcut-net": "what a weak network learns at once added to the target's scores in training, left out in the test",
    "self-pairs": "cleaned by a network trained on other pictures that the adversary protected, training and test",
    "purify": "cleaned by a network trained to take off noise of the usual kinds, training and test",
    "leaked-pairs": "cleaned by a network trained on {} pairs that have leaked, training and test (needs them)",
    "simclr": "features learnt without labels, then a linear probe",
    "st": _STAGED,
    "st-cg": f"{_STAGED}, colour jitter and random grayscale",
    "st-full": f"{_STAGED}, colour jitter and random grayscale, then fine-tuning",
}


def describe_regime(regime: str) -> str:
    """A phrase for 'nt-cg', 'lowpass:8' or 'subtract+cg'; options in brackets are repeated; or nothing."""
    parts = []
    for part in regime.split("+"):
        plain, bracket, options = part.partition("[")
        name, _, number = plain.partition(":")
        words = _WORDS.get(name, "").format(number)
        if not words:
            return ""
        parts.append(f"{words}; {options.rstrip(']')}" if bracket else words)
    return ", then ".join(parts)
