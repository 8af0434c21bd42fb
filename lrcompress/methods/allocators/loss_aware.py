"""One budget for the whole model, spent where it saves the most loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from lrcompress.methods.plan import Budget, Candidates, Plan, RankCurve, WidthOption
from lrcompress.runtime.errors import InputError

# halvings of the multiplier's bracket, in log space
BISECTIONS = 44
# shares kept from which on the factors of probes count in full, and down to which not at all
TRUSTED, DISTRUSTED = 0.8, 0.4
# loss of leaving all out, as a share of the largest that is estimated: above rounding alone
PRIOR = 1e-9


@dataclass(frozen=True)
class Decision:
    """One way to shrink one FFN: its width, its ranks (0: dense), what it costs and loses."""

    width: int | None
    ranks: tuple[int, ...]
    parameters: int
    error: float


class FFNOptions:
    """The decisions open to one FFN; those of shapes without a rank to choose are made once.

    `floor` is the least share of its parameters that any linear keeps.
    """

    def __init__(self, ffn: Candidates, floor: float) -> None:
        self.ffn, self.floor = ffn, floor
        self.open = [shape for shape in ffn.shapes if _has_ranks(shape)]
        settled = [shape for shape in ffn.shapes if not _has_ranks(shape)]
        self.settled = [self._decide(shape, 0.0) for shape in settled]
        self.errors = np.array([decision.error for decision in self.settled])
        self.parameters = np.array([decision.parameters for decision in self.settled])

    def best(self, multiplier: float) -> Decision:
        """That with the least (estimated loss + multiplier x parameters)."""
        found = [self._decide(shape, multiplier) for shape in self.open]
        if self.settled:
            best = int(np.argmin(self.errors + multiplier * self.parameters))
            found.append(self.settled[best])
        return min(found, key=lambda decision: decision.error + multiplier * decision.parameters)

    def _decide(self, shape: WidthOption, multiplier: float) -> Decision:
        error, parameters, ranks = shape.error, 0, []
        for linear, curve in zip(self.ffn.linears, shape.curves, strict=True):
            allowed = curve.parameters >= self.floor * linear.dense_parameters
            errors = np.where(allowed, curve.errors, np.inf)
            best = int(np.argmin(errors + multiplier * curve.parameters))
            error += float(errors[best])
            parameters += int(curve.parameters[best])
            ranks.append(int(curve.ranks[best]))
        return Decision(shape.width, tuple(ranks), parameters, error)


@dataclass(frozen=True)
class LossAware:
    """Every FFN takes the option with the least (estimated loss + multiplier x parameters).

    The multiplier is bisected to the budget: at equal multipliers no parameter could save more
    loss anywhere else (Everett 1963). What the last step leaves of the budget goes to single
    FFNs, as long as one of their options fits. `floor` is the least share of its parameters
    that any linear keeps.
    """

    needs_errors: ClassVar[bool] = True
    floor: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.floor < 1:
            raise InputError(f"floor {self.floor} is not in [0, 1)")

    def allocate(self, choices: Sequence[Candidates], budget: Budget) -> Plan:
        if budget.keep_ratio is None:
            raise InputError("loss_aware needs a budget to share out: give --keep-ratio")
        total = sum(ffn.dense_parameters for ffn in choices)
        corrected = _corrected(choices, budget.keep_ratio)
        decisions = self.decide(_steadied(corrected), budget.keep_ratio * total)
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

    def decide(self, choices: Sequence[Candidates], parameters: float) -> list[Decision]:
        """One decision for each FFN, together at most `parameters` where that is possible."""
        total = sum(ffn.dense_parameters for ffn in choices)
        unit = float(np.log(_largest_error(choices) / total or 1.0))
        low, high = unit - 60.0, unit + 60.0  # log of the multiplier, in any unit of loss
        menus = [FFNOptions(ffn, self.floor) for ffn in choices]
        tight, loose = _at(menus, np.exp(high)), _at(menus, np.exp(low))
        if _spent(loose) <= parameters:
            return loose
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            found = _at(menus, np.exp(middle))
            if _spent(found) > parameters:
                low, loose = middle, found
            else:
                high, tight = middle, found
        return _spend_rest(menus, tight, parameters, np.exp(high))


def _has_ranks(shape: WidthOption) -> bool:
    return any(len(curve.ranks) > 1 for curve in shape.curves)


def _at(menus: Sequence[FFNOptions], multiplier: float) -> list[Decision]:
    return [menu.best(multiplier) for menu in menus]


def _spend_rest(
    menus: Sequence[FFNOptions], tight: list[Decision], budget: float, multiplier: float
) -> list[Decision]:
    """`tight` with single FFNs moved to larger options while one fits, best first."""
    filled = list(tight)
    # looser multipliers give each FFN its larger options
    loosened = [
        [menu.best(multiplier * 2.0**-step / 8) for step in range(-12, 24)] for menu in menus
    ]
    while True:
        left = budget - _spent(filled)
        moves = [
            ((now.error - option.error) / (option.parameters - now.parameters), i, option)
            for i, (now, options) in enumerate(zip(filled, loosened, strict=True))
            for option in (*options, *_one_step(menus[i].ffn, now))
            if 0 < option.parameters - now.parameters <= left and option.error <= now.error
        ]
        if not moves:
            return filled
        _, i, option = max(moves, key=lambda move: move[:2])
        filled[i] = option


def _one_step(ffn: Candidates, now: Decision) -> Iterator[Decision]:
    """`now` with one linear at its next larger option, or all channels at the next width."""
    shapes = {shape.width: shape for shape in ffn.shapes}
    shape = shapes[now.width]
    for i, (curve, rank) in enumerate(zip(shape.curves, now.ranks, strict=True)):
        at = int(np.flatnonzero(curve.ranks == rank)[0])
        if at + 1 < len(curve.ranks):
            yield Decision(
                now.width,
                (*now.ranks[:i], int(curve.ranks[at + 1]), *now.ranks[i + 1 :]),
                now.parameters + int(curve.parameters[at + 1] - curve.parameters[at]),
                now.error + float(curve.errors[at + 1] - curve.errors[at]),
            )
    wider = [w for w in shapes if w is not None and now.width is not None and w > now.width]
    if wider and not any(now.ranks):
        after = shapes[min(wider)]
        counts = sum(int(curve.parameters[-1]) for curve in after.curves)
        yield Decision(after.width, now.ranks, counts, after.error)


def _curves(ffn: Candidates, decision: Decision) -> tuple[RankCurve, ...]:
    return next(shape.curves for shape in ffn.shapes if shape.width == decision.width)


def _corrected(choices: Sequence[Candidates], keep_ratio: float) -> list[Candidates]:
    """Estimates times the factors, which are of changes as small as where most is kept."""
    trust = min(max((keep_ratio - DISTRUSTED) / (TRUSTED - DISTRUSTED), 0.0), 1.0)
    return [_scaled(ffn, ffn.factor**trust) for ffn in choices]


def _scaled(ffn: Candidates, factor: float) -> Candidates:
    def shape(one: WidthOption) -> WidthOption:
        curves = tuple(replace(curve, errors=curve.errors * factor) for curve in one.curves)
        return WidthOption(one.width, one.error * factor, curves)

    return replace(ffn, shapes=tuple(map(shape, ffn.shapes)))


def _steadied(choices: Sequence[Candidates]) -> tuple[Candidates, ...]:
    """With a loss for every parameter left out, far below what can be estimated: where the text is
    too short to tell options apart, the budget is still used, in equal shares."""
    total = sum(ffn.dense_parameters for ffn in choices)
    unit = PRIOR * (_largest_error(choices) or 1.0) / total
    return tuple(
        replace(ffn, shapes=tuple(_with_prior(ffn, shape, unit) for shape in ffn.shapes))
        for ffn in choices
    )


def _with_prior(ffn: Candidates, shape: WidthOption, unit: float) -> WidthOption:
    found = []
    for linear, curve in zip(ffn.linears, shape.curves, strict=True):
        dense = linear.dense_parameters
        prior = unit * (dense - curve.parameters) ** 2 / dense
        found.append(replace(curve, errors=curve.errors + prior))
    return replace(shape, curves=tuple(found))


def _largest_error(choices: Sequence[Candidates]) -> float:
    shapes = [shape for ffn in choices for shape in ffn.shapes]
    curves = [float(curve.errors.max()) for shape in shapes for curve in shape.curves]
    return max([*curves, *(shape.error for shape in shapes)])


def _spent(decisions: Sequence[Decision]) -> int:
    return sum(decision.parameters for decision in decisions)
