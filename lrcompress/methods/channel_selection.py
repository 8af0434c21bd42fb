"""Chooses the intermediate channels of an FFN to keep, and folds the others into down_proj."""

from __future__ import annotations

import torch
from torch import Tensor

from lrcompress.methods.linalg import to_float64
from lrcompress.methods.types import ChannelOrder

# channels chosen between two updates of the full matrices, and candidates from which they are
# chosen: among the candidates every step is exact, so only a channel outside can be missed
CHANNELS_PER_UPDATE = 32
POOL_SIZE = 96
# a channel with a smaller residual, relative to its second moment, is already reconstructed
RESIDUAL_TOLERANCE = 1e-9
# chosen channels are cut out of the matrices when the others are fewer than this share
COMPACT_BELOW = 0.8


def order_channels(second_moment: Tensor, root: Tensor) -> ChannelOrder:
    """All channels in a greedy order: the one that lowers the error most comes first.

    `second_moment` C = E h hᵀ has shape (width, width), and `root` R (out, width) is the root of
    the metric M = RᵀR = W_downᵀ G W_down, whose products are cheaper than those of M. With the
    channels J kept and the others reconstructed from them, the error is tr(M D), where D is the
    residual C - C_J C_JJ⁻¹ C_Jᵀ. Keeping channel j as well lowers the error by exactly
    (D M D)_jj / D_jj (pivoted Cholesky in the metric M). D is updated for several channels at once.
    """
    D, R = to_float64(second_moment).clone(), to_float64(root)
    floor = RESIDUAL_TOLERANCE * D.diagonal().clamp_min(torch.finfo(D.dtype).tiny)
    RD = R @ D
    dmd = RD.square().sum(0)  # diag(D M D)
    channels = torch.arange(len(D), device=D.device)  # the channel of each row of D
    remaining = torch.ones(len(D), dtype=torch.bool, device=D.device)
    order: list[Tensor] = []
    errors = [float((R * RD).sum())]
    while bool(remaining.any()):
        pool, best_outside = _pool(D, dmd, remaining, floor)
        chosen, gains = _choose(D, R, pool, floor, best_outside)
        if not len(chosen):
            break
        order.append(channels[chosen])
        for gain in gains:
            errors.append(max(errors[-1] - gain, 0.0))
        remaining[chosen] = False
        dmd = _project_out(D, R, dmd, chosen)
        if int(remaining.sum()) < COMPACT_BELOW * len(D):  # rows of chosen channels are zero
            D, R = D[remaining][:, remaining], R[:, remaining]
            dmd, floor, channels = dmd[remaining], floor[remaining], channels[remaining]
            remaining = remaining[remaining]
    rest = channels[remaining]  # the chosen channels reconstruct these without error
    tail = [errors[-1]] * (len(rest) - 1) + [0.0] if len(rest) else []
    errors = [*errors, *tail] if tail else [*errors[:-1], 0.0]
    return ChannelOrder(torch.cat([*order, rest]), torch.tensor(errors, dtype=torch.float64))


def _pool(D: Tensor, dmd: Tensor, remaining: Tensor, floor: Tensor) -> tuple[Tensor, float]:
    """The channels with the largest gains, and the largest gain of a channel outside this pool."""
    gains = torch.where(D.diagonal() > floor, dmd / D.diagonal().clamp_min(floor), 0.0)
    top = torch.where(remaining, gains, -1.0).topk(min(POOL_SIZE + 1, len(gains)))
    pool = top.indices[:POOL_SIZE]
    return pool[remaining[pool]], float(top.values[-1])


def _choose(
    D: Tensor, R: Tensor, pool: Tensor, floor: Tensor, best_outside: float
) -> tuple[Tensor, list[float]]:
    """Up to CHANNELS_PER_UPDATE channels of `pool` with their gains, greedy and exact in the pool.

    Stops where a channel outside the pool may gain more than the best in the pool. Every step asks
    for values of small matrices: they are copied to the CPU once.
    """
    rows = D[pool]
    images = R @ rows.T
    residual, S = rows[:, pool].clone().cpu(), (images.T @ images).cpu()
    pool_floor, pool = floor[pool].cpu(), pool.cpu()
    chosen: list[int] = []
    chosen_gains: list[float] = []
    free = torch.ones(len(pool), dtype=torch.bool)
    for _ in range(min(CHANNELS_PER_UPDATE, len(pool))):
        diagonal = residual.diagonal()
        usable = free & (diagonal > pool_floor)
        if not bool(usable.any()):
            break
        # rounding may give negative gains: then the -1 of unusable channels could win
        gains = (S.diagonal() / diagonal.clamp_min(pool_floor)).clamp_min(0)
        j = int(torch.where(usable, gains, -1.0).argmax())
        if chosen and float(gains[j]) < best_outside:
            break
        chosen.append(int(pool[j]))
        chosen_gains.append(float(gains[j]))
        free[j] = False
        d, s, pivot = residual[:, j] / diagonal[j], S[:, j].clone(), float(diagonal[j])
        outer = torch.outer(d, s)
        S += torch.outer(d, d * s[j]).sub_(outer).sub_(outer.T)
        residual -= torch.outer(d, d * pivot)
    return torch.tensor(chosen, device=D.device, dtype=torch.long), chosen_gains


def _project_out(D: Tensor, R: Tensor, dmd: Tensor, chosen: Tensor) -> Tensor:
    """Subtracts from D, in place, what `chosen` reconstructs; returns the new diag(D M D).

    With Q Qᵀ = D_J D_JJ⁻¹ D_Jᵀ the residual becomes D - Q Qᵀ. The new diag(D M D) follows from
    V = D M Q, without a product of two full matrices.
    """
    sizes = D.diagonal()[chosen].sqrt()  # scaling by these keeps Cholesky accurate
    rows = D[chosen] / sizes[:, None]
    block = rows[:, chosen] / sizes
    Q = torch.linalg.solve_triangular(torch.linalg.cholesky(block), rows, upper=False).T
    RQ = R @ Q
    V, inner = D @ (R.T @ RQ), RQ.T @ RQ
    D.addmm_(Q, Q.T, alpha=-1)
    updated: Tensor = dmd - 2 * (V * Q).sum(1) + ((Q @ inner) * Q).sum(1)
    return updated.clamp_min(0)


def fold_into_down(weight: Tensor, second_moment: Tensor, channels: Tensor, ridge: float) -> Tensor:
    """The weight (out, kept) of down_proj that reads only `channels` J (kept,).

    It is W_J + W_K C_KJ (C_JJ + ridge I)⁻¹, for the `weight` W (out, width) and the second moment
    C (width, width): ridge regression reconstructs the other channels K from J.
    """
    W, C = to_float64(weight), to_float64(second_moment)
    others = torch.ones(len(C), dtype=torch.bool, device=C.device)
    others[channels] = False
    block, right = C[channels][:, channels], W[:, others] @ C[others][:, channels]
    block.diagonal().add_(ridge)
    lower, failed = torch.linalg.cholesky_ex(block)
    if bool(failed):  # numerically singular
        solution: Tensor = torch.linalg.solve(block, right.T)
    else:
        solution = torch.cholesky_solve(right.T, lower)
    return W[:, channels] + solution.T
