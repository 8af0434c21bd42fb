"""Sums of v vᵀ over tokens, by key, that no outlier token can own.

An expert with few tokens borrows from its mixture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lrcompress.compression.calibration.outliers import clip_scales
from lrcompress.runtime import distributed

# columns of v vᵀ that one product computes
COLUMNS_PER_PRODUCT = 384


@dataclass
class TokenSums:
    """Running sums of v vᵀ over tokens, and the number of tokens, by key.

    Outliers among the vectors count with the largest norm that is none. `sums` are square matrices
    (features, features) of `dtype` whose upper triangle alone is filled: the lower one holds
    partial results. Products are computed in float32. `energies` are the sums of ‖v‖² over the
    vectors as they were.
    """

    dtype: torch.dtype
    sums: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)
    energies: dict[str, Tensor] = field(default_factory=dict)
    _mixture_totals: dict[tuple[str, ...], tuple[Tensor, int]] = field(default_factory=dict)

    def add(self, key: str, vectors: Tensor, norms: Tensor) -> Tensor:
        """Adds v vᵀ of every token in `vectors` (tokens, features), float32, to the sum of `key`.

        `norms` (tokens,) are those of the vectors. Returns the factors (tokens,) in (0, 1] by which
        outliers were scaled down.
        """
        size = vectors.shape[1]
        if key not in self.sums:
            self.sums[key] = self._zeros(size, vectors.device)
            self.tokens[key] = torch.tensor(0)
            self.energies[key] = torch.tensor(0.0, dtype=torch.float64)
        self.tokens[key] += len(vectors)
        self.energies[key] += norms.square().cpu().double().sum()
        scales = clip_scales(norms)
        self._add_products(self.sums[key], vectors * scales[:, None])
        return scales

    def _add_products(self, total: Tensor, v: Tensor) -> None:
        size = v.shape[1]
        for begin in range(0, size, COLUMNS_PER_PRODUCT):
            columns = slice(begin, begin + COLUMNS_PER_PRODUCT)
            product = v[:, columns].T @ v[:, begin:]
            total[columns, begin:] += product.to(total.device)

    def outlier_share(self, key: str) -> float | None:
        """The share of the energy Σ ‖v‖² that the sum of `key` leaves out.

        0 where all vectors are zero, None for an unknown key.
        """
        if key not in self.energies:
            return None
        energy = float(self.energies[key])
        if energy == 0:
            return 0.0
        return max(1 - float(self.sums[key].diagonal().double().sum()) / energy, 0.0)

    def count(self, key: str) -> int:
        """The number of tokens in the sum of `key`; 0 for an unknown key."""
        return int(self.tokens[key]) if key in self.tokens else 0

    def all_reduce(self, sizes: dict[str, int], device: torch.device) -> None:
        """Replaces the sums of this process by those over all processes.

        `sizes` are the features by key: a process that saw no token of a key adds zeros.
        """
        distributed.all_reduce_sums(self.sums, lambda key: self._zeros(sizes[key], device))
        distributed.all_reduce_sums(self.tokens, lambda _: torch.zeros((), dtype=torch.int64))
        distributed.all_reduce_sums(self.energies, lambda _: torch.zeros((), dtype=torch.float64))

    def padded_by_mixture(
        self, key: str, mixture: Sequence[str], size: int, shared_features: bool
    ) -> Tensor:
        """The sum of one expert, padded with the mean of its mixture to `size` tokens.

        `key` is the expert's, `mixture` are the keys of all experts, `size` its features: with
        fewer tokens than features the sum would be singular. With `shared_features`, as those of
        the hidden state, each missing token counts as the mixture's mean of v vᵀ. The channels of
        different experts are unrelated; without `shared_features` it counts as the mean of all
        their squares, times the identity.
        """
        mixture_sum, mixture_tokens = self._mixture_total(tuple(mixture), size)
        expert_sum = self.sums.get(key, torch.zeros_like(mixture_sum))
        missing = size - self.count(key)
        if missing <= 0 or not mixture_tokens:
            return expert_sum
        mean = mixture_sum / mixture_tokens
        if not shared_features:
            mean = torch.eye(size, dtype=mean.dtype, device=mean.device) * mean.diagonal().mean()
        return expert_sum + missing * mean

    def _mixture_total(self, keys: tuple[str, ...], size: int) -> tuple[Tensor, int]:
        """Sum and number of tokens over all `keys`; zeros where no token reached any of them."""
        if keys not in self._mixture_totals:
            sums = [self.sums[key] for key in keys if key in self.sums]
            total = torch.zeros_like(sums[0]) if sums else torch.zeros(size, size)
            for expert_sum in sums:
                total += expert_sum
            self._mixture_totals[keys] = total, sum(map(self.count, keys))
        return self._mixture_totals[keys]

    def _zeros(self, size: int, device: torch.device) -> Tensor:
        """On the CPU where the device does not support the dtype."""
        unsupported = device.type == "mps" and self.dtype == torch.float64
        return torch.zeros(size, size, dtype=self.dtype, device="cpu" if unsupported else device)
