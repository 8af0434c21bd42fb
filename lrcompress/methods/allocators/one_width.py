"""One width for all FFNs: the widest that the budget allows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lrcompress.methods.plan import Budget, Candidates, Plan


@dataclass(frozen=True)
class OneWidth:
    """The policy of targets that take one width: of the FFNs only the channels still differ.

    FFNs that cannot all be narrowed to one width stay dense. Not in ALLOCATORS, because it gives no
    ranks and meets a budget in steps of the whole model.
    """

    needs_errors: ClassVar[bool] = False

    def allocate(self, candidates: Sequence[Candidates], budget: Budget) -> Plan:
        """The plan for `budget`, which is a keep_ratio; with the narrowest width if none fits."""
        assert budget.keep_ratio is not None
        parameters = _parameters_by_width(candidates)
        if budget.keep_ratio == 1 or not parameters:
            return Plan()
        limit = budget.keep_ratio * sum(ffn.dense_parameters for ffn in candidates)
        fitting = [width for width, total in parameters.items() if total <= limit]
        width = max(fitting, default=min(parameters))
        return Plan({}, {ffn.ffn: width for ffn in candidates})


def _parameters_by_width(candidates: Sequence[Candidates]) -> dict[int, int]:
    """Parameters of all FFNs together, at each width that all of them can be narrowed to."""
    totals: Counter[int] = Counter()
    counts: Counter[int] = Counter()
    for ffn in candidates:
        for shape in ffn.shapes:
            if shape.width is not None:
                counts[shape.width] += 1
                totals[shape.width] += sum(int(curve.parameters[-1]) for curve in shape.curves)
    return {width: totals[width] for width in totals if counts[width] == len(candidates)}
