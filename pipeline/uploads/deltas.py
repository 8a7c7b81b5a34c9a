"""A protection's file -> whatever answers: which deltas for these pictures?"""

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
    """What protects pictures of a collection that is not clustered again.

    distance_p99  float32 [p]: an image farther than this from its nearest centroid resembles nothing that was fitted;
                  None where the protection has no centroids
    """

    deltas: PictureDeltas
    distance_p99: NDArray[np.float32] | None

    def is_far(self, cluster: int, distance: float) -> bool:
        """True if an image lies beyond what 99 % of its cluster's fitted images do."""
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
    """What a protection's file answers with, its surrogate loaded on `device`.

    key      secret of a texture
    weights  file of the surrogate's weights; None = where its library keeps them
    small_images  how a universal generator sees pictures of at most 64 px
    Raises InputError for a damaged file or weights that cannot be had, ConflictError if key or weights are others
    than the protection was fitted with, SettingsError if it needs a key and there is none.
    """
    from pipeline.deltas.load import deltas_of, load_protection  # here: a run without new uploads needs none of it
    from pipeline.surrogates.surrogate import load_surrogate

    check_protection(protection, has_key=key is not None)
    loaded = load_protection(protection)
    name, size = named_surrogate(loaded.surrogate_id)
    surrogate = load_surrogate(name, weights=weights, size=size, device=device)
    deltas = deltas_of(protection, surrogate, key=key, device=device, small_images=small_images)
    return UploadDeltas(deltas, loaded.clustering.distance_p99)


def check_protection(data: bytes, *, has_key: bool) -> float:
    """Epsilon of a protection; what can be refused without loading it is refused in an instant.

    Raises InputError for what is no protection, SettingsError if it needs a key and there is none.
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
