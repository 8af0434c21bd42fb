"""What `factorize` did: exact counts, linears, refined blocks, and what is worth a word."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lrcompress.compression.refined_block import RefinedBlock
from lrcompress.compression.replace_layers import LinearResult
from lrcompress.data.packing import Fingerprint
from lrcompress.methods.plan import Candidates, Plan
from lrcompress.methods.types import Form, LinearSpec

# a budget that is missed by more is worth a word
BUDGET_TOLERANCE = 0.005


@dataclass(frozen=True)
class Counts:
    """Exact numbers of parameters before and after."""

    dense: int
    kept: int

    @property
    def keep_ratio(self) -> float:
        return self.kept / self.dense if self.dense else 1.0

    def to_dict(self) -> dict[str, Any]:
        return {"dense": self.dense, "kept": self.kept, "keep_ratio": self.keep_ratio}


@dataclass(frozen=True)
class Factorization:
    """What `factorize` did. Counts: the selected linears, all FFNs, and the whole model.

    `probed` has by FFN what the probes of its block cost over their estimates, `trials` lists what
    a search for a perplexity tried, `refined` what refinement did.
    """

    linears: tuple[LinearResult, ...]
    selected: Counts
    ffn: Counts
    model: Counts
    calibration: Fingerprint | None
    probed: Mapping[str, float]
    trials: tuple[dict[str, float], ...]
    refined: tuple[RefinedBlock, ...]
    notes: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "counts": {
                "selected": self.selected.to_dict(),
                "ffn": self.ffn.to_dict(),
                "model": self.model.to_dict(),
            },
            "calibration": self.calibration.to_dict() if self.calibration else None,
            "probed": dict(self.probed),
            "trials": list(self.trials),
            "refined": [asdict(block) for block in self.refined],
            "notes": list(self.notes),
            "seconds": round(self.seconds, 1),
            "linears": [linear.to_dict() for linear in self.linears],
        }


def counts(linears: Sequence[LinearSpec], plan: Plan, form: Form) -> Counts:
    """Parameters of `linears`, dense and under `plan`."""
    return Counts(
        sum(linear.dense_parameters for linear in linears),
        sum(plan.parameters(linear, form) for linear in linears),
    )


def probed(choices: Sequence[Candidates]) -> dict[str, float]:
    """The factor of each FFN whose estimates were corrected."""
    return {one.ffn: one.factor for one in choices if one.factor != 1.0}


def warnings_of(
    done: tuple[LinearResult, ...],
    experts: tuple[str, ...],
    scarce: Sequence[tuple[str, int]],
    kept: Counts,
    wanted: float | None,
) -> Iterator[str]:
    """Sentences on what a reader of the counts alone would miss.

    `experts` are tensors that stay dense, `scarce` experts that few calibration tokens reached.
    """
    if all(linear.form is None for linear in done):
        spec = done[0].spec
        yield (
            f"all {len(done)} linears stay dense, because at the budget asked for factors would "
            f"not be smaller: {spec.name} breaks even at rank {spec.break_even_rank:.0f}"
        )
    elif wanted is not None and abs(kept.keep_ratio - wanted) > BUDGET_TOLERANCE:
        yield (
            f"{kept.keep_ratio:.1%} of the selected parameters are kept, not the {wanted:.1%} "
            "asked for: ranks come in steps of --rank-multiple"
        )
    if scarce:
        every = {linear.spec.ffn for linear in done if linear.spec.mixture}
        name, tokens = min(scarce, key=lambda one: one[1])
        yield (
            f"{len(scarce)} of {len(every)} experts were given fewer calibration tokens than they "
            f"have inputs, {name} the fewest with {tokens}: the mean of the experts beside them "
            "stands in for the others; more --num-samples give them more"
        )
    if experts:
        yield (f"{len(experts)} mixture-of-experts tensors stay dense, such as {experts[0]}")
