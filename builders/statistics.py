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
    n = outcomes.shape[1]
    spread = Z * math.sqrt(max(0.0, mean * (1 - mean)) / n + Z**2 / (4 * n**2))
    centre, scale = mean + Z**2 / (2 * n), 1 + Z**2 / n
    return Interval(mean, min(low, (centre - spread) / scale), max(high, (centre + spread) / scale))


def paired(outcomes: np.ndarray, against: np.ndarray, seed: int = 0) -> Interval:
    """Mean difference to the same items under another method, `[runs, items]` each.

    Where one of the two has a single run (no steering has no seeds), it stands against every run.

    Raises:
        ValueError: the items differ in number.
    """
    if outcomes.shape[-1] != against.shape[-1]:
        raise ValueError(f"expected the same items, got {outcomes.shape[-1]} and {against.shape[-1]}")
    return interval(outcomes.astype(float) - against.astype(float), seed)


def _bootstrap(outcomes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Means of samples, [SAMPLES]; how often each row and column was drawn is all that matters."""
    runs, items = outcomes.shape
    rows = rng.multinomial(runs, np.full(runs, 1 / runs), SAMPLES) / runs
    columns = rng.multinomial(items, np.full(items, 1 / items), SAMPLES) / items
    return np.einsum("sr,ri,si->s", rows, outcomes, columns, optimize=True)
