"""One budget for the whole model, spent where it saves the most loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lrcompress.protocols import Budget, Choices, Curve, InputError, Plan, Shape

# halvings of the multiplier's bracket, in log space
BISECTIONS = 100


@dataclass(frozen=True)
class Decision:
    """One way to shrink one FFN: its width, its ranks (0: dense), what it costs and loses."""

    width: int | None
    ranks: tuple[int, ...]
    parameters: int
    error: float


@dataclass(frozen=True)
class LossAware:
    """Every FFN takes the option with the least (estimated loss + multiplier x parameters).

    The multiplier is bisected to the budget: at equal multipliers no parameter could save more
    loss anywhere else (Everett 1963). What the last step leaves of the budget is filled by the
    single decisions of the next looser multiplier, best first. `floor` is the least share of
    its parameters that any FFN keeps.
    """

    needs_errors: ClassVar[bool] = True
    floor: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.floor < 1:
            raise InputError(f"floor {self.floor} is not in [0, 1)")

    def allocate(self, choices: Sequence[Choices], budget: Budget) -> Plan:
        if budget.keep_ratio is None:
            raise InputError("loss_aware needs a budget to share out: give --keep-ratio")
        total = sum(ffn.dense_parameters for ffn in choices)
        decisions = self.decide(choices, budget.keep_ratio * total)
        ranks = {
            curve.name: rank
            for ffn, decision in zip(choices, decisions, strict=True)
            for curve, rank in zip(_curves(ffn, decision), decision.ranks, strict=True)
            if rank
        }
        widths = {
            ffn.ffn: decision.width
            for ffn, decision in zip(choices, decisions, strict=True)
            if decision.width is not None
        }
        return Plan(ranks, widths)

    def decide(self, choices: Sequence[Choices], parameters: float) -> list[Decision]:
        """One decision for each FFN, together at most `parameters` where that is possible."""
        low, high = -60.0, 60.0  # log of the multiplier; errors and counts are far from e^60
        tight = self._at(choices, np.exp(high))
        loose = self._at(choices, np.exp(low))
        if _spent(loose) <= parameters:
            return loose
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            found = self._at(choices, np.exp(middle))
            if _spent(found) > parameters:
                low, loose = middle, found
            else:
                high, tight = middle, found
        return _fill(tight, loose, parameters)

    def _at(self, choices: Sequence[Choices], multiplier: float) -> list[Decision]:
        return [self._best(ffn, multiplier) for ffn in choices]

    def _best(self, ffn: Choices, multiplier: float) -> Decision:
        found = [_decide(shape, multiplier) for shape in ffn.shapes]
        least = self.floor * ffn.dense_parameters
        allowed = [d for d in found if d.parameters >= least] or [_largest(found)]
        return min(allowed, key=lambda d: d.error + multiplier * d.parameters)


def _largest(decisions: Sequence[Decision]) -> Decision:
    return max(decisions, key=lambda decision: decision.parameters)


def _decide(shape: Shape, multiplier: float) -> Decision:
    error, parameters, ranks = shape.error, 0, []
    for curve in shape.curves:
        best = int(np.argmin(curve.errors + multiplier * curve.parameters))
        error += float(curve.errors[best])
        parameters += int(curve.parameters[best])
        ranks.append(int(curve.ranks[best]))
    return Decision(shape.width, tuple(ranks), parameters, error)


def _curves(ffn: Choices, decision: Decision) -> tuple[Curve, ...]:
    return next(shape.curves for shape in ffn.shapes if shape.width == decision.width)


def _spent(decisions: Sequence[Decision]) -> int:
    return sum(decision.parameters for decision in decisions)


def _fill(tight: list[Decision], loose: list[Decision], parameters: float) -> list[Decision]:
    """`tight` with as many decisions of `loose` as fit, in the order of loss saved a parameter."""
    left = parameters - _spent(tight)
    steps = [
        ((a.error - b.error) / (b.parameters - a.parameters), i)
        for i, (a, b) in enumerate(zip(tight, loose, strict=True))
        if b.parameters > a.parameters
    ]
    filled = list(tight)
    for _, i in sorted(steps, reverse=True):
        cost = loose[i].parameters - tight[i].parameters
        if cost <= left:
            filled[i] = loose[i]
            left -= cost
    return filled
