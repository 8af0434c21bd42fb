"""Lists what a method could do to each FFN: exact parameter counts and estimated losses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from lrcompress.methods.plan import Candidates, RankCurve, WidthOption
from lrcompress.methods.types import FFN, Form, LinearSpec, Method
from lrcompress.runtime.errors import InputError

# widths, as shares of all channels, at which narrowing and low rank are combined
COMBINED_WIDTH_SHARES = (0.85, 0.7, 0.55, 0.4)


@dataclass(frozen=True)
class CandidateGrid:
    """Which ranks and widths are considered: multiples of `multiple`, or exactly one `rank`."""

    form: Form
    multiple: int
    rank: int | None = None

    def ranks(self, linear: LinearSpec) -> list[int]:
        """Ranks of `linear` that save parameters, ascending."""
        grid = (
            [self.rank]
            if self.rank is not None
            else range(min(self.multiple, linear.full_rank), linear.full_rank, self.multiple)
        )
        return [
            rank for rank in grid if 1 <= rank < linear.full_rank and linear.saves(rank, self.form)
        ]

    def widths(self, width: int) -> list[int]:
        """Widths below `width`, descending."""
        return list(range((width - 1) // self.multiple * self.multiple, 0, -self.multiple))


def list_candidates(
    ffn: FFN, method: Method, grid: CandidateGrid, errors: bool
) -> tuple[Candidates, Tensor | None]:
    """The candidates of one FFN, and its channels in the order in which narrowing keeps them.

    The order has shape (width,); it is None where the FFN is not narrowed. Without `errors` the
    errors of ranks are NaN, which saves their decompositions. Raises InputError where the method
    can only narrow and the FFN is incomplete, or mixes its channels.
    """
    if not method.truncates and ffn.down is None:
        raise InputError(_cannot_narrow(ffn))
    if method.narrows and ffn.down is not None:
        shapes, channels = _narrowed_shapes(ffn, method, grid, errors)
    else:
        shapes, channels = [], None
    full = WidthOption(None, 0.0, tuple(_curves(ffn, method, grid, errors)))
    return Candidates(ffn.name, ffn.linears, (full, *shapes)), channels


def _cannot_narrow(ffn: FFN) -> str:
    if ffn.linears[0].channelwise:
        return (
            f"{ffn.name} cannot be narrowed without all of its linears: do not exclude any of "
            "them, or use a method that truncates, such as fisher"
        )
    return (
        f"{ffn.name} cannot be narrowed, because it does not compute each intermediate channel by "
        f"itself: leave it out with --exclude '{ffn.name}.*', or use a method that truncates, "
        "such as fisher"
    )


def _narrowed_shapes(
    ffn: FFN, method: Method, grid: CandidateGrid, errors: bool
) -> tuple[list[WidthOption], Tensor]:
    assert ffn.down is not None
    order = method.order(ffn)
    full_width = ffn.down.in_features
    combined = {_nearest_multiple(s * full_width, grid.multiple) for s in COMBINED_WIDTH_SHARES}
    shapes = []
    for width in grid.widths(full_width):
        if method.truncates and errors and width in combined:
            narrowed = method.narrow(ffn, order.channels[:width])
            curves = _curves(narrowed, method, grid, errors)
        else:
            curves = (_dense_curve(linear.narrowed(width)) for linear in ffn.linears)
        shapes.append(WidthOption(width, float(order.errors[width]), tuple(curves)))
    return shapes, order.channels


def _nearest_multiple(value: float, multiple: int) -> int:
    return multiple * round(value / multiple)


def _curves(ffn: FFN, method: Method, grid: CandidateGrid, errors: bool) -> Iterator[RankCurve]:
    for linear in ffn.linears:
        if not method.truncates:
            yield _dense_curve(linear)
            continue
        ranks = grid.ranks(linear)
        parameters = [linear.parameters(rank, grid.form) for rank in ranks]
        rank_errors = [float("nan")] * len(ranks)
        if errors:
            weight, statistics = ffn.weights[linear.name], ffn.statistics[linear.name]
            rank_errors = method.error_curve(weight, statistics)[ranks].tolist()
        yield RankCurve(
            name=linear.name,
            ranks=np.array([*ranks, 0]),
            parameters=np.array([*parameters, linear.dense_parameters]),
            errors=np.array([*rank_errors, 0.0]),
        )


def _dense_curve(linear: LinearSpec) -> RankCurve:
    return RankCurve(
        name=linear.name,
        ranks=np.array([0]),
        parameters=np.array([linear.dense_parameters]),
        errors=np.array([0.0]),
    )
