"""Lists what a method could do to each FFN: exact parameter counts and estimated losses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lrcompress.methods.costs import FormCosts
from lrcompress.methods.plan import Candidates, RankCurve, WidthOption
from lrcompress.methods.types import FFN, Form, LinearSpec, Method
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.stage_costs import stage

# widths, as shares of all channels, at which narrowing and low rank are combined
COMBINED_WIDTH_SHARES = (0.85, 0.7, 0.55, 0.4)


@dataclass(frozen=True)
class CandidateGrid:
    """Which ranks and widths are considered: multiples of `multiple`, or exactly one `rank`.

    Widths are also multiples of `width_multiple`. Without `low_rank` there are widths alone.
    With `costs`, only what costs less than the dense linear or FFN is considered.
    """

    form: Form
    multiple: int
    rank: int | None = None
    low_rank: bool = True
    width_multiple: int = 1
    costs: FormCosts | None = None

    @property
    def width_step(self) -> int:
        return math.lcm(self.multiple, self.width_multiple)

    def truncates(self, method: Method) -> bool:
        """Whether linears are made low rank by `method`."""
        return self.low_rank and method.truncates

    def ranks(self, linear: LinearSpec, narrowed: bool = False) -> list[int]:
        """Ranks of `linear`, in an FFN that may be `narrowed`, that save parameters, ascending."""
        grid = (
            [self.rank]
            if self.rank is not None
            else range(min(self.multiple, linear.full_rank), linear.full_rank, self.multiple)
        )
        dense = self.cost(linear, None, narrowed)
        return [
            rank
            for rank in grid
            if 1 <= rank < linear.full_rank
            and linear.saves(rank, self.form)
            and self.cost(linear, rank, narrowed) < dense
        ]

    def widths(self, linears: Sequence[LinearSpec], width: int) -> list[int]:
        """Widths of an FFN of `linears` below its `width` that save something, descending."""
        step = self.width_step
        dense = sum(linear.dense_parameters for linear in linears)
        return [
            narrower
            for narrower in range((width - 1) // step * step, 0, -step)
            if sum(self.cost(spec.narrowed(narrower), None, True) for spec in linears) < dense
        ]

    def cost(self, linear: LinearSpec, rank: int | None, narrowed: bool) -> float:
        """What `linear` costs at `rank`, or dense if that is None, in an FFN that is `narrowed`."""
        parameters = linear.parameters(rank, self.form)
        if self.costs is None or (rank is None and not narrowed):
            return parameters
        return self.costs.of(linear.name, self.form if rank else "narrowed", parameters)


def list_candidates(
    ffn: FFN, method: Method, grid: CandidateGrid, errors: bool
) -> tuple[Candidates, Tensor | None]:
    """The candidates of one FFN, and its channels in the order in which narrowing keeps them.

    The order has shape (width,); it is None where the FFN is not narrowed. Without `errors` the
    errors of ranks are NaN, which saves their decompositions. Raises InputError where the method
    can only narrow and the FFN is incomplete, or mixes its channels.
    """
    if not grid.truncates(method) and ffn.down is None:
        raise InputError(_cannot_narrow(ffn, method))
    shapes: list[WidthOption] = []
    channels: Tensor | None = None
    errors_of_ranks: Mapping[str, Tensor] = {}
    if method.narrows and ffn.down is not None:
        shapes, channels, errors_of_ranks = _narrowed_shapes(ffn, method, grid, errors)
    full = None
    if grid.truncates(method):
        full = _errors(ffn, method, grid, errors_of_ranks, errors)
    curves = _curves(ffn.linears, full, grid, narrowed=False)
    options = (WidthOption(None, 0.0, tuple(curves)), *shapes)
    return Candidates(ffn.name, ffn.linears, options), channels


def _cannot_narrow(ffn: FFN, method: Method) -> str:
    remedy = (
        "leave --for out" if method.truncates else "use a method that truncates, such as fisher"
    )
    if ffn.linears[0].channelwise:
        return (
            f"{ffn.name} cannot be narrowed without all of its linears: do not exclude any of "
            f"them, or {remedy}"
        )
    return (
        f"{ffn.name} cannot be narrowed, because it does not compute each intermediate channel by "
        f"itself: leave it out with --exclude '{ffn.name}.*', or {remedy}"
    )


def _narrowed_shapes(
    ffn: FFN, method: Method, grid: CandidateGrid, errors: bool
) -> tuple[list[WidthOption], Tensor, Mapping[str, Tensor]]:
    """The widths below the full one, the channels in their order, and what errors at the full
    width came with them, by linear."""
    assert ffn.down is not None
    full_width = ffn.down.in_features
    widths = grid.widths(ffn.linears, full_width)
    combined: set[int] = set()
    if grid.truncates(method) and errors:
        combined = {_nearest_multiple(s * full_width, grid.multiple) for s in COMBINED_WIDTH_SHARES}
        combined.intersection_update(widths)
    with stage("choices_of_channels"):
        order = method.order(ffn, combined)
    errors_of_ranks = method.narrowed_curves(ffn, order, combined) if combined else {}
    shapes = []
    for width in widths:
        linears = [linear.narrowed(width) for linear in ffn.linears]
        curves = _curves(linears, errors_of_ranks.get(width), grid, narrowed=True)
        shapes.append(WidthOption(width, float(order.errors[width]), tuple(curves)))
    return shapes, order.channels, errors_of_ranks.get(full_width, {})


def _nearest_multiple(value: float, multiple: int) -> int:
    return multiple * round(value / multiple)


def _curves(
    linears: Sequence[LinearSpec],
    errors: Mapping[str, Tensor] | None,
    grid: CandidateGrid,
    narrowed: bool,
) -> Iterator[RankCurve]:
    """The curve of each linear, with its `errors` by rank; dense alone where they are None."""
    for linear in linears:
        ranks = [] if errors is None else grid.ranks(linear, narrowed)
        rank_errors = [] if errors is None else errors[linear.name].cpu()[ranks].tolist()
        yield _curve(linear, ranks, rank_errors, grid, narrowed)


def _errors(
    ffn: FFN, method: Method, grid: CandidateGrid, known: Mapping[str, Tensor], wanted: bool
) -> dict[str, Tensor]:
    """The error curve of each linear, `known` or not.

    NaN unless `wanted` and where no rank is considered, which saves decompositions.
    """
    errors = dict(known)
    for linear in ffn.linears:
        name = linear.name
        if not (wanted and grid.ranks(linear)):
            errors[name] = torch.full((linear.full_rank + 1,), torch.nan)
        elif name not in errors:
            errors[name] = method.error_curve(ffn.weights[name], ffn.statistics[name])
    return errors


def _curve(
    linear: LinearSpec,
    ranks: Sequence[int],
    errors: Sequence[float],
    grid: CandidateGrid,
    narrowed: bool,
) -> RankCurve:
    """The curve of `linear` with the `errors` of `ranks`, and with the dense linear at its end."""
    options = [*ranks, None]
    costs = [grid.cost(linear, rank, narrowed) for rank in options]
    return RankCurve(
        name=linear.name,
        ranks=np.array([*ranks, 0]),
        parameters=np.array([linear.parameters(rank, grid.form) for rank in options]),
        errors=np.array([*errors, 0.0]),
        costs=None if grid.costs is None else np.array(costs),
    )
