"""How processes are sized and counted by what nodes have: tables, without Ray."""

from __future__ import annotations

import pytest

from actors.cluster.placement import MANY, Workers, check_memory, place
from pipeline.errors import ClusterError

HEAD, CPU2, CPU64, GPU8 = {"CPU": 0.0}, {"CPU": 2.0}, {"CPU": 64.0}, {"CPU": 8.0, "GPU": 1.0}


@pytest.mark.parametrize(
    ("nodes", "gpus", "workers", "expected"),
    [
        ([CPU2], 0.0, None, Workers(2, 1.0, 0.0, MANY)),
        ([CPU2], 0.0, 1, Workers(1, 2.0, 0.0, 1)),
        ([CPU2, CPU2], 0.0, 1, Workers(1, 2.0, 0.0, 1)),  # never more than one node has
        ([CPU2, CPU2], 0.0, 3, Workers(3, 1.0, 0.0, 3)),
        ([CPU2, CPU2], 0.0, 9, Workers(4, 1.0, 0.0, 9)),  # five may come with nodes that join
        ([HEAD, CPU64, CPU2], 0.0, 4, Workers(4, 16.0, 0.0, 4)),
        ([CPU64, GPU8, GPU8, CPU64], 1.0, None, Workers(2, 8.0, 1.0, MANY)),  # 64 CPUs are not beside a GPU
        ([GPU8, {"CPU": 64.0, "GPU": 8.0}], 1.0, None, Workers(9, 8.0, 1.0, MANY)),
        ([GPU8, {"CPU": 64.0, "GPU": 8.0}], 1.0, 1, Workers(1, 64.0, 1.0, 1)),
        ([{"CPU": 8.0, "GPU": 2.0}], 0.4, None, Workers(4, 2.0, 0.4, MANY)),  # no share lies on two GPUs
        ([{"CPU": 20.0, "GPU": 1.0}], 0.1, None, Workers(10, 2.0, 0.1, MANY)),
        ([{"CPU": 8.0, "GPU": 4.0}], 2.0, None, Workers(2, 4.0, 2.0, MANY)),
        ([{"CPU": 1.0, "GPU": 4.0}], 1.0, None, Workers(1, 1.0, 1.0, MANY)),
    ],
)
def test_a_worker_is_as_large_as_the_nodes_that_have_what_it_needs(
    nodes: list[dict[str, float]], gpus: float, workers: int | None, expected: Workers
) -> None:
    assert place(nodes, gpus, workers=workers) == expected


@pytest.mark.parametrize(
    ("nodes", "gpus", "workers", "expected"),
    [
        ([HEAD, CPU2], 0.0, None, Workers(2, 1.0, 0.0, MANY)),
        ([HEAD, CPU2], 0.0, 8, Workers(8, 1.0, 0.0, 8)),  # all are asked for at once
        ([HEAD, CPU2], 0.0, 1, Workers(1, 2.0, 0.0, 1)),
        ([HEAD], 0.0, None, Workers(1, 1.0, 0.0, MANY)),  # scaled down to nothing
        ([HEAD, CPU64], 1.0, 3, Workers(3, 1.0, 1.0, 3)),  # nodes with a GPU may come
        ([HEAD, GPU8], 1.0, 3, Workers(3, 8.0, 1.0, 3)),
    ],
)
def test_an_autoscaler_is_asked_for_all_workers_and_for_one_at_least(
    nodes: list[dict[str, float]], gpus: float, workers: int | None, expected: Workers
) -> None:
    assert place(nodes, gpus, workers=workers, grows=True) == expected


@pytest.mark.parametrize(
    ("nodes", "gpus", "message"),
    [
        (
            [CPU64, GPU8, GPU8],
            2.0,
            "no node of the Ray cluster has 2 GPU and a CPU (--gpus-per-worker 2) for a worker; its nodes: "
            "2 with 8 CPU, 1 GPU; 1 with 64 CPU, 0 GPU",
        ),
        (
            [{"GPU": 4.0}, CPU2],
            1.0,
            "no node of the Ray cluster has 1 GPU and a CPU (--gpus-per-worker 1) for a worker; its nodes: "
            "1 with 0 CPU, 4 GPU; 1 with 2 CPU, 0 GPU",
        ),
        ([HEAD], 0.0, "no node of the Ray cluster has a CPU for a worker; its nodes: 1 with 0 CPU, 0 GPU"),
        ([], 0.0, "no node of the Ray cluster has a CPU for a worker; its nodes: none"),
    ],
)
def test_what_can_never_be_placed_is_refused_with_what_was_asked_and_what_nodes_have(
    nodes: list[dict[str, float]], gpus: float, message: str
) -> None:
    with pytest.raises(ClusterError) as refused:
        place(nodes, gpus)
    assert str(refused.value) == message


def test_stages_without_a_gpu_use_the_cpus_of_gpu_workers() -> None:
    assert Workers(2, 8.0, 1.0, 4).on_cpus() == Workers(16, 1.0, 0.0, 32)
    assert Workers(2, 8.0, 0.0, 4).on_cpus() == Workers(2, 8.0, 0.0, 4)


def test_images_that_fit_into_no_node_or_not_into_all_together_are_refused_with_the_numbers() -> None:
    nodes = [{"CPU": 8.0, "memory": 100e9}, {"CPU": 8.0, "memory": 300e9}]
    check_memory(nodes, 100_000_000_000, 3, "fitting")
    check_memory([{"CPU": 8.0}], 10**15, 3, "fitting")  # who does not say how much is not judged
    check_memory([{"CPU": 0.0}, *nodes], 10**15, 3, "fitting")
    for each, workers in ((301, 1), (100, 4)):
        with pytest.raises(ClusterError, match=r"^fitting: .* the nodes .* have 400\.0 GB, the largest 300\.0 GB$"):
            check_memory(nodes, each * 10**9, workers, "fitting")
