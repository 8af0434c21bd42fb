"""What a factorization says about outlier tokens."""

from __future__ import annotations

from typing import Any

import pytest

import lrcompress
from lrcompress.compression.calibration.moments import MomentStatistics
from lrcompress.methods.types import LinearSpec, OutlierShares
from tests.tiny import byte_tokenizer, sink_model, tiny_model

SETTINGS: dict[str, Any] = {
    "keep_ratio": 0.6, "rank_multiple": 4, "calibration": "pydoc", "num_samples": 2, "seq_len": 48,
}  # fmt: skip
MEASURED = {
    ("gate", 0): OutlierShares(0.25, 0.75),
    ("down", 0): OutlierShares(0.5, 0.1),
    ("gate", 1): OutlierShares(0.9, 0.0),
    ("down", 1): OutlierShares(0.2, 0.625),
    ("gate", 2): OutlierShares(0.0, 0.0),
    ("down", 2): OutlierShares(0.75, 0.0),
}


def _note(monkeypatch: pytest.MonkeyPatch, measured: dict[Any, OutlierShares]) -> list[str]:
    """The notes on outliers where linears of a role and block have these shares."""

    def shares(_: MomentStatistics, linear: LinearSpec) -> OutlierShares:
        return measured.get((linear.role, linear.block), OutlierShares(0.0, 0.0))

    monkeypatch.setattr(MomentStatistics, "outlier_shares", shares)
    model = tiny_model(num_hidden_layers=3)
    result = lrcompress.factorize(model, byte_tokenizer(), **SETTINGS)
    return [note for note in result.notes if "outlier" in note]


def test_a_note_counts_blocks_with_most_energy_in_outliers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Half is not more than half; the largest of the linears of a block counts."""
    assert _note(monkeypatch, MEASURED) == [
        "a few outlier tokens, such as attention sinks, had more than half of the energy of inputs "
        "in 2 of 3 blocks (90.0% in block 1) and of the energy of gradients in 2 of 3 blocks "
        "(75.0% in block 0): they were scaled down in the moments and kept as directions of their "
        "own"
    ]
    gradients = {("down", 2): OutlierShares(0.5, 0.997), ("up", 1): OutlierShares(None, None)}
    (note,) = _note(monkeypatch, gradients)
    assert "more than half of the energy of gradients in 1 of 3 blocks (99.7% in block 2)" in note
    assert "inputs" not in note
    assert _note(monkeypatch, {("gate", 0): OutlierShares(0.5, 0.5)}) == []


@pytest.mark.parametrize(
    ("method", "notes"), [("auto", 1), ("whitened", 1), ("svd", 0), ("ppm", 1)]
)
def test_a_model_with_a_sink_gets_the_note(method: str, notes: int) -> None:
    """Unless nothing was measured."""
    model = sink_model(block=1)
    result = lrcompress.factorize(model, byte_tokenizer(), **(SETTINGS | {"method": method}))
    sentence = "of the energy of inputs in 1 of 2 blocks (100.0% in block 1)"
    assert sum(sentence in note for note in result.notes) == notes
