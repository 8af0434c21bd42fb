"""Numerics: square roots of moments and truncated decompositions in scaled metrics.

Everything here computes in float64, on the device of its input where that device has float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# below this share of the full rank the randomized range finder is cheaper than a full eigh
RANDOMIZED_SHARE = 0.125
RANDOMIZED_MINIMUM = 1024
OVERSAMPLING = 32
POWER_STEPS = 6


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


def roots(metric: Tensor) -> tuple[Tensor, Tensor]:
    """metric^1/2 and metric^-1/2 of a symmetric positive definite matrix, by eigh.

    A metric given by its diagonal, shape (n,), has diagonal roots. Eigenvalues are floored at
    float64 rounding of the largest, so a nearly singular metric gives large, finite inverses.
    """
    if metric.ndim == 1:
        root = metric.clamp_min(_floor(metric)).sqrt()
        return torch.diag(root), torch.diag(1 / root)
    values, vectors = torch.linalg.eigh(metric)
    root = values.clamp_min(_floor(values)).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def _floor(values: Tensor) -> float:
    top = float(values.max())
    return top * len(values) * torch.finfo(values.dtype).eps if top > 0 else 1.0


@dataclass(frozen=True)
class Decomposition:
    """The leading terms of W = B A, ordered by what each adds to the fit in a metric.

    B is (out, k), A is (k, in); `energies[i]` is the squared singular value of term i and
    `total` the squared norm of W in the metric, so that truncation at rank r has squared error
    total - sum(energies[:r]) (Eckart-Young).
    """

    A: Tensor
    B: Tensor
    energies: Tensor
    total: float

    def truncated(self, rank: int) -> tuple[Tensor, Tensor]:
        """(A, B) of the first `rank` terms, each term's norm shared evenly by both factors."""
        A, B = self.A[:rank], self.B[:, :rank]
        balance = (A.norm(dim=1) / B.norm(dim=0)).sqrt()
        balance = torch.where(balance.isfinite() & (balance > 0), balance, 1.0)
        return (A / balance[:, None]).contiguous(), (B * balance).contiguous()

    def error(self, rank: int) -> float:
        return max(self.total - float(self.energies[:rank].sum()), 0.0)


def decompose(
    weight: Tensor, input_metric: Tensor | None = None, rank: int | None = None
) -> Decomposition:
    """Terms of W (out, in) ordered by ‖(W - BA) X^1/2‖², X = `input_metric`.

    X is a symmetric matrix (in, in), its diagonal (in,), or None for the identity. Only the
    eigenproblem of the smaller side is solved. For out <= in that is W X Wᵀ = U S² Uᵀ, and the
    best approximation is the projection U Uᵀ W: X needs no root at all. Otherwise it is
    X^1/2 Wᵀ W X^1/2 = V S² Vᵀ, with W X^1/2 V Vᵀ X^-1/2. With `rank` far below the full rank
    the leading terms come from a randomized range finder instead of a full eigh.
    """
    W = to_float64(weight)
    X = None if input_metric is None else to_float64(input_metric).to(W.device)
    out_features, in_features = W.shape
    if out_features <= in_features:
        gram = _scaled(W, X) @ W.T
        energies, U = leading_eigenpairs(gram, rank)
        return Decomposition(U.T @ W, U, energies, float(gram.trace()))
    if X is None:
        gram = W.T @ W
        energies, V = leading_eigenpairs(gram, rank)
        return Decomposition(V.T, W @ V, energies, float(gram.trace()))
    root, inverse = roots(X)
    scaled = W @ root
    gram = scaled.T @ scaled
    energies, V = leading_eigenpairs(gram, rank)
    return Decomposition(V.T @ inverse, scaled @ V, energies, float(gram.trace()))


def _scaled(W: Tensor, X: Tensor | None) -> Tensor:
    if X is None:
        return W
    return W * X if X.ndim == 1 else W @ X


def leading_eigenpairs(gram: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Eigenvalues (descending, not negative) and eigenvectors (n, k) of a PSD matrix.

    All n of them, or the `rank` leading ones by the randomized method where that pays.
    """
    size = len(gram)
    if rank is not None and size >= RANDOMIZED_MINIMUM and rank <= RANDOMIZED_SHARE * size:
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
