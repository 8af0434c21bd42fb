"""Numbers with their 95 % intervals, and how many of their digits are worth showing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
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


def steepness(difference: Interval) -> str:
    """What a difference of two slopes, and its interval, say of the first."""
    if difference.low > 0:
        return "steeper"
    return "less steep" if difference.high < 0 else "not shown to differ"


def mean(values: Points) -> tuple[Interval, float]:
    """Of independent differences, with Student's interval, and the p-value of their being zero.

    Raises InputError for less than two.
    """
    if len(values) < 2:
        raise InputError("a mean of one difference has no interval: add sizes or seeds")
    found = ttest_1samp(np.asarray(values, float), 0.0)
    span = found.confidence_interval(CONFIDENCE)
    return Interval(float(np.mean(values)), float(span.low), float(span.high)), float(found.pvalue)


def shown(interval: Interval, sign: str = "") -> str:
    """With no more digits than the interval allows: two of its half-width."""
    half = (interval.high - interval.low) / 2
    if not np.isfinite(half):
        return f"{interval.value:{sign}.3g} (no interval)"
    decimals = 12 if half == 0 else int(np.clip(1 - np.floor(np.log10(half)), 0, 12))
    numbers = [f"{v:{sign}.{decimals}f}" for v in (interval.value, interval.low, interval.high)]
    return f"{numbers[0]} ({numbers[1]} to {numbers[2]})"
