"""Losses between a model's predictions and its teacher's, a few rows of logits at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lrcompress.training.teacher_cache import others

# rows of logits at a time: vocabularies are large, and what a few rows make stays in the cache
ROWS = 32

RowLoss = Callable[[Tensor, slice], Tensor]


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean over tokens of KL(teacher ‖ student) in nats, logits (tokens, vocabulary).

    At a temperature T both are softened and the result is multiplied by T², so that the size of
    gradients does not depend on T (Hinton et al. 2015).
    """

    def loss(rows: Tensor, where: slice) -> Tensor:
        log_q = (rows.float() / temperature).log_softmax(-1)
        log_p = (teacher[where].float() / temperature).log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum()

    return mean_by_rows(student, loss) * temperature**2


def top_k_divergence(student: Tensor, ids: Tensor, log_p: Tensor, temperature: float) -> Tensor:
    """The same from the teacher's k likeliest tokens (tokens, k) and their log-probabilities.

    log_p (tokens, k + 1) ends with that of all other tokens, which count as one: never more
    than the whole divergence, and equal to it where k is the vocabulary less one.
    """

    def loss(rows: Tensor, where: slice) -> Tensor:
        every = (rows.float() / temperature).log_softmax(-1)
        chosen = ids[where].long()
        log_q = torch.cat([every.gather(-1, chosen), others(every, chosen)], dim=-1)
        return (log_p[where].exp() * (log_p[where] - log_q)).sum()

    return mean_by_rows(student, loss) * temperature**2


def token_loss(student: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats, logits (tokens, vocabulary)."""
    return mean_by_rows(
        student, lambda rows, where: cross_entropy(rows.float(), labels[where], reduction="sum")
    )


def mean_by_rows(logits: Tensor, loss: RowLoss) -> Tensor:
    """The sum of `loss` over slices of `logits`, divided by the number of rows.

    The gradient is taken slice by slice in the forward pass, so that no more than one tensor
    of the size of `logits` is kept for the backward pass.
    """
    found: Tensor = _MeanByRows.apply(logits, loss)  # type: ignore[no-untyped-call]
    return found


class _MeanByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss: RowLoss) -> Tensor:
        total = torch.zeros((), device=logits.device)
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(logits) if wanted else None
        for begin in range(0, len(logits), ROWS):
            where = slice(begin, begin + ROWS)
            with torch.enable_grad():
                rows = logits[where].detach().requires_grad_(wanted)
                part = loss(rows, where)
            total += part.detach()
            if gradient is not None:
                gradient[where] = torch.autograd.grad(part, rows)[0]
        ctx.save_for_backward(gradient)
        return total / len(logits)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * (outer / len(gradient)), None


def hidden_error(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Tensor:
    """Mean over blocks and tokens of ‖s - t‖² / ‖t‖², hidden states (batch, length, width)."""
    errors = [
        ((s.float() - t.float()).square().sum(-1) / t.float().square().sum(-1).clamp_min(1e-12))
        for s, t in zip(student[1:], teacher[1:], strict=True)
    ]
    return torch.stack([error.mean() for error in errors]).mean()
