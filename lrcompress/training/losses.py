"""Losses between the predictions of a student and its teacher, a few rows of logits at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lrcompress.training.teacher_cache import log_prob_of_others

# vocabularies are large: the intermediate results of this many rows of logits fit the CPU's cache
ROWS_AT_ONCE = 32

# (rows of the student's logits, their place in all rows) -> sum of the losses of these rows
RowLoss = Callable[[Tensor, slice], Tensor]


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean over tokens of KL(teacher ‖ student) in nats, from logits (tokens, vocabulary).

    Both logits are divided by the temperature T and the result is multiplied by T², so that the
    size of the gradients does not depend on T (Hinton et al. 2015).
    """

    def loss(rows: Tensor, place: slice) -> Tensor:
        log_q = (rows.float() / temperature).log_softmax(-1)
        log_p = (teacher[place].float() / temperature).log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum()

    return mean_by_rows(student, loss) * temperature**2


def top_k_divergence(student: Tensor, ids: Tensor, log_p: Tensor, temperature: float) -> Tensor:
    """`kl_divergence` from the teacher's k most likely tokens and their log-probabilities.

    ids (tokens, k); log_p (tokens, k + 1), at the same temperature, whose last column is that of
    all other tokens together. These count as one token, so that the result is at most the full
    divergence; it is equal where k is the size of the vocabulary minus 1.
    """

    def loss(rows: Tensor, place: slice) -> Tensor:
        log_probs = (rows.float() / temperature).log_softmax(-1)
        top_ids = ids[place].long()
        log_q = torch.cat(
            [log_probs.gather(-1, top_ids), log_prob_of_others(log_probs, top_ids)], dim=-1
        )
        return (log_p[place].exp() * (log_p[place] - log_q)).sum()

    return mean_by_rows(student, loss) * temperature**2


def token_loss(student: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats of logits (tokens, vocabulary) and labels (tokens,)."""
    return mean_by_rows(
        student, lambda rows, place: cross_entropy(rows.float(), labels[place], reduction="sum")
    )


def mean_by_rows(logits: Tensor, loss: RowLoss) -> Tensor:
    """The sum of `loss` over slices of `logits`, divided by the number of rows.

    The gradient is computed slice by slice in the forward pass, so that the backward pass needs
    only one tensor of the size of `logits`.
    """
    mean: Tensor = _MeanByRows.apply(logits, loss)  # type: ignore[no-untyped-call]
    return mean


class _MeanByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss: RowLoss) -> Tensor:
        total = torch.zeros((), device=logits.device)
        needs_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(logits) if needs_gradient else None
        for begin in range(0, len(logits), ROWS_AT_ONCE):
            place = slice(begin, begin + ROWS_AT_ONCE)
            with torch.enable_grad():
                rows = logits[place].detach().requires_grad_(needs_gradient)
                row_loss = loss(rows, place)
            total += row_loss.detach()
            if gradient is not None:
                gradient[place] = torch.autograd.grad(row_loss, rows)[0]
        ctx.save_for_backward(gradient)
        return total / len(logits)

    @staticmethod
    def backward(ctx: Any, outer_gradient: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * (outer_gradient / len(gradient)), None


def hidden_error(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Tensor:
    """Mean over blocks and tokens of ‖s - t‖² / ‖t‖², with s and t the hidden states of a token.

    Each tuple holds (batch, length, width) of the embedding and then of every block, as
    transformers gives them; the embedding does not count.
    """
    errors = [
        ((s.float() - t.float()).square().sum(-1) / t.float().square().sum(-1).clamp_min(1e-12))
        for s, t in zip(student[1:], teacher[1:], strict=True)
    ]
    return torch.stack([error.mean() for error in errors]).mean()
