"""Self-guided training: the dense weight's share falls from 1 to 0."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import TrainerState

import lrcompress
from lrcompress.training.self_guided import Guidance, guide_pairs
from tests.conftest import invoke
from tests.tiny import logits


def test_the_share_of_the_dense_weights_falls_to_zero(dense: Path, tmp_path: Path) -> None:
    flags = ("--rank", 12, "--method", "svd")
    assert invoke("factorize", dense, "--out", tmp_path / "low", *flags).exit_code == 0
    model, _ = lrcompress.load(str(tmp_path / "low"), dtype="float32")
    teacher, _ = lrcompress.load(str(dense), dtype="float32")
    unguided, dense_logits = logits(model), logits(teacher)
    guidance = Guidance(steps=10, reduced=False, seed=0)
    with guidance.guiding(guide_pairs(model, dict(teacher.named_modules()))):
        torch.testing.assert_close(logits(model), unguided)  # no guidance in evaluation mode
        model.train()
        shares = []
        for step in range(7):
            guidance.on_step_begin(None, TrainerState(global_step=step), None)
            shares.append(guidance.share)
            if step == 0:
                torch.testing.assert_close(logits(model), dense_logits, rtol=1e-3, atol=1e-3)
        assert shares == pytest.approx([1, 0.9045, 0.6545, 0.3455, 0.0955, 0, 0], abs=1e-3)
        torch.testing.assert_close(logits(model), unguided)
    reduced = Guidance(steps=2000, reduced=True, seed=0)
    is_guided = []
    for step in range(1000):
        reduced.on_step_begin(None, TrainerState(global_step=step), None)
        is_guided.append(reduced.share > 0)
    assert 0.45 < sum(is_guided) / len(is_guided) < 0.55  # the mean of the cosine is 1/2
