"""Which intermediate channels of an FFN to keep, and how down_proj makes up for the others."""

from __future__ import annotations

import torch
from torch import Tensor

from lrcompress.methods.linalg import to_float64
from lrcompress.methods.types import ChannelOrder

# channels taken between two updates of the full matrices, and the candidates they come from:
# within the candidates every step is exact, so only a channel from outside can be missed
STEP = 32
POOL = 96
# a channel whose residual is this small against its own second moment is reconstructed already
EXHAUSTED = 1e-9
# the matrices are cut to the channels that are left when these are fewer than this share
SHRINK = 0.8


def order_channels(second_moment: Tensor, metric: Tensor) -> ChannelOrder:
    """Greedy column selection of C = E h hᵀ in the metric M = W_downᵀ G W_down.

    With the channels J kept and the others reconstructed from them, the error is tr(M D), D the
    residual C - C_J C_JJ⁻¹ C_Jᵀ. Keeping channel j next lowers it by exactly
    (D M D)_jj / D_jj; the largest gain goes first (pivoted Cholesky in the metric M).
    Both matrices have shape (width, width); D is updated in steps of several channels.
    """
    D, M = to_float64(second_moment).clone(), to_float64(metric)
    floor = EXHAUSTED * D.diagonal().clamp_min(torch.finfo(D.dtype).tiny)
    spread = ((D @ M) * D).sum(1)  # diag(D M D)
    names = torch.arange(len(D), device=D.device)
    left = torch.ones(len(D), dtype=torch.bool, device=D.device)
    order: list[Tensor] = []
    errors = [float((M * D).sum())]
    while bool(left.any()):
        pool, outside = _candidates(D, spread, left, floor)
        picked, lowered = _pick(D, M, pool, floor, outside)
        if not len(picked):
            break
        order.append(names[picked])
        for gain in lowered:
            errors.append(max(errors[-1] - gain, 0.0))
        left[picked] = False
        spread = _take_out(D, M, spread, picked)
        if int(left.sum()) < SHRINK * len(D):  # rows of kept channels are zero: drop them
            D, M = D[left][:, left], M[left][:, left]
            spread, floor, names = spread[left], floor[left], names[left]
            left = left[left]
    rest = names[left]  # reconstructed by the kept ones without error
    tail = [errors[-1]] * (len(rest) - 1) + [0.0] if len(rest) else []
    errors = [*errors, *tail] if tail else [*errors[:-1], 0.0]
    return ChannelOrder(torch.cat([*order, rest]), torch.tensor(errors, dtype=torch.float64))


def _candidates(D: Tensor, spread: Tensor, left: Tensor, floor: Tensor) -> tuple[Tensor, float]:
    """The channels with the largest gains, and the largest gain that is not among them."""
    gains = torch.where(D.diagonal() > floor, spread / D.diagonal().clamp_min(floor), 0.0)
    top = torch.where(left, gains, -1.0).topk(min(POOL + 1, len(gains)))
    pool = top.indices[:POOL]
    return pool[left[pool]], float(top.values[-1])


def _pick(
    D: Tensor, M: Tensor, pool: Tensor, floor: Tensor, outside: float
) -> tuple[Tensor, list[float]]:
    """Up to STEP channels of `pool`, greedy and exact within it; and the gain of each.

    Ends early where a channel outside the pool may gain more than the best inside.
    """
    rows = D[pool]
    R, S, least = rows[:, pool].clone(), rows @ M @ rows.T, floor[pool]
    picked: list[int] = []
    lowered: list[float] = []
    free = torch.ones(len(pool), dtype=torch.bool, device=D.device)
    for _ in range(min(STEP, len(pool))):
        diagonal = R.diagonal()
        usable = free & (diagonal > least)
        if not bool(usable.any()):
            break
        # rounding may take gains below zero, where channels that are out would win
        gains = (S.diagonal() / diagonal.clamp_min(least)).clamp_min(0)
        j = int(torch.where(usable, gains, -1.0).argmax())
        if picked and float(gains[j]) < outside:
            break
        picked.append(int(pool[j]))
        lowered.append(float(gains[j]))
        free[j] = False
        d, s, pivot = R[:, j].clone(), S[:, j].clone(), float(R[j, j])
        R -= torch.outer(d, d) / pivot
        S += torch.outer(d, d) * (float(s[j]) / pivot**2)
        S -= (torch.outer(d, s) + torch.outer(s, d)) / pivot
    return torch.tensor(picked, device=D.device, dtype=torch.long), lowered


def _take_out(D: Tensor, M: Tensor, spread: Tensor, picked: Tensor) -> Tensor:
    """Removes what `picked` reconstructs from D, in place; returns the new diag(D M D).

    With Q Qᵀ = D_J D_JJ⁻¹ D_Jᵀ the residual becomes D - Q Qᵀ, and its diag(D M D) follows from
    V = D M Q without a product of two full matrices.
    """
    sizes = D.diagonal()[picked].sqrt()  # these may differ by many decades
    rows = D[picked] / sizes[:, None]
    block = rows[:, picked] / sizes
    Q = torch.linalg.solve_triangular(torch.linalg.cholesky(block), rows, upper=False).T
    MQ = M @ Q
    V, inner = D @ MQ, Q.T @ MQ
    D.addmm_(Q, Q.T, alpha=-1)
    left: Tensor = spread - 2 * (V * Q).sum(1) + ((Q @ inner) * Q).sum(1)
    return left.clamp_min(0)


def folded(weight: Tensor, second_moment: Tensor, channels: Tensor, damping: float) -> Tensor:
    """down_proj (out, width) of `channels` J (kept,) alone: W_J + W_K C_KJ (C_JJ + ridge)⁻¹.

    The other channels K are reconstructed from those of J in least squares, damped towards zero.
    """
    W, C = to_float64(weight), to_float64(second_moment)
    others = torch.ones(len(C), dtype=torch.bool, device=C.device)
    others[channels] = False
    block, right = C[channels][:, channels], W[:, others] @ C[others][:, channels]
    mean = block.diagonal().mean()
    block.diagonal().add_(damping * mean if mean > 0 else torch.ones_like(mean))
    lower, failed = torch.linalg.cholesky_ex(block)
    if bool(failed):  # singular but for rounding
        solution: Tensor = torch.linalg.solve(block, right.T)
    else:
        solution = torch.cholesky_solve(right.T, lower)
    return W[:, channels] + solution.T
