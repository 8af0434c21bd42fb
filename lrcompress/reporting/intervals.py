"""Numbers with their 95 % intervals, and how many of their digits are worth printing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from scipy.stats import t as student
from scipy.stats import ttest_1samp

from lrcompress.runtime.errors import InputError

CONFIDENCE = 0.95
ROUNDING = 1e-9  # of a share that is 0 or 1
Points = Sequence[float] | np.ndarray
Samples = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def normal_quantile(confidence: float) -> float:
    """Of a two-sided interval: its half-width in standard errors."""
    return NormalDist().inv_cdf((1 + confidence) / 2)


def wilson_interval(share: float, count: float, z: float) -> Interval:
    """The interval of a share of `count` items, which may be no whole number (Wilson 1927).

    `z` is that of `normal_quantile`. It has a width for a share of 0 or 1 too, and is within them.
    """
    scale = 1 + z**2 / count
    centre = (share + z**2 / (2 * count)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return Interval(share, max(centre - half, 0.0), min(centre + half, 1.0))


def score_interval(
    value: float,
    error: float | None,
    samples: Samples,
    z: float = 1.0,
    is_pooled: bool = False,
) -> Interval | None:
    """The interval of the score `value` whose standard error is `error`; None where none is known.

    It has the confidence of `z` standard errors of a normal distribution: 68.27 % for one.

    `samples` are the scores of items and their weights, shape (items, 2), or empty. A share of
    right answers has Wilson's interval. Where the error is pooled over the tasks of a group, it
    has it only at 0 and 1, for the number of equal items that has the same variance (Kish 1965).
    Other scores have z standard errors on both sides.
    """
    scores, weights = np.array(samples, float).reshape(-1, 2).T
    is_share = len(scores) > 0 and bool(np.isin(scores / weights, (0.0, 1.0)).all())
    is_at_end = min(value, 1 - value) < ROUNDING
    if is_share and (is_at_end or error is None or not is_pooled):
        count = float(weights.sum() ** 2 / (weights**2).sum())
        return wilson_interval(value, count, z)
    if error is None:
        return None
    half = z * error
    return Interval(value, value - half, value + half)


def student_quantile(degrees_of_freedom: float) -> float:
    """Of a two-sided 95 % interval: its half-width in standard errors, by Student's t."""
    return float(student.ppf((1 + CONFIDENCE) / 2, degrees_of_freedom))


def slope_verdict(difference: Interval) -> str:
    """What the difference of two slopes, first less second, says about the first."""
    if difference.low > 0:
        return "steeper"
    return "less steep" if difference.high < 0 else "not shown to differ"


def mean_difference(differences: Points) -> tuple[Interval, float]:
    """The mean of independent differences, and the p-value of a mean of zero, by Student's t.

    Raises InputError for fewer than two.
    """
    if len(differences) < 2:
        raise InputError("a mean of one difference has no interval: add sizes or seeds")
    test = ttest_1samp(np.asarray(differences, float), 0.0)
    span = test.confidence_interval(CONFIDENCE)
    mean = Interval(float(np.mean(differences)), float(span.low), float(span.high))
    return mean, float(test.pvalue)


def shown(interval: Interval, sign: str = "") -> str:
    """The interval as text, with two digits of its half-width.

    `sign` is a format flag: "+" shows the sign of positive numbers too.
    """
    half = (interval.high - interval.low) / 2
    if not np.isfinite(half):
        return f"{interval.value:{sign}.3g} (no interval)"
    decimals = 12 if half == 0 else int(np.clip(1 - np.floor(np.log10(half)), 0, 12))
    value, low, high = (
        f"{number:{sign}.{decimals}f}" for number in (interval.value, interval.low, interval.high)
    )
    return f"{value} ({low} to {high})"
