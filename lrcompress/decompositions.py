"""The decompositions of a model's linears: one serves the ranks of many plans."""

from __future__ import annotations

from lrcompress.protocols import FFN, Decomposition, Factors, LinearSpec, Method


class Decompositions:
    """Of the linears of one model by one method.

    With `keep` each is made once for all plans, at the cost of its memory; without, none is kept.
    """

    def __init__(self, method: Method, keep: bool = False) -> None:
        self.method, self.keep = method, keep
        self._kept: dict[tuple[str, tuple[int, ...]], list[Decomposition]] = {}

    def factors(self, ffn: FFN, linear: LinearSpec, rank: int) -> Factors:
        """Of `linear` as it is in `ffn`: what its name and shape were first given for is kept."""
        weight, statistics = ffn.weights[linear.name], ffn.statistics[linear.name]
        known = self._kept.setdefault((linear.name, tuple(weight.shape)), [])
        found = next((one for one in known if one.serves(rank)), None)
        if found is None:
            found = self.method.decompose(weight, statistics, rank)
            if self.keep:
                known.append(found)
        return found.factors(weight, rank)
