"""Deltas of a universal protection, from one forward pass of surrogate and generator."""

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
from pipeline.surrogates.surrogate import Surrogate, filled

AT_ONCE = 64  # pictures, on a GPU always: the generator at full size takes about 2 GB for so many
SMALL_SIDE = 64  # pictures up to this side are small (Chen et al. 2024, section 4.4)


class UniversalDeltas:
    """The generator's delta for each picture.

    A picture of any size and shape is squeezed to the generator's side, so that it is seen whole. The delta is resized
    to the picture (bilinear, antialiased), clipped at epsilon and rounded to whole 8-bit levels.

    small_images  how pictures of at most 64 px a side are treated. resize: enlarged like all others (Chen et al.
                  2024, section 4.4); their delta is weakened by averaging when it is scaled back. native: the
                  generator, which is convolutional, sees them unscaled, mirror-padded to a multiple of 8.
    Raises ConflictError if the surrogate is not the one that the generator was trained with.
    """

    def __init__(
        self, protection: UniversalProtection, surrogate: Surrogate, *, small_images: SmallImages = "resize"
    ) -> None:
        protection.check_surrogate(surrogate.id)
        self._small_images = small_images
        self.epsilon = protection.epsilon
        self.at_least, self.side, self.uses_small = max(surrogate.resize, protection.side), None, True
        self._protection, self._surrogate = protection, surrogate
        generator = UniversalGenerator(surrogate.dimension, width=protection.width, blocks=protection.blocks)
        generator.load_state_dict({n: torch.from_numpy(np.array(a)) for n, a in protection.weights.items()})
        self._generator = generator.eval().requires_grad_(False).to(surrogate.device)
        self._generator = self._generator.to(memory_format=torch.channels_last)

    def for_pictures(self, requests: Sequence[DeltaRequest]) -> list[DeltaAnswer]:
        """One answer per request. Raises PromiseError if the surrogate or generator gives non-finite values."""
        pictures = [_small(request) for request in requests]
        features = self._surrogate.embed_pictures(pictures)
        clusters, distances = self._protection.clustering.assign(features)
        return [
            DeltaAnswer(request.laid(self._levels(delta, request.height, request.width)), int(cluster), float(distance))
            for request, delta, cluster, distance in zip(
                requests, self._made(requests, features), clusters, distances, strict=True
            )
        ]

    def _made(self, requests: Sequence[DeltaRequest], features: NDArray[np.float32]) -> list[Tensor]:
        """Delta [3, S, S] of each request; pictures that are seen at the same size are batched together."""
        seen = [self._seen(request) for request in requests]
        deltas: list[Tensor] = [torch.empty(0)] * len(requests)
        for size in sorted({tuple(pixels.shape) for pixels in seen}):
            rows = [row for row, pixels in enumerate(seen) if tuple(pixels.shape) == size]
            for start in range(0, len(rows), AT_ONCE):
                part = rows[start : start + AT_ONCE]
                made = self.deltas(torch.cat([seen[row] for row in part]), torch.from_numpy(features[part]))
                for row, delta in zip(part, made, strict=True):
                    height, width = requests[row].height, requests[row].width
                    deltas[row] = delta[:, :height, :width] if self._is_native(requests[row]) else delta
        return deltas

    def _is_native(self, request: DeltaRequest) -> bool:
        return (
            self._small_images == "native"
            and max(request.height, request.width) <= SMALL_SIDE
            and _small(request).shape[:2] == (request.height, request.width)
        )

    def _seen(self, request: DeltaRequest) -> Tensor:
        """A picture as the generator sees it: uint8 [1, 3, s, s]."""
        small = _small(request)
        if self._is_native(request):
            rows, columns = (max(2 * STRIDE, -(-size // STRIDE) * STRIDE) - size for size in small.shape[:2])
            small = np.pad(small, ((0, rows), (0, columns), (0, 0)), mode="reflect")
        pixels = torch.from_numpy(np.require(small, requirements=["C", "W"])).permute(2, 0, 1)[None]
        if self._is_native(request):
            return pixels
        side = (self._protection.side,) * 2
        if pixels.shape[2:] == side:
            return pixels
        return F.interpolate(pixels, side, mode="bilinear", align_corners=False, antialias=True)

    @torch.inference_mode()
    def deltas(self, images: Tensor, features: Tensor) -> Tensor:
        """Delta float32 [B, 3, S, S] of images uint8 [B, 3, S, S] with their features [B, d]; bf16 on a GPU."""
        device = self._surrogate.device
        seen = filled(images.to(device), AT_ONCE).float().div_(255).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            raw = self._generator(seen, F.normalize(filled(features.to(device), AT_ONCE).float(), dim=1))[: len(images)]
        deltas = bounded_output(raw.float(), self.epsilon, self._protection.bound)
        if not bool(torch.isfinite(deltas).all()):
            raise PromiseError("the generator gives non-finite deltas: the protection file is damaged")
        return deltas

    def _levels(self, delta: Tensor, height: int, width: int) -> NDArray[np.int16]:
        """Resize a delta [3, S, S] to levels int16 [height, width, 3]."""
        laid = delta[None].float()
        if laid.shape[2:] != (height, width):
            laid = F.interpolate(laid, (height, width), mode="bilinear", align_corners=False, antialias=True)
        limit = levels_of(self.epsilon)
        levels = (laid[0] * 255).round_().clamp_(-limit, limit)
        return np.ascontiguousarray(levels.permute(1, 2, 0).cpu().numpy().astype(np.int16))


def _small(request: DeltaRequest) -> NDArray[np.uint8]:
    assert request.small is not None, "a universal generator embeds every picture"
    return request.small
