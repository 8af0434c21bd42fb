"""Rank policies: exact budgets, losses where they hurt least, and linears better left dense."""

from __future__ import annotations

import pkgutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lrcompress.methods.allocators.loss_aware import LossAware
from lrcompress.methods.allocators.one_width import OneWidth
from lrcompress.methods.allocators.uniform import Uniform
from lrcompress.methods.candidates import CandidateGrid
from lrcompress.methods.plan import Budget, Candidates, Plan, RankCurve, WidthOption
from lrcompress.methods.registry import ALLOCATORS
from lrcompress.methods.types import Form, LinearSpec
from lrcompress.runtime.errors import InputError

FORMS: list[Form] = ["factored", "pivoted"]
SIZE = (576, 1536)


def linear(block: int, role: Any, bias: bool = False) -> LinearSpec:
    width, inner = SIZE if role == "up" else SIZE[::-1]
    return LinearSpec(
        f"{block}.{role}", block, role, width, inner, bias, f"{block}.{role}", f"{block}"
    )


def curve(spec: LinearSpec, grid: CandidateGrid, weight: float) -> RankCurve:
    """Errors that fall as the square of the share of ranks thrown away."""
    ranks = grid.ranks(spec)
    errors = [weight * (1 - rank / spec.full_rank) ** 2 for rank in ranks]
    counts = [spec.parameters(rank, grid.form) for rank in ranks]
    return RankCurve(
        spec.name,
        np.array([*ranks, 0]),
        np.array([*counts, spec.dense_parameters]),
        np.array([*errors, 0.0]),
    )


def model(
    blocks: int = 30, form: Form = "pivoted", bias: bool = False, rank: int | None = None,
    multiple: int = 8, growth: float = 1.3,
) -> list[Candidates]:  # fmt: skip
    """Blocks whose weight in the loss grows by `growth` from one to the next."""
    grid = CandidateGrid(form, multiple, rank)
    ffns = []
    for block in range(blocks):
        specs = (linear(block, "up", bias), linear(block, "down", bias))
        curves = tuple(curve(spec, grid, growth**block) for spec in specs)
        ffns.append(Candidates(f"{block}", specs, (WidthOption(None, 0.0, curves),)))
    return ffns


def narrowing(blocks: int = 30) -> list[Candidates]:
    """Widths alone, linears dense."""
    ffns = []
    for block in range(blocks):
        specs = (linear(block, "up"), linear(block, "down"))
        shapes = []
        for width in (None, *range(1528, 0, -8)):
            now = specs if width is None else tuple(spec.narrowed(width) for spec in specs)
            dense = [
                RankCurve(s.name, np.array([0]), np.array([s.dense_parameters]), np.zeros(1))
                for s in now
            ]
            lost = 0.0 if width is None else 1.2**block * (1 - width / 1536) ** 2
            shapes.append(WidthOption(width, lost, tuple(dense)))
        ffns.append(Candidates(f"{block}", specs, tuple(shapes)))
    return ffns


def kept_share(candidates: list[Candidates], plan: Plan, form: Form) -> float:
    linears = [spec for ffn in candidates for spec in ffn.linears]
    spent = sum(plan.parameters(spec, form) for spec in linears)
    return spent / sum(spec.dense_parameters for spec in linears)


@pytest.mark.parametrize("policy", ALLOCATORS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("keep_ratio", [0.9, 0.8, 0.6, 0.32, 0.1])
@pytest.mark.parametrize("bias", [False, True])
def test_keep_ratio_is_met(policy: str, form: Form, keep_ratio: float, bias: bool) -> None:
    candidates = model(form=form, bias=bias)
    plan = pkgutil.resolve_name(ALLOCATORS[policy])().allocate(
        candidates, Budget(keep_ratio=keep_ratio)
    )
    assert kept_share(candidates, plan, form) == pytest.approx(keep_ratio, rel=0.005)
    assert all(rank % 8 == 0 for rank in plan.ranks.values())


@pytest.mark.parametrize("policy", ALLOCATORS)
@pytest.mark.parametrize("keep_ratio", [0.9, 0.6, 0.4])
def test_widths_meet_the_budget(policy: str, keep_ratio: float) -> None:
    candidates = narrowing()
    plan = pkgutil.resolve_name(ALLOCATORS[policy])().allocate(
        candidates, Budget(keep_ratio=keep_ratio)
    )
    assert kept_share(candidates, plan, "pivoted") == pytest.approx(keep_ratio, rel=0.005)
    assert plan.ranks == {}
    assert plan.widths


@pytest.mark.parametrize("policy", ALLOCATORS)
def test_keeping_everything_leaves_all_dense(policy: str) -> None:
    allocator = pkgutil.resolve_name(ALLOCATORS[policy])()
    assert allocator.allocate(model(), Budget(keep_ratio=1.0)) == Plan()
    assert allocator.allocate(narrowing(), Budget(keep_ratio=1.0)) == Plan()


@pytest.mark.parametrize("policy", ALLOCATORS)
def test_same_choices_same_plan_and_more_budget_keeps_more(policy: str) -> None:
    allocator = pkgutil.resolve_name(ALLOCATORS[policy])()
    ratios = []
    for keep_ratio in (0.2, 0.4, 0.6, 0.8):
        plans = [allocator.allocate(model(), Budget(keep_ratio=keep_ratio)) for _ in range(2)]
        assert plans[0] == plans[1]
        ratios.append(kept_share(model(), plans[0], "pivoted"))
    assert ratios == sorted(ratios)


def test_loss_aware_spends_where_it_matters() -> None:
    candidates = model(4, growth=8.0)
    plan = LossAware().allocate(candidates, Budget(keep_ratio=0.5))
    ranks = [plan.ranks.get(f"{block}.up", SIZE[0]) for block in range(4)]
    assert ranks == sorted(ranks)
    assert ranks[0] < ranks[-1]


def test_loss_aware_is_no_worse_than_any_exchange() -> None:
    """No transfer of budget between two linears lowers the loss: the optimum by brute force."""
    candidates = model(2, multiple=64, growth=3.0)
    curves = [curve for ffn in candidates for curve in ffn.shapes[0].curves]
    budget = 0.5 * sum(ffn.dense_parameters for ffn in candidates)
    decisions = LossAware().decide(candidates, budget)
    error = sum(decision.error for decision in decisions)
    spent = sum(decision.parameters for decision in decisions)
    assert spent <= budget
    best = min(
        sum(c.errors[i] for c, i in zip(curves, index, strict=True))
        for index in np.ndindex(*(len(c.ranks) for c in curves))
        if sum(c.parameters[i] for c, i in zip(curves, index, strict=True)) <= spent
    )
    assert error == pytest.approx(best, rel=1e-9)


def test_floor_keeps_a_share_of_every_ffn() -> None:
    candidates = model(4, growth=50.0)
    bare = LossAware().allocate(candidates, Budget(keep_ratio=0.5))
    held = LossAware(floor=0.3).allocate(candidates, Budget(keep_ratio=0.5))
    assert kept_share(candidates[:1], bare, "pivoted") < 0.2
    assert kept_share(candidates[:1], held, "pivoted") >= 0.3


def test_loss_aware_refuses_a_rank() -> None:
    with pytest.raises(InputError, match="needs a budget"):
        LossAware().allocate(model(), Budget(rank=8))


def test_uniform_ranks_differ_by_one_step_at_most() -> None:
    ranks = Uniform().allocate(model(form="factored"), Budget(keep_ratio=0.8)).ranks.values()
    assert max(ranks) - min(ranks) == 8


def test_one_rank_for_all() -> None:
    plan = Uniform().allocate(model(2, "factored", rank=100), Budget(rank=100))
    assert set(plan.ranks.values()) == {100}
    assert len(plan.ranks) == 4


@pytest.mark.parametrize("rank", [419, 576])
def test_rank_that_saves_nothing_stays_dense(rank: int) -> None:
    candidates = model(2, "factored", rank=rank)  # break-even: 576 * 1536 / 2112 = 418.9
    assert Uniform().allocate(candidates, Budget(rank=rank)) == Plan()


def test_pivoted_form_has_no_break_even_below_full_rank() -> None:
    plan = Uniform().allocate(model(2, "pivoted", rank=575), Budget(rank=575))
    assert set(plan.ranks.values()) == {575}


def test_rank_over_the_size_is_refused() -> None:
    with pytest.raises(InputError, match=r"rank 577 does not fit 0\.up .* use 1\.\.576"):
        Uniform().allocate(model(1, rank=577), Budget(rank=577))


def test_tiny_share_still_gives_a_rank() -> None:
    assert set(Uniform().allocate(model(1), Budget(keep_ratio=0.001)).ranks.values()) == {8}


@pytest.mark.parametrize(
    ("keep_ratio", "width"), [(0.9, 1376), (0.75, 1152), (0.001, 8), (0.9999, 1528)]
)
def test_one_width_is_the_widest_within_the_budget(keep_ratio: float, width: int) -> None:
    plan = OneWidth().allocate(narrowing(3), Budget(keep_ratio=keep_ratio))
    assert plan == Plan({}, {"0": width, "1": width, "2": width})
    assert OneWidth().allocate(narrowing(3), Budget(keep_ratio=1.0)) == Plan()


def test_one_width_is_one_that_all_have() -> None:
    first, second = narrowing(2)
    few = replace(second, shapes=tuple(s for s in second.shapes if s.width in (None, 640, 960)))
    plan = OneWidth().allocate([first, few], Budget(keep_ratio=0.9))
    assert plan == Plan({}, {"0": 960, "1": 960})
    alone = replace(second, shapes=second.shapes[:1])
    assert OneWidth().allocate([first, alone], Budget(keep_ratio=0.9)) == Plan()


def priced(candidates: list[Candidates], overhead: float) -> list[Candidates]:
    """`candidates` whose linears cost `overhead` beside their parameters at every rank."""

    def with_costs(curve: RankCurve) -> RankCurve:
        return replace(curve, costs=curve.parameters + np.where(curve.ranks > 0, overhead, 0.0))

    return [
        replace(ffn, shapes=tuple(
            replace(shape, curves=tuple(map(with_costs, shape.curves))) for shape in ffn.shapes
        ))
        for ffn in candidates
    ]  # fmt: skip


def test_costs_decide_between_forms_and_parameters_meet_the_budget() -> None:
    """Low rank loses less than narrowing here, so that it is chosen unless it costs much more."""
    low_rank, narrow = model(10, growth=1.2), narrowing(10)
    both = [
        replace(
            ffn,
            shapes=(ffn.shapes[0], *(replace(s, error=5 * s.error) for s in wide.shapes[1:])),
        )
        for ffn, wide in zip(low_rank, narrow, strict=True)
    ]
    budget = Budget(keep_ratio=0.6)
    free, costly = (LossAware().allocate(priced(both, overhead), budget) for overhead in (0.0, 3e5))
    assert free == LossAware().allocate(both, budget)
    assert len(costly.ranks) < len(free.ranks)
    assert len(costly.widths) > len(free.widths)
    for plan in (free, costly):
        assert 0.595 < kept_share(both, plan, "pivoted") <= 0.6
