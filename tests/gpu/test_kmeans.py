"""k-means on faiss-gpu, where it is installed, against the CPU's."""

from __future__ import annotations

import faiss
import numpy as np
import pytest

from pipeline.hashing import numpy_rng


def test_a_gpu_assigns_points_as_the_cpu_does(device: str) -> None:
    rng = numpy_rng(0, "gpu-kmeans")
    points, centroids = (rng.normal(size=(count, 64)).astype(np.float32) for count in (5000, 40))
    exact = faiss.IndexFlatL2(64)
    if device == "cuda":
        if not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus():
            pytest.skip("faiss-gpu is not installed")
        other = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, faiss.IndexFlatL2(64))
    else:
        other = faiss.IndexFlatL2(64)
    for index in (exact, other):
        index.add(centroids)
    (distance, nearest), (_, found) = exact.search(points, 2), other.search(points, 1)
    decided = distance[:, 1] - distance[:, 0] > 1e-3 * distance[:, 0]  # of the others either answer is right
    assert decided.mean() > 0.98
    assert np.array_equal(found[decided, 0], nearest[decided, 0])
