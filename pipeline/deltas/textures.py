"""Keyed random-phase textures: deltas that share a statistic within a cluster, but no fixed pattern.

A cluster owns bands of spatial frequency; every sample gets waves from them with its own phases and jitter, all drawn
from a secret key. Averaging over samples reveals nothing, and without the key the bands are unknown. Every number
comes from HMAC-SHA256, not from a library's random generator, so that it depends only on the key.
The key comes from --key-file (`jobs.shared.cli.read_key`).
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError, SettingsError
from pipeline.hashing import sha256
from pipeline.settings import NUM_BANDS

LEAST_KEY_BYTES = 16
LEAST_RADIUS, MOST_RADIUS = 2.5, 14.0  # cycles per image; 32 pixels can show at most 16
SEPARATION = 1.6  # minimum distance of two band centres, cycles per image
JITTER = 0.35  # standard deviation of a wave's frequency around its band's centre, per axis
WAVES = 6  # per sample, plus as many mirrored ones
GAIN = 2.0
_REFERENCE_SIDE = 64  # of the grid on which a texture's standard deviation is computed, for every image size
_ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class Bands:
    """The frequencies that each cluster owns under one key.

    middles  float64 [p, bands per cluster, 2]: cycles per image across (kx) and down (ky), both >= 0
    """

    middles: NDArray[np.float64]
    key: bytes = field(repr=False)

    def levels(self, cluster: int, sample_key: str, height: int, width: int, epsilon: float) -> NDArray[np.int16]:
        """The delta of one sample in whole 8-bit levels: int16 [height, width, 3], equal in all channels.

        epsilon * tanh(2 * sum of the waves / its standard deviation). Frequencies are in cycles per image, so a sample
        has the same texture at every size. |delta| <= floor(255 epsilon).
        """
        waves = self._waves(cluster, sample_key)
        spread = max(float(np.std(_sum(waves, _grid(_REFERENCE_SIDE), _grid(_REFERENCE_SIDE)))), 1e-9)
        down, across = _grid(height), _grid(width)
        levels = np.empty((height, width, 3), np.int16)
        for start in range(0, height, _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            squashed = np.tanh(_sum(waves, down[rows], across) * (GAIN / spread))
            # rounded towards zero if epsilon is not a whole number of levels, to keep the bound
            bound = math.floor(epsilon * 255 + 1e-6)
            levels[rows] = np.clip(np.rint(squashed * (epsilon * 255)), -bound, bound)[:, :, None]
        return levels

    def _waves(self, cluster: int, sample_key: str) -> NDArray[np.float64]:
        """(kx, ky, phase) of each wave, float64 [2 * WAVES, 3]; every other one is mirrored, kx < 0."""
        draws = _uniforms(self.key, f"wave/{cluster}/{sample_key}")
        bands = self.middles[cluster]
        waves = np.empty((2 * WAVES, 3))
        for index in range(2 * WAVES):
            kx, ky = bands[index // 2 % len(bands)] + JITTER * np.array(_normal_pair(draws))
            waves[index] = (-kx if index % 2 else kx), ky, 2 * math.pi * next(draws)
        return waves


def bands_for(key: bytes, num_clusters: int) -> Bands:
    """Draw the frequency bands of `num_clusters` clusters from a key: two each for up to 20 clusters, else one.

    Band centres are at least 1.6 cycles per image apart (4.5 standard deviations of the jitter). The coarsest bands are
    used first, and assigned to clusters at random.
    Raises SettingsError above 40 clusters, InputError for a key shorter than 16 bytes.
    """
    check_key(key)
    if not 1 <= num_clusters <= NUM_BANDS:
        raise SettingsError(
            f"--generator texture has only {NUM_BANDS} distinct frequency bands: "
            f"--clusters must be at most {NUM_BANDS}, not {num_clusters}"
        )
    each = 2 if 2 * num_clusters <= NUM_BANDS else 1
    middles = _spread_middles(key)[: each * num_clusters]
    draws = _uniforms(key, f"owners/{num_clusters}")
    order = sorted(range(len(middles)), key=[next(draws) for _ in middles].__getitem__)
    return Bands(np.array(middles)[order].reshape(num_clusters, each, 2), key)


def check_key(key: bytes) -> str:
    """The SHA-256 of a secret key, the only part that is ever stored. Raises InputError if the key is too short."""
    if len(key) < LEAST_KEY_BYTES:
        raise InputError(
            f"the texture key has {len(key)} bytes; it needs at least {LEAST_KEY_BYTES} "
            "(create one with head -c 32 /dev/urandom > FILE)"
        )
    return sha256(key)


def _spread_middles(key: bytes) -> list[tuple[float, float]]:
    """NUM_BANDS points in a quarter ring, no two closer than SEPARATION, coarsest first.

    Rejection sampling: after 3000 misses in a row it starts over.
    """
    draws = _uniforms(key, "bands")
    middles: list[tuple[float, float]] = []
    misses = 0
    while len(middles) < NUM_BANDS:
        point = MOST_RADIUS * next(draws), MOST_RADIUS * next(draws)
        is_inside = LEAST_RADIUS <= math.hypot(*point) <= MOST_RADIUS
        if is_inside and all(math.dist(point, other) >= SEPARATION for other in middles):
            middles.append(point)
            misses = 0
        elif (misses := misses + 1) > 3000:
            middles, misses = [], 0
    return sorted(middles, key=lambda middle: math.hypot(*middle))


def _uniforms(key: bytes, purpose: str) -> Iterator[float]:
    """Endless numbers in [0, 1) that only the holder of the key can know: HMAC-SHA256 over purpose and a counter."""
    counter = 0
    while True:
        digest = hmac.new(key, f"{purpose}/{counter}".encode(), hashlib.sha256).digest()
        for start in range(0, len(digest), 8):
            yield (int.from_bytes(digest[start : start + 8], "little") >> 11) / 2**53
        counter += 1


def _normal_pair(draws: Iterator[float]) -> tuple[float, float]:
    """Two standard normal numbers (Box and Muller 1958)."""
    radius = math.sqrt(-2 * math.log(1 - next(draws)))
    angle = 2 * math.pi * next(draws)
    return radius * math.cos(angle), radius * math.sin(angle)


def _grid(size: int) -> NDArray[np.float64]:
    """Pixel centres as fractions of the side."""
    return (np.arange(size) + 0.5) / size


def _sum(waves: NDArray[np.float64], down: NDArray[np.float64], across: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum over the waves of cos(2 pi (kx x + ky y) + phase) -> [len(down), len(across)]."""
    vertical = 2 * np.pi * np.outer(down, waves[:, 1])
    horizontal = 2 * np.pi * np.outer(across, waves[:, 0]) + waves[:, 2]
    total: NDArray[np.float64] = np.cos(vertical) @ np.cos(horizontal).T - np.sin(vertical) @ np.sin(horizontal).T
    return total
