"""Target models by name: networks that an adversary trains, from random or published weights.

small                                                       a residual network that a CPU trains in seconds
resnet18 resnet50 vgg16 densenet121 wrn-28-10 wrn-34-10     random weights; small-image stem up to 64 px
efficientnet_b1 regnet_x_1_6gf mobilenet_v2 shufflenet_v2_x1_0 vit-14a
pretrained:SURROGATE                                        a surrogate's weights, fine-tuned
probe:SURROGATE                                             a linear classifier on a surrogate's frozen features
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from pipeline.errors import InputError, SettingsError
from pipeline.settings import near_matches

if TYPE_CHECKING:
    from torch import nn

__all__ = ["TARGETS", "build_target", "check_target", "parse_target"]

Builder: TypeAlias = "Callable[[int, int, float], nn.Module]"


# Libraries, torch too, are imported where a network is built: who only checks names needs none of them.
def _small(num_classes: int, side: int, dropout: float) -> nn.Module:
    from pipeline.relearning.targets.small import SmallResNet

    return SmallResNet(num_classes, side, dropout)


def _published(name: str, num_classes: int, side: int, dropout: float) -> nn.Module:
    from pipeline.relearning.targets.published import build_published

    return build_published(name, num_classes, side, dropout)


def _wide(depth: int, width: int, num_classes: int, side: int, dropout: float) -> nn.Module:
    from pipeline.relearning.targets.wide import build_wide

    return build_wide(depth, width, num_classes, side, dropout)


def _vit(num_classes: int, side: int, dropout: float) -> nn.Module:
    from pipeline.relearning.targets.published import build_vit

    return build_vit(num_classes, side, dropout)


def _pretrained(surrogate: str, is_frozen: bool, num_classes: int, side: int, dropout: float) -> nn.Module:
    from pipeline.relearning.targets.pretrained import build_pretrained

    return build_pretrained(surrogate, num_classes, dropout, is_frozen=is_frozen)


TARGETS: dict[str, Builder] = {
    "small": _small,
    "resnet18": partial(_published, "resnet18"),
    "resnet50": partial(_published, "resnet50"),
    "vgg16": partial(_published, "vgg16_bn"),
    "densenet121": partial(_published, "densenet121"),
    "wrn-28-10": partial(_wide, 28, 10),
    "wrn-34-10": partial(_wide, 34, 10),
    "efficientnet_b1": partial(_published, "efficientnet_b1"),
    "regnet_x_1_6gf": partial(_published, "regnet_x_1_6gf"),
    "mobilenet_v2": partial(_published, "mobilenet_v2"),
    "shufflenet_v2_x1_0": partial(_published, "shufflenet_v2_x1_0"),
    "vit-14a": _vit,
}
_ON_WEIGHTS = {"pretrained": False, "probe": True}  # kind -> whether the trunk is frozen


def parse_target(name: str) -> tuple[str, str]:
    """(name, "") for a network, (kind, surrogate) for one on a surrogate's weights.

    Raises SettingsError, with near matches, for anything else; does not check whether the surrogate exists.
    """
    kind, separator, surrogate = name.partition(":")
    if separator and kind in _ON_WEIGHTS:
        return kind, surrogate
    if name not in TARGETS:
        names = [*sorted(TARGETS), "pretrained:SURROGATE", "probe:SURROGATE"]
        raise SettingsError(f"unknown target {name!r}; choose from {', '.join(names)}{near_matches(name, names)}")
    return name, ""


def check_target(name: str) -> None:
    """Raise SettingsError, with near matches, unless `name` is a known target. Reads no weights."""
    kind, surrogate = parse_target(name)
    if kind in _ON_WEIGHTS:
        from pipeline.surrogates.pretrained import check_surrogate

        try:
            check_surrogate(surrogate)
        except SettingsError as error:
            raise SettingsError(f"target {name!r}: {str(error).removeprefix('--surrogate ')}") from None


def build_target(name: str, num_classes: int, side: int, *, seed: int, dropout: float = 0.0) -> nn.Module:
    """Build a target. Its random weights depend only on the seed; torch's global generator is not affected.

    dropout  rate before the classifier; at 0, a network keeps the rate it was published with
    The network maps float [B, 3, side, side], normalised (or in [0, 1] if its attribute `normalises_itself` is true),
    to scores [B, num_classes]; `embed` returns the penultimate features [B, d], and `head` is the classifier.
    Raises SettingsError for an unknown name, with near matches, or a side the network cannot handle; InputError for
    published weights that are not available.
    """
    import torch

    check_target(name)
    kind, surrogate = parse_target(name)
    builder = partial(_pretrained, surrogate, _ON_WEIGHTS[kind]) if surrogate else TARGETS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return builder(num_classes, side, dropout)
        except InputError as error:
            raise InputError(f"target {name}: {error}") from None
