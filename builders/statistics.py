"""Rates and paired differences with bootstrap intervals; reads and writes nothing.

Outcomes are a matrix, one row a run (another seed, another draw), one column an item; the columns of two
methods are the same items. Items and runs are drawn with replacement, both together, so that an interval
holds for other items *and* for other seeds.
"""

import math
from typing import NamedTuple

import numpy as np

SAMPLES = 2_000
"""Bootstrap samples."""

Z = 1.959964
"""Standard normal quantile of a 95 % interval."""


class Interval(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


def interval(outcomes: np.ndarray, seed: int = 0) -> Interval:
    """Mean of outcomes [runs, items] and its percentile interval.

    Args:
        outcomes: Rates are means of zeros and ones; differences of -1, 0 and 1.
        seed: Of the bootstrap.

    Raises:
        ValueError: not two-dimensional, or empty.
    """
    if outcomes.ndim != 2 or not outcomes.size:
        raise ValueError(f"outcomes: expected [runs, items], got {list(outcomes.shape)}")
    means = _bootstrap(outcomes.astype(float), np.random.default_rng(seed))
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(outcomes.mean()), float(low), float(high))


def rate(outcomes: np.ndarray, seed: int = 0) -> Interval:
    """Mean of zeros and ones [runs, items] with an interval that is never empty.

    The hull of the bootstrap's interval and of Wilson's for the number of items: where all outcomes are the
    same, every bootstrap sample is too, and would claim certainty.
    """
    mean, low, high = interval(outcomes, seed)
    least, most = _wilson(mean, outcomes.shape[1])
    return Interval(mean, min(low, least), max(high, most))


def paired(outcomes: np.ndarray, against: np.ndarray, seed: int = 0) -> Interval:
    """Mean difference to the same items under another method, `[runs, items]` each.

    Where one of the two has a single run (no steering has no seeds), it stands against every run. Of shares
    (nothing below 0 or above 1) the interval is the hull of the bootstrap's and of one that is never empty:
    where all items change alike, or none does, every bootstrap sample is the same and would claim certainty.

    Raises:
        ValueError: the items differ in number.

    Source: shares of items that rise and fall, each with Wilson's interval, put together as in Zou and
    Donner, Statistics in Medicine 27 (2008), without their correlation.
    """
    if outcomes.shape[-1] != against.shape[-1]:
        raise ValueError(f"expected the same items, got {outcomes.shape[-1]} and {against.shape[-1]}")
    differences = outcomes.astype(float) - against.astype(float)
    found = interval(differences, seed)
    if min(outcomes.min(), against.min()) < 0 or max(outcomes.max(), against.max()) > 1:
        return found
    n = differences.shape[1]
    rise, fall = (float(np.maximum(sign * differences, 0).mean()) for sign in (1, -1))
    (rise_low, rise_high), (fall_low, fall_high) = _wilson(rise, n), _wilson(fall, n)
    low = found.mean - math.hypot(rise - rise_low, fall_high - fall)
    high = found.mean + math.hypot(rise_high - rise, fall - fall_low)
    return Interval(found.mean, max(-1.0, min(found.low, low)), min(1.0, max(found.high, high)))


def _wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `n` items."""
    spread = Z * math.sqrt(max(0.0, share * (1 - share)) / n + Z**2 / (4 * n**2))
    centre, scale = share + Z**2 / (2 * n), 1 + Z**2 / n
    return (centre - spread) / scale, (centre + spread) / scale


def _bootstrap(outcomes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Means of samples, [SAMPLES]; how often each row and column was drawn is all that matters."""
    runs, items = outcomes.shape
    rows = rng.multinomial(runs, np.full(runs, 1 / runs), SAMPLES) / runs
    columns = rng.multinomial(items, np.full(items, 1 / items), SAMPLES) / items
    return np.einsum("sr,ri,si->s", rows, outcomes, columns, optimize=True)
