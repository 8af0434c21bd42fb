"""Sampled score gradients have the Fisher matrix of the predictions as second moment."""

from __future__ import annotations

import pytest
import torch

from lrcompress.layers.block_runner import sample_score_gradients

DRAWS = 20_000


def test_second_moment_is_the_fisher_matrix() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0])
    p = logits.softmax(-1)
    u = sample_score_gradients(logits.expand(DRAWS, -1), torch.Generator().manual_seed(0))
    assert float(u.mean(0).abs().max()) < 0.01
    torch.testing.assert_close(u.T @ u / DRAWS, p.diag() - torch.outer(p, p), rtol=0, atol=0.01)
    torch.testing.assert_close(u.sum(-1), torch.zeros(DRAWS), rtol=0, atol=1e-5)


def test_squares_are_twice_the_divergence_of_a_small_change() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(30, generator=generator)
    change = 0.02 * torch.randn(30, generator=generator)
    before, after = logits.log_softmax(-1), (logits + change).log_softmax(-1)
    divergence = float((before.exp() * (before - after)).sum())
    u = sample_score_gradients(logits.expand(DRAWS, -1), torch.Generator().manual_seed(1))
    assert float((u @ change).square().mean()) / 2 == pytest.approx(divergence, rel=0.03)


def test_the_seed_decides_and_tokens_differ() -> None:
    logits = torch.randn(3, 7).repeat(100, 1)
    generators = (torch.Generator().manual_seed(seed) for seed in (3, 3, 4))
    first, again, other = (sample_score_gradients(logits, generator) for generator in generators)
    assert torch.equal(first, again)
    assert not bool((first == other).any())
    assert len({tuple(row) for row in first[::3].tolist()}) == 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_its_dtype(dtype: torch.dtype) -> None:
    u = sample_score_gradients(torch.randn(4, 9).to(dtype), torch.Generator().manual_seed(0))
    assert u.dtype == dtype
    assert bool(u.isfinite().all())
