"""Chooses the intermediate channels of an FFN to keep, and folds the others into down_proj."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from lrcompress.methods.linalg import to_float64
from lrcompress.methods.types import ChannelOrder

# channels chosen between two updates of the full matrices, and candidates from which they are
# chosen: among the candidates every step is exact, so only a channel outside can be missed. Both
# are multiplied in FFNs of a multiple of this width, whose matrices are then read less often.
CHANNELS_PER_UPDATE, POOL_SIZE = 32, 96
WIDTH_PER_MULTIPLE = 6144
# a channel with a smaller residual, relative to its second moment, is already reconstructed
RESIDUAL_TOLERANCE = 1e-9
# chosen channels are cut out of the matrices when the others are fewer than this share
COMPACT_BELOW = 0.8


def order_channels(
    second_moment: Tensor, root: Tensor, widths: Collection[int] = ()
) -> ChannelOrder:
    """All channels in a greedy order: the one that lowers the error most comes first.

    `second_moment` C = E h hᵀ has shape (width, width), and `root` R (out, width) is the root of
    the metric M = RᵀR = W_downᵀ G W_down. With the channels J kept and the others reconstructed
    from them, the error is tr(M D), where D is the residual C - C_J C_JJ⁻¹ C_Jᵀ. Keeping channel j
    as well lowers the error by exactly (D M D)_jj / D_jj (pivoted Cholesky in the metric M). At
    `widths` the order has the Gram matrices R C_J C_JJ⁻¹ C_Jᵀ Rᵀ.
    """
    residual = _Residual(to_float64(second_moment).clone(), to_float64(root))
    grams, errors = _Grams(widths, residual.F), [residual.error]
    order: list[Tensor] = []
    while bool(residual.remaining.any()):
        until_width = [width - len(errors) + 1 for width in widths if width >= len(errors)]
        chosen, gains = residual.choose(min(until_width, default=len(second_moment)))
        if not len(chosen):
            break
        order.append(residual.channels[chosen])
        errors += _errors_after(errors[-1], gains)
        grams.add(residual.project_out(chosen), width=len(errors) - 1)
    rest = residual.channels[residual.remaining]  # the others reconstruct these without error
    errors += [errors[-1]] * len(rest)
    return ChannelOrder(
        channels=torch.cat([*order, rest]),
        errors=torch.tensor([*errors[:-1], 0.0], dtype=torch.float64),
        grams=grams.by_width(),
    )


def _errors_after(error: float, gains: Sequence[float]) -> Iterator[float]:
    """The error after each of `gains` was taken from `error`."""
    for gain in gains:
        error = max(error - gain, 0.0)
        yield error


class _Grams:
    """Sums of (R Q)(R Q)ᵀ over the channels chosen so far, kept at `widths`.

    `images` has the rows of R.
    """

    def __init__(self, widths: Collection[int], images: Tensor) -> None:
        self.widths = widths
        size = len(images) if widths else 0
        self._sum = images.new_zeros(size, size)
        self._by_width: dict[int, Tensor] = {}

    def add(self, image: Tensor, width: int) -> None:
        """Adds `image` R Q (out, chosen) of the channels that make up `width`."""
        if self.widths:
            self._sum.addmm_(image, image.T)
        if width in self.widths:
            self._by_width[width] = self._sum.clone()

    def by_width(self) -> dict[int, Tensor]:
        """That of all chosen channels where a width was not reached: the others add nothing."""
        return {width: self._by_width.get(width, self._sum) for width in self.widths}


class _Residual:
    """What the channels chosen so far do not reconstruct.

    Of the `channels` (n,) that are still in the matrices, those in `remaining` are not chosen. D
    (n, n) is the residual of the second moment, F = R D (out, n) its image, and `dmd` (n,) the
    diagonal of D M D, the squared norms of the columns of F.
    """

    def __init__(self, C: Tensor, R: Tensor) -> None:
        self.D, self.F = C, R @ C
        self.error = float((R * self.F).sum())
        self.dmd = self.F.square().sum(0)
        self.floor = RESIDUAL_TOLERANCE * C.diagonal().clamp_min(torch.finfo(C.dtype).tiny)
        self.channels = torch.arange(len(C), device=C.device)
        self.remaining = torch.ones(len(C), dtype=torch.bool, device=C.device)
        self.steps = max(1, round(len(C) / WIDTH_PER_MULTIPLE))

    def choose(self, most: int) -> tuple[Tensor, list[float]]:
        """The next channels with their gains, at most `most`; none where nothing is left to gain.

        They come from a pool of those with the largest gains.
        """
        size, diagonal = self.steps * POOL_SIZE, self.D.diagonal()
        gains = torch.where(diagonal > self.floor, self.dmd / diagonal.clamp_min(self.floor), 0.0)
        top = torch.where(self.remaining, gains, -1.0).topk(min(size + 1, len(gains)))
        pool = top.indices[:size]
        pool = pool[self.remaining[pool]]
        count = min(most, self.steps * CHANNELS_PER_UPDATE)
        return _choose(self, pool, float(top.values[-1]), count)

    def project_out(self, chosen: Tensor) -> Tensor:
        """Subtracts from D and F what `chosen` reconstruct; returns R Q (out, chosen).

        Q Qᵀ = D_J D_JJ⁻¹ D_Jᵀ for the chosen J: D becomes D - Q Qᵀ, and F becomes F - R Q Qᵀ.
        """
        D, F = self.D, self.F
        sizes = D.diagonal()[chosen].sqrt()  # scaling by these keeps Cholesky accurate
        rows, images = D[chosen] / sizes[:, None], F[:, chosen] / sizes
        lower = torch.linalg.cholesky(rows[:, chosen] / sizes)
        Q = torch.linalg.solve_triangular(lower, rows, upper=False).T
        image: Tensor = torch.linalg.solve_triangular(lower, images.T, upper=False).T
        self.dmd -= ((2 * (F.T @ image) - Q @ (image.T @ image)) * Q).sum(1)
        self.dmd.clamp_min_(0)
        D.addmm_(Q, Q.T, alpha=-1)
        F.addmm_(image, Q.T, alpha=-1)
        self.remaining[chosen] = False
        self._compact()
        return image

    def _compact(self) -> None:
        """Cuts the chosen channels out, whose rows are zero, once they are many."""
        left = self.remaining
        if 0 < int(left.sum()) < COMPACT_BELOW * len(left):
            self.D, self.F = self.D[left][:, left], self.F[:, left]
            self.dmd, self.floor = self.dmd[left], self.floor[left]
            self.channels, self.remaining = self.channels[left], left[left]


def _choose(
    before: _Residual, pool: Tensor, best_outside: float, count: int
) -> tuple[Tensor, list[float]]:
    """Up to `count` channels of `pool` with their gains, greedy and exact in the pool.

    Stops where a channel outside the pool may gain more than the best in the pool. Every step asks
    for values of small matrices: they are copied to the CPU once.
    """
    D, images = before.D, before.F[:, pool]
    residual, S = D[pool][:, pool].cpu(), (images.T @ images).cpu()
    pool_floor, pool = before.floor[pool].cpu(), pool.cpu()
    chosen: list[int] = []
    chosen_gains: list[float] = []
    free = torch.ones(len(pool), dtype=torch.bool)
    for _ in range(min(count, len(pool))):
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
