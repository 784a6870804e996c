"""Proves that work done ahead comes in order, is bounded, overlaps with its use, and passes its errors on."""

import threading

import pytest

from builders.prefetch import prefetched


@pytest.mark.parametrize("ahead", [1, 4])
def test_results_come_in_order_and_no_item_is_taken_too_early(ahead):
    taken = []

    def items():
        for i in range(9):
            taken.append(i)
            yield i

    for i, square in enumerate(prefetched(lambda x: x * x, items(), ahead)):
        assert square == i * i
        assert len(taken) == min(9, i + 1 + ahead)
    assert taken == list(range(9))
    assert list(prefetched(str, [])) == []


def test_the_next_item_is_worked_on_while_one_is_used():
    started = threading.Event()

    def work(item):
        if item == 1:
            started.set()
        return item

    results = prefetched(work, range(3))
    assert next(results) == 0
    assert started.wait(10)  # without the second result being asked for
    assert list(results) == [1, 2]


def test_an_error_comes_where_its_result_would():
    results = prefetched(lambda x: 1 // x, [2, 1, 0, 3])
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
