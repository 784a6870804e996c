"""Intervals cover the truth about as often as they say, and differences are paired item by item."""

import numpy as np
import pytest

from builders.statistics import interval, paired, rate


def test_a_rate_is_inside_its_interval_which_narrows_with_items() -> None:
    draw = np.random.default_rng(0)
    few, many = (interval((draw.random((1, n)) < 0.3).astype(float)) for n in (50, 2_000))
    assert few.low < few.mean < few.high
    assert many.high - many.low < (few.high - few.low) / 3
    assert interval(np.ones((2, 9))) == pytest.approx((1.0, 1.0, 1.0))


def test_ninety_five_of_a_hundred_intervals_hold_the_truth() -> None:
    draw = np.random.default_rng(1)
    held = 0
    for number in range(300):
        found = interval((draw.random((1, 400)) < 0.2).astype(float), number)
        held += found.low <= 0.2 <= found.high
    assert 0.91 <= held / 300 <= 0.98


def test_runs_that_differ_widen_the_interval() -> None:
    draw = np.random.default_rng(2)
    rates = np.array([0.1, 0.9, 0.2, 0.8, 0.5])[:, None]
    apart = interval((draw.random((5, 500)) < rates).astype(float))
    alike = interval((draw.random((5, 500)) < rates.mean()).astype(float))
    assert apart.high - apart.low > 4 * (alike.high - alike.low)


def test_a_rate_of_none_or_all_is_not_certain() -> None:
    # Wilson's interval for 0 of 200: 0 to z^2 / (200 + z^2)
    assert rate(np.zeros((1, 200))) == pytest.approx((0, 0, 1.959964**2 / (200 + 1.959964**2)), abs=1e-9)
    assert rate(np.ones((3, 200))).low == pytest.approx(1 - rate(np.zeros((1, 200))).high)
    some = (np.random.default_rng(0).random((4, 300)) < 0.4).astype(float)
    inner, outer = interval(some), rate(some)
    assert outer.low <= inner.low < inner.high <= outer.high


def test_pairing_removes_what_items_share() -> None:
    draw = np.random.default_rng(3)
    hard = draw.random((1, 800))
    first, second = (hard < 0.5).astype(float), (hard < 0.45).astype(float)
    difference = paired(first, second)
    assert difference.mean == pytest.approx((first - second).mean())
    assert difference.low > 0.02
    unpaired = interval(first).high - interval(second).low
    assert difference.high - difference.low < unpaired / 2
    three = np.repeat(first, 3, axis=0)
    assert paired(three, second).mean == pytest.approx(difference.mean)


def test_a_difference_of_none_or_all_items_is_not_certain() -> None:
    n = 200
    missed = 1.959964**2 / (n + 1.959964**2)  # Wilson's bound where 0 of n were seen
    none, all_of = np.zeros((1, n)), np.ones((1, n))
    assert paired(none, none) == pytest.approx((0, -missed, missed), abs=1e-9)
    assert paired(none, all_of) == pytest.approx((-1, -1, -1 + 2**0.5 * missed), abs=1e-9)
    assert paired(all_of, none) == pytest.approx((1, 1 - 2**0.5 * missed, 1), abs=1e-9)
    many = np.zeros((1, 10 * n))
    assert paired(many, many).high < paired(none, none).high / 9
    lengths = np.full((1, n), 7.0)  # no shares: nothing is known of how they spread
    assert paired(lengths, lengths) == pytest.approx((0, 0, 0))


def test_intervals_of_small_differences_hold_the_truth() -> None:
    draw = np.random.default_rng(4)
    held, empty = 0, 0
    for number in range(300):
        before = draw.random((1, 200)) < 0.97
        after = before & (draw.random((1, 200)) < 0.99)
        found = paired(after.astype(float), before.astype(float), number)
        held += found.low <= -0.0097 <= found.high
        empty += found.low == found.high
    assert held / 300 >= 0.95
    assert empty == 0


def test_other_items_are_refused() -> None:
    with pytest.raises(ValueError, match="expected the same items, got 4 and 5"):
        paired(np.zeros((1, 4)), np.zeros((1, 5)))
    with pytest.raises(ValueError, match=r"expected \[runs, items\], got \[3\]"):
        interval(np.zeros(3))
