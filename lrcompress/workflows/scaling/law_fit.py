"""Scaling laws: how a loss falls with what was spent, fitted, with intervals and comparisons.

Three laws, x the parameters, FLOPs or seconds, L the loss in nats per token:

    power       log L = a - b log x
    offset      log L = log(E + exp(a - b log x)), E the irreducible loss
    decade      L = a - b log10 x, the slope b in nats per decade

They are fitted to the residuals of L (decade) or log L by Huber's loss (as Hoffmann et al. 2022,
arXiv 2203.15556, appendix D.2, do). Intervals are from a wild bootstrap: each resample multiplies
the residual of every point, that is of every size and seed, by a normal number, and takes one
Gauss-Newton step from the fit (the score bootstrap of Kline and Santos 2012). Its spread, times
Student's quantile for the few points that there are, gives the interval.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.optimize import least_squares
from scipy.stats import t as student

from lrcompress.runtime.errors import InputError
from lrcompress.workflows.scaling.intervals import CONFIDENCE, Interval, Points, steepness

Law = Literal["power", "offset", "decade"]
# residuals beyond this count by their size, not their square: relative, or nats for decades
HUBER: dict[Law, float] = {"power": 0.03, "offset": 0.03, "decade": 0.1}
# exponents beyond this are of no use
STEEPEST = 5.0
# shares of the lowest loss that are tried as the irreducible one
FLOORS = (0.0, 0.5, 0.9)


@dataclass(frozen=True)
class LawFit:
    """One law of one variant: a, b, and E if it has one; `draws` are (resamples, parameters).

    `freedom` is the number of points less that of parameters.
    """

    law: Law
    parameters: tuple[float, ...]
    draws: np.ndarray
    freedom: int

    @property
    def slope(self) -> Interval:
        """The exponent b, or the nats per decade that the loss falls by."""
        return _interval(self.parameters[1], self.draws[:, 1], self.freedom)

    @property
    def irreducible(self) -> Interval | None:
        if self.law != "offset":
            return None
        return _interval(self.parameters[2], self.draws[:, 2], self.freedom, least=0.0)

    def loss(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(predicted(self.law, np.array([self.parameters]), x)[0])

    def band(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of the fitted curve, pointwise."""
        middle, spread = self.loss(x), predicted(self.law, self.draws, x).std(axis=0, ddof=1)
        reach = student.ppf((1 + CONFIDENCE) / 2, self.freedom) * spread
        return middle - reach, middle + reach


def fit(x: Points, loss: Points, law: Law, resamples: int = 1000, seed: int = 0) -> LawFit:
    """`law` through points (x, loss). InputError where there are too few to leave one over."""
    X, y = np.asarray(x, float), np.asarray(loss, float)
    count = 3 if law == "offset" else 2
    if len(np.unique(X)) < count or len(X) <= count:
        raise InputError(
            f"a {law} law of {count} parameters needs {count} sizes and {count + 1} points, and "
            f"there are {len(np.unique(X))} and {len(X)}: add sizes or seeds"
        )
    centre = float(np.log(X).mean())
    found = _fitted(np.log(X) - centre, y, law)
    residuals, jacobian = _residuals(found, np.log(X) - centre, y, law)
    steps = _steps(residuals, jacobian, HUBER[law], resamples, seed)
    sets = _uncentred(np.vstack([found, found + steps]), centre, law)
    return LawFit(law, tuple(float(value) for value in sets[0]), sets[1:], len(X) - count)


def _fitted(x: np.ndarray, y: np.ndarray, law: Law) -> np.ndarray:
    """a, b, and E of the offset law, for centred log x; the best from several E."""
    shares = FLOORS if law == "offset" else FLOORS[:1]
    tries = [_start(x, y, law, share * float(y.min())) for share in shares]
    found = [_least(x, y, law, np.array(first)) for first in tries]
    return np.asarray(min(found, key=lambda result: result.cost).x)


def _start(x: np.ndarray, y: np.ndarray, law: Law, floor: float) -> list[float]:
    fall, level = np.polyfit(x, _transformed(y - floor, law), 1)
    return [level, -fall, floor] if law == "offset" else [level, -fall]


def _least(x: np.ndarray, y: np.ndarray, law: Law, start: np.ndarray) -> Any:
    low, high = [-np.inf, -STEEPEST, 0.0], [np.inf, STEEPEST, float(y.min())]
    bounds = (low[: len(start)], high[: len(start)])
    return least_squares(
        lambda p: _residuals(p, x, y, law)[0],
        np.clip(start, *bounds),
        lambda p: _residuals(p, x, y, law)[1],
        bounds=bounds,
        loss="huber",
        f_scale=HUBER[law],
    )


def _residuals(
    p: np.ndarray, x: np.ndarray, y: np.ndarray, law: Law
) -> tuple[np.ndarray, np.ndarray]:
    """Fit less data (points,), and its derivatives (points, parameters); all by natural logs."""
    line = p[0] - p[1] * x
    if law != "offset":
        return line - _transformed(y, law), np.stack([np.ones_like(x), -x], axis=1)
    power = np.exp(line)
    whole = p[2] + power
    slopes = np.stack([power / whole, -power * x / whole, 1 / whole], axis=1)
    return np.log(whole) - np.log(y), slopes


def _steps(
    residuals: np.ndarray, jacobian: np.ndarray, scale: float, resamples: int, seed: int
) -> np.ndarray:
    """(resamples, parameters). Residuals are widened for what the fit took from them (HC2)."""
    weights = scale / np.maximum(np.abs(residuals), scale)
    inverse = np.linalg.pinv(jacobian.T @ (weights[:, None] * jacobian)) @ (jacobian.T * weights)
    leverage = np.clip(np.einsum("np,pn->n", jacobian, inverse), 0, 1 - 1e-6)
    widened = residuals / np.sqrt(1 - leverage)
    noise = np.random.default_rng(seed).standard_normal((resamples, len(residuals)))
    return np.asarray((noise * widened) @ inverse.T)


def _uncentred(sets: np.ndarray, centre: float, law: Law) -> np.ndarray:
    """Parameters for x itself; the slope of a decade by its own logarithm."""
    sets = sets.copy()
    sets[:, 0] += sets[:, 1] * centre
    if law == "decade":
        sets[:, 1] *= np.log(10)
    if law == "offset":
        sets[:, 2] = sets[:, 2].clip(min=0)
    return sets


def predicted(law: Law, parameters: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Losses (sets, points) of `parameters` (sets, 2 or 3) at x (points,)."""
    a, b = parameters[:, :1], parameters[:, 1:2]
    if law == "decade":
        return np.asarray(a - b * np.log10(x))
    power = np.exp(a - b * np.log(x))
    return np.asarray(power + parameters[:, 2:3] if law == "offset" else power)


def _transformed(y: np.ndarray, law: Law) -> np.ndarray:
    return y if law == "decade" else np.log(y)


def _interval(
    value: float, draws: np.ndarray, freedom: int, least: float | None = None
) -> Interval:
    reach = float(student.ppf((1 + CONFIDENCE) / 2, freedom)) * float(draws.std(ddof=1))
    low = value - reach
    return Interval(value, low if least is None else max(low, least), value + reach)


@dataclass(frozen=True)
class SlopeComparison:
    """How much steeper one law is than another, and where they cross, if they do.

    `p_value` is that of slopes as different as these, or more, if they were equal (Welch's t).
    `crossing` is None where the fitted lines are parallel or the law has no closed crossing.
    """

    difference: Interval
    p_value: float
    crossing: Interval | None

    @property
    def verdict(self) -> str:
        return steepness(self.difference)


def compare(found: LawFit, baseline: LawFit) -> SlopeComparison:
    """`found` against `baseline`, two fits of one law."""
    spreads = [float(one.draws[:, 1].std(ddof=1)) for one in (found, baseline)]
    squares = [spread**2 for spread in spreads]
    parts = [s**2 / one.freedom for s, one in zip(squares, (found, baseline), strict=True)]
    freedom = max(sum(squares) ** 2 / max(sum(parts), 1e-300), 1.0)
    difference = found.parameters[1] - baseline.parameters[1]
    error = max(sum(squares), 1e-300) ** 0.5
    reach = float(student.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    p_value = 2 * float(student.sf(abs(difference) / error, freedom))
    span = Interval(difference, difference - reach, difference + reach)
    return SlopeComparison(span, p_value, _crossing(found, baseline))


def _crossing(found: LawFit, baseline: LawFit) -> Interval | None:
    """The x at which two straight laws give one loss; percentiles of the resamples, widened as
    Student's quantile is wider than the normal one."""
    if found.law == "offset" or found.parameters[1] == baseline.parameters[1]:
        return None
    level, fall = (found.draws - baseline.draws).T
    gap, steeper = (np.array(found.parameters) - baseline.parameters).tolist()
    middle, freedom = gap / steeper, min(found.freedom, baseline.freedom)
    wider = student.ppf((1 + CONFIDENCE) / 2, freedom) / student.ppf((1 + CONFIDENCE) / 2, np.inf)
    ends = np.percentile(level / fall, [100 * (1 - CONFIDENCE) / 2, 100 * (1 + CONFIDENCE) / 2])
    powers = [middle, *(middle + wider * (ends - middle)).tolist()]
    if found.law == "power":
        powers = [power / np.log(10) for power in powers]
    return Interval(*(float(10.0 ** np.clip(power, -300, 300)) for power in powers))


def gap(found: LawFit, baseline: LawFit, x: float) -> Interval:
    """The loss of one fitted law less that of another of the same law, at x."""
    at = np.array([x])
    value = float(found.loss(at)[0] - baseline.loss(at)[0])
    spreads = [float(predicted(one.law, one.draws, at).std(ddof=1)) for one in (found, baseline)]
    freedom = min(found.freedom, baseline.freedom)
    reach = float(student.ppf((1 + CONFIDENCE) / 2, freedom)) * float(np.linalg.norm(spreads))
    return Interval(value, value - reach, value + reach)
