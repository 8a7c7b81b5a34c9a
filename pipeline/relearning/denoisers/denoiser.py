"""The denoiser of a purifying adversary: a small U-Net that predicts an image's delta so that it can be subtracted.

It is trained on pairs of protected and clean pictures, or on clean pictures with many kinds of synthetic noise. Pairs
teach it to remove textures that ordinary photo denoisers preserve (BridgePure, NeurIPS 2025, trains diffusion models on
such pairs).
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
from pipeline.fitting.fit_figures import reproducible
from pipeline.hashing import canonical, derive, sha256, torch_rng
from pipeline.pictures.augment import Views, random_views, take
from pipeline.precision import autocast
from pipeline.relearning.denoisers.noises import draw_noise

FAMILY_EPSILON = 16 / 255  # of the noise used to train a denoiser without pairs
MOST_DB = 99.0
_UNIT = 16 / 255  # the loss is in squares of this, pixel units
_SCALE = 4.0  # brings pixels to a standard deviation of about one inside the network
MULTIPLE = 8  # sides must be multiples of this: the network halves them three times
_WINDOW = 96  # pixels a side: larger pictures are trained on in crops of this size
_MOST_HELD_OUT = 256
BLOCK = 256
_VERSION = 1  # of network and training: bump it when the same settings would give a different denoiser


@dataclass(frozen=True)
class DenoiserRecipe:
    """How a denoiser is trained: Adam at each learning rate in turn, each until the held-out gain levels off.

    rates        learning rates; each starts from the best weights so far
    max_steps    total over all rates, split equally
    every        steps between evaluations on the held-out pictures
    patience     evaluations without a further `least_gain` dB before moving on to the next rate
    holdout      share of the pictures held out for evaluation, at most 256 of them; never trained on
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
        """SHA-256 of these settings and the training version."""
        return sha256(canonical([_VERSION, asdict(self)]))


class UNet(nn.Module):
    """A residual U-Net whose finest maps have half the image's size (as in FFDNet, Zhang et al. 2018).

    Pixel coordinates are extra input channels, so that a delta fixed in place can be learnt. The last layer sees the
    pixels again, because much of the answer is a plain filter of them. 869,372 parameters at width 64. It starts out
    predicting a delta of zero.

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
    gain_db     on its own held-out pictures (see the function gain_db)
    num_steps   training steps taken
    digest      of the data and settings it was trained with
    """

    weights: Mapping[str, Tensor]
    width: int
    gain_db: float
    num_steps: int
    digest: str

    def network(self, device: torch.device) -> UNet:
        """The network on the device, in inference mode."""
        network = UNet(self.width)
        network.load_state_dict(dict(self.weights))
        return network.to(device).to(memory_format=torch.channels_last).eval()

    def to_bytes(self) -> bytes:
        """A safetensors file; equal denoisers give equal bytes."""
        about = {"width": self.width, "gain_db": self.gain_db, "num_steps": self.num_steps, "digest": self.digest}
        return artefact_to_bytes(about, {name: value.numpy() for name, value in self.weights.items()})


def denoiser_from_bytes(data: bytes, where: str) -> Denoiser:
    """The inverse of `Denoiser.to_bytes`. Raises InputError, naming `where`, for a damaged file."""
    try:
        weights = {name: torch.from_numpy(array.copy()) for name, array in read_tensors(data).items()}
        return Denoiser(weights, **read_header(data))
    except (InputError, TypeError):
        raise InputError(f"{where}: not a denoiser, or truncated; delete it and it will be trained again") from None


def train_denoiser(
    clean: Tensor,
    protected: Tensor | None,
    *,
    seed: int,
    device: str = "cpu",
    recipe: DenoiserRecipe = DenoiserRecipe(),  # noqa: B008  frozen
    digest: str = "",
) -> Denoiser:
    """Train on pairs or, if `protected` is None, on clean pictures with fresh noise of every family.

    clean, protected   uint8 [n, 3, S, S], S >= 8; the same pictures in the same order
    Deterministic for a given machine and number of threads. Raises InputError for fewer than two pictures: one is held
    out.
    """
    if len(clean) < 2:
        raise InputError(f"training a denoiser takes at least 2 pictures; there are {len(clean)}")
    return trained_on(TrainingPictures(clean, protected, seed, recipe), seed, device, recipe, digest)


def trained_on(pictures: TrainingPictures, seed: int, device: str, recipe: DenoiserRecipe, digest: str) -> Denoiser:
    """The network whose gain on the held-out pictures was the best; arguments as for train_denoiser."""
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
                gained_db = pictures.held_out_gain(network)
                if gained_db > best_db:
                    best, best_db = copy.deepcopy(network.state_dict()), gained_db
                mark, waited = (gained_db, 0) if gained_db >= mark + recipe.least_gain else (mark, waited + 1)
                if waited == recipe.patience:
                    break
    weights = {name: value.cpu().contiguous() for name, value in best.items()}
    return Denoiser(weights, recipe.width, best_db, num_steps, digest)


class TrainingPictures:
    """Training pictures, and held-out pictures that are chosen and given their noise once.

    Arguments as for train_denoiser.
    """

    def __init__(self, clean: Tensor, protected: Tensor | None, seed: int, recipe: DenoiserRecipe) -> None:
        order = torch.randperm(len(clean), generator=torch_rng(seed, "denoiser-held-out"))
        num_held = min(_MOST_HELD_OUT, max(1, round(recipe.holdout * len(clean))))
        held, self.rows = order[:num_held], order[num_held:]
        self.clean, self.protected = clean, protected
        self.side = clean.shape[-1]
        self.window = min(self.side, _WINDOW) // MULTIPLE * MULTIPLE
        self.batch_size = recipe.batch_size
        self.rng = torch_rng(seed, "denoiser-batches")
        self.held_clean = clean[held]
        if protected is not None:
            self.held_changed = protected[held]
        else:
            noise = draw_noise(num_held, self.side, FAMILY_EPSILON, torch_rng(seed, "denoiser-held-out-noise"))
            self.held_changed = quantised(self.held_clean.float() / 255 + noise)

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Changed and clean crops, float [B, 3, W, W] in [0, 1], and the coordinates of their pixels, [B, 2, W, W]."""
        rows, views = self._drawn()
        clean = take(self.clean[rows], views).float() / 255
        if self.protected is not None:
            changed = take(self.protected[rows], views).float() / 255
        else:
            noise = draw_noise(len(rows), self.window, FAMILY_EPSILON, self.rng)
            changed = quantised(clean + noise).float() / 255
        return changed, clean, _places(views.rows, views.columns, self.side)

    def _drawn(self) -> tuple[Tensor, Views]:
        """Rows of a batch, and the crop of each."""
        rows = self.rows[torch.randint(len(self.rows), (self.batch_size,), generator=self.rng)]
        padding = max(2, self.side // 16) if self.window == self.side else 0
        return rows, random_views(len(rows), self.side, self.window, padding, self.rng)

    def held_out_gain(self, network: UNet) -> float:
        network.eval()
        return gain_db(self.held_changed, denoise(network, self.held_changed), self.held_clean)


def _descend(network: UNet, optimiser: torch.optim.Optimizer, pictures: TrainingPictures, steps: int) -> float:
    """Take `steps` steps on the delta's mean squared error; returns the last loss, in squares of 16 levels."""
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
    """Subtract the predicted delta from images, uint8 [n, 3, H, W]; same shape, dtype and device."""
    device = next(network.parameters()).device
    height, width = images.shape[2:]
    more = (-width % MULTIPLE, -height % MULTIPLE)
    rows, columns = (torch.arange(size + added)[None] for size, added in ((height, more[1]), (width, more[0])))
    places = _places(rows, columns, max(height, width)).to(device)
    cleaned = torch.empty_like(images)
    for start in range(0, len(images), BLOCK):
        block = images[start : start + BLOCK].to(device).float() / 255
        padded = F.pad(block, (0, more[0], 0, more[1]), mode="replicate").contiguous(memory_format=torch.channels_last)
        with autocast(device):
            delta = network(padded, places.expand(len(block), -1, -1, -1))
        cleaned[start : start + BLOCK] = quantised(block - delta[:, :, :height, :width]).to(images.device)
    return cleaned


def gain_db(changed: Tensor, cleaned: Tensor, clean: Tensor) -> float:
    """By how many decibels cleaning lowers the mean squared error against the clean images, within +-99.

    All uint8 [n, 3, S, S]. 0: no change; negative: cleaning made things worse.
    """
    before, after = _square_error(changed, clean), _square_error(cleaned, clean)
    if before == after:
        return 0.0
    if min(before, after) == 0:
        return MOST_DB if after == 0 else -MOST_DB
    return max(-MOST_DB, min(MOST_DB, 10 * math.log10(before / after)))


def seconds_at_most(side: int, recipe: DenoiserRecipe = DenoiserRecipe()) -> float:  # noqa: B008  frozen
    """Upper bound on training time on this machine's CPU, extrapolated from a few steps; most runs stop earlier."""
    clean = torch.randint(256, (2, 3, side, side), dtype=torch.uint8, generator=torch_rng(0, "denoiser-timing"))
    pictures = TrainingPictures(clean, None, 0, recipe)
    network = UNet(recipe.width).to(memory_format=torch.channels_last)
    optimiser = torch.optim.Adam(network.parameters())
    _descend(network, optimiser, pictures, 1)
    started = time.perf_counter()
    _descend(network, optimiser, pictures, 2)
    return recipe.max_steps * (time.perf_counter() - started) / 2


def _square_error(images: Tensor, clean: Tensor) -> float:
    total = 0.0
    for start in range(0, len(images), BLOCK):
        rows = slice(start, start + BLOCK)
        total += float((images[rows].short() - clean[rows].short()).double().square().sum())
    return total / max(1, images.numel())


def _places(rows: Tensor, columns: Tensor, side: int) -> Tensor:
    """Pixel coordinates from row and column indices, int64 [B, h] and [B, w]: float [B, 2, h, w], -1 to 1."""
    down, across = (2 * index.float() / (side - 1) - 1 for index in (rows, columns))
    shape = (len(rows), rows.shape[1], columns.shape[1])
    return torch.stack([down[:, :, None].expand(shape), across[:, None, :].expand(shape)], 1)


def quantised(images: Tensor) -> Tensor:
    """Float, nominally in [0, 1], rounded and clipped to uint8."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)
