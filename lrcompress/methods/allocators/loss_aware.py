"""One parameter budget for the whole model, spent where it saves the most loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from lrcompress.methods.plan import Budget, Candidates, Plan, RankCurve, WidthOption
from lrcompress.runtime.errors import InputError

# the multiplier's logarithm is searched this far on both sides of log(loss / parameters)
LOG_BRACKET = 60.0
BISECTION_STEPS = 44
# multipliers, relative to the bisected one, whose decisions compete for the rest of the budget
MULTIPLIER_GRID = tuple(2.0**power for power in range(9, -27, -1))
# keep ratio from which on probe factors are trusted fully, and up to which they are not used
FULL_TRUST_KEEP_RATIO, NO_TRUST_KEEP_RATIO = 0.8, 0.4
# prior loss of leaving out a whole linear, relative to the largest estimate: above rounding errors
PRIOR_LOSS_SHARE = 1e-9


@dataclass(frozen=True)
class Decision:
    """One way to compress one FFN, with its parameter count, its estimated loss and its cost.

    `width` is None where all channels stay, and a rank is 0 where the linear stays dense.
    """

    width: int | None
    ranks: tuple[int, ...]
    parameters: int
    error: float
    cost: float


class FFNOptions:
    """Finds the best decision for one FFN at any multiplier.

    No linear keeps less than the share `floor` of its parameters. Shapes without a rank to choose
    have one decision each, whatever the multiplier; these decisions are made once.
    """

    def __init__(self, candidates: Candidates, floor: float) -> None:
        self.candidates, self.floor = candidates, floor
        self._ranked_shapes = [shape for shape in candidates.shapes if _has_ranks(shape)]
        fixed_shapes = [shape for shape in candidates.shapes if not _has_ranks(shape)]
        self._fixed = [self._decide(shape, 0.0) for shape in fixed_shapes]
        self._fixed_errors = np.array([decision.error for decision in self._fixed])
        self._fixed_costs = np.array([decision.cost for decision in self._fixed])

    def best(self, multiplier: float) -> Decision:
        """The decision with the least (estimated loss + multiplier x cost)."""
        decisions = [self._decide(shape, multiplier) for shape in self._ranked_shapes]
        if self._fixed:
            sums = self._fixed_errors + multiplier * self._fixed_costs
            decisions.append(self._fixed[int(np.argmin(sums))])
        return min(decisions, key=lambda decision: decision.error + multiplier * decision.cost)

    def _decide(self, shape: WidthOption, multiplier: float) -> Decision:
        """The best rank of each linear at the width of `shape`."""
        error, parameters, cost, ranks = shape.error, 0, 0.0, []
        for linear, curve in zip(self.candidates.linears, shape.curves, strict=True):
            allowed = curve.parameters >= self.floor * linear.dense_parameters
            errors = np.where(allowed, curve.errors, np.inf)
            best = int(np.argmin(errors + multiplier * curve.prices))
            error += float(errors[best])
            parameters += int(curve.parameters[best])
            cost += float(curve.prices[best])
            ranks.append(int(curve.ranks[best]))
        return Decision(shape.width, tuple(ranks), parameters, error, cost)


@dataclass(frozen=True)
class LossAware:
    """Every FFN takes the decision with the least (estimated loss + multiplier x cost).

    The cost of a decision is its number of parameters, unless its curves have `costs`. The
    multiplier is bisected until the parameters meet the budget: at equal multipliers no parameter
    could save more loss in another FFN (Everett 1963). The rest of the budget goes to single FFNs,
    as long as one of their larger decisions fits. No linear keeps less than the share `floor` of
    its parameters.
    """

    needs_errors: ClassVar[bool] = True
    floor: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.floor < 1:
            raise InputError(f"floor {self.floor} is not in [0, 1)")

    def allocate(self, candidates: Sequence[Candidates], budget: Budget) -> Plan:
        """The plan for `budget`. Raises InputError where the budget is a rank."""
        if budget.keep_ratio is None:
            raise InputError("loss_aware needs a budget to share out: give --keep-ratio")
        total = sum(ffn.dense_parameters for ffn in candidates)
        corrected = _with_probe_factors(candidates, budget.keep_ratio)
        decisions = self.decide(_with_prior_loss(corrected), budget.keep_ratio * total)
        ranks = {
            curve.name: rank
            for ffn, decision in zip(candidates, decisions, strict=True)
            for curve, rank in zip(_curves(ffn, decision), decision.ranks, strict=True)
            if rank
        }
        widths = {
            ffn.ffn: decision.width
            for ffn, decision in zip(candidates, decisions, strict=True)
            if decision.width is not None
        }
        return Plan(ranks, widths)

    def decide(self, candidates: Sequence[Candidates], parameters: float) -> list[Decision]:
        """One decision for each FFN; together at most `parameters` where that is possible."""
        total = sum(ffn.dense_parameters for ffn in candidates)
        center = float(np.log(_largest_error(candidates) / total or 1.0))
        low, high = center - LOG_BRACKET, center + LOG_BRACKET  # logarithms of the multiplier
        options = [FFNOptions(ffn, self.floor) for ffn in candidates]
        smallest, largest = _best(options, np.exp(high)), _best(options, np.exp(low))
        if _total_parameters(largest) <= parameters:
            return largest
        for _ in range(BISECTION_STEPS):
            middle = (low + high) / 2
            decisions = _best(options, np.exp(middle))
            if _total_parameters(decisions) > parameters:
                low = middle
            else:
                high, smallest = middle, decisions
        return _spend_rest(options, smallest, parameters, np.exp(high))


def _has_ranks(shape: WidthOption) -> bool:
    return any(len(curve.ranks) > 1 for curve in shape.curves)


def _best(options: Sequence[FFNOptions], multiplier: float) -> list[Decision]:
    return [ffn_options.best(multiplier) for ffn_options in options]


def _spend_rest(
    options: Sequence[FFNOptions], decisions: list[Decision], budget: float, multiplier: float
) -> list[Decision]:
    """`decisions` with larger ones for single FFNs as long as one fits into `budget`.

    Each step takes the one that saves the most loss for each parameter that it adds.
    """
    decisions = list(decisions)
    grid = [
        [ffn_options.best(multiplier * factor) for factor in MULTIPLIER_GRID]
        for ffn_options in options
    ]
    while True:
        remaining = budget - _total_parameters(decisions)
        moves = [
            ((now.error - larger.error) / (larger.parameters - now.parameters), index, larger)
            for index, (now, ffn_grid) in enumerate(zip(decisions, grid, strict=True))
            for larger in (*ffn_grid, *_next_larger(options[index].candidates, now))
            if 0 < larger.parameters - now.parameters <= remaining and larger.error <= now.error
        ]
        if not moves:
            return decisions
        _, index, larger = max(moves, key=lambda move: move[:2])
        decisions[index] = larger


def _next_larger(ffn: Candidates, now: Decision) -> Iterator[Decision]:
    """`now` with one linear at its next larger rank; and, if all are dense, the next width."""
    shapes = {shape.width: shape for shape in ffn.shapes}
    for i, (curve, rank) in enumerate(zip(shapes[now.width].curves, now.ranks, strict=True)):
        at = int(np.flatnonzero(curve.ranks == rank)[0])
        if at + 1 < len(curve.ranks):
            yield Decision(
                width=now.width,
                ranks=(*now.ranks[:i], int(curve.ranks[at + 1]), *now.ranks[i + 1 :]),
                parameters=now.parameters + int(curve.parameters[at + 1] - curve.parameters[at]),
                error=now.error + float(curve.errors[at + 1] - curve.errors[at]),
                cost=now.cost + float(curve.prices[at + 1] - curve.prices[at]),
            )
    wider = [
        width
        for width in shapes
        if width is not None and now.width is not None and width > now.width
    ]
    if wider and not any(now.ranks):
        shape = shapes[min(wider)]
        parameters = sum(int(curve.parameters[-1]) for curve in shape.curves)
        cost = sum(float(curve.prices[-1]) for curve in shape.curves)
        yield Decision(shape.width, now.ranks, parameters, shape.error, cost)


def _curves(ffn: Candidates, decision: Decision) -> tuple[RankCurve, ...]:
    return next(shape.curves for shape in ffn.shapes if shape.width == decision.width)


def _with_probe_factors(candidates: Sequence[Candidates], keep_ratio: float) -> list[Candidates]:
    """`candidates` with errors times `factor`, which is trusted fully at high keep ratios only.

    Probes measure small changes. They say little about the large changes at low keep ratios.
    """
    trust = (keep_ratio - NO_TRUST_KEEP_RATIO) / (FULL_TRUST_KEEP_RATIO - NO_TRUST_KEEP_RATIO)
    trust = min(max(trust, 0.0), 1.0)
    return [_scaled(ffn, ffn.factor**trust) for ffn in candidates]


def _scaled(ffn: Candidates, factor: float) -> Candidates:
    shapes = tuple(
        WidthOption(
            width=shape.width,
            error=shape.error * factor,
            curves=tuple(replace(curve, errors=curve.errors * factor) for curve in shape.curves),
        )
        for shape in ffn.shapes
    )
    return replace(ffn, shapes=shapes)


def _with_prior_loss(candidates: Sequence[Candidates]) -> tuple[Candidates, ...]:
    """`candidates` with a small loss for every parameter left out, below all real estimates.

    Where the calibration text is too short to tell decisions apart, the budget is then still
    spent, in equal shares.
    """
    total = sum(ffn.dense_parameters for ffn in candidates)
    unit = PRIOR_LOSS_SHARE * (_largest_error(candidates) or 1.0) / total
    return tuple(
        replace(ffn, shapes=tuple(_shape_with_prior(ffn, shape, unit) for shape in ffn.shapes))
        for ffn in candidates
    )


def _shape_with_prior(ffn: Candidates, shape: WidthOption, unit: float) -> WidthOption:
    curves = []
    for linear, curve in zip(ffn.linears, shape.curves, strict=True):
        dense = linear.dense_parameters
        prior = unit * (dense - curve.parameters) ** 2 / dense
        curves.append(replace(curve, errors=curve.errors + prior))
    return replace(shape, curves=tuple(curves))


def _largest_error(candidates: Sequence[Candidates]) -> float:
    shapes = [shape for ffn in candidates for shape in ffn.shapes]
    curves = [float(curve.errors.max()) for shape in shapes for curve in shape.curves]
    return max([*curves, *(shape.error for shape in shapes)])


def _total_parameters(decisions: Sequence[Decision]) -> int:
    return sum(decision.parameters for decision in decisions)
