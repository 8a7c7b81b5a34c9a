"""A universal protection at work: pictures in, deltas out, in one forward pass of surrogate and generator."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pipeline.deltas.delta import levels_of
from pipeline.deltas.picture_deltas import DeltaAnswer, DeltaRequest
from pipeline.deltas.universal.generator import UniversalGenerator, bounded_output
from pipeline.deltas.universal.protection import UniversalProtection
from pipeline.deltas.universal.shape import STRIDE
from pipeline.errors import PromiseError
from pipeline.settings import SmallImages
from pipeline.surrogates.surrogate import Surrogate

SMALL_SIDE = 64  # pictures up to this side are small (Chen et al. 2024, section 4.4)


class UniversalDeltas:
    """Answers with the generator's delta for each picture.

    A picture of any size and shape is squeezed to the generator's side, so that all of it is seen; its delta is
    brought to the picture's own size (bilinear; averaged where that is smaller), cut at epsilon and rounded to whole
    8-bit levels.

    small_images  what is done with pictures of at most 64 px a side. resize: enlarged like all others (Chen et al.
                  2024, section 4.4); averaging takes strength from their delta on the way back. native: the generator,
                  which is convolutional, sees them as they are, mirrored at the edges to a multiple of 8.
    Raises ConflictError if the surrogate is not the one that the generator was trained with.
    """

    def __init__(
        self, protection: UniversalProtection, surrogate: Surrogate, *, small_images: SmallImages = "resize"
    ) -> None:
        protection.check_surrogate(surrogate.id)
        self._small_images = small_images
        self.epsilon = protection.epsilon
        self.at_least, self.side = max(surrogate.resize, protection.side), None
        self._protection, self._surrogate = protection, surrogate
        generator = UniversalGenerator(surrogate.dimension, width=protection.width, blocks=protection.blocks)
        generator.load_state_dict({n: torch.from_numpy(np.array(a)) for n, a in protection.weights.items()})
        self._generator = generator.eval().requires_grad_(False).to(surrogate.device)
        self._generator = self._generator.to(memory_format=torch.channels_last)

    def for_pictures(self, asked: Sequence[DeltaRequest]) -> list[DeltaAnswer]:
        """One answer each. Raises PromiseError if the surrogate or the generator gives what is not finite."""
        pictures = [_small(one) for one in asked]
        features = self._surrogate.embed_pictures(pictures)
        clusters, distances = self._protection.clustering.assign(features)
        return [
            DeltaAnswer(one.laid(self._levels(delta, one.height, one.width)), int(cluster), float(distance))
            for one, delta, cluster, distance in zip(
                asked, self._made(asked, features), clusters, distances, strict=True
            )
        ]

    def _made(self, asked: Sequence[DeltaRequest], features: NDArray[np.float32]) -> list[Tensor]:
        """Delta [3, S, S] of each, pictures of one seen size together."""
        seen = [self._seen(one) for one in asked]
        found: list[Tensor] = [torch.empty(0)] * len(asked)
        for size in sorted({tuple(one.shape) for one in seen}):
            rows = [row for row, one in enumerate(seen) if tuple(one.shape) == size]
            made = self.deltas(torch.cat([seen[row] for row in rows]), torch.from_numpy(features[rows]))
            for row, delta in zip(rows, made, strict=True):
                height, width = asked[row].height, asked[row].width
                found[row] = delta[:, :height, :width] if self._is_native(asked[row]) else delta
        return found

    def _is_native(self, one: DeltaRequest) -> bool:
        return (
            self._small_images == "native"
            and max(one.height, one.width) <= SMALL_SIDE
            and _small(one).shape[:2] == (one.height, one.width)
        )

    def _seen(self, one: DeltaRequest) -> Tensor:
        """What the generator is shown of a picture: uint8 [1, 3, s, s]."""
        small = _small(one)
        if self._is_native(one):
            rows, columns = (max(2 * STRIDE, -(-size // STRIDE) * STRIDE) - size for size in small.shape[:2])
            small = np.pad(small, ((0, rows), (0, columns), (0, 0)), mode="reflect")
        pixels = torch.from_numpy(np.require(small, requirements=["C", "W"])).permute(2, 0, 1)[None]
        if self._is_native(one):
            return pixels
        side = (self._protection.side,) * 2
        if pixels.shape[2:] == side:
            return pixels
        return F.interpolate(pixels, side, mode="bilinear", align_corners=False, antialias=True)

    @torch.inference_mode()
    def deltas(self, images: Tensor, features: Tensor) -> Tensor:
        """Delta float32 [B, 3, S, S] of images uint8 [B, 3, S, S] with their features [B, d]; bf16 on a GPU."""
        device = self._surrogate.device
        seen = images.to(device).float().div_(255).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            raw = self._generator(seen, F.normalize(features.to(device).float(), dim=1))
        found = bounded_output(raw.float(), self.epsilon, self._protection.bound)
        if not bool(torch.isfinite(found).all()):
            raise PromiseError("the generator gives deltas that are not finite: the protection file is damaged")
        return found

    def _levels(self, delta: Tensor, height: int, width: int) -> NDArray[np.int16]:
        """int16 [height, width, 3] of delta [3, S, S]."""
        laid = delta[None].float()
        if laid.shape[2:] != (height, width):
            laid = F.interpolate(laid, (height, width), mode="bilinear", align_corners=False, antialias=True)
        limit = levels_of(self.epsilon)
        levels = (laid[0] * 255).round_().clamp_(-limit, limit)
        return np.ascontiguousarray(levels.permute(1, 2, 0).cpu().numpy().astype(np.int16))


def _small(one: DeltaRequest) -> NDArray[np.uint8]:
    assert one.small is not None, "a universal generator embeds every picture"
    return one.small
