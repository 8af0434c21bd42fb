"""Reuses the decomposition of a linear for the ranks of many plans."""

from __future__ import annotations

import time

from lrcompress.methods.types import FFN, Decomposition, Factors, LinearSpec, Method


class DecompositionCache:
    """Decompositions of the linears of one model by one method.

    With `keep`, decompositions stay in memory and serve later plans; without it, each one is
    computed again. `saved` counts the seconds that reuse has saved.
    """

    def __init__(self, method: Method, keep: bool = False) -> None:
        self.method, self.keep, self.saved = method, keep, 0.0
        # (linear, weight shape) -> decompositions, and the seconds that each took
        self._cache: dict[tuple[str, tuple[int, ...]], list[tuple[Decomposition, float]]] = {}

    def factors(self, ffn: FFN, linear: LinearSpec, rank: int) -> Factors:
        """Factors of `linear` with its weight in `ffn`.

        The cache key is the name and the shape: weights of one name and shape must be equal.
        """
        weight = ffn.weights[linear.name]
        cached = self._cache.setdefault((linear.name, tuple(weight.shape)), [])
        for decomposition, seconds in cached:
            if decomposition.serves(rank):
                self.saved += seconds
                return decomposition.factors(weight, rank)
        started = time.perf_counter()
        decomposition = self.method.decompose(weight, ffn.statistics[linear.name], rank)
        if self.keep:
            cached.append((decomposition, time.perf_counter() - started))
        return decomposition.factors(weight, rank)
