"""Balanced factors: the same outputs, equal norms, and packed again."""

from __future__ import annotations

from pathlib import Path

import torch

import lrcompress
from lrcompress.layers.lowrank import FactoredLinear, compressed_layers
from lrcompress.training.trainable import balance, pack
from tests.conftest import invoke
from tests.tiny import logits


def test_balancing_changes_no_output(dense: Path, tmp_path: Path) -> None:
    assert invoke("factorize", dense, "--out", tmp_path / "low", "--rank", 12).exit_code == 0
    model, _ = lrcompress.load(str(tmp_path / "low"), dtype="float32")
    expected, stored = logits(model), balance(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)
    layers = [m for _, m in compressed_layers(model) if isinstance(m, FactoredLinear)]
    assert len(layers) == len(stored) > 0
    for layer in layers:
        A, B = layer.A.weight, layer.B.weight
        torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0), rtol=1e-3, atol=1e-4)
    pack(model, stored)
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)
