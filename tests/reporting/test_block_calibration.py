"""Blocks have the largest share among their linears, and the factor of their FFNs."""

from __future__ import annotations

from lrcompress.reporting.block_calibration import BlockCalibration, by_block, largest_by_block
from tests.samples import RECORD


def test_every_block_has_the_largest_of_its_linears() -> None:
    assert by_block(RECORD) == [
        BlockCalibration(0, gate_up_inputs=0.125, down_inputs=0.0, gradients=0.75, factor=2.5),
        BlockCalibration(1, gate_up_inputs=0.5, down_inputs=0.998, gradients=0.625, factor=0.8),
    ]


def test_what_was_not_measured_or_recorded_is_unknown() -> None:
    linears = [
        {"name": "h.3.fc1", "block": 3, "role": "up"},
        {"name": "h.1.fc1", "block": 1, "role": "up", "input_outlier_share": None},
        {"name": "h.1.fc2", "block": 1, "role": "down", "input_outlier_share": 0.25},
    ]
    assert by_block({}) == []
    assert by_block({"linears": linears[:2], "probed": {}}) == []
    assert by_block({"linears": linears}) == [BlockCalibration(1, None, 0.25, None, None)]


def test_factors_belong_to_the_block_of_their_ffn() -> None:
    """Block 1 is no prefix of block 10, an expert has its own FFN, a lone linear is one."""
    names = {
        "h.1.fc1": 1, "h.10.fc1": 10, "m.2.mlp.experts.ffns.0.down": 2, "m.4.attention.q_proj": 4,
    }  # fmt: skip
    probed = {"h.1": 2.0, "h.10": 3.0, "m.2.mlp.experts.ffns.0": 4.0, "m.4.attention.q_proj": 5.0}
    linears = [{"name": name, "block": block, "role": "down"} for name, block in names.items()]
    factors = {c.block: c.factor for c in by_block({"linears": linears, "probed": probed})}
    assert factors == {1: 2.0, 2: 4.0, 4: 5.0, 10: 3.0}


def test_largest_by_block() -> None:
    assert largest_by_block([(1, 0.5), (0, None), (1, 0.75), (2, 0.0), (1, None)]) == {
        1: 0.75,
        2: 0,
    }
