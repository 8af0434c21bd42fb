"""Numbers with their 95 % intervals, and how many of their digits are worth printing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student
from scipy.stats import ttest_1samp

from lrcompress.runtime.errors import InputError

CONFIDENCE = 0.95
Points = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


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
