"""Narrowing: keeps some intermediate channels of an FFN; down_proj reconstructs the others."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from lrcompress.methods.channel_selection import fold_into_down, order_channels
from lrcompress.methods.linalg import WeightedNorm, shrunk, to_float64, with_outliers
from lrcompress.methods.narrowing import down_of, keep_channels
from lrcompress.methods.svd import OUTPUT_SHRINKAGE, SHRINKAGE, check_shrinkage
from lrcompress.methods.types import (
    FFN,
    ChannelOrder,
    Decomposition,
    NarrowedCurves,
    Statistic,
    Statistics,
)
from lrcompress.runtime.errors import InputError


@dataclass(frozen=True)
class Nystrom:
    """MoDeGPT's FFN module (arXiv 2408.09632), with channels chosen by estimated loss.

    Let C be the second moment of down_proj's input h, outliers included, and J the kept channels.
    With h ~ C_J C_JJ⁻¹ h_J, down_proj becomes W_down C_J C_JJ⁻¹, and gate and up lose the rows of
    the other channels. The metric for choosing channels is M = W_downᵀ G W_down. If `two_sided`, G
    is the gradient moment of down_proj's output, and errors estimate the rise of the loss.
    Otherwise G = I, and errors are squared errors of the FFN's output. Both moments are shrunk as
    in `FisherSVD`.
    """

    requires: ClassVar[frozenset[Statistic]] = frozenset({"second_moment", "gradient_moment"})
    narrows: ClassVar[bool] = True
    truncates: ClassVar[bool] = False
    estimates_errors: ClassVar[bool] = True
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

    def narrowed_curves(
        self, ffn: FFN, order: ChannelOrder, widths: Collection[int]
    ) -> NarrowedCurves:
        raise TypeError("nystrom leaves linears at full rank")

    def decompose(self, weight: Tensor, statistics: Statistics, rank: int) -> Decomposition:
        raise TypeError("nystrom leaves linears at full rank")

    def order(self, ffn: FFN, widths: Collection[int] = ()) -> ChannelOrder:
        """All channels of `ffn`, in the order in which they are kept, with Grams at `widths`."""
        down, statistics = down_of(ffn)
        root = to_float64(ffn.weights[down.name])
        if self.two_sided:
            assert statistics.gradient_moment is not None
            gradient_moment = to_float64(statistics.gradient_moment)
            root = WeightedNorm(shrunk(gradient_moment, self.output_shrinkage)).scale(root)
        moment = with_outliers(self._shrunk_moment(statistics), statistics.outlier_moment)
        return order_channels(moment, root, widths)

    def _shrunk_moment(self, statistics: Statistics) -> Tensor:
        assert statistics.second_moment is not None
        return shrunk(to_float64(statistics.second_moment), self.shrinkage)

    def narrow(self, ffn: FFN, channels: Tensor) -> FFN:
        """`ffn` with only `channels` (width,): its weights, biases and statistics."""
        down, statistics = down_of(ffn)
        moment = self._shrunk_moment(statistics)
        mean_square = float(moment.diagonal()[channels].mean())
        folded = fold_into_down(
            ffn.weights[down.name],
            with_outliers(moment, statistics.outlier_moment),
            channels,
            ridge=self.ridge * mean_square if mean_square > 0 else 1.0,
        )
        narrowed = keep_channels(ffn, channels)
        return replace(narrowed, weights={**narrowed.weights, down.name: folded})
