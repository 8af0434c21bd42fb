"""Rank policies: exact budgets, and linears that are better left dense."""

from __future__ import annotations

import pkgutil

import pytest

from lrcompress.allocators import ALLOCATORS
from lrcompress.allocators.uniform import Uniform
from lrcompress.protocols import Budget, InputError, LinearSpec


def linears(
    count: int = 30, width: int = 576, inner: int = 1536, bias: bool = False
) -> list[LinearSpec]:
    found = []
    for block in range(count):
        found += [
            LinearSpec(f"{block}.up", block, "up", width, inner, bias, f"{block}.in"),
            LinearSpec(f"{block}.down", block, "down", inner, width, bias, f"{block}.mid"),
        ]
    return found


@pytest.mark.parametrize("policy", ALLOCATORS)
@pytest.mark.parametrize("keep_ratio", [0.95, 0.8, 0.6, 0.32, 0.1])
@pytest.mark.parametrize("bias", [False, True])
def test_keep_ratio_is_met_exactly(policy: str, keep_ratio: float, bias: bool) -> None:
    specs = linears(bias=bias)
    plan = pkgutil.resolve_name(ALLOCATORS[policy])().allocate(specs, Budget(keep_ratio=keep_ratio))
    kept = sum(plan.parameters(spec) for spec in specs)
    total = sum(spec.dense_parameters for spec in specs)
    assert abs(kept / total - keep_ratio) < 0.0005
    assert all(rank % 8 == 0 for rank in plan.ranks.values())


def test_uniform_ranks_differ_by_one_step_at_most() -> None:
    ranks = Uniform().allocate(linears(), Budget(keep_ratio=0.8)).ranks.values()
    assert max(ranks) - min(ranks) == 8


def test_rank_multiple_is_kept() -> None:
    plan = Uniform().allocate(linears(), Budget(keep_ratio=0.5, rank_multiple=64))
    assert {rank % 64 for rank in plan.ranks.values()} == {0}


def test_one_rank_for_all() -> None:
    plan = Uniform().allocate(linears(2), Budget(rank=100))
    assert set(plan.ranks.values()) == {100}
    assert len(plan.ranks) == 4


@pytest.mark.parametrize("rank", [419, 576])
def test_rank_that_saves_nothing_stays_dense(rank: int) -> None:
    specs = linears(2)  # break-even: 576 * 1536 / 2112 = 418.9
    plan = Uniform().allocate(specs, Budget(rank=rank))
    assert plan.ranks == {}
    assert sum(plan.parameters(spec) for spec in specs) == sum(s.dense_parameters for s in specs)


def test_keeping_everything_leaves_all_dense() -> None:
    assert Uniform().allocate(linears(), Budget(keep_ratio=1.0)).ranks == {}


def test_rank_over_the_size_is_refused() -> None:
    with pytest.raises(InputError, match=r"rank 577 does not fit 0\.up .* use 1\.\.576"):
        Uniform().allocate(linears(1), Budget(rank=577))


def test_tiny_share_still_gives_a_rank() -> None:
    plan = Uniform().allocate(linears(1), Budget(keep_ratio=0.001))
    assert set(plan.ranks.values()) == {8}
