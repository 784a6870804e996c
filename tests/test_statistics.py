"""Intervals cover the truth about as often as they say, and differences are paired item by item."""

import math

import numpy as np
import pytest

from builders.statistics import by_cluster, interval, paired, rate, share


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
    for n in range(1, 60):  # not -1e-17, which a card would show
        assert rate(np.zeros((1, n))).low == 0
        assert 1 - 1e-9 < rate(np.ones((1, n))).high <= 1
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


# Coverage: how many of the data sets that chance makes have an interval that holds the truth.


@pytest.mark.parametrize("n", [50, 300])
@pytest.mark.parametrize("truth", [0.02, 0.1, 0.5, 0.9])
def test_intervals_of_rates_cover(n: int, truth: float) -> None:
    """Of every data set that there can be, weighted by how likely it is: no luck is in this."""
    covered = 0.0
    for count in range(n + 1):
        found = rate((np.arange(n) < count)[None].astype(float))
        likely = math.comb(n, count) * truth**count * (1 - truth) ** (n - count)
        covered += likely * (found.low <= truth <= found.high)
    assert 0.92 <= covered <= 0.98


@pytest.mark.parametrize("n", [50, 300])
@pytest.mark.parametrize("truth", [0.02, 0.5])
def test_intervals_of_simulated_rates_cover(n: int, truth: float) -> None:
    draw = np.random.default_rng(n)
    held = 0
    for number in range(600):
        found = rate((draw.random((1, n)) < truth).astype(float), number)
        held += found.low <= truth <= found.high
    assert 0.92 <= held / 600 <= 0.98


def two_methods(
    draw: np.random.Generator, n: int, none: float, other: float
) -> tuple[np.ndarray, np.ndarray]:
    """Answers of two methods to the same items; what is hard for one mostly is for the other."""
    shared = draw.random((1, n))
    own = np.where(draw.random((1, n)) < 0.6, shared, draw.random((1, n)))
    return (own < other).astype(float), (shared < none).astype(float)


@pytest.mark.parametrize("n", [50, 300])
@pytest.mark.parametrize(
    ("none", "other"), [(0.5, 0.5), (0.5, 0.02), (0.5, 0.4), (0.1, 0.02), (0.9, 0.5), (0.02, 0.02)]
)
def test_intervals_of_simulated_differences_cover(n: int, none: float, other: float) -> None:
    draw = np.random.default_rng(n + round(100 * other))
    held, changed = 0, 0.0
    for number in range(400):
        method, plain = two_methods(draw, n, none, other)
        found = paired(method, plain, number)
        held += found.low <= other - none <= found.high
        changed += np.abs(method - plain).sum() / 400
    assert held / 400 >= 0.92
    # of less than three items that change, as with rates of .02, no interval covers as seldom as it may
    assert held / 400 <= 0.98 or changed < 3


def test_intervals_of_means_of_groups_cover() -> None:
    sizes, rates = (60, 20, 40, 30), (0.2, 0.6, 0.4, 0.5)
    groups = [name for name, size in zip("abcd", sizes, strict=True) for _ in range(size)]
    chance = np.repeat(rates, sizes)
    draw = np.random.default_rng(7)
    held, apart = 0, 0
    for number in range(400):
        plain, method = ((draw.random((1, 150)) < p).astype(float) for p in (chance, chance / 2))
        found, difference = rate(plain, number, groups), paired(method, plain, number, groups)
        held += found.low <= np.mean(rates) <= found.high
        apart += difference.low <= -np.mean(rates) / 2 <= difference.high
    assert 0.92 <= held / 400 <= 0.985  # Wilson's part knows nothing of rates that differ between groups
    assert 0.92 <= apart / 400 <= 0.985


# Groups.


def test_each_group_counts_alike() -> None:
    outcomes = np.array([[1, 1, 1, 1, 1, 1, 0, 0, 1, 0]], dtype=float)
    groups = ["a"] * 6 + ["b"] * 2 + ["c"] * 2
    found = rate(outcomes, 0, groups)
    assert found.mean == pytest.approx((1 + 0 + 0.5) / 3)
    assert found.low < found.mean < found.high
    assert paired(outcomes, np.zeros((1, 10)), 0, groups).mean == pytest.approx(found.mean)
    order = np.random.default_rng(0).permutation(10)
    again = rate(outcomes[:, order], 0, [groups[i] for i in order])
    assert again == pytest.approx(found)
    one = ["a"] * 10
    assert interval(outcomes, 3, one) == interval(outcomes, 3)


def test_groups_that_agree_within_narrow_the_interval() -> None:
    outcomes = np.repeat([[0.0, 1.0]], 100, axis=1)
    groups = ["a", "b"] * 100
    groups_are_sure = interval(outcomes, 0, ["a"] * 100 + ["b"] * 100)
    assert groups_are_sure == pytest.approx((0.5, 0.5, 0.5))
    assert interval(outcomes, 0, groups).high > 0.55


def test_groups_of_unlike_size_count_as_fewer_items() -> None:
    # each group weighs 1/2: 1 / (1 x (1/2)^2 + 99 x (1/198)^2) = 3.96 items
    groups = ["a"] + ["b"] * 99
    n = 1 / (1 / 4 + 99 / 198**2)
    assert rate(np.zeros((1, 100)), 0, groups).high == pytest.approx(1.959964**2 / (n + 1.959964**2))
    assert paired(np.zeros((1, 100)), np.zeros((1, 100)), 0, groups).high > 0.4


def test_groups_of_other_items_are_refused() -> None:
    with pytest.raises(ValueError, match="groups: expected one an item, 4, got 3"):
        rate(np.zeros((1, 4)), 0, ["a", "b", "c"])


def test_a_large_suite_is_drawn_in_parts_as_if_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = (np.random.default_rng(5).random((2, 90)) < 0.4).astype(float)
    whole = interval(outcomes, 1)
    monkeypatch.setattr("builders.statistics._DRAWN", 90 * 7)
    assert interval(outcomes, 1) == whole


def test_the_same_seed_gives_the_same_table() -> None:
    draw = np.random.default_rng(6)
    outcomes, against = ((draw.random((3, 200)) < p).astype(float) for p in (0.3, 0.5))
    groups = ["a", "b"] * 100

    def table(seed: int) -> list[object]:
        return [rate(outcomes, seed, groups), paired(outcomes, against, seed), interval(against, seed)]

    assert table(3) == table(3)
    assert table(3) != table(4)


def test_a_share_is_of_sums_and_its_interval_holds_the_truth() -> None:
    draw = np.random.default_rng(5)
    held = 0
    for seed in range(200):
        whole = draw.poisson(5, size=120)
        part = draw.binomial(whole, 0.4)
        found = share(part, whole, seed)
        assert found.mean == pytest.approx(part.sum() / whole.sum())
        held += found.low <= 0.4 <= found.high
    assert held >= 182  # 95 % of 200 is 190, two standard deviations 6
    assert 0.05 < found.high - found.low < 0.12
    assert found == share(part, whole, seed)


def test_an_interval_over_clusters_holds_the_truth_where_one_over_items_does_not() -> None:
    """Five captions a picture, of which some pictures are told and others are not."""
    draw, held = np.random.default_rng(6), {"items": 0, "clusters": 0}
    clusters = [f"{i % 60}" for i in range(300)]
    for seed in range(200):
        truth = np.clip(draw.normal(0.4, 0.2, size=60), 0, 1)
        whole = draw.poisson(5, size=300)
        part = draw.binomial(whole, np.tile(truth, 5))
        sums = by_cluster(np.stack([part, whole], 1), clusters)
        assert sums.shape == (60, 2)
        for name, found in (("items", share(part, whole, seed)), ("clusters", share(*sums.T, seed))):
            assert found.mean == pytest.approx(part.sum() / whole.sum())
            held[name] += found.low <= 0.4 <= found.high
    assert held["clusters"] >= 182
    assert held["items"] < 160


def test_what_is_said_twice_is_no_more_certain() -> None:
    draw = np.random.default_rng(7)
    whole, names = draw.poisson(5, size=80), [f"{i}" for i in range(80)]
    for part in (draw.binomial(whole, 0.4), whole):
        both = np.stack([part, whole], 1)
        once, twice = by_cluster(both, names), by_cluster(np.tile(both, (2, 1)), names * 2)
        assert once.tolist() == both.tolist()
        assert share(*twice.T) == pytest.approx(share(part, whole))
    with pytest.raises(ValueError, match="clusters: expected one an item, 80, got 79"):
        by_cluster(both, names[1:])


def test_a_share_of_nothing_is_none_and_of_other_items_an_error() -> None:
    assert np.isnan(share(np.zeros(3), np.zeros(3))).all()
    found = share(np.array([0, 2]), np.array([0, 2]))
    assert (found.mean, found.high) == pytest.approx((1, 1))
    assert found.low == pytest.approx(1 / (1 + 1.959964**2 / 2))  # never certain
    for part, whole in ((np.zeros(0), np.zeros(0)), (np.zeros(3), np.zeros(2)), (np.zeros((2, 2)),) * 2):
        with pytest.raises(ValueError, match="expected \\[items\\] of both"):
            share(part, whole)
