"""Distillation losses: their values, their gradients, and what the k most likely tokens give."""

from __future__ import annotations

import pytest
import torch

from lrcompress.training.losses import kl_divergence, top_k_divergence
from lrcompress.training.teacher_cache import log_prob_of_others


def test_divergence_is_zero_at_the_teacher_and_has_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(300, 17, generator=generator)
    student = torch.randn(300, 17, generator=generator, requires_grad=True)
    assert float(kl_divergence(teacher, teacher, 2.0)) == pytest.approx(0, abs=1e-6)
    kl_divergence(student, teacher, 1.0).backward()  # type: ignore[no-untyped-call]
    expected = (student.softmax(-1) - teacher.softmax(-1)) / 300
    torch.testing.assert_close(student.grad, expected.detach())


def random_logits(seed: int) -> torch.Tensor:
    return torch.randn(40, 23, generator=torch.Generator().manual_seed(seed))


def top_k(log_p: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (tokens, k) and log-probabilities (tokens, k + 1), as a teacher cache has them."""
    top = log_p.topk(k)
    return top.indices, torch.cat([top.values, log_prob_of_others(log_p, top.indices)], dim=-1)


def test_top_k_divergence_is_a_lower_bound_and_exact_with_all_tokens() -> None:
    student, teacher = random_logits(1).requires_grad_(), random_logits(2)
    full = kl_divergence(student, teacher, 1.5)
    log_p = (teacher / 1.5).log_softmax(-1)
    for k in (22, 4):
        bound = top_k_divergence(student, *top_k(log_p, k), 1.5)
        assert float(bound.detach()) <= float(full.detach()) + 1e-6
    exact = top_k_divergence(student, *top_k(log_p, 22), 1.5)
    torch.testing.assert_close(exact, full)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (full, exact)]
    torch.testing.assert_close(*gradients)
