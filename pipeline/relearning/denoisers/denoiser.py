"""The denoiser of a purifying adversary: a small U-Net that predicts the delta of an image, to be taken off.

Trained on pairs of protected and clean pictures, or on clean pictures under noise of many kinds. Pairs of a protection
teach more than photo denoisers know, which leave textures alone (BridgePure, NeurIPS 2025, trains diffusion on such
pairs).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.deltas.artefact import artefact_to_bytes, read_header, read_tensors
from pipeline.errors import InputError
from pipeline.fingerprint import canonical, derive, sha256, torch_rng
from pipeline.fitting.fit_figures import reproducible
from pipeline.pictures.augment import random_views, take
from pipeline.relearning.denoisers.noises import draw_noise
from pipeline.relearning.precision import autocast

FAMILY_EPSILON = 16 / 255  # of the noise that a denoiser without pairs is trained on
MOST_DB = 99.0
_UNIT = 16 / 255  # of the loss, pixel units
_SCALE = 4.0  # of pixels in the network, which so have a deviation of about one
_MULTIPLE = 8  # of the sides that the network takes: it halves them three times
_WINDOW = 96  # pixels of a side: larger pictures are trained on in windows
_MOST_HELD_OUT = 256
_BLOCK = 256
_VERSION = 1  # of network and training: another one makes other denoisers of the same settings


@dataclass(frozen=True)
class DenoiserRecipe:
    """How a denoiser is trained: Adam at one rate after the other, each until the held-out gain is flat.

    rates        each goes on from the best weights so far
    max_steps    of all rates together, in equal parts
    every        steps between two looks at the held-out pictures
    patience     looks without another `least_gain` dB after which a rate ends
    holdout      share of the pictures that is looked at, at most 256 of them; never trained on
    """

    width: int = 64
    batch_size: int = 64
    rates: tuple[float, ...] = (1e-3, 2e-4)
    max_steps: int = 6_000
    every: int = 100
    patience: int = 5
    least_gain: float = 0.02
    holdout: float = 0.1

    def digest(self) -> str:
        """SHA-256 of these settings and the version of the training."""
        return sha256(canonical([_VERSION, asdict(self)]))


class UNet(nn.Module):
    """A residual U-Net whose finest maps have half the image's size (as in FFDNet, Zhang et al. 2018).

    Each pixel's place stands beside its colours, so that a delta that always lies at its place can be learnt.
    The last layer sees the pixels again, because much of an answer is a plain filter of them. 869,372 parameters at
    width 64. It starts as the identity: the delta that it predicts is zero.

    forward: images float [B, 3, H, W] in [0, 1], places float [B, 2, H, W] in [-1, 1], sides multiples of 8
             -> delta float32 [B, 3, H, W], pixel units
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.enter = nn.Sequential(*_layer(20, width), *_layer(width, width))
        self.coarse = nn.Sequential(*_layer(width, 2 * width, stride=2), *_layer(2 * width, 2 * width))
        lowest = [*_layer(2 * width, 2 * width, stride=2), *_layer(2 * width, 2 * width)]
        self.lowest = nn.Sequential(*lowest, nn.Upsample(scale_factor=2))
        self.rise = nn.Sequential(*_layer(2 * width, 2 * width), nn.Upsample(scale_factor=2))
        self.leave = nn.Sequential(*_layer(3 * width, width), *_layer(width, width))
        self.last = nn.Conv2d(width + 20, 12, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor, places: Tensor) -> Tensor:
        seen = F.pixel_unshuffle(torch.cat([(images - 0.5) * _SCALE, places], 1), 2)
        fine = self.enter(seen)
        coarse = self.coarse(fine)
        maps = self.leave(torch.cat([fine, self.rise(coarse + self.lowest(coarse))], 1))
        return F.pixel_shuffle(self.last(torch.cat([maps, seen], 1)), 2).float() / _SCALE


def _layer(channels: int, made: int, *, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, made, 3, stride=stride, padding=1)
    nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
    nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
    return [convolution, nn.ReLU(inplace=True)]


@dataclass(frozen=True, eq=False)
class Denoiser:
    """A trained denoiser.

    weights     of UNet(width), float32 on the CPU
    gain_db     on its own held-out pictures (see gain_db)
    num_steps   that its training took
    digest      of the data and settings that it was made of
    """

    weights: Mapping[str, Tensor]
    width: int
    gain_db: float
    num_steps: int
    digest: str

    def network(self, device: torch.device) -> UNet:
        """The network in inference mode, on the device."""
        network = UNet(self.width)
        network.load_state_dict(dict(self.weights))
        return network.to(device).to(memory_format=torch.channels_last).eval()

    def to_bytes(self) -> bytes:
        """A safetensors file; equal denoisers give equal bytes."""
        about = {"width": self.width, "gain_db": self.gain_db, "num_steps": self.num_steps, "digest": self.digest}
        return artefact_to_bytes(about, {name: value.numpy() for name, value in self.weights.items()})


def denoiser_from_bytes(data: bytes, where: str) -> Denoiser:
    """What `to_bytes` wrote. Raises InputError, naming the place, for a file that is damaged."""
    try:
        weights = {name: torch.from_numpy(array.copy()) for name, array in read_tensors(data).items()}
        return Denoiser(weights, **read_header(data))
    except (InputError, TypeError):
        raise InputError(f"{where}: not a denoiser, or cut short; delete it, and it is trained again") from None


def train_denoiser(
    clean: Tensor,
    protected: Tensor | None,
    *,
    seed: int,
    device: str = "cpu",
    recipe: DenoiserRecipe = DenoiserRecipe(),  # noqa: B008  frozen
    digest: str = "",
) -> Denoiser:
    """Train on the pairs, or, where `protected` is None, on the clean pictures under fresh noise of all families.

    clean, protected   uint8 [n, 3, S, S], S >= 8; the same pictures in the same order
    Equal arguments give equal weights on one machine with one number of threads. Raises InputError for fewer than two
    pictures: one is held out.
    """
    if len(clean) < 2:
        raise InputError(f"a denoiser needs at least 2 pictures to be trained on; there are {len(clean)}")
    pictures = _Pictures(clean, protected, seed, recipe)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "denoiser-weights"))
        network = UNet(recipe.width).to(device).to(memory_format=torch.channels_last)
    best, best_db, num_steps = copy.deepcopy(network.state_dict()), 0.0, 0
    with reproducible():
        for rate in recipe.rates:
            network.load_state_dict(best)
            optimiser = torch.optim.Adam(network.parameters(), lr=rate)
            mark, waited = best_db, 0
            for _ in range(recipe.max_steps // (recipe.every * len(recipe.rates))):
                loss = _descend(network, optimiser, pictures, recipe.every)
                num_steps += recipe.every
                if not math.isfinite(loss):
                    break
                found_db = pictures.held_out_gain(network)
                if found_db > best_db:
                    best, best_db = copy.deepcopy(network.state_dict()), found_db
                mark, waited = (found_db, 0) if found_db >= mark + recipe.least_gain else (mark, waited + 1)
                if waited == recipe.patience:
                    break
    weights = {name: value.cpu().contiguous() for name, value in best.items()}
    return Denoiser(weights, recipe.width, best_db, num_steps, digest)


class _Pictures:
    """What a denoiser is trained on and held-out pictures, which are chosen and changed once."""

    def __init__(self, clean: Tensor, protected: Tensor | None, seed: int, recipe: DenoiserRecipe) -> None:
        order = torch.randperm(len(clean), generator=torch_rng(seed, "denoiser-held-out"))
        num_held = min(_MOST_HELD_OUT, max(1, round(recipe.holdout * len(clean))))
        held, self.rows = order[:num_held], order[num_held:]
        self.clean, self.protected = clean, protected
        self.side = clean.shape[-1]
        self.window = min(self.side, _WINDOW) // _MULTIPLE * _MULTIPLE
        self.batch_size = recipe.batch_size
        self.rng = torch_rng(seed, "denoiser-batches")
        self.held_clean = clean[held]
        if protected is not None:
            self.held_changed = protected[held]
        else:
            noise = draw_noise(num_held, self.side, FAMILY_EPSILON, torch_rng(seed, "denoiser-held-out-noise"))
            self.held_changed = _quantised(self.held_clean.float() / 255 + noise)

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Changed and clean windows float [B, 3, W, W] in [0, 1], and the places of their pixels [B, 2, W, W]."""
        rows = self.rows[torch.randint(len(self.rows), (self.batch_size,), generator=self.rng)]
        padding = max(2, self.side // 16) if self.window == self.side else 0
        views = random_views(len(rows), self.side, self.window, padding, self.rng)
        clean = take(self.clean[rows], views).float() / 255
        if self.protected is not None:
            changed = take(self.protected[rows], views).float() / 255
        else:
            noise = draw_noise(len(rows), self.window, FAMILY_EPSILON, self.rng)
            changed = _quantised(clean + noise).float() / 255
        return changed, clean, _places(views.rows, views.columns, self.side)

    def held_out_gain(self, network: UNet) -> float:
        network.eval()
        return gain_db(self.held_changed, denoise(network, self.held_changed), self.held_clean)


def _descend(network: UNet, optimiser: torch.optim.Optimizer, pictures: _Pictures, steps: int) -> float:
    """So many steps on the mean square error of the delta; the last one's loss, in squares of 16 levels."""
    network.train()
    device = next(network.parameters()).device
    loss = torch.zeros(())
    for _ in range(steps):
        changed, clean, places = (part.to(device) for part in pictures.batch())
        with autocast(device):
            predicted = network(changed, places)
        loss = F.mse_loss(predicted / _UNIT, (changed - clean) / _UNIT)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return float(loss.detach())


@torch.no_grad()
def denoise(network: UNet, images: Tensor) -> Tensor:
    """Images uint8 [n, 3, H, W] without the delta that the network sees in them: the same shape, dtype and device."""
    device = next(network.parameters()).device
    height, width = images.shape[2:]
    more = (-width % _MULTIPLE, -height % _MULTIPLE)
    rows, columns = (torch.arange(size + added)[None] for size, added in ((height, more[1]), (width, more[0])))
    places = _places(rows, columns, max(height, width)).to(device)
    cleaned = torch.empty_like(images)
    for start in range(0, len(images), _BLOCK):
        block = images[start : start + _BLOCK].to(device).float() / 255
        padded = F.pad(block, (0, more[0], 0, more[1]), mode="replicate").contiguous(memory_format=torch.channels_last)
        with autocast(device):
            delta = network(padded, places.expand(len(block), -1, -1, -1))
        cleaned[start : start + _BLOCK] = _quantised(block - delta[:, :, :height, :width]).to(images.device)
    return cleaned


def gain_db(changed: Tensor, cleaned: Tensor, clean: Tensor) -> float:
    """By how many decibels cleaning lowers the mean square error against the clean images; at most 99 either way.

    uint8 [n, 3, S, S] each. 0: as before, or nothing to take off and nothing taken off; below 0: cleaning did harm.
    """
    before, after = _square_error(changed, clean), _square_error(cleaned, clean)
    if before == after:
        return 0.0
    if min(before, after) == 0:
        return MOST_DB if after == 0 else -MOST_DB
    return max(-MOST_DB, min(MOST_DB, 10 * math.log10(before / after)))


def seconds_at_most(side: int, recipe: DenoiserRecipe = DenoiserRecipe()) -> float:  # noqa: B008  frozen
    """What a training of all its steps would take on one CPU of this machine, from a few steps; most end earlier."""
    clean = torch.randint(256, (2, 3, side, side), dtype=torch.uint8, generator=torch_rng(0, "denoiser-timing"))
    pictures = _Pictures(clean, None, 0, recipe)
    network = UNet(recipe.width).to(memory_format=torch.channels_last)
    optimiser = torch.optim.Adam(network.parameters())
    _descend(network, optimiser, pictures, 1)
    started = time.perf_counter()
    _descend(network, optimiser, pictures, 2)
    return recipe.max_steps * (time.perf_counter() - started) / 2


def _square_error(images: Tensor, clean: Tensor) -> float:
    total = 0.0
    for start in range(0, len(images), _BLOCK):
        rows = slice(start, start + _BLOCK)
        total += float((images[rows].short() - clean[rows].short()).double().square().sum())
    return total / max(1, images.numel())


def _places(rows: Tensor, columns: Tensor, side: int) -> Tensor:
    """Rows and columns of pixels, int64 [B, h] and [B, w], as float [B, 2, h, w]: -1 at the first, 1 at the last."""
    down, across = (2 * index.float() / (side - 1) - 1 for index in (rows, columns))
    shape = (len(rows), rows.shape[1], columns.shape[1])
    return torch.stack([down[:, :, None].expand(shape), across[:, None, :].expand(shape)], 1)


def _quantised(images: Tensor) -> Tensor:
    """Float in [0, 1] and a little beyond -> uint8."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)
