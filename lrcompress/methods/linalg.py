"""Numerics: square roots of moments and truncated decompositions in scaled metrics.

Everything here computes in float64, on the device of its input where that device has float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from lrcompress.methods.types import Factors

# diagonal entries of a pivoted QR below this share of the first count as zero
RANK_TOLERANCE = 1e-13


def to_float64(matrix: Tensor) -> Tensor:
    """`matrix` in float64; on the CPU where its device has no float64."""
    if matrix.device.type == "mps":
        matrix = matrix.cpu()
    return matrix.to(torch.float64)


def damped(moment: Tensor, damping: float) -> Tensor:
    """moment + damping * mean(diag(moment)) * I: positive definite for any non-zero moment."""
    mean = moment.diagonal().mean()
    if mean == 0:
        return torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    return moment + damping * mean * torch.eye(
        len(moment), dtype=moment.dtype, device=moment.device
    )


def shrunk(moment: Tensor, shrinkage: float) -> Tensor:
    """(1 - shrinkage) moment + shrinkage diag(moment): what features have in common counts less."""
    if shrinkage == 0:
        return moment
    found = (1 - shrinkage) * moment
    found.diagonal().copy_(moment.diagonal())
    return found


def roots(metric: Tensor) -> tuple[Tensor, Tensor]:
    """metric^1/2 and metric^-1/2 of a symmetric positive definite matrix, by eigh.

    Eigenvalues are floored at float64 rounding of the largest, so a nearly singular metric gives
    large, finite inverses.
    """
    values, vectors = torch.linalg.eigh(metric)
    root = values.clamp_min(_floor(values)).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def _floor(values: Tensor) -> float:
    top = float(values.max())
    return top * len(values) * torch.finfo(values.dtype).eps if top > 0 else 1.0


class WeightedNorm:
    """A metric M, as a symmetric positive definite matrix (n, n) or its diagonal (n,).

    Its root L, with L Lᵀ = M, is taken once: any root gives the same factors, as two of them
    differ by an orthogonal matrix on the right. It is the Cholesky factor, or the symmetric root
    where rounding would make that one fail or its inverse overflow.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = to_float64(matrix)

    @cached_property
    def _root(self) -> tuple[Tensor, Tensor | None]:
        """L, and its inverse where L is not triangular; the roots of a diagonal as vectors."""
        matrix = self.matrix
        if matrix.ndim == 1:
            root = matrix.clamp_min(_floor(matrix)).sqrt()
            return root, 1 / root
        lower, failed = torch.linalg.cholesky_ex(matrix)
        least = _floor(matrix.diagonal())
        if not bool(failed) and float(lower.diagonal().min()) ** 2 > least:
            return lower, None
        return roots(matrix)

    def after(self, W: Tensor) -> Tensor:
        """W times the metric."""
        matrix = self.matrix.to(W.device)
        scaled: Tensor = W * matrix if matrix.ndim == 1 else W @ matrix
        return scaled

    def scaled(self, W: Tensor) -> Tensor:
        """Lᵀ W."""
        root = self._root[0].to(W.device)
        return root[:, None] * W if root.ndim == 1 else root.T @ W

    def both(self, U: Tensor) -> tuple[Tensor, Tensor]:
        """L⁻ᵀ U and L U."""
        root, inverse = self._root
        root = root.to(U.device)
        if root.ndim == 1:
            return U / root[:, None], root[:, None] * U
        if inverse is None:
            return torch.linalg.solve_triangular(root.T, U, upper=True), root @ U
        return inverse.to(U.device) @ U, root @ U


@dataclass(frozen=True)
class TruncatedSVD:
    """The leading terms of W (out, in), ordered by what each adds to the fit in a metric.

    Truncation is a projection of W: L_r R_rᵀ W, or W R_r L_rᵀ where W is `turned` (out > in).
    `left` L and `right` R are (min(out, in), k), so that W itself need not be kept.
    `energies[i]` is the squared singular value of term i and `total` the squared norm of W in the
    metric: truncation at rank r has squared error total - sum(energies[:r]) (Eckart-Young).
    """

    left: Tensor
    right: Tensor
    energies: Tensor
    total: float
    turned: bool

    def serves(self, rank: int) -> bool:
        """Whether `decompose` for that rank alone would give the same terms."""
        size, known = self.left.shape
        return rank == known or (known == size and not is_randomized(size, rank))

    def factors(self, weight: Tensor, rank: int) -> Factors:
        """The first `rank` terms of W, the `weight` decomposed; A and B share each term's norm."""
        A, B = self._terms(to_float64(weight), rank)
        balance = (A.norm(dim=1) / B.norm(dim=0)).sqrt()
        balance = torch.where(balance.isfinite() & (balance > 0), balance, 1.0)
        A, B = (A / balance[:, None]).contiguous(), (B * balance).contiguous()
        return Factors(A, B, self.error(rank), self.total, self.energies)

    def _terms(self, W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        left, right = self.left[:, :rank], self.right[:, :rank]
        return (left.T, W @ right) if self.turned else (right.T @ W, left)

    def error(self, rank: int) -> float:
        return max(self.total - float(self.energies[:rank].sum()), 0.0)


def decompose(
    weight: Tensor,
    input_metric: WeightedNorm | None = None,
    output_metric: WeightedNorm | None = None,
    rank: int | None = None,
) -> TruncatedSVD:
    """Terms of W (out, in) ordered by ‖G^1/2 (W - BA) X^1/2‖², X the input, G the output metric.

    None stands for the identity. Only the eigenproblem of the smaller side is solved, and only
    that side's metric needs a root L. For
    out <= in: Lᵀ W X Wᵀ L = U S² Uᵀ with L Lᵀ = G, and the best approximation is L⁻ᵀ U Uᵀ Lᵀ W.
    Otherwise: Lᵀ Wᵀ G W L = V S² Vᵀ with L Lᵀ = X, and W L V Vᵀ L⁻¹. With `rank` far below the
    full rank the leading terms come from a randomized range finder instead of a full eigh.
    """
    W, wide, narrow, turned = _sides(weight, input_metric, output_metric)
    gram = _gram(W, wide, narrow)
    energies, U = leading_eigenpairs(gram, rank)
    left, right = U, U
    if narrow is not None:
        left, right = narrow.both(U)
    return TruncatedSVD(left, right, energies, float(gram.trace()), turned)


def spectrum(
    weight: Tensor,
    input_metric: WeightedNorm | None = None,
    output_metric: WeightedNorm | None = None,
) -> Tensor:
    """The energies of all terms of `decompose`, without the terms: a third of the work."""
    W, wide, narrow, _ = _sides(weight, input_metric, output_metric)
    energies: Tensor = torch.linalg.eigvalsh(_gram(W, wide, narrow))
    return energies.flip(0).clamp_min(0)


def _sides(
    weight: Tensor, X: WeightedNorm | None, G: WeightedNorm | None
) -> tuple[Tensor, WeightedNorm | None, WeightedNorm | None, bool]:
    """W with no more rows than columns, the columns' metric, the rows', and whether W is turned."""
    W = to_float64(weight)
    if W.shape[0] <= W.shape[1]:
        return W, X, G, False
    return W.T, G, X, True


def _gram(W: Tensor, wide: WeightedNorm | None, narrow: WeightedNorm | None) -> Tensor:
    """Lᵀ W M Wᵀ L, M the columns' metric and L the root of the rows'."""
    scaled = W if narrow is None else narrow.scaled(W)
    return (scaled if wide is None else wide.after(scaled)) @ scaled.T


@dataclass(frozen=True)
class Pivoted:
    """B A = C [I Z] Pᵀ: `columns` C (out, r) are r columns of the product itself.

    `coefficients` Z (r, in - r) give the other columns from them; `order` (in,) lists the pivot
    columns first, then the rest.
    """

    columns: Tensor
    coefficients: Tensor
    order: Tensor


def pivot(A: Tensor, B: Tensor, scale: Tensor | None = None) -> Pivoted:
    """Factors (A (r, in), B (out, r)) -> the same product with r(out + in - r) numbers.

    The pivots come from a rank-revealing QR with column pivoting of A, which keeps the
    coefficients small (PIFA, arXiv 2505.02443, stores rows in the same way). `scale` (in,) are
    sizes of the inputs, positive: then it is what the coefficients make of inputs of such sizes,
    over the pivots' own, that is kept small. So rounding does little, and large inputs are pivots.
    """
    rank = A.shape[0]
    sizes = torch.ones(A.shape[1]) if scale is None else scale
    sizes = to_float64(sizes).cpu()
    factor = (to_float64(A).cpu() * sizes).numpy()
    R, order = scipy.linalg.qr(factor, mode="r", pivoting=True)
    diagonal = abs(R.diagonal())
    full = int((diagonal > RANK_TOLERANCE * diagonal[0]).sum())  # of a weight of lower rank
    coefficients = np.zeros((rank, A.shape[1] - rank))
    coefficients[:full] = scipy.linalg.solve_triangular(R[:full, :full], R[:full, rank:])
    chosen = torch.from_numpy(order.astype("int64"))
    product = to_float64(B).cpu() @ to_float64(A).cpu()[:, chosen[:rank]]
    unscaled = torch.from_numpy(coefficients) * sizes[chosen[:rank], None] / sizes[chosen[rank:]]
    return Pivoted(product, unscaled, chosen)


# below this share of the full rank the randomized range finder is cheaper than a full eigh
RANDOMIZED_SHARE = 0.125


RANDOMIZED_MINIMUM = 1024


OVERSAMPLING = 32


POWER_STEPS = 6


def is_randomized(size: int, rank: int) -> bool:
    """Whether the `rank` leading eigenpairs of `size` come from the randomized method."""
    return size >= RANDOMIZED_MINIMUM and rank <= RANDOMIZED_SHARE * size


def leading_eigenpairs(gram: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Eigenvalues (descending, not negative) and eigenvectors (n, k) of a PSD matrix.

    All n of them, or the `rank` leading ones by the randomized method where that pays.
    """
    if rank is not None and is_randomized(len(gram), rank):
        return randomized_eigenpairs(gram, rank)
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def randomized_eigenpairs(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The `rank` leading eigenpairs by subspace iteration (Halko, Martinsson, Tropp 2011).

    With these many power steps the error left over is within 1 % of the best one even for a
    flat spectrum, the worst case; the energies are those of the vectors that were found, so
    the error computed from them is exact.
    """
    generator = torch.Generator(device=gram.device).manual_seed(0)
    columns = rank + OVERSAMPLING
    basis = torch.randn(
        len(gram), columns, dtype=gram.dtype, device=gram.device, generator=generator
    )
    for _ in range(POWER_STEPS):
        basis, _ = torch.linalg.qr(gram @ basis)
    values, rotation = torch.linalg.eigh(basis.T @ gram @ basis)
    leading = rotation.flip(1)[:, :rank]
    return values.flip(0)[:rank].clamp_min(0), basis @ leading
