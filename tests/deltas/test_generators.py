"""The generator network is the paper's, parameter by parameter, and no delta leaves its bound."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pipeline.deltas.generators import DirectDelta, NetworkDelta, ResNetGenerator, bounded

EPSILON = 16 / 255


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_generator_has_the_papers_parameters() -> None:
    generator = ResNetGenerator()
    assert count(generator.encoder) == 378_944
    assert count(generator.blocks) == 7_084_032
    assert count(generator.decoder) == 378_435
    assert count(generator) == 7_841_411


@pytest.mark.parametrize("side", [8, 20, 32, 64])
def test_a_delta_has_the_shape_of_its_noise(side: int) -> None:
    generator = ResNetGenerator(width=4, blocks=1)
    assert generator(torch.rand(1, 3, side, side)).shape == (1, 3, side, side)


def test_the_same_noise_gives_the_same_delta_in_any_mode_and_at_any_time() -> None:
    made = NetworkDelta(16, EPSILON, "tanh_clamp", seed=0, cluster=3, width=4, blocks=1)
    first = made.train()()
    for _ in range(5):
        made.generator(torch.rand(1, 3, 16, 16) * 9)  # would move running statistics
    assert torch.equal(first, made.train()())
    assert torch.equal(first, made.eval()())


def test_batch_statistics_are_those_of_one_map_as_instance_norm_takes_them() -> None:
    first = NetworkDelta(16, EPSILON, "tanh_clamp", seed=0, cluster=0, width=4, blocks=1).generator.encoder[1:3]
    maps = torch.rand(1, 3, 22, 22)
    convolved = first[0](maps)
    assert torch.allclose(first(maps), nn.functional.instance_norm(convolved), atol=1e-5)


@pytest.mark.parametrize("bound", ["tanh_clamp", "eps_tanh", "clamp_ste"])
def test_no_value_leaves_the_bound(bound: str) -> None:
    raw = torch.linspace(-20, 20, 3000).reshape(3, 10, 100)
    assert bounded(raw, EPSILON, bound).abs().max() <= torch.tensor(EPSILON)  # type: ignore[arg-type]


def gradient(bound: str, value: float) -> float:
    raw = torch.tensor([value], requires_grad=True)
    bounded(raw, 0.5, bound).sum().backward()  # type: ignore[arg-type, no-untyped-call]
    assert raw.grad is not None
    return float(raw.grad)


def test_only_the_papers_clamp_has_a_dead_zone() -> None:
    slope = 1 - torch.tanh(torch.tensor(1.0)).item() ** 2  # tanh(1) = 0.76 lies beyond 0.5
    assert gradient("tanh_clamp", 1.0) == 0
    assert gradient("clamp_ste", 1.0) == pytest.approx(slope)
    assert gradient("eps_tanh", 1.0) == pytest.approx(0.5 * slope)


def test_most_of_a_new_generators_delta_is_clamped_as_in_the_papers_code() -> None:
    delta = NetworkDelta(64, EPSILON, "tanh_clamp", seed=0, cluster=0)()
    clamped = (delta.abs() >= EPSILON - 1e-7).float().mean()
    assert 0.8 < clamped < 0.95


def test_each_cluster_and_seed_has_a_generator_and_noise_of_its_own() -> None:
    def made(seed: int, cluster: int) -> Tensor:
        network = NetworkDelta(8, EPSILON, "eps_tanh", seed=seed, cluster=cluster, width=2, blocks=1)
        return torch.cat([network.sigma.flatten(), next(network.parameters()).flatten()])

    torch.manual_seed(1)
    first = made(0, 0)
    torch.manual_seed(2)
    assert torch.equal(first, made(0, 0)), "torch's global generator must not matter"
    assert not torch.equal(first, made(0, 1))
    assert not torch.equal(first, made(1, 0))
    assert 0 <= first[:192].min() < first[:192].max() <= 1


def test_a_direct_delta_starts_inside_half_the_bound() -> None:
    colour = DirectDelta(4, 8, EPSILON, seed=0)()
    grey = DirectDelta(4, 8, EPSILON, seed=0, one_channel=True)()
    assert 0.45 * EPSILON < colour.abs().max() <= EPSILON / 2
    assert not torch.equal(colour[:, 0], colour[:, 1])
    assert torch.equal(grey[:, 0], grey[:, 1])
    assert grey.shape == colour.shape == (4, 3, 8, 8)
