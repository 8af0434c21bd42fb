"""Pruning: keeps the intermediate channels with the largest weights and activations, unchanged."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lrcompress.methods.linalg import to_float64, with_outliers
from lrcompress.methods.narrowing import down_of, keep_channels
from lrcompress.methods.types import (
    FFN,
    ChannelOrder,
    Decomposition,
    NarrowedCurves,
    Statistic,
    Statistics,
)


@dataclass(frozen=True)
class PPM:
    """Width pruning by peak-to-peak magnitude and activations (Martra 2025, arXiv 2512.22671).

    The importance of channel j is

        (P_gate,j / max P_gate + P_up,j / max P_up + P_down,j / max P_down) · ‖h_j‖

    where P_j = max w + |min w| over the weights w of the channel: its row of gate and of up, and
    its column of down_proj. ‖h_j‖ is the root mean square of down_proj's input over calibration
    tokens, and is not normalized. An FFN without a gate has the terms of up and down alone.

    This is the data-driven score of optipfair 0.4.2, which adds up the norms ‖h_j‖ of batches
    instead: with one batch the two differ by a constant factor. Weights of kept channels stay as
    they are, and nothing makes up for the others.
    """

    requires: ClassVar[frozenset[Statistic]] = frozenset({"second_moment"})
    narrows: ClassVar[bool] = True
    truncates: ClassVar[bool] = False
    estimates_errors: ClassVar[bool] = False
    estimates_loss: ClassVar[bool] = False

    def error_curve(self, weight: Tensor, statistics: Statistics) -> Tensor:
        raise TypeError("ppm leaves linears at full rank")

    def decompose(self, weight: Tensor, statistics: Statistics, rank: int) -> Decomposition:
        raise TypeError("ppm leaves linears at full rank")

    def narrowed_curves(
        self, ffn: FFN, order: ChannelOrder, widths: Collection[int]
    ) -> NarrowedCurves:
        raise TypeError("ppm leaves linears at full rank")

    def order(self, ffn: FFN, widths: Collection[int] = ()) -> ChannelOrder:
        """All channels of `ffn`, the most important first; the errors are NaN."""
        channels = importance(ffn).argsort(descending=True, stable=True)
        errors = torch.full((len(channels) + 1,), torch.nan, dtype=torch.float64)
        return ChannelOrder(channels, errors)

    def narrow(self, ffn: FFN, channels: Tensor) -> FFN:
        """`ffn` with only `channels` (width,), whose weights stay as they are."""
        return keep_channels(ffn, channels)


def importance(ffn: FFN) -> Tensor:
    """The importance (width,) of each intermediate channel of a whole FFN, as in `PPM`; float64."""
    _, statistics = down_of(ffn)
    assert statistics.second_moment is not None
    moment = with_outliers(to_float64(statistics.second_moment), statistics.outlier_moment)
    sizes = moment.diagonal().sqrt()
    magnitudes = torch.stack([_relative_magnitudes(weight) for weight in _channel_rows(ffn)])
    return magnitudes.sum(0) * sizes


def _channel_rows(ffn: FFN) -> Iterator[Tensor]:
    """The weights of gate, up and down, each as (width, hidden) with one row for each channel."""
    for linear in ffn.linears:
        weight = ffn.weights[linear.name]
        if linear.role == "gate_up":
            yield from weight.chunk(2)
        else:
            yield weight.T if linear.role == "down" else weight


def _relative_magnitudes(rows: Tensor) -> Tensor:
    """max + |min| of each row, divided by the largest of them; zero where all are zero."""
    magnitudes = to_float64(rows.amax(1)) + to_float64(rows.amin(1)).abs()
    return magnitudes / magnitudes.max().clamp_min(torch.finfo(torch.float64).tiny)
