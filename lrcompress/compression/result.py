"""What `factorize` returns: exact counts, what became of each linear, and warnings."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from torch import nn

from lrcompress.compression.planning import PreparedModel
from lrcompress.compression.refined_block import RefinedBlock
from lrcompress.compression.replace_layers import LinearResult
from lrcompress.data.packing import Fingerprint
from lrcompress.layers.ffn_layouts import FFNLinears, find_ffns
from lrcompress.layers.model_info import parameter_count
from lrcompress.methods.plan import Plan
from lrcompress.methods.types import Form, LinearSpec, OutlierShares
from lrcompress.reporting.block_calibration import largest_by_block

# a keep_ratio that differs by more from the requested one gets a warning
BUDGET_TOLERANCE = 0.005
# outliers with a larger share of the energy of a block's inputs or gradients get a note
NOTED_OUTLIER_SHARE = 0.5


@dataclass(frozen=True)
class ParameterCounts:
    """Exact numbers of parameters: of the dense model, and kept after compression."""

    dense: int
    kept: int

    @property
    def keep_ratio(self) -> float:
        return self.kept / self.dense if self.dense else 1.0

    def to_dict(self) -> dict[str, Any]:
        return {"dense": self.dense, "kept": self.kept, "keep_ratio": self.keep_ratio}


@dataclass(frozen=True)
class Factorization:
    """What `factorize` did. `selected`, `ffn` and `model` count the selected linears, all FFNs
    and the whole model.

    `calibration` is None where no text was read. `probed` has, by FFN, the factor by which probes
    corrected its estimates, if they did. `trials` are the keep_ratios that a search for a
    perplexity tried. `notes` are warnings. `seconds` is the wall time, and `stages` has what each
    stage took of it, as `StageCosts.to_dict` gives it.
    """

    linears: tuple[LinearResult, ...]
    selected: ParameterCounts
    ffn: ParameterCounts
    model: ParameterCounts
    calibration: Fingerprint | None
    probed: Mapping[str, float]
    trials: tuple[dict[str, float], ...]
    refined: tuple[RefinedBlock, ...]
    notes: tuple[str, ...]
    seconds: float
    stages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

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
            "stages": {name: dict(cost) for name, cost in self.stages.items()},
            "linears": [linear.to_dict() for linear in self.linears],
        }


@dataclass(frozen=True)
class DenseModel:
    """What is counted of the dense model, before a layer is replaced, and when work on it began."""

    ffns: FFNLinears
    parameters: int
    started: float

    @classmethod
    def of(cls, model: nn.Module, started: float) -> Self:
        """`started` is a time of `time.perf_counter`."""
        return cls(find_ffns(model), parameter_count(model), started)


def factorization_of(
    model: nn.Module,
    before: DenseModel,
    prepared: PreparedModel,
    linears: tuple[LinearResult, ...],
    refined: tuple[RefinedBlock, ...],
    calibration: Fingerprint | None,
    trials: tuple[dict[str, float], ...] = (),
) -> Factorization:
    """The result for `model`, whose layers were just replaced by the plan of `prepared`.

    `before` is the same model while it was dense; `calibration` is None where no text was read.
    """
    plan, form = prepared.plan, prepared.form
    assert plan is not None
    selected = _planned_counts(prepared.linears, plan, form)
    return Factorization(
        linears=linears,
        selected=selected,
        ffn=_planned_counts(before.ffns.linears, plan, form),
        model=ParameterCounts(before.parameters, parameter_count(model)),
        calibration=calibration,
        probed={c.ffn: c.factor for c in prepared.candidates if c.factor != 1.0},
        trials=trials,
        refined=refined,
        notes=tuple(_warnings(prepared, linears, before.ffns.experts, selected)),
        seconds=time.perf_counter() - before.started,
    )


def _planned_counts(linears: Sequence[LinearSpec], plan: Plan, form: Form) -> ParameterCounts:
    """Parameters of `linears`, dense and under `plan`."""
    return ParameterCounts(
        sum(linear.dense_parameters for linear in linears),
        sum(plan.parameters(linear, form) for linear in linears),
    )


def _warnings(
    prepared: PreparedModel,
    linears: Sequence[LinearResult],
    dense_experts: Sequence[str],
    selected: ParameterCounts,
) -> Iterator[str]:
    """Sentences on what a reader of the counts alone would miss.

    `dense_experts` are the names of expert tensors, which stay dense.
    """
    yield from prepared.notes
    yield from _budget_warning(prepared, linears, selected)
    undersampled = [] if prepared.moments is None else prepared.moments.undersampled_experts()
    if undersampled:
        experts = {linear.spec.ffn for linear in linears if linear.spec.mixture}
        name, tokens = min(undersampled, key=lambda expert: expert[1])
        yield (
            f"{len(undersampled)} of {len(experts)} experts were given fewer calibration tokens "
            f"than they have inputs, {name} the fewest with {tokens}: the mean of their mixture "
            "stands in for the missing tokens; a larger --num-samples gives them more"
        )
    if outliers := list(_outliers(linears)):
        yield (
            "a few outlier tokens, such as attention sinks, had more than half "
            f"{' and '.join(outliers)}: they were scaled down in the moments and kept as "
            "directions of their own"
        )
    if dense_experts:
        yield (
            f"{len(dense_experts)} mixture-of-experts tensors stay dense, such as "
            f"{dense_experts[0]}"
        )


def _budget_warning(
    prepared: PreparedModel, linears: Sequence[LinearResult], selected: ParameterCounts
) -> Iterator[str]:
    """What became of the budget, if it is not met."""
    keep_ratio, grid = prepared.keep_ratio, prepared.grid
    if all(linear.form is None for linear in linears) and grid.low_rank:
        spec = linears[0].spec
        yield (
            f"all {len(linears)} linears stay dense, because at the requested budget factors would "
            f"not be smaller: {spec.name} breaks even at rank {spec.break_even_rank:.0f}"
        )
    elif keep_ratio is not None and abs(selected.keep_ratio - keep_ratio) > BUDGET_TOLERANCE:
        steps = "ranks come in steps of --rank-multiple"
        if not grid.low_rank:
            steps = f"widths come in steps of {grid.width_step} channels"
        yield (
            f"{selected.keep_ratio:.1%} of the selected parameters are kept, not the requested "
            f"{keep_ratio:.1%}: {steps}"
        )


def _outliers(linears: Sequence[LinearResult]) -> Iterator[str]:
    """Where outliers had more than half of the energy of inputs, and of gradients."""
    for kind in OutlierShares._fields:
        shares = ((linear.spec.block, getattr(linear.outlier_shares, kind)) for linear in linears)
        largest = largest_by_block(shares)
        noted = [share for share in largest.values() if share > NOTED_OUTLIER_SHARE]
        if noted:
            worst = max(largest, key=largest.__getitem__)
            yield (
                f"of the energy of {kind} in {len(noted)} of {len(largest)} blocks "
                f"({largest[worst]:.1%} in block {worst})"
            )
