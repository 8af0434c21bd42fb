"""The decompositions of a model's linears: one serves the ranks of many plans."""

from __future__ import annotations

import time

from lrcompress.methods.types import FFN, Decomposition, Factors, LinearSpec, Method


class DecompositionCache:
    """Of the linears of one model by one method.

    With `keep` each is made once for all plans, at the cost of its memory; without, none is kept.
    `saved` are the seconds that making them again would have taken.
    """

    def __init__(self, method: Method, keep: bool = False) -> None:
        self.method, self.keep, self.saved = method, keep, 0.0
        self._kept: dict[tuple[str, tuple[int, ...]], list[tuple[Decomposition, float]]] = {}

    def factors(self, ffn: FFN, linear: LinearSpec, rank: int) -> Factors:
        """Of `linear` as it is in `ffn`, where equal shapes have to mean equal weights."""
        weight = ffn.weights[linear.name]
        known = self._kept.setdefault((linear.name, tuple(weight.shape)), [])
        for decomposition, seconds in known:
            if decomposition.serves(rank):
                self.saved += seconds
                return decomposition.factors(weight, rank)
        started = time.perf_counter()
        made = self.method.decompose(weight, ffn.statistics[linear.name], rank)
        if self.keep:
            known.append((made, time.perf_counter() - started))
        return made.factors(weight, rank)
