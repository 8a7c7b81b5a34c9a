"""The surrogate: the pretrained encoder whose features deltas move. Takes images in [0, 1], returns features [B, d].

Shape letters: B batch, H W picture, S input size, d feature.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import InputError, PromiseError, SettingsError, one_line
from pipeline.hashing import canonical
from pipeline.profile import StepClock
from pipeline.surrogates.pretrained import Tower, build_tower, check_surrogate

__all__ = [
    "Surrogate",
    "SurrogateSettings",
    "check_surrogate",
    "known_surrogate",
    "load_surrogate",
    "size_for",
    "surrogate_for",
]

SMALL_SIDE, ENLARGED_SIDE = 96, 160  # pixels
WHOLE_BATCH = {"cpu": 16, "cuda": 256}  # images
MOST_REDUCED = 40  # times on a GPU
LONGEST = 16  # times its shorter side: what of a picture is resized before it is cropped to a square


def filled(images: Tensor, on_gpu: int = WHOLE_BATCH["cuda"]) -> Tensor:
    """Images [B, ...]; the last one is repeated until B is a multiple of 16, on a GPU of `on_gpu`.

    In other batches CPU threads share the work of one image, and their number decides the last bits of its sums; on a
    GPU, the size of a batch decides by which algorithm they are summed.
    """
    missing = -len(images) % (on_gpu if images.device.type == "cuda" else WHOLE_BATCH["cpu"])
    return torch.cat([images, images[-1:].expand(missing, *images.shape[1:])]) if missing else images


def resized_by_axis(pixels: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """uint8 [B, 3, H, W] at another size, for devices without torch's 8-bit kernel: nearly what that gives.

    Like Pillow, it rounds after each axis; what bicubic filters make of edges beyond 0 and 255 differs otherwise.
    """
    for part in ((pixels.shape[2], size[1]), size):
        wide = functional.interpolate(pixels.float(), part, mode=mode, antialias=True)
        pixels = wide.round_().clamp_(0, 255).to(torch.uint8)
    return pixels


def _without_ends(pixels: Tensor) -> Tensor:
    """The middle of a strip [1, 3, H, W]: the ends are not in the crop, and 1 x 60,000 would be enlarged to 12 GB."""
    for axis in (2, 3):
        length, most = pixels.shape[axis], LONGEST * min(pixels.shape[2:])
        if length > most:
            pixels = pixels.narrow(axis, (length - most) // 2, most)
    return pixels


class SurrogateSettings(Protocol):
    """The part of a run's settings that selects the surrogate."""

    @property
    def surrogate(self) -> str: ...
    @property
    def surrogate_weights(self) -> str | None: ...
    @property
    def surrogate_size(self) -> int | None: ...


def surrogate_for(settings: SurrogateSettings, device: str) -> Surrogate:
    """The surrogate named in the settings, on `device`; raises like load_surrogate."""
    return known_surrogate(settings, device).loaded()


def known_surrogate(settings: SurrogateSettings, device: str = "cpu") -> Surrogate:
    """As surrogate_for, but the bundled network is not built before it embeds something; raises like load_surrogate."""
    weights = Path(settings.surrogate_weights) if settings.surrogate_weights else None
    return Surrogate(
        settings.surrogate,
        build_tower(settings.surrogate, weights=weights, size=settings.surrogate_size),
        device,
    )


def load_surrogate(name: str, *, weights: Path | None, size: int | None, device: str) -> Surrogate:
    """A surrogate by name, ready on `device`.

    name     open_clip:MODEL/PRETRAINED | torchvision:MODEL/WEIGHTS | timm:MODEL
    weights  a safetensors file, or a .pt file containing only tensors; None = where the library keeps them
    size     input side in pixels; None = as the weights were trained
    Raises SettingsError for an unknown name or an unsuitable size, InputError for weights that are unavailable or do
    not fit, ConflictError if the bundled weights were altered.
    """
    return Surrogate(name, build_tower(name, weights=weights, size=size), device).loaded()


def size_for(shorter_sides: Sequence[int]) -> int | None:
    """Side at which a collection is embedded unless the user says otherwise; None = as the weights were trained.

    shorter_sides  of some of its images, in pixels
    Images below 96 px (the median) are enlarged to 160, not to the 224 or more of large ones. The BiT-HyperRule of
    Kolesnikov et al. 2020 enlarges images below 96 x 96 to 160 too (and trains on crops of 128) when it transfers
    pretrained convolutional networks.
    """
    median = sorted(shorter_sides)[len(shorter_sides) // 2] if shorter_sides else SMALL_SIDE
    return ENLARGED_SIDE if median < SMALL_SIDE else None


class Surrogate:
    """A frozen encoder in eval mode.

    id              what a protection must match: name, weights digest and preprocessing, as canonical JSON
    input_size      S, the network's input side
    resize          shorter side before the centre crop
    dimension       d
    mean            per channel, from the weights' configuration
    std             per channel, from the weights' configuration
    interpolation   bicubic or bilinear, from the weights' configuration
    head            weight float32 [k, d] and bias [k] that turn features into class scores, or None
    weights_sha256  of the weights file
    """

    def __init__(self, name: str, tower: Tower, device: str) -> None:
        preprocessing = tower.preprocessing
        self.name = name
        self.weights_sha256 = tower.weights_sha256
        self.head = tower.head
        self.input_size = preprocessing.size
        self.resize = preprocessing.resize
        self.mean, self.std = preprocessing.mean, preprocessing.std
        self.interpolation = preprocessing.interpolation
        identity = {"name": name, "weights": tower.weights_sha256[:16]} | asdict(preprocessing)
        self.id = canonical(identity).decode()
        self._squash = preprocessing.squash
        self.device = _device(device)
        self._tower = tower
        self._mean, self._std = (
            torch.tensor(values, device=self.device).view(1, 3, 1, 1) for values in (self.mean, self.std)
        )
        self.is_convolutional = tower.is_convolutional
        self.dimension = tower.dimension or self._probe()

    def loaded(self) -> Surrogate:
        """The same, after its network has been built: before seconds are measured."""
        self._network.eval()
        return self

    @cached_property
    def _network(self) -> nn.Module:
        with torch.inference_mode(False):  # whoever asks first: gradients may be wanted later
            return self._tower.network.to(self.device).to(memory_format=torch.channels_last)

    def clock(self, *, exact: bool = False) -> StepClock:
        """A clock for `prepare` and `embed_pictures`.

        exact  synchronise with the GPU after every step; otherwise its pending work is charged to the step that waits
        """
        return StepClock(torch.cuda.synchronize) if exact and self.device.type == "cuda" else StepClock()

    def prepare(self, pictures: Sequence[NDArray[np.uint8]], clock: StepClock | None = None) -> Tensor:
        """Pictures uint8 [H, W, 3], any size -> float32 [B, 3, S, S] in [0, 1] on the device.

        Each is resized with antialiasing, rounded to 8 bits as Pillow does, and centre-cropped; pictures smaller than S
        are enlarged.
        clock  records the steps `copy` (to the device) and `resize`
        """
        clock = clock or StepClock()
        with clock.step("copy"):
            copied = [
                torch.from_numpy(np.require(picture, requirements=["C", "W"])).to(self.device) for picture in pictures
            ]
        with clock.step("resize"):
            return torch.stack([self._square(pixels.permute(2, 0, 1)[None]) for pixels in copied]).float().div_(255)

    def _square(self, pixels: Tensor) -> Tensor:
        """uint8 [1, 3, H, W] -> uint8 [3, S, S]."""
        if not self._squash:
            pixels = _without_ends(pixels)
        height, width = pixels.shape[2:]
        size = self._size_before_crop(height, width)
        if size != (height, width):
            pixels = self._resized(pixels, size)
        top, left = (round((side - self.input_size) / 2) for side in size)
        return pixels[0, :, top : top + self.input_size, left : left + self.input_size].clone()  # frees the rest

    def _resized(self, pixels: Tensor, size: tuple[int, int]) -> Tensor:
        """uint8 [1, 3, H, W] at another size; a GPU has no room in its shared memory for the widest filters."""
        far = max(pixels.shape[2] / size[0], pixels.shape[3] / size[1]) > MOST_REDUCED
        if self.device.type == "cpu" or far:
            made = functional.interpolate(pixels.cpu(), size, mode=self.interpolation, antialias=True)
            return made.to(self.device)
        return resized_by_axis(pixels, size, self.interpolation)

    def _size_before_crop(self, height: int, width: int) -> tuple[int, int]:
        if self._squash:
            return self.input_size, self.input_size
        shorter = min(height, width)
        return int(self.resize * height / shorter), int(self.resize * width / shorter)

    def embed(self, images: Tensor, *, resize: bool = False) -> Tensor:
        """Features, float32 [B, d], of images, float [B, 3, S, S] in [0, 1]; differentiable.

        resize  resize images [B, 3, s, s] to S bilinearly
        Features are the classifier's input (Zhang et al. 2023, section 3.3) or, for CLIP, the joint embedding, not
        normalised. Raises ValueError for any other shape.
        """
        if resize and images.shape[-2:] != (self.input_size, self.input_size):
            smaller = images.shape[-1] > self.input_size
            side = (self.input_size, self.input_size)
            images = functional.interpolate(images, side, mode="bilinear", align_corners=False, antialias=smaller)
        expected = (3, self.input_size, self.input_size)
        if tuple(images.shape[1:]) != expected:
            raise ValueError(f"images must be [B, {expected}], not {tuple(images.shape)}; see resize=True")
        normalised = (images - self._mean) / self._std
        features: Tensor = self._network(normalised.contiguous(memory_format=torch.channels_last))
        return features.float()

    def embed_pictures(
        self, pictures: Sequence[NDArray[np.uint8]], clock: StepClock | None = None
    ) -> NDArray[np.float32]:
        """Features, float32 [n, d], of pictures, uint8 [H, W, 3]; computed in bfloat16 on a GPU.

        The number of CPU threads changes no bit of them.
        clock  records the steps `copy`, `resize` and `model`
        Raises PromiseError for non-finite features.
        """
        clock = clock or StepClock()
        with torch.inference_mode(), self._half_precision():
            images = self.prepare(pictures, clock)
            with clock.step("model"):
                features = self.embed(filled(images))[: len(images)].cpu().numpy()
        if not np.isfinite(features).all():
            raise PromiseError(f"{self.name} returned non-finite features: its weights are damaged")
        return np.asarray(features, dtype=np.float32)

    def _half_precision(self) -> contextlib.AbstractContextManager[object]:
        if self.device.type == "cpu":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _probe(self) -> int:
        """d, from embedding a grey image; a network that cannot handle S fails here."""
        try:
            with torch.inference_mode():
                grey = torch.full((1, 3, self.input_size, self.input_size), 0.5, device=self.device)
                features = self.embed(grey)
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = one_line(error)
            raise SettingsError(f"--surrogate-size {self.input_size} does not suit {self.name}: {reason}") from None
        if features.ndim != 2:
            raise SettingsError(
                f"--surrogate {self.name}: its output {tuple(features.shape)} is not one feature vector per image"
            )
        return int(features.shape[1])


def _device(name: str) -> torch.device:
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError("a GPU was requested, but torch sees none; leave --gpus-per-worker at 0 or use another node")
    return torch.device(name)
