"""Tests whether losses bend away from a line, and compares two variants at equal cost.

The slope of a line through bent points depends on the range of their costs, and a variant that is
cheaper at every size has another range than its baseline. So both variants are fitted together
with one common bend, by least squares:

    L = a + b z + c z² + v (d + e z),  z = log10 x less its mean, v = 1 for the variant, else 0

Standard errors are HC3 (MacKinnon and White 1985), which allow for points that scatter unequally;
intervals are by Student's t.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from lrcompress.reporting.intervals import (
    CONFIDENCE,
    Interval,
    Points,
    slope_verdict,
    student_quantile,
)

# of c, d and e above
CURVATURE, LEVEL, SLOPE = 2, 3, 4
COLUMNS = 5


@dataclass(frozen=True)
class Bend:
    """The common bend of two variants, and their difference at equal cost, with 95 % intervals.

    `curvature` is c, in nats per squared decade; `p_value` is the probability of a c at least as
    far from zero if there were no bend. `level` is d: the variant's loss less the baseline's at the
    mean cost, in nats. `steeper` is -e: the variant's slope less the baseline's, in nats per
    decade.
    """

    curvature: Interval
    p_value: float
    level: Interval
    steeper: Interval

    @property
    def is_shown(self) -> bool:
        """Whether the bend is significant at 5 %."""
        return self.p_value < 1 - CONFIDENCE

    @property
    def verdict(self) -> str:
        """How the variant's slope compares with the baseline's."""
        return slope_verdict(self.steeper)


def bend(x: Points, loss: Points, base_x: Points, base_loss: Points) -> Bend | None:
    """Fits a variant's points (x, loss) together with a baseline's; None for too few points."""
    costs = np.log10(np.concatenate([np.asarray(x, float), np.asarray(base_x, float)]))
    y = np.concatenate([np.asarray(loss, float), np.asarray(base_loss, float)])
    is_variant = np.arange(len(y)) < len(x)
    z = costs - costs.mean()
    columns = np.stack([np.ones_like(z), z, z * z, is_variant, is_variant * z], axis=1)
    freedom = len(y) - COLUMNS
    if freedom < 1 or np.linalg.matrix_rank(columns) < COLUMNS:
        return None
    coefficients, errors = _least_squares(columns, y)
    reach = student_quantile(freedom) * errors
    with np.errstate(divide="ignore"):  # errors are 0 where points do not scatter
        p_value = 2 * float(student.sf(abs(coefficients[CURVATURE] / errors[CURVATURE]), freedom))
    spans = [
        Interval(float(value), float(value - half), float(value + half))
        for value, half in zip(coefficients, reach, strict=True)
    ]
    slope = spans[SLOPE]
    steeper = Interval(-slope.value, -slope.high, -slope.low)
    return Bend(spans[CURVATURE], p_value, spans[LEVEL], steeper)


def _least_squares(columns: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients (columns,) and their HC3 standard errors; `columns` is (points, columns)."""
    inverse = np.linalg.pinv(columns)
    coefficients = inverse @ y
    leverage = np.clip(np.einsum("ij,ji->i", columns, inverse), 0, 1 - 1e-6)
    widened = (y - columns @ coefficients) / (1 - leverage)
    return coefficients, np.linalg.norm(inverse * widened, axis=1)
