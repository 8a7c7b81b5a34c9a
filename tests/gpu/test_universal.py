"""The universal generator on a GPU: its output, losses and training, alone and in a process group of one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import distributed as dist
from torch.nn import functional as F

from pipeline.deltas.universal.generator import UniversalGenerator
from pipeline.one_for_all.losses import LOSSES, select_concepts
from pipeline.one_for_all.settings import OneForAllSettings, one_for_all_settings
from pipeline.one_for_all.training import TrainingImages, UniversalFit
from pipeline.settings import EMBEDDED_SURROGATE
from pipeline.surrogates.surrogate import load_surrogate

SIDE = 64


def settings() -> OneForAllSettings:
    return one_for_all_settings(
        {
            "input": ("-",),
            "output": "-.safetensors",
            "surrogate": EMBEDDED_SURROGATE,
            "surrogate_size": SIDE,
            "width": 8,
            "blocks": 1,
            "side": SIDE,
            "batch_size": 8,
            "max_steps": 6,
            "lr": 1e-3,
        }
    )


def started(device: str) -> UniversalFit:
    surrogate = load_surrogate(EMBEDDED_SURROGATE, weights=None, size=SIDE, device=device)
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (32, 3, 72, 72), dtype=torch.uint8, generator=rng)
    bank = torch.randn(40, surrogate.dimension, generator=rng)
    return UniversalFit(TrainingImages(pixels), surrogate, bank, settings(), device)


def test_the_generator_gives_the_delta_of_the_cpu(device: str) -> None:
    generator = UniversalGenerator(512, width=16, blocks=2).eval()
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, SIDE, SIDE, generator=rng)
    embeddings = F.normalize(torch.randn(2, 512, generator=rng), dim=1)
    with torch.inference_mode():
        exact = generator(images, embeddings).tanh()
        generator.to(device)
        there = images.to(device), embeddings.to(device)
        single = generator(*there).tanh().cpu()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            half = generator(*there).float().tanh().cpu()
    assert (single - exact).abs().max() <= 5e-3
    assert (half - exact).abs().mean() <= 2e-2


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_loss_and_its_gradient_are_those_of_the_cpu(name: str, device: str) -> None:
    rng = torch.Generator().manual_seed(0)
    features, embeddings, bank = (torch.randn(count, 32, generator=rng) for count in (8, 8, 40))
    found = []
    for place in ("cpu", device):
        leaf = features.to(place).requires_grad_()
        concepts = select_concepts(embeddings.to(place), F.normalize(bank, dim=1).to(place), 5)
        loss = LOSSES[name](leaf, concepts)
        loss.backward()
        assert leaf.grad is not None
        found.append((loss.item(), leaf.grad.cpu()))
    (loss, gradient), (other_loss, other_gradient) = found
    assert other_loss == pytest.approx(loss, rel=1e-4)
    assert torch.allclose(other_gradient, gradient, rtol=1e-3, atol=1e-5)


def test_a_training_that_is_resumed_takes_the_same_steps(device: str) -> None:
    torch.backends.cudnn.deterministic = True
    whole = started(device)
    whole.advance(6)
    fit = started(device)
    fit.advance(3)
    again = started(device)
    again.load(load(save(fit.state())))
    again.advance(6)
    assert again.step == whole.step == 6
    assert again.curves["loss"] == pytest.approx(whole.curves["loss"], rel=2e-2 if device == "cuda" else 1e-6)


@pytest.fixture
def group(device: str, tmp_path: Path) -> Iterator[None]:
    """A process group of one, as Ray Train makes it."""
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_process_group_of_one_takes_the_steps_of_no_group(device: str, group: None) -> None:
    inside = started(device)
    inside.advance(3)
    dist.destroy_process_group()
    outside = started(device)
    outside.advance(3)
    assert inside.curves["loss"] == pytest.approx(outside.curves["loss"], rel=2e-2 if device == "cuda" else 1e-6)
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)


def test_gradients_that_are_averaged_over_a_group_of_one_are_those_of_the_network(device: str, group: None) -> None:
    plain = UniversalGenerator(64, width=8, blocks=1).to(device)
    wrapped = torch.nn.SyncBatchNorm.convert_sync_batchnorm(plain) if device == "cuda" else plain
    shared = torch.nn.parallel.DistributedDataParallel(wrapped)
    images, embeddings = torch.rand(4, 3, SIDE, SIDE, device=device), torch.randn(4, 64, device=device)
    gradients = []
    for network in (UniversalGenerator(64, width=8, blocks=1).to(device), shared):
        network(images, embeddings).square().mean().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in network.parameters()]).cpu())
    assert torch.allclose(*gradients, rtol=1e-2, atol=1e-4)
