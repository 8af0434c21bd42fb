"""Do points bend away from a line, and do two variants differ where they cost the same?

A line through bent points has the slope of where they lie, and a variant that is cheaper at every
size lies elsewhere. So both are fitted together with one bend, by least squares:

    L = a + b z + c z² + v (d + e z),  z = log10 x less its mean, v = 1 for the variant, else 0

Errors are HC3 (MacKinnon and White 1985), which allow for points that scatter unequally; intervals
are by Student's t.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from lrcompress.workflows.scaling.intervals import CONFIDENCE, Interval, Points, steepness

# of c, d and e above
CURVATURE, LEVEL, SLOPE = 2, 3, 4
COLUMNS = 5


@dataclass(frozen=True)
class Bend:
    """`curvature` is c, in nats per squared decade, and `p_value` that of a c as far from zero, or
    farther, if there were no bend. Of the variant less the baseline at equal cost: `level` is d, in
    nats at the mean cost, and `steeper` -e, in nats per decade."""

    curvature: Interval
    p_value: float
    level: Interval
    steeper: Interval

    @property
    def is_shown(self) -> bool:
        return self.p_value < 1 - CONFIDENCE

    @property
    def verdict(self) -> str:
        return steepness(self.steeper)


def bend(x: Points, loss: Points, base_x: Points, base_loss: Points) -> Bend | None:
    """Of a variant's points (x, loss) beside a baseline's; None where they are too few to tell."""
    costs = np.log10(np.concatenate([np.asarray(x, float), np.asarray(base_x, float)]))
    y = np.concatenate([np.asarray(loss, float), np.asarray(base_loss, float)])
    own = np.arange(len(y)) < len(x)
    z = costs - costs.mean()
    columns = np.stack([np.ones_like(z), z, z * z, own, own * z], axis=1)
    freedom = len(y) - COLUMNS
    if freedom < 1 or np.linalg.matrix_rank(columns) < COLUMNS:
        return None
    found, errors = _least_squares(columns, y)
    reach = float(student.ppf((1 + CONFIDENCE) / 2, freedom)) * errors
    with np.errstate(divide="ignore"):  # points without any scatter
        p_value = 2 * float(student.sf(abs(found[CURVATURE] / errors[CURVATURE]), freedom))
    spans = [Interval(*map(float, (f, f - r, f + r))) for f, r in zip(found, reach, strict=True)]
    slope = spans[SLOPE]
    steeper = Interval(-slope.value, -slope.high, -slope.low)
    return Bend(spans[CURVATURE], p_value, spans[LEVEL], steeper)


def _least_squares(columns: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients and their HC3 errors."""
    inverse = np.linalg.pinv(columns)
    found = inverse @ y
    leverage = np.clip(np.einsum("ij,ji->i", columns, inverse), 0, 1 - 1e-6)
    widened = (y - columns @ found) / (1 - leverage)
    return found, np.linalg.norm(inverse * widened, axis=1)
