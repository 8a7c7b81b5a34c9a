"""A map over threads keeps the order and takes no more than it may."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.storage.bounded import bounded_map


@pytest.mark.parametrize("ahead", [1, 2, 7, 100])
def test_answers_come_in_order_and_items_are_taken_as_answers_are(ahead: int) -> None:
    taken = most = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for number in range(50):
            taken += 1
            yield number

    with ThreadPoolExecutor(3) as pool:
        for count, answer in enumerate(bounded_map(pool, lambda n: n * n, items(), ahead=ahead)):
            assert answer == count * count
            most = max(most, taken - count)
    assert (taken, most) == (50, min(ahead, 50))


def test_a_failure_comes_where_its_answer_would() -> None:
    with ThreadPoolExecutor(2) as pool:
        answers = bounded_map(pool, lambda n: 1 / n, [2, 1, 0], ahead=2)
        assert [next(answers), next(answers)] == [0.5, 1]
        with pytest.raises(ZeroDivisionError):
            next(answers)
