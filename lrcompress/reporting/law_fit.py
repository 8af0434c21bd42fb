"""Scaling laws: how the loss falls with the cost; fits with intervals, and comparisons of fits.

Three laws, where x is the cost in parameters, FLOPs or seconds, and L the loss in nats per token:

    power       log L = a - b log x
    offset      log L = log(E + exp(a - b log x)), E the irreducible loss
    decade      L = a - b log10 x, the slope b in nats per decade

A fit minimizes Huber's loss of the residuals of L (decade) or of log L, as Hoffmann et al. 2022
(arXiv 2203.15556, appendix D.2) do. Intervals are from a wild bootstrap: each resample multiplies
the residual of every point by a random normal number, and takes one Gauss-Newton step from the fit
(the score bootstrap of Kline and Santos 2012). The standard deviation of these steps, times
Student's quantile, is the half-width of the interval.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.optimize import least_squares
from scipy.stats import t as student

from lrcompress.reporting.intervals import (
    CONFIDENCE,
    Interval,
    Points,
    slope_verdict,
    student_quantile,
)
from lrcompress.runtime.errors import InputError

Law = Literal["power", "offset", "decade"]
# Huber's threshold: larger residuals count linearly. Relative, or in nats for "decade"
HUBER: dict[Law, float] = {"power": 0.03, "offset": 0.03, "decade": 0.1}
# bound of the exponent b in the fit
MAX_EXPONENT = 5.0
# first guesses of the irreducible loss, as shares of the lowest measured loss
IRREDUCIBLE_SHARES = (0.0, 0.5, 0.9)


@dataclass(frozen=True)
class LawFit:
    """One law fitted to the points of one variant.

    `parameters` are a, b and, for "offset", E; `draws` are those of each resample, of shape
    (resamples, parameters). `freedom` is the number of points less the number of parameters.
    """

    law: Law
    parameters: tuple[float, ...]
    draws: np.ndarray
    freedom: int

    @property
    def slope(self) -> Interval:
        """b: the exponent, or for "decade" the fall of the loss in nats per decade."""
        return _interval(self.parameters[1], self.draws[:, 1], self.freedom)

    @property
    def irreducible(self) -> Interval | None:
        """E of the law "offset" in nats; None for the other laws."""
        if self.law != "offset":
            return None
        return _interval(self.parameters[2], self.draws[:, 2], self.freedom, least=0.0)

    def loss(self, x: np.ndarray) -> np.ndarray:
        """The fitted loss at x (points,)."""
        return np.asarray(predicted(self.law, np.array([self.parameters]), x)[0])

    def band(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper ends of the 95 % interval of the fitted loss at each x (points,)."""
        middle, spread = self.loss(x), predicted(self.law, self.draws, x).std(axis=0, ddof=1)
        reach = student_quantile(self.freedom) * spread
        return middle - reach, middle + reach


def fit(x: Points, loss: Points, law: Law, resamples: int = 1000, seed: int = 0) -> LawFit:
    """Fits `law` to the points (x, loss).

    Raises InputError for fewer sizes than parameters, or for no more points than parameters.
    """
    X, y = np.asarray(x, float), np.asarray(loss, float)
    count = 3 if law == "offset" else 2
    if len(np.unique(X)) < count or len(X) <= count:
        raise InputError(
            f"a {law} law of {count} parameters needs {count} sizes and {count + 1} points, and "
            f"there are {len(np.unique(X))} and {len(X)}: add sizes or seeds"
        )
    centre = float(np.log(X).mean())
    best = _best_fit(np.log(X) - centre, y, law)
    residuals, jacobian = _residuals(best, np.log(X) - centre, y, law)
    steps = _bootstrap_steps(residuals, jacobian, HUBER[law], resamples, seed)
    sets = _uncentred(np.vstack([best, best + steps]), centre, law)
    return LawFit(law, tuple(float(value) for value in sets[0]), sets[1:], len(X) - count)


def _best_fit(x: np.ndarray, y: np.ndarray, law: Law) -> np.ndarray:
    """a, b, and E of "offset", for centred log x: the best of the fits from several first E."""
    shares = IRREDUCIBLE_SHARES if law == "offset" else IRREDUCIBLE_SHARES[:1]
    starts = [_start(x, y, law, share * float(y.min())) for share in shares]
    results = [_minimize(x, y, law, np.array(start)) for start in starts]
    return np.asarray(min(results, key=lambda result: result.cost).x)


def _start(x: np.ndarray, y: np.ndarray, law: Law, floor: float) -> list[float]:
    """The parameters of a straight line through the losses less `floor`, the first guess of E."""
    fall, level = np.polyfit(x, _transformed(y - floor, law), 1)
    return [level, -fall, floor] if law == "offset" else [level, -fall]


def _minimize(x: np.ndarray, y: np.ndarray, law: Law, start: np.ndarray) -> Any:
    """scipy's result of the least Huber loss, searched from the parameters `start`."""
    low, high = [-np.inf, -MAX_EXPONENT, 0.0], [np.inf, MAX_EXPONENT, float(y.max())]
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
    """Fit less data (points,), and the derivatives (points, parameters); `x` is centred log x."""
    line = p[0] - p[1] * x
    if law != "offset":
        return line - _transformed(y, law), np.stack([np.ones_like(x), -x], axis=1)
    power = np.exp(line)
    whole = p[2] + power
    slopes = np.stack([power / whole, -power * x / whole, 1 / whole], axis=1)
    return np.log(whole) - np.log(y), slopes


def _bootstrap_steps(
    residuals: np.ndarray, jacobian: np.ndarray, scale: float, resamples: int, seed: int
) -> np.ndarray:
    """The change of the parameters in each resample, of shape (resamples, parameters).

    Residuals are divided by sqrt(1 - leverage), because the fit has made them smaller (HC2).
    """
    weights = scale / np.maximum(np.abs(residuals), scale)
    inverse = np.linalg.pinv(jacobian.T @ (weights[:, None] * jacobian)) @ (jacobian.T * weights)
    leverage = np.clip(np.einsum("np,pn->n", jacobian, inverse), 0, 1 - 1e-6)
    widened = residuals / np.sqrt(1 - leverage)
    noise = np.random.default_rng(seed).standard_normal((resamples, len(residuals)))
    return np.asarray((noise * widened) @ inverse.T)


def _uncentred(sets: np.ndarray, centre: float, law: Law) -> np.ndarray:
    """Parameters (sets, 2 or 3) for log x instead of centred log x; for "decade", log10 x."""
    sets = sets.copy()
    sets[:, 0] += sets[:, 1] * centre
    if law == "decade":
        sets[:, 1] *= np.log(10)
    if law == "offset":
        sets[:, 2] = sets[:, 2].clip(min=0)
    return sets


def predicted(law: Law, parameters: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Losses of shape (sets, points), for `parameters` (sets, 2 or 3) at x (points,)."""
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
    reach = student_quantile(freedom) * float(draws.std(ddof=1))
    low = value - reach
    return Interval(value, low if least is None else max(low, least), value + reach)


@dataclass(frozen=True)
class SlopeComparison:
    """The slope of a fit less that of its baseline, and the cost at which both lines cross.

    `p_value` is the probability of slopes at least as different if they were equal (Welch's t).
    `crossing` is None for parallel lines, and for the law "offset", which has no closed formula.
    """

    difference: Interval
    p_value: float
    crossing: Interval | None

    @property
    def verdict(self) -> str:
        """How the first slope compares with the baseline's."""
        return slope_verdict(self.difference)


def compare(variant: LawFit, baseline: LawFit) -> SlopeComparison:
    """The slope of `variant` against that of `baseline`: two fits of one law."""
    spreads = [float(law_fit.draws[:, 1].std(ddof=1)) for law_fit in (variant, baseline)]
    squares = [spread**2 for spread in spreads]
    freedom = max(
        sum(squares) ** 2
        / max(squares[0] ** 2 / variant.freedom + squares[1] ** 2 / baseline.freedom, 1e-300),
        1.0,
    )
    difference = variant.parameters[1] - baseline.parameters[1]
    error = max(sum(squares), 1e-300) ** 0.5
    reach = student_quantile(freedom) * error
    p_value = 2 * float(student.sf(abs(difference) / error, freedom))
    interval = Interval(difference, difference - reach, difference + reach)
    return SlopeComparison(interval, p_value, _crossing(variant, baseline))


def _crossing(variant: LawFit, baseline: LawFit) -> Interval | None:
    """The x at which two straight laws give one loss.

    Its interval has the percentiles of the resamples, widened by the ratio of Student's quantile
    to the normal one.
    """
    if variant.law == "offset" or variant.parameters[1] == baseline.parameters[1]:
        return None
    level, fall = (variant.draws - baseline.draws).T
    gap, steeper = (np.array(variant.parameters) - baseline.parameters).tolist()
    middle, freedom = gap / steeper, min(variant.freedom, baseline.freedom)
    wider = student_quantile(freedom) / student_quantile(np.inf)
    ends = np.percentile(level / fall, [100 * (1 - CONFIDENCE) / 2, 100 * (1 + CONFIDENCE) / 2])
    powers = [middle, *(middle + wider * (ends - middle)).tolist()]
    if variant.law == "power":
        powers = [power / np.log(10) for power in powers]
    return Interval(*(float(10.0 ** np.clip(power, -300, 300)) for power in powers))


def loss_gap(variant: LawFit, baseline: LawFit, x: float) -> Interval:
    """The fitted loss of `variant` less that of `baseline`, two fits of one law, at x."""
    at = np.array([x])
    gap = float(variant.loss(at)[0] - baseline.loss(at)[0])
    spreads = [
        float(predicted(law_fit.law, law_fit.draws, at).std(ddof=1))
        for law_fit in (variant, baseline)
    ]
    freedom = min(variant.freedom, baseline.freedom)
    reach = student_quantile(freedom) * float(np.linalg.norm(spreads))
    return Interval(gap, gap - reach, gap + reach)
