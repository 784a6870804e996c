"""Rates and paired differences with bootstrap intervals; reads and writes nothing.

Outcomes are a matrix, one row a run (another seed, another draw), one column an item; the columns of two
methods are the same items. Items and runs are drawn with replacement, both together, so that an interval
holds for other items *and* for other seeds. Where items belong to groups, the mean is that of the groups'
means, and items are drawn within their groups.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

SAMPLES = 2_000
"""Bootstrap samples."""

Z = 1.959964
"""Standard normal quantile of a 95 % interval."""

_DRAWN = 4_000_000
"""Numbers drawn at once: all of them would need gigabytes for the largest suites."""


class Interval(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


def interval(outcomes: np.ndarray, seed: int = 0, groups: Sequence[str] | None = None) -> Interval:
    """Mean of outcomes [runs, items] and its percentile interval.

    Args:
        outcomes: Rates are means of zeros and ones; differences of -1, 0 and 1.
        seed: Of the bootstrap.
        groups: One an item, each group counts alike; None: each item counts alike.

    Raises:
        ValueError: not two-dimensional, or empty, or groups of other items.
    """
    if outcomes.ndim != 2 or not outcomes.size:
        raise ValueError(f"outcomes: expected [runs, items], got {list(outcomes.shape)}")
    values = outcomes.astype(float)
    parts = [values] if groups is None else [values[:, columns] for columns in _members(values, groups)]
    means = _bootstrap(parts, np.random.default_rng(seed))
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(np.mean([part.mean() for part in parts])), float(low), float(high))


def rate(outcomes: np.ndarray, seed: int = 0, groups: Sequence[str] | None = None) -> Interval:
    """Mean of zeros and ones [runs, items] with an interval that is never empty.

    Of one run without groups it is Wilson's interval for the number of items. Of several it is the hull of
    that and the bootstrap's: they vary too, but where all outcomes are alike, every bootstrap sample is, and
    would claim certainty.

    Args:
        outcomes: Zeros and ones.
        seed: Of the bootstrap.
        groups: One an item, each group counts alike; None: each item counts alike.

    Source: Wilson 1927; Brown, Cai and DasGupta, Statistical Science 16 (2001).
    """
    mean, low, high = interval(outcomes, seed, groups)
    least, most = _wilson(mean, _effective(outcomes, groups))
    if len(outcomes) == 1 and groups is None:
        return Interval(mean, least, most)
    return Interval(mean, min(low, least), max(high, most))


def share(part: np.ndarray, whole: np.ndarray, seed: int = 0) -> Interval:
    """Sum of parts over the sum of wholes, each [items], with an interval over items drawn anew.

    Precision is such a share, of what is right in what was named; where nothing is named, it is NaN. The
    interval is the hull of the bootstrap's and Wilson's of the sum of wholes, so that it is never empty.

    Args:
        part: Numbers of each item, none above those of `whole`.
        whole: Numbers of each item.
        seed: Of the bootstrap.

    Raises:
        ValueError: no items, or not as many of both.
    """
    mean, low, high = ratio(part, whole, seed)
    if math.isnan(mean):
        return Interval(mean, low, high)
    least, most = _wilson(mean, float(whole.sum()))
    return Interval(mean, min(low, least), max(high, most))


def precision_recall(counts: np.ndarray) -> dict[str, Any]:
    """Of names right, given and true of each item [n, 3]: both figures with 95 % intervals.

    A figure is missing where nothing was named, or nothing was there to be.
    """
    right, given, true = counts.T
    found: dict[str, Any] = {}
    for name, one in {"precision": share(right, given), "recall": share(right, true)}.items():
        if np.isfinite(one.mean):
            found |= {name: one.mean, f"{name}_interval": [one.low, one.high]}
    return found


def by_cluster(values: np.ndarray, clusters: Sequence[str]) -> np.ndarray:
    """Sums over each cluster's items, by the mean number of its items, [clusters, ...]: to be drawn as one.

    Items that are alike, as captions of one picture are, say less than as many others: an interval over items
    would be too narrow. `ratio`, `share` and `precision_recall` of these draw clusters, and `share` takes the
    items of a cluster for one, so that said twice it is no more certain.

    Args:
        values: [items, ...], at least one.
        clusters: Name of each item's cluster, [items].

    Raises:
        ValueError: names of other items.
    """
    numbers, names = pd.factorize(np.asarray(clusters, dtype=object))
    if len(numbers) != len(values):
        raise ValueError(f"clusters: expected one an item, {len(values)}, got {len(numbers)}")
    found = np.zeros((len(names), *values.shape[1:]))
    np.add.at(found, numbers, values)
    return found * (len(names) / len(values))


def ratio(part: np.ndarray, whole: np.ndarray, seed: int = 0) -> Interval:
    """Sum of parts over the sum of wholes, each [items], with a percentile interval over items drawn anew.

    Args:
        part: Numbers of each item.
        whole: Numbers of each item, none below zero; where all are zero, the ratio is NaN.
        seed: Of the bootstrap.

    Raises:
        ValueError: no items, or not as many of both.
    """
    if part.ndim != 1 or part.shape != whole.shape or not len(part):
        raise ValueError(f"expected [items] of both, got {list(part.shape)} and {list(whole.shape)}")
    if not whole.sum():
        return Interval(math.nan, math.nan, math.nan)
    rng, n = np.random.default_rng(seed), len(part)
    drawn, both = [], np.stack([part, whole], 1).astype(float)
    while (left := SAMPLES - sum(map(len, drawn))) > 0:
        rows = rng.integers(n, size=(max(1, min(left, _DRAWN // n)), n))
        drawn.append(both[rows].sum(1))
    sums = np.concatenate(drawn)
    some = sums[sums[:, 1] > 0]
    low, high = np.percentile(some[:, 0] / some[:, 1], [2.5, 97.5])
    return Interval(float(part.sum() / whole.sum()), float(low), float(high))


def paired(
    outcomes: np.ndarray, against: np.ndarray, seed: int = 0, groups: Sequence[str] | None = None
) -> Interval:
    """Mean difference to the same items under another method, `[runs, items]` each.

    Where one of the two has a single run (no steering has no seeds), it stands against every run. Of shares
    (nothing below 0 or above 1) the interval is the hull of the bootstrap's and of one that is never empty:
    where all items change alike, or none does, every bootstrap sample is the same and would claim certainty.

    Args:
        outcomes: Of the method.
        against: Of the other one.
        seed: Of the bootstrap.
        groups: One an item, each group counts alike; None: each item counts alike.

    Raises:
        ValueError: the items differ in number.

    Source: shares of items that rise and fall, each with Wilson's interval, put together as in Zou and
    Donner, Statistics in Medicine 27 (2008), without their correlation.
    """
    if outcomes.shape[-1] != against.shape[-1]:
        raise ValueError(f"expected the same items, got {outcomes.shape[-1]} and {against.shape[-1]}")
    differences = outcomes.astype(float) - against.astype(float)
    found = interval(differences, seed, groups)
    if min(outcomes.min(), against.min()) < 0 or max(outcomes.max(), against.max()) > 1:
        return found
    n = _effective(differences, groups)
    weights = _weights(differences, groups)
    rise, fall = (float((np.maximum(sign * differences, 0) @ weights).mean()) for sign in (1, -1))
    (rise_low, rise_high), (fall_low, fall_high) = _wilson(rise, n), _wilson(fall, n)
    low = found.mean - math.hypot(rise - rise_low, fall_high - fall)
    high = found.mean + math.hypot(rise_high - rise, fall - fall_low)
    return Interval(found.mean, max(-1.0, min(found.low, low)), min(1.0, max(found.high, high)))


def _wilson(share: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `n` items."""
    spread = Z * math.sqrt(max(0.0, share * (1 - share)) / n + Z**2 / (4 * n**2))
    centre, scale = share + Z**2 / (2 * n), 1 + Z**2 / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)  # but for rounding


def _members(outcomes: np.ndarray, groups: Sequence[str]) -> list[np.ndarray]:
    """Columns of each group, in the order of their names."""
    names = np.asarray(groups)
    if names.shape != outcomes.shape[1:]:
        raise ValueError(f"groups: expected one an item, {outcomes.shape[1]}, got {len(names)}")
    return [np.flatnonzero(names == name) for name in np.unique(names)]


def _weights(outcomes: np.ndarray, groups: Sequence[str] | None) -> np.ndarray:
    """What each item counts in the mean, [items]; sums to 1."""
    items = outcomes.shape[1]
    found = np.full(items, 1 / items)
    members = [] if groups is None else _members(outcomes, groups)
    for columns in members:
        found[columns] = 1 / (len(columns) * len(members))
    return found


def _effective(outcomes: np.ndarray, groups: Sequence[str] | None) -> float:
    """How many items that count alike say as much: fewer than there are where groups differ in size."""
    if groups is None:
        return float(outcomes.shape[1])
    return float(1 / (_weights(outcomes, groups) ** 2).sum())


def _bootstrap(parts: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Means of samples, [SAMPLES], of the means of groups [runs, items of the group].

    How often each row and column was drawn is all that matters. Of each of several groups one item less is
    drawn than it has, else samples of small groups vary too little (Rao and Wu, JASA 83, 1988).
    """
    runs = len(parts[0])
    rows = rng.multinomial(runs, np.full(runs, 1 / runs), SAMPLES) / runs
    less = int(len(parts) > 1)
    means = [_means(part, rows, max(1, part.shape[1] - less), rng) for part in parts]
    return np.mean(means, axis=0)


def _means(outcomes: np.ndarray, rows: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Means of samples of `n` items of one group, [SAMPLES], whose rows were drawn already.

    Columns that are alike are drawn as one: of zeros and ones there are few kinds, and many items.
    """
    kinds, counts = np.unique(outcomes, axis=1, return_counts=True)
    at_once = max(1, _DRAWN // len(counts))
    found = []
    for start in range(0, SAMPLES, at_once):
        some = rows[start : start + at_once]
        columns = rng.multinomial(n, counts / counts.sum(), len(some)) / n
        found.append(np.einsum("sr,ri,si->s", some, kinds, columns, optimize=True))
    return np.concatenate(found)
