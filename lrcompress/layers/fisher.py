"""Directions in the logits whose gradients have Fisher matrices as second moments."""

from __future__ import annotations

import torch
from torch import Tensor

# tokens whose predictions are held at a time
ROWS = 128


def drawn_scores(logits: Tensor, seed: int) -> Tensor:
    """A random u for every token of `logits` (tokens, vocabulary), with E u uᵀ = diag(p) - p pᵀ.

    p are the model's own predictions, the softmax of the logits, and diag(p) - p pᵀ is their Fisher
    matrix, the Hessian of the divergence from them. So what u becomes by the chain rule in some
    layer's output has that output's Fisher matrix as second moment. The gradient of a label drawn
    from p has it too (Martens and Grosse 2015, arXiv 1503.05671, section 5), but tells of one
    label; u = z - p sum(z), z normal with variance p, tells of all. The gradient of the text's own
    label (the empirical Fisher matrix) weighs most the tokens that surprise the model most.
    """
    generator = torch.Generator(logits.device).manual_seed(seed)
    scores = torch.empty_like(logits)
    for rows, found in zip(torch.split(logits, ROWS), torch.split(scores, ROWS), strict=True):
        p = rows.float().softmax(-1)
        z = torch.empty_like(p).normal_(generator=generator) * p.sqrt()
        found.copy_(z - p * z.sum(-1, keepdim=True))
    return scores
