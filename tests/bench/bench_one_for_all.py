"""Speed of laying a universal generator's deltas:  python tests/bench/bench_one_for_all.py [--device cuda]

On a CPU: `protect_pictures` (decode, embed, generate, add, check, encode) beside a plain loop that does the same in the
same way (a small decode for the models, a full one for the picture) and checks nothing. On a GPU: deltas of resident
uint8 images beside the generator and the encoder alone on resident float tensors, in bf16.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable

import numpy as np
import torch
from photo_shards import samples
from PIL import Image
from ratio import in_turns, publish, row
from torch import nn
from torch.nn import functional as F

from pipeline.clusters.clustering import Clustering, ClusterSpace
from pipeline.deltas.picture_deltas import protect_pictures
from pipeline.deltas.universal.deltas import UniversalDeltas
from pipeline.deltas.universal.generator import UniversalGenerator
from pipeline.deltas.universal.protection import UniversalProtection
from pipeline.settings import EMBEDDED_SURROGATE, Settings
from pipeline.surrogates.surrogate import Surrogate, load_surrogate

EPSILON, BATCH, ROUNDS = 8 / 255, 32, 5
NEEDED = {"cpu": 0.85, "cuda": 0.9}


def protection(surrogate: Surrogate, side: int, width: int, blocks: int) -> UniversalProtection:
    """An untrained generator: it is as fast as a trained one."""
    generator = UniversalGenerator(surrogate.dimension, width=width, blocks=blocks)
    last = generator.up[-1]
    assert isinstance(last, nn.Module)
    last.get_parameter("weight").data.mul_(100)  # else its deltas change no pixel, and every picture is refused
    zeros = np.zeros((2, surrogate.dimension), np.float32)
    return UniversalProtection(
        surrogate_id=surrogate.id,
        epsilon=EPSILON,
        bound="eps_tanh",
        side=side,
        width=width,
        blocks=blocks,
        weights={name: value.numpy() for name, value in generator.state_dict().items()},
        clustering=Clustering(ClusterSpace(), zeros, zeros, np.ones(2, np.float32)),
        fingerprint="bench",
    )


def opened(data: bytes, *, draft: int | None = None) -> Image.Image:
    """A JPEG's pixels; with `draft` at the smallest scale that has so many on the shorter side."""
    image = Image.open(io.BytesIO(data))
    if draft is not None:
        image.draft("RGB", (draft, draft))
    return image.convert("RGB")


def on_cpu(deltas: UniversalDeltas, surrogate: Surrogate, count: int, side: int) -> tuple[Callable[[int], int], ...]:
    collection = list(samples(count, 500, 375))
    settings = Settings(method="one-for-all", encode="jpeg:95")

    def ours(_: int) -> int:
        return len(list(protect_pictures(collection, deltas, settings=settings, batch_size=BATCH)))

    @torch.inference_mode()
    def plain(_: int) -> int:
        for start in range(0, count, BATCH):
            files = [one.members["jpg"] for one in collection[start : start + BATCH]]
            small = [opened(data, draft=max(surrogate.resize, side)) for data in files]
            features = surrogate.embed(surrogate.prepare([np.asarray(image) for image in small]))
            squares = np.stack([np.asarray(image.resize((side, side), Image.Resampling.BILINEAR)) for image in small])
            seen = torch.from_numpy(squares).permute(0, 3, 1, 2).float().div_(255)
            found = EPSILON * deltas._generator(seen, F.normalize(features, dim=1)).tanh()
            for data, delta in zip(files, found, strict=True):
                pixels = np.asarray(opened(data))
                laid = F.interpolate(delta[None], pixels.shape[:2], mode="bilinear")[0].mul_(255).round_()
                changed = pixels + laid.permute(1, 2, 0).to(torch.int16).numpy()
                protected = Image.fromarray(changed.clip(0, 255).astype(np.uint8))
                protected.save(io.BytesIO(), "JPEG", quality=95, subsampling=0)
        return count

    return ours, plain


def on_gpu(deltas: UniversalDeltas, surrogate: Surrogate, count: int, side: int) -> tuple[Callable[[int], int], ...]:
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, device="cuda")
    floats = images.float() / 255

    def ours(_: int) -> int:
        for start in range(0, count, BATCH * 8):
            batch = images[start : start + BATCH * 8]
            with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
                features = surrogate.embed(batch.float().div_(255), resize=True)
            deltas.deltas(batch, features)
        torch.cuda.synchronize()
        return count

    def plain(_: int) -> int:
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            for start in range(0, count, BATCH * 8):
                batch = floats[start : start + BATCH * 8]
                deltas._generator(batch, F.normalize(surrogate.embed(batch, resize=True), dim=1))
        torch.cuda.synchronize()
        return count

    return ours, plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args().device
    is_cpu = device == "cpu"
    torch.set_num_threads(1 if is_cpu else 8)
    side, width, blocks, count = (64, 8, 2, 96) if is_cpu else (224, 64, 24, 2048)
    surrogate = load_surrogate(EMBEDDED_SURROGATE, weights=None, size=64 if is_cpu else 224, device=device)
    deltas = UniversalDeltas(protection(surrogate, side, width, blocks), surrogate)
    ours, plain = (on_cpu if is_cpu else on_gpu)(deltas, surrogate, count, side)
    taken = in_turns(ours, plain, ROUNDS)
    name = f"width {width}, {blocks} blocks, {side} px, {torch.cuda.get_device_name() if not is_cpu else 'CPU'}"
    publish("one_for_all", [row(name, "images", taken, NEEDED[device])])


if __name__ == "__main__":
    main()
