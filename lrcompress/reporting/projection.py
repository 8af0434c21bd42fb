"""What a longer training would reach, projected from the held-out losses of one training.

The law is L = E + exp(a - b log t), where t are the tokens trained on and E is the loss that stays:
"offset" of `law_fit`, which also gives the intervals. They do not cover that the law is not quite
the right one: a training's own cosine makes the end of its losses flat (docs/concepts.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lrcompress.reporting.intervals import Interval, shown
from lrcompress.reporting.law_fit import LawFit, fit

# multiples of the tokens of a training, and how sentences call them
FACTORS = {2: "twice", 10: "ten times"}
MIN_MEASUREMENTS = 5
# share of the variance of log L that a law has to explain
MIN_EXPLAINED = 0.5
# half of the interval at twice the tokens, as a share of the loss there
MAX_HALF_WIDTH = 0.5


@dataclass(frozen=True)
class ProjectedLoss:
    """The held-out loss in nats per token after `factor` times the tokens; its 95 % interval."""

    factor: int
    tokens: int
    loss: float
    low: float
    high: float


@dataclass(frozen=True)
class Projection:
    """The losses for all FACTORS, or the reason why there are none."""

    losses: tuple[ProjectedLoss, ...] = ()
    reason: str | None = None


def project(curve: Sequence[tuple[int, float | None]]) -> Projection:
    """The projection from a training's (tokens so far, held-out loss), in order.

    The measurement at 0 tokens does not count: the law has no value there.
    """
    points = [(tokens, loss) for tokens, loss in curve if tokens > 0]
    if len(points) < MIN_MEASUREMENTS:
        return Projection(
            reason=f"there are {len(points)} measurements after the first step, and it takes "
            f"{MIN_MEASUREMENTS}"
        )
    if any(loss is None or loss <= 0 for _, loss in points):
        return Projection(reason="not all measured losses are positive numbers")
    tokens, losses = np.array(points, dtype=float).T
    law = fit(tokens / tokens[-1], losses, "offset")
    if reason := _weakness(law, tokens / tokens[-1], losses):
        return Projection(reason=reason)
    return _projected(law, int(tokens[-1]))


def _weakness(law: LawFit, x: np.ndarray, losses: np.ndarray) -> str | None:
    """Why `law`, fitted to `losses` at x (points,), tells nothing about later losses, or None."""
    if law.slope.value <= 0:
        return "the measured losses do not fall along a power law"
    residuals, spread = np.log(law.loss(x) / losses), np.log(losses).std()
    if not (residuals**2).mean() <= (1 - MIN_EXPLAINED) * spread**2:
        return "the measured losses scatter too much around a power law"
    return None


def _projected(law: LawFit, tokens: int) -> Projection:
    """The losses after multiples of `tokens`, where `law` is of shares of `tokens`."""
    x = np.array(list(FACTORS), dtype=float)
    with np.errstate(over="ignore", invalid="ignore"):  # of resamples without any bound
        (low, high), middle = law.band(x), law.loss(x)
    if not high[0] - middle[0] <= MAX_HALF_WIDTH * middle[0]:
        return Projection(reason="many power laws fit the measured losses equally well")
    rows = zip(FACTORS, middle.tolist(), low.clip(min=0).tolist(), high.tolist(), strict=True)
    return Projection(tuple(ProjectedLoss(n, n * tokens, *values) for n, *values in rows))


def sentence(projection: Mapping[str, Any]) -> str:
    """The projection of a record (lrcompress.json) in words."""
    if reason := projection["reason"]:
        return f"No loss is projected for longer trainings: {reason}."
    parts = [
        f"{shown(Interval(row['loss'], row['low'], row['high']))} for "
        f"{FACTORS.get(row['factor'], row['factor'])} the tokens"
        for row in projection["losses"]
    ]
    return (
        f"Projected held-out loss, rather too high than too low: {', '.join(parts)}. The 95 % "
        "intervals are of the fit alone."
    )
