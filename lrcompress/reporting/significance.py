"""Is the difference between two models real? Paired over windows of a text, items of a task."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np
from scipy import stats

from lrcompress.reporting.differences import LARGEST
from lrcompress.reporting.metric import PUBLISHED, Metric
from lrcompress.reporting.tables import comparable, title
from lrcompress.runtime.errors import InputError

ALPHA = 0.05
POWER = 0.8
# nats per token, or a share of right answers: differences below it are called none
NEGLIGIBLE = 0.01
RESAMPLES = 2000
# flipping the signs of fewer cannot give p < ALPHA: 2 / 2**5 = 0.06
FEWEST = 6


@dataclass(frozen=True)
class Comparison:
    """A later model against the first, by one metric.

    Where every sample is right or wrong, the interval combines those of the shares that changed
    (Newcombe 1998), and the test is McNemar's exact one; else a paired bootstrap, and the test that
    flips the signs of the samples' differences.
    """

    __pydantic_config__ = PUBLISHED

    metric: str
    """Name and, where there is one, text or file of the metric."""
    baseline: str
    model: str
    samples: int
    """Windows of a text, or items of a task."""
    difference: float
    """The later model's less the first's: of a perplexity in nats per token, else in the metric's
    unit."""
    low: float
    """Lower end of the 95 % interval of the difference."""
    high: float
    """Upper end of the 95 % interval of the difference."""
    worst: float
    """The largest loss inside the interval: of a perplexity as a share of the first's, else in the
    metric's unit."""
    p_value: float
    """Adjusted for all comparisons of a report (Holm 1979)."""
    verdict: str
    """better, worse, no difference seen, or not enough data, with how many samples would decide."""


def comparisons(metrics: Sequence[Metric]) -> tuple[Comparison, ...]:
    """Of every metric whose samples are known, each later model against the first."""
    found = list(_pairs(metrics))
    results = [_compared(base, other) for base, other in found]
    adjusted = holm([result.p_value for result in results])
    return tuple(
        _judged(replace(result, p_value=p), other.higher_is_better)
        for result, p, (_, other) in zip(results, adjusted, found, strict=True)
    )


def not_shown(metrics: Sequence[Metric], max_loss: float) -> list[Comparison]:
    """Of the last model against the first, the metrics that may have lost more than `max_loss`.

    Non-inferiority: the whole 95 % interval has to lie within the margin, which is a share of a
    perplexity, and points of an accuracy. Raises InputError where there is nothing to compare, a
    text or task was measured in another way on the first model, or a value is not finite.
    """
    last = metrics[-1].model if metrics else ""
    found = [one for one in comparisons(metrics) if one.model == last]
    if not found:
        raise InputError(
            "max_loss needs a first model to compare with, and a text or task that both models are "
            "measured on"
        )
    compared = {one.metric for one in found}
    for metric in (metric for metric in metrics if metric.model == last):
        if not math.isfinite(metric.value):
            raise InputError(
                f"{title(metric)!r} of {last!r} is {metric.value}, which shows nothing: leave it "
                "out of what max_loss decides"
            )
        if metric.samples and title(metric) not in compared:
            raise InputError(
                f"{title(metric)!r} was measured in another way on {metrics[0].model!r}: leave it "
                "out of what max_loss decides, or compare with a model of the same tokenizer"
            )
    return [one for one in found if one.samples < FEWEST or one.worst > max_loss]


def _pairs(metrics: Sequence[Metric]) -> Iterator[tuple[Metric, Metric]]:
    first = metrics[0].model if metrics else ""
    for row in dict.fromkeys(title(metric) for metric in metrics):
        by_model = {metric.model: metric for metric in metrics if title(metric) == row}
        base = by_model.pop(first, None)
        for other in by_model.values():
            if base is not None and _paired(base, other):
                yield base, other


def _paired(base: Metric, other: Metric) -> bool:
    if not base.samples or len(base.samples) != len(other.samples):
        return False
    same = all(a[1] == b[1] for a, b in zip(base.samples, other.samples, strict=True))
    finite = bool(np.isfinite([base.samples, other.samples]).all())
    return same and finite and comparable(base, other)


def _compared(base: Metric, other: Metric) -> Comparison:
    values, weights = np.array(base.samples, dtype=float).T
    changed = np.array(other.samples, dtype=float)[:, 0]
    difference = float((changed - values).sum() / weights.sum())
    gains = changed - values
    if np.isin([values, changed], (0.0, 1.0)).all():
        low, high = _share_interval((gains > 0).mean(), (gains < 0).mean(), len(gains))
        p_value = _mcnemar(gains)
    else:
        low, high = _interval(gains, weights, difference)
        p_value = _sign_flips(gains)
    names = (title(base), base.model, other.model)
    worst = _worst(other, low, high)
    return Comparison(*names, len(values), difference, low, high, worst, p_value, "")


def _worst(metric: Metric, low: float, high: float) -> float:
    if metric.higher_is_better:
        return -low
    return math.expm1(min(high, LARGEST)) if metric.is_exponential else high


def _interval(gains: Any, weights: Any, mean: float) -> tuple[float, float]:
    """The 95 % interval of sum(gains) / sum(weights), both of shape (samples,)."""
    if len(gains) < 2 or np.ptp(gains / weights) == 0:
        return mean, mean

    def ratio(gains: Any, weights: Any, axis: int) -> Any:
        return gains.sum(axis) / weights.sum(axis)

    options = {"paired": True, "n_resamples": RESAMPLES, "vectorized": True, "method": "BCa"}
    generator = np.random.default_rng(0)
    found = stats.bootstrap((gains, weights), ratio, rng=generator, **options)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _share_interval(won: float, lost: float, count: int) -> tuple[float, float]:
    """The 95 % interval of won - lost, shares of `count` items, by their Wilson intervals.

    Newcombe (1998) with the correlation of the two shares, which exclude each other. Unlike a
    bootstrap it has a width where no item changed.
    """
    wins, losses = (
        stats.binomtest(round(share * count), count).proportion_ci(method="wilson")
        for share in (won, lost)
    )
    apart = math.sqrt(won * lost / ((1 - won) * (1 - lost))) if max(won, lost) < 1 else 0.0

    def distance(one: float, other: float) -> float:
        return math.sqrt(one**2 + other**2 + 2 * apart * one * other)

    low = won - lost - distance(won - wins.low, losses.high - lost)
    high = won - lost + distance(wins.high - won, lost - losses.low)
    return float(max(low, -1.0)), float(min(high, 1.0))


def _mcnemar(gains: Any) -> float:
    changed = int((gains != 0).sum())
    return float(stats.binomtest(int((gains > 0).sum()), changed).pvalue) if changed else 1.0


def _sign_flips(gains: Any) -> float:
    if len(gains) < 2 or not gains.any():
        return 1.0
    options = {"permutation_type": "samples", "vectorized": True, "n_resamples": 9999}
    generator = np.random.default_rng(0)
    return float(stats.permutation_test((gains,), np.mean, rng=generator, **options).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted for their number by Holm (1979), which bounds the chance of any false alarm."""
    order = np.argsort(p_values)
    adjusted = np.array(p_values, dtype=float)[order] * np.arange(len(order), 0, -1)
    found = np.empty(len(order))
    found[order] = np.minimum(np.maximum.accumulate(adjusted), 1.0)
    return [float(p) for p in found]


def _judged(result: Comparison, higher_is_better: bool) -> Comparison:
    if result.p_value < ALPHA:
        better = (result.difference > 0) == higher_is_better
        return replace(result, verdict="better" if better else "worse")
    if result.samples >= FEWEST and max(-result.low, result.high) < NEGLIGIBLE:
        return replace(result, verdict="no difference seen")
    needed = _needed(result)
    more = f": about {needed:,} samples would decide" if needed else ""
    return replace(result, verdict=f"not enough data{more}")


def _needed(result: Comparison) -> int | None:
    """Samples that show a difference as large as the one seen, or that it is negligible."""
    half = (result.high - result.low) / 2
    if half == 0:
        return None
    normal = NormalDist()
    seen = normal.inv_cdf(1 - ALPHA / 2)
    power = (seen + normal.inv_cdf(POWER)) / seen * half
    size, gap = abs(result.difference), NEGLIGIBLE - abs(result.difference)
    shares = [power / size] if size else []
    shares += [half / gap] if gap > 0 else []
    return max(result.samples + 1, math.ceil(result.samples * min(shares) ** 2))
