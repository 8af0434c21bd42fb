"""Fewer intermediate channels, the others reconstructed from them in down_proj."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lrcompress.methods.channel_selection import folded, order_channels
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
    """MoDeGPT's FFN module (arXiv 2408.09632) with channels chosen in the metric of the loss.

    With C the second moment of down_proj's input h, J the channels kept and h ~ C_J C_JJ⁻¹ h_J,
    down_proj becomes W_down C_J C_JJ⁻¹ and gate and up lose the rows of the others. Channels go
    by the loss that they save, M = W_downᵀ G W_down with G of down_proj's output (`two_sided`),
    or by the error of the FFN's output, G = I. Both moments are shrunk as those of `fisher` are.
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
        scaled, gradient = weight, statistics.gradient_moment
        if self.two_sided:
            assert gradient is not None
            scaled = shrunk(to_float64(gradient), self.output_shrinkage) @ weight
        return order_channels(self._second_moment(statistics), weight.T @ scaled)

    def _second_moment(self, statistics: Statistics) -> Tensor:
        assert statistics.second_moment is not None
        return shrunk(to_float64(statistics.second_moment), self.shrinkage)

    def narrow(self, ffn: FFN, channels: Tensor) -> FFN:
        """`ffn` with `channels` (kept,) alone, and the statistics of what is left."""
        down, statistics = _down(ffn)
        assert statistics.second_moment is not None
        weights, biases, moments = dict(ffn.weights), dict(ffn.biases), dict(ffn.statistics)
        second_moment = self._second_moment(statistics)
        weights[down.name] = folded(weights[down.name], second_moment, channels, self.ridge)
        kept = statistics.second_moment[channels][:, channels]
        moments[down.name] = replace(statistics, second_moment=kept)
        for linear in ffn.linears:
            if linear.role != "down":
                rows = _rows(linear, channels)
                weights[linear.name] = weights[linear.name][rows]
                bias = biases[linear.name]
                biases[linear.name] = None if bias is None else bias[rows]
                moments[linear.name] = _of_rows(moments, linear, rows)
        specs = tuple(linear.narrowed(len(channels)) for linear in ffn.linears)
        return FFN(ffn.name, specs, weights, biases, moments, ffn.whole)


def _down(ffn: FFN) -> tuple[LinearSpec, Statistics]:
    down = ffn.down
    assert down is not None, "only a whole FFN is narrowed"
    return down, ffn.statistics[down.name]


def _rows(linear: LinearSpec, channels: Tensor) -> Tensor:
    """Output rows that make `channels`: a fused gate_up has two halves."""
    if linear.role != "gate_up":
        return channels
    return torch.cat([channels, channels + linear.out_features // 2])


def _of_rows(moments: Mapping[str, Statistics], linear: LinearSpec, rows: Tensor) -> Statistics:
    gradient = moments[linear.name].gradient_moment
    kept = None if gradient is None else gradient[rows][:, rows]
    return replace(moments[linear.name], gradient_moment=kept)
