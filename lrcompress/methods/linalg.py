"""Numerics: square roots of moments, truncated SVD in weighted norms, and pivoted factors.

Everything computes in float64, on the device of the input where that device has float64; only
the products of `nested_grams` are in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lrcompress.methods.types import Factors

# pivots are exchanged, at most this often, until no coefficient is larger
COEFFICIENT_LIMIT, MAX_EXCHANGES = 1.5, 64
# the randomized range finder is cheaper than a full eigh from this size on, up to this share of
# the full rank
RANDOMIZED_MINIMUM = 1024
RANDOMIZED_SHARE = 0.125
# extra columns and power iterations of the randomized range finder
OVERSAMPLING = 32
POWER_STEPS = 6


def to_float64(matrix: Tensor) -> Tensor:
    """`matrix` in float64; on the CPU where its device has no float64."""
    if matrix.device.type == "mps":
        matrix = matrix.cpu()
    return matrix.to(torch.float64)


def damped(moment: Tensor, damping: float) -> Tensor:
    """moment + damping * mean(diag(moment)) * I: positive definite; I if the moment is zero."""
    mean = moment.diagonal().mean()
    if mean == 0:
        return torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    result = moment.clone()
    result.diagonal().add_(damping * mean)
    return result


def shrunk(moment: Tensor, shrinkage: float) -> Tensor:
    """(1 - shrinkage) moment + shrinkage diag(moment): scales the correlations down."""
    if shrinkage == 0:
        return moment
    result = (1 - shrinkage) * moment
    result.diagonal().copy_(moment.diagonal())
    return result


def with_outliers(moment: Tensor, outliers: Tensor | None) -> Tensor:
    """The moment of all tokens, from that of most tokens and from what outliers add to it.

    Add outliers after shrinking and damping: their directions are known exactly, and a share of
    their size would exceed all that the moment says of other tokens.
    """
    return moment if outliers is None else moment + to_float64(outliers).to(moment.device)


def roots(metric: Tensor) -> tuple[Tensor, Tensor]:
    """metric^1/2 and metric^-1/2 of a symmetric positive definite matrix (n, n), by eigh.

    Eigenvalues have a lower limit, the rounding error of the largest: a nearly singular metric
    gives a large but finite inverse.
    """
    values, vectors = torch.linalg.eigh(metric)
    root = values.clamp_min(_floor(values)).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def _floor(values: Tensor) -> float:
    """Eigenvalues below this are rounding errors of the largest; 1 where all are zero."""
    largest = float(values.max())
    return largest * len(values) * torch.finfo(values.dtype).eps if largest > 0 else 1.0


class WeightedNorm:
    """The norm ‖W‖² = tr(Wᵀ M W), M a symmetric positive definite matrix (n, n) or diagonal (n,).

    The root L with L Lᵀ = M is computed once. Any root gives the same factors, because two roots
    differ by an orthogonal matrix on the right. L is the Cholesky factor; where rounding would
    make Cholesky fail or its inverse overflow, L is the symmetric square root.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = to_float64(matrix)

    @cached_property
    def _root(self) -> tuple[Tensor, Tensor | None]:
        """L, and its inverse where L is not triangular. Vectors where M is a diagonal."""
        matrix = self.matrix
        if matrix.ndim == 1:
            root = matrix.clamp_min(_floor(matrix)).sqrt()
            return root, 1 / root
        lower, failed = torch.linalg.cholesky_ex(matrix)
        floor = _floor(matrix.diagonal())
        if not bool(failed) and float(lower.diagonal().min()) ** 2 > floor:
            return lower, None
        return roots(matrix)

    def multiply_right(self, W: Tensor) -> Tensor:
        """W M, for W of shape (k, n)."""
        matrix = self.matrix.to(W.device)
        product: Tensor = W * matrix if matrix.ndim == 1 else W @ matrix
        return product

    def scale(self, W: Tensor) -> Tensor:
        """Lᵀ W, for W of shape (n, k)."""
        root = self._root[0].to(W.device)
        return root[:, None] * W if root.ndim == 1 else root.T @ W

    def unscale(self, U: Tensor) -> tuple[Tensor, Tensor]:
        """L⁻ᵀ U and L U, for U of shape (n, k)."""
        root, inverse = self._root
        root = root.to(U.device)
        if root.ndim == 1:
            return U / root[:, None], root[:, None] * U
        if inverse is None:
            return torch.linalg.solve_triangular(root.T, U, upper=True), root @ U
        return inverse.to(U.device) @ U, root @ U


@dataclass(frozen=True)
class TruncatedSVD:
    """The k leading singular terms of W (out, in) in a weighted norm, largest first.

    Truncation is a projection of W: L_r R_rᵀ W, or W R_r L_rᵀ if `transposed` (out > in). `left` L
    and `right` R have shape (min(out, in), k), so that W need not stay in memory.
    `energies[i]` is the squared singular value of term i, and `total` is the squared norm of W.
    Truncation at rank r has the squared error total - sum(energies[:r]) (Eckart-Young).
    """

    left: Tensor
    right: Tensor
    energies: Tensor
    total: float
    transposed: bool

    def serves(self, rank: int) -> bool:
        """Whether `decompose` for that rank alone would give the same terms."""
        size, terms = self.left.shape
        return rank == terms or (terms == size and not is_randomized(size, rank))

    def factors(self, weight: Tensor, rank: int) -> Factors:
        """Factors from the first `rank` terms; `weight` is the matrix that was decomposed.

        Row i of A and column i of B get the same norm.
        """
        A, B = self._terms(to_float64(weight), rank)
        balance = (A.norm(dim=1) / B.norm(dim=0)).sqrt()
        balance = torch.where(balance.isfinite() & (balance > 0), balance, 1.0)
        A, B = (A / balance[:, None]).contiguous(), (B * balance).contiguous()
        return Factors(A, B, self.error(rank), self.total, self.energies)

    def _terms(self, W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        left, right = self.left[:, :rank], self.right[:, :rank]
        return (left.T, W @ right) if self.transposed else (right.T @ W, left)

    def error(self, rank: int) -> float:
        """Squared error of truncation at `rank`."""
        return max(self.total - float(self.energies[:rank].sum()), 0.0)


def decompose(
    weight: Tensor,
    input_metric: WeightedNorm | None = None,
    output_metric: WeightedNorm | None = None,
    rank: int | None = None,
) -> TruncatedSVD:
    """The SVD of W (out, in) that minimizes ‖G^1/2 (W - BA) X^1/2‖² at every rank.

    X (in, in) is the input metric, G (out, out) the output metric; None stands for the identity.
    Only the eigenproblem of the smaller side is solved, and only that side's metric needs a root L.
    out <= in: Lᵀ W X Wᵀ L = U S² Uᵀ with L Lᵀ = G; the best approximation is L⁻ᵀ U Uᵀ Lᵀ W.
    out > in: Lᵀ Wᵀ G W L = V S² Vᵀ with L Lᵀ = X; the best approximation is W L V Vᵀ L⁻¹.
    With a `rank` far below the full rank, the leading terms come from a randomized range finder
    instead of a full eigh.
    """
    W, column_metric, row_metric, transposed = _sides(weight, input_metric, output_metric)
    gram = _gram(W, column_metric, row_metric)
    energies, U = leading_eigenpairs(gram, rank)
    left, right = U, U
    if row_metric is not None:
        left, right = row_metric.unscale(U)
    return TruncatedSVD(
        left=left,
        right=right,
        energies=energies,
        total=float(gram.trace()),
        transposed=transposed,
    )


def spectrum(
    weight: Tensor,
    input_metric: WeightedNorm | None = None,
    output_metric: WeightedNorm | None = None,
) -> Tensor:
    """All energies of `decompose`, descending, without the terms: a third of the work."""
    W, column_metric, row_metric, _ = _sides(weight, input_metric, output_metric)
    return energies(_gram(W, column_metric, row_metric))


def energies(gram: Tensor) -> Tensor:
    """Eigenvalues (n,) of a PSD matrix (n, n), descending and >= 0."""
    values: Tensor = torch.linalg.eigvalsh(gram)
    return values.flip(0).clamp_min(0)


def error_curve(spectrum: Tensor) -> Tensor:
    """Squared error (n + 1,) of truncation at every rank 0 .. n, from all n energies."""
    tails = spectrum.flip(0).cumsum(0).flip(0)
    return torch.cat([tails, tails.new_zeros(1)])


def nested_grams(W: Tensor, metric: Tensor, groups: Sequence[Tensor]) -> Iterator[Tensor]:
    """W_Jᵀ M_JJ W_J (in, in), J being the rows of the first 1, 2, ... of `groups`.

    W has shape (out, in) and M (out, out). All of them together take the products of the last one.
    These are computed in float32 and summed in float64. M is scaled to a diagonal of ones, and the
    columns of W to one norm: so each entry is exact relative to its columns, however large or
    different these are.
    """
    sizes = _nonzero(metric.diagonal().sqrt())
    scaled = W * sizes[:, None]
    norms = _nonzero(scaled.norm(dim=0))
    V = (scaled / norms).float()

    def correlations(rows: Tensor, columns: Tensor) -> Tensor:
        return (metric[rows][:, columns] / sizes[rows, None] / sizes[columns]).float()

    gram = W.new_zeros(W.shape[1], W.shape[1])
    for index, rows in enumerate(groups):
        image = correlations(rows, rows) @ V[rows] / 2
        if index:
            before = torch.cat(list(groups[:index]))
            image += correlations(rows, before) @ V[before]
        half = (V[rows].T @ image).to(gram.dtype)
        gram = gram + half + half.T
        yield gram * norms[:, None] * norms


def _nonzero(sizes: Tensor) -> Tensor:
    """`sizes` to divide by: 1 where they are zero."""
    return torch.where(sizes > 0, sizes, 1.0)


def _sides(
    weight: Tensor, X: WeightedNorm | None, G: WeightedNorm | None
) -> tuple[Tensor, WeightedNorm | None, WeightedNorm | None, bool]:
    """W or Wᵀ with no more rows than columns, its column and row metrics, and whether it is Wᵀ."""
    W = to_float64(weight)
    if W.shape[0] <= W.shape[1]:
        return W, X, G, False
    return W.T, G, X, True


def _gram(W: Tensor, column_metric: WeightedNorm | None, row_metric: WeightedNorm | None) -> Tensor:
    """Lᵀ W M Wᵀ L, with M the column metric and L the root of the row metric."""
    scaled = W if row_metric is None else row_metric.scale(W)
    return (scaled if column_metric is None else column_metric.multiply_right(scaled)) @ scaled.T


@dataclass(frozen=True)
class Pivoted:
    """The product B A in the form C [I Z] Pᵀ.

    `columns` C (out, r) are r columns of the product, the pivots. `coefficients` Z (r, in - r) make
    the other columns from them. `order` (in,) is the permutation P: the indices of the pivots, then
    of the other columns.
    """

    columns: Tensor
    coefficients: Tensor
    order: Tensor


def pivot(A: Tensor, B: Tensor, scale: Tensor | None = None) -> Pivoted:
    """Converts A (r, in) and B (out, r) to the pivoted form, which has r(out + in - r) numbers.

    The pivots make the volume of their columns of A large, which keeps the coefficients small
    (PIFA, arXiv 2505.02443, stores rows in the same way). `scale` (in,) holds the positive
    sizes of the inputs. With it, coefficients are small relative to these sizes and large inputs
    become pivots, so that rounding the stored numbers changes the outputs little.
    """
    rank, A = len(A), to_float64(A)
    sizes = A.new_ones(A.shape[1]) if scale is None else to_float64(scale).to(A.device)
    coefficients, order = _interpolation(A * sizes)
    pivots, others = order[:rank], order[rank:]
    columns = to_float64(B).to(A.device) @ A[:, pivots]
    return Pivoted(columns, coefficients * sizes[pivots, None] / sizes[others], order)


def _interpolation(A: Tensor) -> tuple[Tensor, Tensor]:
    """Z (r, n - r) and an order (n,) of the columns of A (r, n), with r pivots first.

    A_others = A_pivots Z. LU with partial pivoting chooses the pivots. Then, as long as a
    coefficient is above the limit, its column takes the place of its pivot (maxvol; Goreinov et al.
    2010, "How to find a good submatrix"). This holds for A of any rank, because the factor that Z
    comes from has ones on its diagonal.
    """
    rank = len(A)
    factors, swaps, _ = torch.linalg.lu_factor_ex(A.T)
    order = torch.arange(A.shape[1])
    for row, swapped in enumerate((swaps - 1).tolist()):
        order[[row, swapped]] = order[[swapped, row]]
    lower, rest = factors[:rank].T, factors[rank:].T
    Z = torch.linalg.solve_triangular(lower, rest, upper=True, unitriangular=True)
    for _ in range(MAX_EXCHANGES if Z.numel() else 0):
        pivot_index, column = divmod(int(Z.abs().argmax()), Z.shape[1])
        if abs(float(Z[pivot_index, column])) <= COEFFICIENT_LIMIT:
            break
        _exchange(Z, pivot_index, column)
        order[[pivot_index, rank + column]] = order[[rank + column, pivot_index]]
    return Z, order.to(A.device)


def _exchange(Z: Tensor, pivot_index: int, column: int) -> None:
    """The coefficients, in place, after `column` and the pivot have changed places."""
    coefficient = float(Z[pivot_index, column])
    row, change = Z[pivot_index] / coefficient, Z[:, column].clone()
    Z.addr_(change, row, alpha=-1)
    Z[pivot_index] = row
    Z[:, column] = -change / coefficient
    Z[pivot_index, column] = 1 / coefficient


def is_randomized(size: int, rank: int) -> bool:
    """Whether `rank` eigenpairs of a (size, size) matrix come from the randomized method."""
    return size >= RANDOMIZED_MINIMUM and rank <= RANDOMIZED_SHARE * size


def leading_eigenpairs(gram: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Eigenvalues (k,), descending and >= 0, and eigenvectors (n, k) of a PSD matrix (n, n).

    All of them (k = n), or the `rank` leading ones where the randomized method is cheaper.
    """
    if rank is not None and is_randomized(len(gram), rank):
        return randomized_eigenpairs(gram, rank)
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def randomized_eigenpairs(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The `rank` leading eigenpairs by subspace iteration (Halko, Martinsson, Tropp 2011).

    With POWER_STEPS steps the truncation error is within 1 % of the optimum even for a flat
    spectrum, the worst case. The eigenvalues belong to the vectors that are returned, so an error
    computed from them is exact. The random numbers have a fixed seed.
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
