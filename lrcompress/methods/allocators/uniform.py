"""The same rank, or the same share of the parameters, everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lrcompress.methods.plan import Budget, Candidates, Plan, RankCurve, WidthOption
from lrcompress.runtime.errors import InputError


@dataclass(frozen=True)
class Uniform:
    """One rank for all, or for each linear the rank that keeps `keep_ratio` of its parameters.

    A method that narrows gets one share of the channels for each FFN instead, and no ranks.
    What rounding one of them leaves over or takes too much is carried to the next, so that the
    total stays within one step of the budget. A linear whose rank would not save parameters
    stays dense.
    """

    needs_errors: ClassVar[bool] = False

    def allocate(self, choices: Sequence[Candidates], budget: Budget) -> Plan:
        if budget.rank is not None:
            return _same_rank(choices, budget.rank)
        assert budget.keep_ratio is not None
        if any(len(ffn.shapes) > 1 for ffn in choices):
            return _same_width(choices, budget.keep_ratio)
        return _same_share(choices, budget.keep_ratio)


def _same_rank(choices: Sequence[Candidates], rank: int) -> Plan:
    linears = [linear for ffn in choices for linear in ffn.linears]
    for linear in linears:
        if not 1 <= rank <= linear.full_rank:
            raise InputError(
                f"rank {rank} does not fit {linear.name} "
                f"({linear.out_features} x {linear.in_features}): use 1..{linear.full_rank}"
            )
    curves = [curve for ffn in choices for curve in ffn.shapes[0].curves]
    return Plan({curve.name: rank for curve in curves if rank in curve.ranks})


def _same_share(choices: Sequence[Candidates], keep_ratio: float) -> Plan:
    ranks: dict[str, int] = {}
    carry = 0.0
    for ffn in choices:
        for curve in ffn.shapes[0].curves:
            target = keep_ratio * curve.parameters[-1] + carry
            nearest = _nearest(curve, target, keep_ratio)
            carry = target - float(curve.parameters[nearest])
            if curve.ranks[nearest]:
                ranks[curve.name] = int(curve.ranks[nearest])
    return Plan(ranks)


def _nearest(curve: RankCurve, target: float, keep_ratio: float) -> int:
    if keep_ratio == 1 or len(curve.ranks) == 1:
        return len(curve.ranks) - 1
    # to stay dense is for ranks that save nothing; rounding up to it would leave a layer out
    options = curve.parameters[:-1]
    return int(np.abs(options - target).argmin())


def _same_width(choices: Sequence[Candidates], keep_ratio: float) -> Plan:
    widths: dict[str, int] = {}
    carry = 0.0
    for ffn in choices:
        target = keep_ratio * ffn.dense_parameters + carry
        best = min(ffn.shapes, key=lambda shape: abs(_dense(shape) - target))
        carry = target - _dense(best)
        if best.width is not None:
            widths[ffn.ffn] = best.width
    return Plan({}, widths)


def _dense(shape: WidthOption) -> int:
    return sum(int(curve.parameters[-1]) for curve in shape.curves)
