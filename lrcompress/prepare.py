"""From a model and settings to what could be done to each FFN, and the plan of what will be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from torch import Tensor

from lrcompress.calibrate import Moments
from lrcompress.choices import Grid, ffn_choices
from lrcompress.decompositions import Decompositions
from lrcompress.ffn import find_ffns
from lrcompress.lowrank import dense_weight
from lrcompress.protocols import (
    FFN,
    Allocator,
    Budget,
    Choices,
    LinearSpec,
    Method,
    Plan,
    Progress,
    Statistics,
)
from lrcompress.settings import FactorizeSettings


@dataclass(frozen=True)
class Prepared:
    """The selected FFNs with all that was measured; `plan` is None until a search finds it.

    `keep_ratio` is the budget asked for, as a share, where it is one.
    """

    linears: tuple[LinearSpec, ...]
    method: Method
    allocator: Allocator
    moments: Moments | None
    choices: tuple[Choices, ...]
    channels: dict[str, Tensor]
    keep_ratio: float | None
    plan: Plan | None
    decompositions: Decompositions

    def for_many_plans(self) -> Prepared:
        """The same, with decompositions that are kept: each then serves all plans."""
        return replace(self, decompositions=Decompositions(self.method, keep=True))

    def ffns(self, model: Any) -> Iterator[FFN]:
        """The FFNs of `model`, block by block, with weights and statistics."""
        return _ffns(model, self.linears, self.moments)


def prepare(
    model: Any,
    linears: tuple[LinearSpec, ...],
    settings: FactorizeSettings,
    keep_ratio: float | None,
    get_moments: Callable[[bool], Moments],
    progress: Progress,
) -> Prepared:
    """Calibrates if the method needs it, and plans if the budget is known.

    A plan that takes neither errors nor narrowing comes first, so that a rank that does not fit
    is refused before anything is measured.
    """
    method, allocator = settings.compressor(), settings.allocator()
    grid = Grid(settings.form, settings.rank_multiple, settings.rank)
    budget = Budget(settings.rank, keep_ratio)
    early = not (allocator.needs_errors or method.narrows)
    plan = None
    if early:
        choices, channels = _choices(_ffns(model, linears, None), method, grid, False)
        plan = _allocate(allocator, choices, budget)
    moments = None
    if method.requires and not (plan is not None and not plan.ranks):
        moments = get_moments("gradient_moment" in method.requires)
    if not early:
        count = len({linear.ffn for linear in linears})
        ffns = progress(_ffns(model, linears, moments), "Measuring choices", count)
        choices, channels = _choices(ffns, method, grid, allocator.needs_errors)
        plan = _allocate(allocator, choices, budget)
    shared = (moments, choices, channels)
    return Prepared(linears, method, allocator, *shared, keep_ratio, plan, Decompositions(method))


def _allocate(allocator: Allocator, choices: Sequence[Choices], budget: Budget) -> Plan | None:
    if budget.rank is None and budget.keep_ratio is None:
        return None
    return allocator.allocate(choices, budget)


def _choices(
    ffns: Any, method: Method, grid: Grid, errors: bool
) -> tuple[tuple[Choices, ...], dict[str, Tensor]]:
    found, channels = [], {}
    for ffn in ffns:
        choices, order = ffn_choices(ffn, method, grid, errors)
        found.append(choices)
        if order is not None:
            channels[ffn.name] = order
    return tuple(found), channels


def _ffns(model: Any, linears: Sequence[LinearSpec], moments: Moments | None) -> Iterator[FFN]:
    sizes = Counter(linear.ffn for linear in find_ffns(model).linears)
    for name, group in groupby(linears, key=lambda linear: linear.ffn):
        specs = tuple(group)
        modules = {spec.name: model.get_submodule(spec.name) for spec in specs}
        yield FFN(
            name,
            specs,
            {n: dense_weight(module) for n, module in modules.items()},
            {n: None if m.bias is None else m.bias.detach() for n, m in modules.items()},
            _statistics(specs, moments),
            len(specs) == sizes[name],
        )


def _statistics(specs: Sequence[LinearSpec], moments: Moments | None) -> dict[str, Statistics]:
    """Linears of one input group share one tensor, so that its roots are taken once."""
    if moments is None:
        return {spec.name: Statistics() for spec in specs}
    first: dict[str, LinearSpec] = {}
    for spec in specs:
        first.setdefault(spec.input_group, spec)
    shared = {group: moments.statistics(spec).second_moment for group, spec in first.items()}
    return {
        spec.name: Statistics(shared[spec.input_group], moments.gradient(spec)) for spec in specs
    }
