"""The same rank for every linear, or the same share of the parameters for every linear or FFN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lrcompress.methods.plan import Budget, Candidates, Plan, RankCurve, WidthOption
from lrcompress.runtime.errors import InputError


@dataclass(frozen=True)
class Uniform:
    """One rank for all linears, or for each the rank that keeps `keep_ratio` of its parameters.

    If the method narrows, each FFN gets the width that keeps `keep_ratio` of its parameters
    instead, and no ranks. Rounding errors are carried to the next linear or FFN, so that the total
    stays within one step of the budget. A linear whose rank would not save parameters stays dense.
    """

    needs_errors: ClassVar[bool] = False

    def allocate(self, candidates: Sequence[Candidates], budget: Budget) -> Plan:
        """The plan for `budget`. Raises InputError where a rank exceeds a linear's full rank."""
        if budget.rank is not None:
            return _same_rank(candidates, budget.rank)
        assert budget.keep_ratio is not None
        if any(len(ffn.shapes) > 1 for ffn in candidates):
            return _same_width(candidates, budget.keep_ratio)
        return _same_share(candidates, budget.keep_ratio)


def _same_rank(candidates: Sequence[Candidates], rank: int) -> Plan:
    linears = [linear for ffn in candidates for linear in ffn.linears]
    for linear in linears:
        if not 1 <= rank <= linear.full_rank:
            raise InputError(
                f"rank {rank} does not fit {linear.name} "
                f"({linear.out_features} x {linear.in_features}): use 1..{linear.full_rank}"
            )
    curves = [curve for ffn in candidates for curve in ffn.shapes[0].curves]
    return Plan({curve.name: rank for curve in curves if rank in curve.ranks})


def _same_share(candidates: Sequence[Candidates], keep_ratio: float) -> Plan:
    ranks: dict[str, int] = {}
    carry = 0.0
    for ffn in candidates:
        for curve in ffn.shapes[0].curves:
            target = keep_ratio * curve.parameters[-1] + carry
            nearest = _nearest(curve, target, keep_ratio)
            carry = target - float(curve.parameters[nearest])
            if curve.ranks[nearest]:
                ranks[curve.name] = int(curve.ranks[nearest])
    return Plan(ranks)


def _nearest(curve: RankCurve, target: float, keep_ratio: float) -> int:
    """Index of the option of `curve` whose parameter count is nearest to `target`."""
    if keep_ratio == 1 or len(curve.ranks) == 1:
        return len(curve.ranks) - 1
    # without the last option, dense: rounding up to it would leave a linear uncompressed
    return int(np.abs(curve.parameters[:-1] - target).argmin())


def _same_width(candidates: Sequence[Candidates], keep_ratio: float) -> Plan:
    widths: dict[str, int] = {}
    carry = 0.0
    for ffn in candidates:
        target = keep_ratio * ffn.dense_parameters + carry
        best = min(ffn.shapes, key=lambda shape: abs(_parameters(shape) - target))
        carry = target - _parameters(best)
        if best.width is not None:
            widths[ffn.ffn] = best.width
    return Plan({}, widths)


def _parameters(shape: WidthOption) -> int:
    """Parameters of an FFN at the width of `shape`, with dense linears."""
    return sum(int(curve.parameters[-1]) for curve in shape.curves)
