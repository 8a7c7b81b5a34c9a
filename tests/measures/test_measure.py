"""The delta that a picture carries is told from the original decoded in the same way."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.deltas.protection import Protection
from pipeline.measures.measure import measure_shard
from pipeline.records import Sample
from pipeline.settings import Settings
from pipeline.shards.photographs import photograph
from pipeline.surrogates.features import Assignment
from tests.deltas.test_sample_steps import CLUSTERS, EPSILON, clustering_of_noise, random_generator
from tests.support.samples import image_bytes


@pytest.mark.parametrize(("kind", "moved"), [("JPEG", 0), ("PNG", 8), ("JPEG", 8)])
def test_a_delta_is_the_difference_of_pictures_decoded_alike(kind: str, moved: int) -> None:
    """A JPEG of 300 px may be decoded at half its size, which alone changes pixels by 30 levels."""
    parts = ("uc", "distilled", "tiny", EPSILON, clustering_of_noise(), (1, 2, 0), None, "f" * 64)
    protection = Protection(*parts, sample=random_generator("distilled"))  # type: ignore[arg-type]
    pixels = photograph("coffee")[:300, :400].clip(20, 230)
    options = {"quality": 95} if kind == "JPEG" else {}
    suffix = {"JPEG": "jpg", "PNG": "png"}[kind]
    before, after = (
        Sample("a", {suffix: image_bytes((pixels + change).astype(np.uint8), kind, **options)}) for change in (0, moved)
    )
    assignment = Assignment("s", ("a",), np.array([CLUSTERS - 1], np.int32), np.zeros(1, np.float32))
    found = measure_shard([after], [before], assignment, protection, Settings(), num_images=1)
    assert found.deltas.shape == (1, 3, 72, 72)
    np.testing.assert_allclose(found.deltas, moved, atol=1.5 if kind == "JPEG" and moved else 0)
