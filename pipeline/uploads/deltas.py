"""Load a protection file as a source of deltas for new pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.deltas.artefact import damaged, named_surrogate, read_header
from pipeline.errors import SettingsError
from pipeline.settings import SmallImages

if TYPE_CHECKING:
    from pipeline.deltas.picture_deltas import PictureDeltas


@dataclass(frozen=True)
class UploadDeltas:
    """Deltas for pictures that were not part of the fitted collection.

    distance_p99  float32 [p]: an image farther than this from its nearest centroid is unlike anything that was fitted;
                  None if the protection has no centroids
    """

    deltas: PictureDeltas
    distance_p99: NDArray[np.float32] | None

    def is_far(self, cluster: int, distance: float) -> bool:
        """True if an image is farther from its centroid than 99 % of its cluster's fitted images."""
        p99 = self.distance_p99
        return p99 is not None and 0 <= cluster < len(p99) and distance > float(p99[cluster])


def deltas_from(
    protection: bytes,
    *,
    key: bytes | None = None,
    weights: Path | None = None,
    device: str = "cpu",
    small_images: SmallImages = "resize",
) -> UploadDeltas:
    """Deltas from a protection file, with its surrogate loaded on `device`.

    key           secret of a texture protection
    weights       file with the surrogate's weights; None = where its library keeps them
    small_images  how a universal generator sees pictures of at most 64 px
    Raises InputError for a damaged file or unavailable weights, ConflictError if key or weights differ from those the
    protection was fitted with, SettingsError if a key is needed but missing.
    """
    from pipeline.deltas.load import deltas_of, load_protection  # imported late: not needed without new uploads
    from pipeline.surrogates.surrogate import load_surrogate

    check_protection(protection, has_key=key is not None)
    loaded = load_protection(protection)
    name, size = named_surrogate(loaded.surrogate_id)
    surrogate = load_surrogate(name, weights=weights, size=size, device=device)
    deltas = deltas_of(protection, surrogate, key=key, device=device, small_images=small_images)
    return UploadDeltas(deltas, loaded.clustering.distance_p99)


def check_protection(data: bytes, *, has_key: bool) -> float:
    """Epsilon of a protection, read from the header alone so that bad input is refused at once.

    Raises InputError if this is not a protection, SettingsError if a key is needed but missing.
    """
    header = read_header(data)
    if header.get("key_sha256") and not has_key:
        raise SettingsError("--protection needs the secret it was made with: add --key-file FILE")
    if "surrogate_id" in header:
        named_surrogate(header["surrogate_id"])
    try:
        return float(header["epsilon"])
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(error) from None
