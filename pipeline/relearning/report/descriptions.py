"""What the trainer does under each regime, in plain words."""

from __future__ import annotations

_STAGED = "progressive staged training (slows shallow layers when activations cluster too tightly)"
_WORDS = {
    "nt": "ordinary training",
    "nt-cg": "colour jitter and random grayscale",
    "cg": "colour jitter and random grayscale",
    "cg-paper": "colour jitter on 80 % and grayscale on 20 % of the images, as in the ST paper",
    "jitter": "colour jitter on 80 % of the images, alone",
    "grayscale": "20 % of the images in grayscale, training only",
    "gamma": "gamma between 1/2 and 2",
    "brightness": "brightness between 0.6 and 1.4 times",
    "solarize": "everything above mid-grey inverted in half of the images",
    "hue": "hue turned by up to a tenth of the circle",
    "iss-jpeg10": "JPEG at quality 10, training and test",
    "iss-gray": "grayscale, training and test",
    "iss-bits2": "two bits per channel, training and test",
    "iss-jpeg10-train": "JPEG at quality 10, training only",
    "iss-gray-train": "grayscale, training only",
    "iss-bits2-train": "two bits per channel, training only",
    "subtract": "delta estimated from the images, grouped by label or blindly, and subtracted",
    "subtract-label": "delta estimated from the images grouped by label, and subtracted",
    "subtract-blind": "delta estimated from groups found in the pixels, and subtracted",
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
    "opa": "projects out what a linear classifier finds in the pixels",
    "ueraser-lite": "strong random augmentation",
    "ueraser": "strong augmentation, the hardest of five draws in the first 0.3 of the epochs",
    "ueraser-max": "strong augmentation, the hardest of five draws",
    "adabn": "batch-norm statistics recomputed on clean images (needs clean images, but no labels)",
    "delta-jitter": "other groups' estimated deltas added or subtracted at random",
    "delta-known": "true delta subtracted (needs the deltas)",
    "few-clean": "fine-tuned on a few clean images (needs them)",
    "early-stop": "the best epoch on held-out clean images (needs them)",
    "dfr": "the last layer refitted on clean images (needs them)",
    "dropout": "dropout of 0.5 on the penultimate features",
    "weight-decay": "ten times the recipe's weight decay",
    "randaugment": "RandAugment",
    "autoaugment": "AutoAugment",
    "trivialaugment": "TrivialAugment",
    "smooth-0.5": "training images blurred, sigma 0.5",
    "smooth-1": "training images blurred, sigma 1",
    "smooth-2": "training images blurred, sigma 2",
    "smooth-uc": "training images blurred, sigma 3, kernel 7 (the UC paper)",
    "equalise": "every image's smoothed spectrum set to the collection's mean, keeping phases, training and test",
    "spectral": "peaks in one label's mean spectrum that the others lack are cut from its training images",
    "highpass": "frequencies up to {} cycles per image filtered out, except the mean, training and test",
    "lowpass": "frequencies above {} cycles per image filtered out, training and test",
    "shortcut-net": "a weak network's scores, which capture the shortcut, added to the target's in training only",
    "coin": "every pixel resampled at a random place up to two pixels away, training only",
    "rsk-ff": "sharpened by random kernels, low frequencies only, training only",
    "friendly-noise": "as much noise added as the target's answers bear, and random signs of 8/255",
    "epic": "images whose gradients lie alone are left out",
    "self-pairs": "cleaned by a network trained on other pictures the adversary protected, training and test",
    "purify": "cleaned by a network trained to remove noise of the usual kinds, training and test",
    "avatar": "made again from strong noise by a diffusion model of other pictures; training only",
    "le": "four times made again from weak noise by a diffusion model of other pictures; training only",
    "d-vae": "what an autoencoder of limited rate keeps, trained on the protected images alone; training only",
    "leaked-pairs": "cleaned by a network trained on {} leaked pairs, training and test (needs them)",
    "simclr": "features learnt without labels, then a linear probe",
    "st": _STAGED,
    "st-cg": f"{_STAGED}, colour jitter and random grayscale",
    "st-full": f"{_STAGED}, colour jitter and random grayscale, then fine-tuning",
}


def describe_regime(regime: str) -> str:
    """A phrase for 'nt-cg', 'lowpass:8' or 'subtract+cg', followed by any bracketed options; "" if unknown."""
    parts = []
    for part in regime.split("+"):
        plain, bracket, options = part.partition("[")
        name, _, number = plain.partition(":")
        words = _WORDS.get(name, "").format(number)
        if not words:
            return ""
        parts.append(f"{words}; {options.rstrip(']')}" if bracket else words)
    return ", then ".join(parts)
