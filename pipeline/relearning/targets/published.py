"""torchvision's networks as targets: split before the classifier, with a different stem for small images.

For images up to 64 px the first layer keeps the resolution: in residual and dense networks it becomes 3x3 with stride 1
and no pooling, as is usual on CIFAR (He et al. 2016, section 4.2); in the others its stride becomes 1. VGG-16 then ends
with its 512 pooled channels instead of two layers of 4,096 units.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torchvision import models

from pipeline.errors import SettingsError
from pipeline.relearning.targets.base import Target

SMALL_SIDE = 64


def build_published(name: str, num_classes: int, side: int, dropout: float) -> Target:
    """The network `name`, one of PUBLISHED, with random weights from torch's global generator.

    dropout  rate before the classifier; at 0, the network keeps the rate it was published with
    """
    network = _make(name, num_classes)
    stem, classifier = PUBLISHED[name]
    if side <= SMALL_SIDE:
        stem(network)
    return _cut(network, classifier, dropout)


def build_vit(num_classes: int, side: int, dropout: float) -> Target:
    """The vision transformer of Chen et al. 2024: 4 layers, 8 heads, hidden and MLP size 256, dropout 0.1.

    Patches are 16 px, or 4 px for images up to 64 px. Raises SettingsError for a side they do not divide.
    """
    patch = 4 if side <= SMALL_SIDE else 16
    if side % patch:
        raise SettingsError(
            f"target vit-14a cuts images into patches of {patch} px, but {side} px is not a multiple of that"
        )
    network = models.VisionTransformer(
        image_size=side,
        patch_size=patch,
        num_layers=4,
        num_heads=8,
        hidden_dim=256,
        mlp_dim=256,
        dropout=0.1,
        num_classes=num_classes,
    )
    return _cut(network, "heads", dropout)


def _make(name: str, num_classes: int) -> nn.Module:
    options = {"init_weights": True} if name.startswith("vgg") else {}
    network: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **options)
    return network


def _cut(network: nn.Module, classifier: str, dropout: float) -> Target:
    """Split off the classifier's last layer and the dropout before it."""
    last = getattr(network, classifier)
    layers = list(last) if isinstance(last, nn.Sequential) else [last]
    head = layers.pop()
    own = 0.0
    if layers and isinstance(layers[-1], nn.Dropout):
        own = float(layers[-1].p)
        layers.pop()
    setattr(network, classifier, nn.Sequential(*layers))
    return Target(network, head, dropout or own)


def _small_resnet_stem(network: nn.Module) -> None:
    network.conv1 = _first(64)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()


def _small_densenet_stem(network: nn.Module) -> None:
    conv = _first(64)
    nn.init.kaiming_normal_(conv.weight)
    network.set_submodule("features.conv0", conv)
    network.set_submodule("features.pool0", nn.Identity())


def _small_vgg_end(network: nn.Module) -> None:
    head = nn.Linear(512, network.get_submodule("classifier.6").out_features)  # type: ignore[arg-type]
    nn.init.normal_(head.weight, 0, 0.01)
    nn.init.zeros_(head.bias)
    network.avgpool = nn.AdaptiveAvgPool2d(1)
    network.classifier = head


def _small_shufflenet_stem(network: nn.Module) -> None:
    _full_resolution("conv1.0")(network)
    network.maxpool = nn.Identity()


def _full_resolution(layer: str) -> Callable[[nn.Module], None]:
    def change(network: nn.Module) -> None:
        first = network.get_submodule(layer)
        assert isinstance(first, nn.Conv2d)
        first.stride = (1, 1)

    return change


def _first(channels: int) -> nn.Conv2d:
    return nn.Conv2d(3, channels, 3, 1, 1, bias=False)


# name -> how to adapt it to small images, and the attribute that holds the classifier
PUBLISHED: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "resnet18": (_small_resnet_stem, "fc"),
    "resnet50": (_small_resnet_stem, "fc"),
    "vgg16_bn": (_small_vgg_end, "classifier"),
    "densenet121": (_small_densenet_stem, "classifier"),
    "efficientnet_b1": (_full_resolution("features.0.0"), "classifier"),
    "regnet_x_1_6gf": (_full_resolution("stem.0"), "fc"),
    "mobilenet_v2": (_full_resolution("features.0.0"), "classifier"),
    "shufflenet_v2_x1_0": (_small_shufflenet_stem, "fc"),
}
