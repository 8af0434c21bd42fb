"""The same rank, or the same share of the parameters, for every linear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lrcompress.protocols import Budget, InputError, LinearSpec, RankPlan


@dataclass(frozen=True)
class Uniform:
    """One rank for all, or per linear the rank whose factors keep `keep_ratio` of its parameters.

    Ranks are multiples of `rank_multiple`, and what rounding one linear leaves over or takes
    too much is carried to the next: the total stays within one rank step of the budget. A
    linear whose rank would not save parameters stays dense.
    """

    def allocate(self, linears: Sequence[LinearSpec], budget: Budget) -> RankPlan:
        if budget.rank is not None:
            return _same_rank(linears, budget.rank)
        assert budget.keep_ratio is not None
        return _same_share(linears, budget.keep_ratio, budget.rank_multiple)


def _same_rank(linears: Sequence[LinearSpec], rank: int) -> RankPlan:
    for linear in linears:
        if not 1 <= rank <= linear.full_rank:
            raise InputError(
                f"rank {rank} does not fit {linear.name} "
                f"({linear.out_features} x {linear.in_features}): use 1..{linear.full_rank}"
            )
    return RankPlan({spec.name: rank for spec in linears if rank < spec.break_even_rank})


def _same_share(linears: Sequence[LinearSpec], keep_ratio: float, multiple: int) -> RankPlan:
    ranks: dict[str, int] = {}
    carry = 0.0
    for linear in linears:
        target = keep_ratio * linear.dense_parameters + carry
        step = linear.in_features + linear.out_features
        rank = multiple * round((target - linear.bias_parameters) / step / multiple)
        rank = max(rank, min(multiple, linear.full_rank))
        if keep_ratio < 1 and rank < linear.break_even_rank:
            ranks[linear.name] = rank
        spent = RankPlan(ranks).parameters(linear)
        carry = target - spent
    return RankPlan(ranks)
