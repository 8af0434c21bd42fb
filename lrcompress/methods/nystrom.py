"""Narrowing: keeps some intermediate channels of an FFN; down_proj reconstructs the others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lrcompress.methods.channel_selection import fold_into_down, order_channels
from lrcompress.methods.linalg import shrunk, to_float64
from lrcompress.methods.svd import OUTPUT_SHRINKAGE, SHRINKAGE, check_shrinkage
from lrcompress.methods.types import (
    FFN,
    ChannelOrder,
    Decomposition,
    LinearSpec,
    Statistic,
    Statistics,
)
from lrcompress.runtime.errors import InputError


@dataclass(frozen=True)
class Nystrom:
    """MoDeGPT's FFN module (arXiv 2408.09632), with channels chosen by estimated loss.

    Let C be the second moment of down_proj's input h, and J the kept channels. With
    h ~ C_J C_JJ⁻¹ h_J, down_proj becomes W_down C_J C_JJ⁻¹, and gate and up lose the rows of the
    other channels. The metric for choosing channels is M = W_downᵀ G W_down. If `two_sided`, G is
    the gradient moment of down_proj's output, and errors estimate the rise of the loss. Otherwise
    G = I, and errors are squared errors of the FFN's output. Both moments are shrunk as in
    `FisherSVD`.
    """

    requires: ClassVar[frozenset[Statistic]] = frozenset({"second_moment", "gradient_moment"})
    narrows: ClassVar[bool] = True
    truncates: ClassVar[bool] = False
    two_sided: bool = True
    ridge: float = 1e-6
    shrinkage: float = SHRINKAGE
    output_shrinkage: float = OUTPUT_SHRINKAGE

    def __post_init__(self) -> None:
        check_shrinkage(self.shrinkage)
        check_shrinkage(self.output_shrinkage)
        if not 0 < self.ridge <= 1:
            raise InputError(f"ridge {self.ridge} is not in (0, 1]")

    @property
    def estimates_loss(self) -> bool:
        return self.two_sided

    def error_curve(self, weight: Tensor, statistics: Statistics) -> Tensor:
        raise TypeError("nystrom leaves linears at full rank")

    def decompose(self, weight: Tensor, statistics: Statistics, rank: int) -> Decomposition:
        raise TypeError("nystrom leaves linears at full rank")

    def order(self, ffn: FFN) -> ChannelOrder:
        """All channels of `ffn`, in the order in which they are kept."""
        down, statistics = _down(ffn)
        weight = to_float64(ffn.weights[down.name])
        scaled = weight
        if self.two_sided:
            assert statistics.gradient_moment is not None
            gradient_moment = to_float64(statistics.gradient_moment)
            scaled = shrunk(gradient_moment, self.output_shrinkage) @ weight
        return order_channels(self._second_moment(statistics), weight.T @ scaled)

    def _second_moment(self, statistics: Statistics) -> Tensor:
        assert statistics.second_moment is not None
        return shrunk(to_float64(statistics.second_moment), self.shrinkage)

    def narrow(self, ffn: FFN, channels: Tensor) -> FFN:
        """`ffn` with only `channels` (width,): its weights, biases and statistics."""
        down, down_statistics = _down(ffn)
        assert down_statistics.second_moment is not None
        weights, biases, statistics = dict(ffn.weights), dict(ffn.biases), dict(ffn.statistics)
        weights[down.name] = fold_into_down(
            weights[down.name], self._second_moment(down_statistics), channels, self.ridge
        )
        statistics[down.name] = replace(
            down_statistics, second_moment=down_statistics.second_moment[channels][:, channels]
        )
        for linear in ffn.linears:
            if linear.role != "down":
                rows = _rows(linear, channels)
                weights[linear.name] = weights[linear.name][rows]
                bias = biases[linear.name]
                biases[linear.name] = None if bias is None else bias[rows]
                statistics[linear.name] = _output_rows(statistics[linear.name], rows)
        return FFN(
            name=ffn.name,
            linears=tuple(linear.narrowed(len(channels)) for linear in ffn.linears),
            weights=weights,
            biases=biases,
            statistics=statistics,
            whole=ffn.whole,
        )


def _down(ffn: FFN) -> tuple[LinearSpec, Statistics]:
    down = ffn.down
    assert down is not None, "only a whole FFN is narrowed"
    return down, ffn.statistics[down.name]


def _rows(linear: LinearSpec, channels: Tensor) -> Tensor:
    """Rows of the weight of `linear` that compute `channels`: two for each in a fused gate_up."""
    if linear.role != "gate_up":
        return channels
    return torch.cat([channels, channels + linear.out_features // 2])


def _output_rows(statistics: Statistics, rows: Tensor) -> Statistics:
    """`statistics` of a linear of which only the output `rows` stay."""
    moment = statistics.gradient_moment
    return replace(statistics, gradient_moment=None if moment is None else moment[rows][:, rows])
