"""Cuts an FFN down to some of its intermediate channels."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lrcompress.methods.types import FFN, LinearSpec, Statistics


def down_of(ffn: FFN) -> tuple[LinearSpec, Statistics]:
    """down_proj of a whole FFN, and its statistics."""
    down = ffn.down
    assert down is not None, "only a whole FFN is narrowed"
    return down, ffn.statistics[down.name]


def keep_channels(ffn: FFN, channels: Tensor) -> FFN:
    """`ffn` with only `channels` (width,), in this order: the others are left out everywhere.

    Gate and up lose rows, biases and outputs, down_proj loses columns and inputs. What stays has
    its values and its dtype.
    """
    weights, biases, statistics = dict(ffn.weights), dict(ffn.biases), dict(ffn.statistics)
    for linear in ffn.linears:
        name = linear.name
        if linear.role == "down":
            weights[name] = weights[name][:, channels]
            statistics[name] = _inputs(statistics[name], channels)
            continue
        rows, bias = rows_of(linear, channels), biases[name]
        weights[name] = weights[name][rows]
        biases[name] = None if bias is None else bias[rows]
        statistics[name] = _outputs(statistics[name], rows)
    return replace(
        ffn,
        linears=tuple(linear.narrowed(len(channels)) for linear in ffn.linears),
        weights=weights,
        biases=biases,
        statistics=statistics,
    )


def rows_of(linear: LinearSpec, channels: Tensor) -> Tensor:
    """Rows of the weight of `linear` that compute `channels`: two for each in a fused gate_up."""
    if linear.role != "gate_up":
        return channels
    return torch.cat([channels, channels + linear.out_features // 2])


def _inputs(statistics: Statistics, channels: Tensor) -> Statistics:
    """`statistics` of a linear of which only the input `channels` stay."""
    return replace(
        statistics,
        second_moment=_block(statistics.second_moment, channels),
        outlier_moment=_block(statistics.outlier_moment, channels),
    )


def _outputs(statistics: Statistics, rows: Tensor) -> Statistics:
    """`statistics` of a linear of which only the output `rows` stay."""
    return replace(statistics, gradient_moment=_block(statistics.gradient_moment, rows))


def _block(moment: Tensor | None, indices: Tensor) -> Tensor | None:
    """Rows and columns `indices` of a moment."""
    return None if moment is None else moment[indices][:, indices]
