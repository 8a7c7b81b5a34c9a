"""The targets: published sizes, one cut between features and classifier, weights that belong to the seed."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.errors import SettingsError
from pipeline.relearning.regimes import find_regime
from pipeline.relearning.targets import TARGETS, build_target, check_target
from pipeline.relearning.targets.small import SmallResNet
from pipeline.relearning.train import train_target
from pipeline.relearning.training import Labelled, Recipe, ScoredOn, Training
from pipeline.surrogates.surrogate import load_surrogate

LITE = "timm:tf_efficientnet_lite0"


def unallocated(name: str, num_classes: int, side: int) -> nn.Module:
    """The target on the meta device: shapes without values. RegNet computes its widths with tensors, so not it."""
    if name == "regnet_x_1_6gf":
        return build_target(name, num_classes, side, seed=0).to("meta")
    with torch.device("meta"):
        return build_target(name, num_classes, side, seed=0)


def num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


# Millions, as the networks' papers and the usual CIFAR-10 implementations state them.
@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("resnet18", 11.17),
        ("resnet50", 23.52),
        ("vgg16", 14.73),
        ("densenet121", 6.96),
        ("wrn-28-10", 36.48),
        ("wrn-34-10", 46.16),
    ],
)
def test_a_target_for_small_images_has_the_size_known_from_cifar(name, millions):
    assert num_parameters(unallocated(name, 10, 32)) / 1e6 == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet18", 11_689_512),
        ("resnet50", 25_557_032),
        ("vgg16", 138_365_992),
        ("densenet121", 7_978_856),
        ("efficientnet_b1", 7_794_184),
        ("regnet_x_1_6gf", 9_190_136),
        ("mobilenet_v2", 3_504_872),
        ("shufflenet_v2_x1_0", 2_278_604),
    ],
)
def test_a_target_for_large_images_is_the_published_imagenet_network(name, count):
    assert num_parameters(unallocated(name, 1000, 224)) == count


@pytest.mark.parametrize(("side", "patch", "tokens"), [(224, 16, 197), (32, 4, 65), (64, 4, 257)])
def test_the_vision_transformer_has_the_layers_of_chen_et_al(side, patch, tokens):
    attention = 4 * (256 * 256 + 256)
    layer = 2 * 512 + attention + 2 * (256 * 256 + 256)  # two norms, attention, two layers of the mlp
    expected = (3 * patch**2 * 256 + 256) + 256 + tokens * 256 + 4 * layer + 512 + (256 * 37 + 37)
    network = unallocated("vit-14a", 37, side)
    assert num_parameters(network) == expected
    rates = {layer.p for layer in network.trunk.modules() if isinstance(layer, nn.Dropout)}
    assert rates == {0.1}


@pytest.mark.parametrize("name", sorted(TARGETS))
@pytest.mark.parametrize("side", [32, 64, 96])
def test_every_target_gives_features_to_its_head_at_every_side(name, side):
    network = unallocated(name, 7, side).eval()
    images = torch.empty(2, 3, side, side, device="meta")
    features = network.embed(images)
    assert features.ndim == 2
    assert features.shape[1] == network.head.in_features
    assert isinstance(network.head, nn.Linear)
    assert network(images).shape == (2, 7)


@pytest.mark.parametrize("name", ["mobilenet_v2", "shufflenet_v2_x1_0", "vit-14a"])
def test_scores_are_the_heads_of_the_features_and_gradients_reach_everything(name):
    network = build_target(name, 5, 32, seed=1).eval()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(network(images), network.head(network.embed(images)))
    network.train()
    network.head.weight.data.normal_(generator=torch.Generator().manual_seed(0))  # the transformer starts at zero
    network(images).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize(
    ("name", "layer"), [("resnet18", "layer4"), ("densenet121", "features"), ("vgg16", "features")]
)
def test_small_images_reach_the_last_layer_with_the_resolution_known_from_cifar(name, layer):
    network = unallocated(name, 10, 32).eval()
    seen = {}
    network.trunk.get_submodule(layer).register_forward_hook(lambda _, __, output: seen.update(side=output.shape[-1]))
    network(torch.empty(1, 3, 32, 32, device="meta"))
    assert seen["side"] == {"resnet18": 4, "densenet121": 4, "vgg16": 1}[name]


def test_weights_belong_to_the_seed_and_the_global_generator_is_left_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = (build_target("shufflenet_v2_x1_0", 3, 32, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_dropout_before_the_head_is_the_one_asked_for_or_else_the_published_one():
    assert unallocated("efficientnet_b1", 3, 32).dropout.p == 0.2  # Tan and Le 2019
    with torch.device("meta"):
        assert build_target("efficientnet_b1", 3, 32, seed=0, dropout=0.5).dropout.p == 0.5
        assert build_target("resnet18", 3, 32, seed=0, dropout=0.5).dropout.p == 0.5
    assert unallocated("resnet18", 3, 32).dropout.p == 0
    assert unallocated("small", 3, 32).dropout.p == 0


def test_a_probe_sees_the_features_of_its_surrogate_and_only_its_head_learns():
    network = build_target(f"probe:{LITE}", 3, 32, seed=0)
    surrogate = load_surrogate(LITE, weights=None, size=None, device="cpu")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert network.normalises_itself
    network.train()
    assert network.training
    assert not any(module.training for module in network.trunk.modules())
    torch.testing.assert_close(network.embed(images), surrogate.embed(images, resize=True))
    assert {name for name, one in network.named_parameters() if one.requires_grad} == {"head.weight", "head.bias"}
    assert network.eval().head.training is False


def test_a_pretrained_victim_starts_at_its_surrogate_and_learns_everywhere():
    network = build_target(f"pretrained:{LITE}", 3, 32, seed=0)
    surrogate = load_surrogate(LITE, weights=None, size=None, device="cpu")
    images = torch.rand(2, 3, 300, 300, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(network.eval().embed(images), surrogate.embed(images, resize=True))
    assert all(parameter.requires_grad for parameter in network.parameters())
    network.train()
    assert all(module.training for module in network.modules())


def test_training_leaves_images_to_a_network_that_normalises_them_itself():
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(64) % 2
    network = build_target(f"probe:{LITE}", 2, 32, seed=0)
    regime = find_regime("nt")
    training = Training(network, images, labels, regime, Recipe(epochs=1), 0, torch.device("cpu"))
    shown = images[:2].float() / 255
    assert torch.equal(training.normalise(shown), shown)
    plain = Training(SmallResNet(2, 32), images, labels, regime, Recipe(epochs=1), 0, torch.device("cpu"))
    expected = (shown.numpy() - over_pixels(images, np.mean)) / over_pixels(images, np.std)
    np.testing.assert_allclose(plain.normalise(shown).numpy(), expected, atol=1e-4)


def over_pixels(images, statistic):
    return statistic(images.numpy() / 255, axis=(0, 2, 3))[:, None, None]


@pytest.mark.slow
def test_a_probe_on_published_features_learns_what_it_was_shown():
    rng = np.random.default_rng(0)
    labels = torch.arange(64) % 2
    images = torch.from_numpy(rng.integers(0, 256, (64, 3, 32, 32)).astype(np.uint8))
    images[labels == 1] = images[labels == 1].float().mean((2, 3), keepdim=True).expand(-1, 3, 32, 32).to(torch.uint8)
    score = train_target(
        Labelled(images, labels),
        ScoredOn(Labelled(images, labels)),
        regime=find_regime("nt"),
        seed=0,
        target=f"probe:{LITE}",
        recipe=Recipe(epochs=3),
    )
    assert score.accuracy_last == 1


def test_a_target_that_is_none_is_refused_with_near_matches():
    with pytest.raises(
        SettingsError, match=r"unknown target 'resnet-18'; choose from .*; did you mean resnet18, resnet50"
    ):
        build_target("resnet-18", 10, 32, seed=0)
    with pytest.raises(SettingsError, match=r"^target 'probe:timm:tf_efficientnet_lit0': .* no model .*did you mean"):
        check_target("probe:timm:tf_efficientnet_lit0")
    with pytest.raises(SettingsError, match=r"^target 'pretrained:resnet18': .* is not one of open_clip:MODEL"):
        check_target("pretrained:resnet18")
    with pytest.raises(SettingsError, match="patches of 16 px, but 72 px is not a multiple"):
        build_target("vit-14a", 10, 72, seed=0)
    for name in TARGETS:
        check_target(name)


def test_checking_names_loads_no_library_of_networks():
    code = (
        "import sys; from pipeline.relearning.targets import check_target; check_target('resnet18');"
        "print([name for name in ('timm', 'open_clip', 'torchvision') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
