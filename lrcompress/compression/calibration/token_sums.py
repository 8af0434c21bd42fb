"""Sums over tokens, also of experts, each of which sees only the tokens that a router sends it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lrcompress.runtime import distributed


@dataclass
class TokenSums:
    """Running sums of v vᵀ over tokens, by key, and the numbers of tokens.

    `of` holds upper triangles (features, features) alone.
    """

    of: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)
    _pools: dict[tuple[str, ...], tuple[Tensor, int]] = field(default_factory=dict)

    def count(self, key: str) -> int:
        return int(self.tokens[key]) if key in self.tokens else 0

    def add_up(self, sizes: dict[str, int], dtype: torch.dtype, device: torch.device) -> None:
        """Sums over all processes in place of those of this one; `sizes` are features by key."""
        distributed.all_reduce_sums(self.of, lambda key: zeros(sizes[key], dtype, device))
        distributed.all_reduce_sums(self.tokens, lambda _: torch.zeros((), dtype=torch.int64))

    def filled_up(self, key: str, mixture: Sequence[str], size: int, alike: bool) -> Tensor:
        """The sum of `key`, filled up to as many tokens as features by its mixture's mean.

        `mixture` are the keys of all its experts, `key` among them. Where their features are
        `alike`, as those of the hidden state are, the mean is that of v vᵀ. Channels of one
        expert have nothing to do with another's, and the mean is then that of all their squares.
        """
        everyone, count = self._pool(tuple(mixture), size)
        own, missing = self.of.get(key, torch.zeros_like(everyone)), size - self.count(key)
        if missing <= 0 or not count:
            return own
        mean = everyone / count
        if not alike:
            mean = torch.eye(size, dtype=mean.dtype, device=mean.device) * mean.diagonal().mean()
        return own + missing * mean

    def _pool(self, keys: tuple[str, ...], size: int) -> tuple[Tensor, int]:
        """Sum and tokens of all `keys`; zeros where no token came at all."""
        if keys not in self._pools:
            reached = [self.of[key] for key in keys if key in self.of]
            total = torch.zeros_like(reached[0]) if reached else torch.zeros(size, size)
            for one in reached:
                total += one
            self._pools[keys] = total, sum(map(self.count, keys))
        return self._pools[keys]


def zeros(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """On the CPU where the device does not have `dtype`."""
    place = "cpu" if device.type == "mps" and dtype == torch.float64 else device
    return torch.zeros(size, size, dtype=dtype, device=place)
