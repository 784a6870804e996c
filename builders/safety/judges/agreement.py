"""Agreement of two judges about the same answers: Cohen's kappa; reads and writes nothing."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from sklearn.exceptions import UndefinedMetricWarning
from sklearn.metrics import cohen_kappa_score

from builders.statistics import SAMPLES, Interval


class Agreement(NamedTuple):
    """How far two judges agree."""

    kappa: Interval | None
    """Cohen's kappa with its 95 % bootstrap interval; None: it is not defined, as where both always say one
    thing."""
    same: float | None
    """Share of answers on which they say the same; None: there are none."""
    n: int
    """Answers that both could be read on."""
    unread_first: int
    """Answers that only the first could not be read on."""
    unread_second: int
    """Answers that only the second could not be read on."""
    unread_both: int
    """Answers that neither could be read on."""


def agreement(first: Sequence[float | None], second: Sequence[float | None], seed: int = 0) -> Agreement:
    """Compare two judges' zeros and ones.

    Args:
        first: Values of verdicts, one an answer; None or NaN: unreadable.
        second: Of the same answers.
        seed: Of the bootstrap.

    Raises:
        ValueError: the answers differ in number, or a value is neither 0 nor 1.

    Source:
        Cohen 1960; scikit-learn's `cohen_kappa_score`.
    """
    if len(first) != len(second):
        raise ValueError(f"expected the same answers, got {len(first)} and {len(second)}")
    values = np.array([first, second], dtype=float).reshape(2, -1)
    unread = np.isnan(values)
    known = values[:, ~unread.any(0)]
    if not np.isin(known, (0, 1)).all():
        raise ValueError(f"expected zeros and ones, got {known[~np.isin(known, (0, 1))][0]}")
    n = known.shape[1]
    return Agreement(
        _kappa(known.astype(int), seed),
        float((known[0] == known[1]).mean()) if n else None,
        n,
        int((unread[0] & ~unread[1]).sum()),
        int((unread[1] & ~unread[0]).sum()),
        int(unread.all(0).sum()),
    )


def _kappa(known: np.ndarray, seed: int) -> Interval | None:
    n = known.shape[1]
    if not n:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndefinedMetricWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        mean = float(cohen_kappa_score(known[0], known[1], labels=[0, 1]))
    if np.isnan(mean):
        return None
    cells = np.bincount(2 * known[0] + known[1], minlength=4)
    drawn = np.random.default_rng(seed).multinomial(n, cells / n, SAMPLES)
    kappas = kappa_of(drawn / n)
    low, high = np.nanpercentile(kappas, [2.5, 97.5])  # a sample in which both say one thing has none
    return Interval(mean, float(low), float(high))


def kappa_of(shares: np.ndarray) -> np.ndarray:
    """Kappa of many tables at once, [samples]; NaN where it is not defined.

    Args:
        shares: [samples, 4] of answers: both 0, only the second 1, only the first 1, both 1.
    """
    first, second = shares[:, 2] + shares[:, 3], shares[:, 1] + shares[:, 3]
    same = shares[:, 0] + shares[:, 3]
    chance = first * second + (1 - first) * (1 - second)
    defined = chance < 1 - 1e-12
    return np.where(defined, (same - chance) / np.where(defined, 1 - chance, 1), np.nan)
