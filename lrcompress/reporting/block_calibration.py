"""What calibration found in each block: the weight of outlier tokens, and the factors of probes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BlockCalibration:
    """Calibration of one block; None stands for what was not measured.

    The shares, in [0, 1], are of the energy that outlier tokens had beyond their limits: of the
    inputs of gate and up, of the inputs of down, and of the gradients of all outputs; each is the
    largest among the linears of the block. `factor` is the cost of the block's probes over their
    estimate.
    """

    block: int
    gate_up_inputs: float | None
    down_inputs: float | None
    gradients: float | None
    factor: float | None


def by_block(record: Mapping[str, Any]) -> list[BlockCalibration]:
    """The calibration of each block in `record` (lrcompress.json) of which something is known."""
    linears, probed = record.get("linears", ()), record.get("probed", {})
    downs = [linear for linear in linears if linear["role"] == "down"]
    others = [linear for linear in linears if linear["role"] != "down"]
    factors = [(linear["block"], _factor(linear["name"], probed)) for linear in linears]
    columns = {
        "gate_up_inputs": _largest("input_outlier_share", others),
        "down_inputs": _largest("input_outlier_share", downs),
        "gradients": _largest("gradient_outlier_share", linears),
        "factor": largest_by_block(factors),
    }
    blocks = sorted({block for column in columns.values() for block in column})
    return [
        BlockCalibration(block, **{name: column.get(block) for name, column in columns.items()})
        for block in blocks
    ]


def largest_by_block(values: Iterable[tuple[int, float | None]]) -> dict[int, float]:
    """Block -> the largest of its `values`, pairs of a block and a value; None does not count."""
    largest: dict[int, float] = {}
    for block, value in values:
        if value is not None:
            largest[block] = max(value, largest.get(block, value))
    return largest


def _largest(key: str, linears: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    return largest_by_block((linear["block"], linear.get(key)) for linear in linears)


def _factor(linear: str, probed: Mapping[str, float]) -> float | None:
    """The factor of the FFN of `linear`; a linear that no layout lists is an FFN by itself."""
    return probed.get(linear.rpartition(".")[0], probed.get(linear))
