"""Outlier tokens: vectors so large that a few of them would make up a whole second moment.

Most models have attention sinks (Xiao et al. 2023, arXiv 2309.17453): a few tokens, such as the
first one or full stops, with activations or gradients thousands of times those of other tokens
(massive activations; Sun et al. 2024, arXiv 2402.17762). A mean of v vᵀ over all tokens is then
that of the sinks and says nothing about the other tokens. So the mean takes every vector with at
most OUTLIER_NORM times the median norm, as Huber's and Maronna's estimators of scatter do (Maronna
1976, Annals of Statistics 4). What this leaves out is kept apart as the rows of a small matrix: few
tokens whose function has to be kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lrcompress.runtime import distributed

# a vector is an outlier from this multiple of the median norm of its sample on
OUTLIER_NORM = 4.0
# the largest norm of an outlier row, relative to that limit: keeps float64 products exact enough
MAX_ROW_NORM = 1e4


def norm_limit(norms: Tensor) -> Tensor:
    """The norm from which on a vector counts as an outlier among vectors with `norms` (tokens,).

    Tokens with a zero vector do not count: behind the last block that reads a token, its gradient
    is zero. Infinity where all are zero.
    """
    limit: Tensor = OUTLIER_NORM * norms.where(norms > 0, torch.nan).nanmedian()
    return limit.nan_to_num(nan=torch.inf, posinf=torch.inf)


def clip_scales(norms: Tensor) -> Tensor:
    """Factors (tokens,) in (0, 1] that bring vectors of `norms` (tokens,) down to `norm_limit`."""
    tiny = torch.finfo(norms.dtype).tiny
    scales: Tensor = norm_limit(norms) / norms.clamp_min(tiny)
    return scales.clamp_max(1.0)


def outlier_rows(vectors: Tensor, weights: Tensor, norms: Tensor) -> Tensor:
    """sqrt(weight) v of the `vectors` (tokens, features) with positive `weights` (tokens,).

    `norms` (tokens,) are those of the vectors. That of a row is at most MAX_ROW_NORM times their
    `norm_limit`.
    """
    chosen = weights > 0
    factors = weights[chosen].sqrt()
    row_norms = (factors * norms[chosen]).clamp_min(torch.finfo(norms.dtype).tiny)
    factors *= (MAX_ROW_NORM * norm_limit(norms) / row_norms).clamp_max(1.0)
    rows: Tensor = vectors[chosen] * factors[:, None]
    return rows


@dataclass
class OutlierRows:
    """Rows R (rows, features), float32, by key; Rᵀ R is the sum of what the means leave out.

    There are never more rows than twice the features: a QR factorization replaces them by as many
    rows as features that have the same product.
    """

    rows: dict[str, Tensor] = field(default_factory=dict)

    def add(self, key: str, rows: Tensor) -> None:
        """Adds `rows` (rows, features) to those of `key`."""
        if not len(rows):
            return
        if key in self.rows:
            rows = torch.cat([self.rows[key], rows])
        features = rows.shape[1]
        if len(rows) > 2 * features:
            rows = torch.linalg.qr(rows, mode="r").R
        self.rows[key] = rows

    def product(self, key: str) -> Tensor | None:
        """Rᵀ R (features, features), float64; None where no row was added."""
        if key not in self.rows:
            return None
        rows = self.rows[key]
        # MPS has no float64
        rows = (rows.cpu() if rows.device.type == "mps" else rows).double()
        return rows.T @ rows

    def all_gather(self) -> None:
        """Adds the rows of all processes to those of this one, in the order of their ranks."""
        if distributed.world_size() == 1:
            return
        parts = distributed.all_gather({key: rows.cpu() for key, rows in self.rows.items()})
        devices: Mapping[str, torch.device] = {k: rows.device for k, rows in self.rows.items()}
        self.rows = {}
        for part in parts:
            for key, rows in part.items():
                self.add(key, rows.to(devices.get(key, rows.device)))
