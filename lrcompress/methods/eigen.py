"""Leading eigenpairs of large symmetric matrices."""

from __future__ import annotations

import torch
from torch import Tensor

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
