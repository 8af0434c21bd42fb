"""Carries out a plan: replaces dense layers by narrowed and low-rank ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from lrcompress.compression.planning import PreparedModel, by_ffn
from lrcompress.layers.lowrank import (
    NARROWED,
    FactoredLinear,
    LowRankLinear,
    NarrowedLinear,
    PivotedLinear,
    dense_weight,
    empty_like,
    install,
)
from lrcompress.layers.model_info import parameter_count
from lrcompress.methods.linalg import pivot, to_float64
from lrcompress.methods.plan import Plan
from lrcompress.methods.types import FFN, LinearSpec, OutlierShares, Statistics
from lrcompress.runtime import distributed
from lrcompress.runtime.distributed import map_sharded
from lrcompress.runtime.progress import Progress
from lrcompress.runtime.stage_costs import stage

# singular values recorded of each linear, to draw its spectrum
SPECTRUM_POINTS = 32


@dataclass(frozen=True)
class LinearResult:
    """What became of one linear: `form` and `rank` are None where it stayed dense.

    `shape` is that of W (out, in), `parameters` the exact count now. `outlier_shares` are those of
    the dense linear in calibration. `error` is the squared error of the truncation relative to the
    weight, in the method's metric; `largest_coefficient` is that of the pivoted form. `spectrum`
    has singular values of the weight in that metric, each with its number from 1 on, evenly spread
    from the first to the last that is known.
    """

    spec: LinearSpec
    form: str | None
    shape: tuple[int, int]
    rank: int | None
    parameters: int
    outlier_shares: OutlierShares
    error: float | None = None
    largest_coefficient: float | None = None
    spectrum: tuple[tuple[int, float], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        spec = self.spec
        return {
            "name": spec.name,
            "block": spec.block,
            "role": spec.role,
            "in_features": spec.in_features,
            "out_features": spec.out_features,
            "form": self.form or "dense",
            "shape": list(self.shape),
            "rank": self.rank,
            "parameters_dense": spec.dense_parameters,
            "parameters_kept": self.parameters,
            "relative_error": self.error,
            "largest_coefficient": self.largest_coefficient,
            "spectrum": [list(value) for value in self.spectrum],
            "input_outlier_share": self.outlier_shares.inputs,
            "gradient_outlier_share": self.outlier_shares.gradients,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], spec: LinearSpec) -> Self:
        """The result of `spec` from what `to_dict` returned."""
        form, (rows, columns) = content["form"], content["shape"]
        return cls(
            spec=spec,
            form=None if form == "dense" else form,
            shape=(rows, columns),
            rank=content["rank"],
            parameters=content["parameters_kept"],
            error=content["relative_error"],
            largest_coefficient=content["largest_coefficient"],
            spectrum=tuple((number, value) for number, value in content["spectrum"]),
            outlier_shares=OutlierShares(
                content["input_outlier_share"], content["gradient_outlier_share"]
            ),
        )

    @property
    def layout(self) -> dict[str, Any]:
        """The layer's entry in a checkpoint's config; see `lowrank.layout`."""
        rank = {} if self.rank is None else {"rank": self.rank}
        return {"form": self.form, "shape": list(self.shape)} | rank


@dataclass(frozen=True)
class Replacement:
    """What becomes of one linear; `layer` is the new layer, None where it stays dense."""

    result: LinearResult
    layer: nn.Module | None


def apply_plan(
    model: nn.Module, prepared: PreparedModel, plan: Plan, progress: Progress
) -> tuple[LinearResult, ...]:
    """Replaces the linears of `model` as `plan` says, in place.

    All layers are computed before the first is installed: after an error the model is as it was.
    Several processes share the FFNs, and all install all layers.
    """

    def replacements(specs: tuple[LinearSpec, ...]) -> list[Replacement]:
        part = replace(prepared, linears=specs)
        computed = [
            replacement
            for ffn in part.ffns(model)
            for replacement in replacements_of_ffn(model, ffn, part, plan)
        ]
        return computed if distributed.world_size() == 1 else [_on_cpu(r) for r in computed]

    with stage("factors"):
        groups = map_sharded(by_ffn(prepared.linears), replacements, progress, "Factorizing")
    computed = [replacement for group in groups for replacement in group]
    for replacement in computed:
        if replacement.layer is not None:
            name = replacement.result.spec.name
            dense = dense_weight(model.get_submodule(name))
            install(model, name, replacement.layer.to(dense.device))
    return tuple(replacement.result for replacement in computed)


def _on_cpu(replacement: Replacement) -> Replacement:
    """Its layer can be sent to another process."""
    return replace(replacement, layer=replacement.layer and replacement.layer.cpu())


def replacements_of_ffn(
    model: nn.Module, ffn: FFN, prepared: PreparedModel, plan: Plan
) -> Iterator[Replacement]:
    """The replacement of each linear of the dense `ffn`; nothing is installed."""
    narrowed = prepared.narrowed(ffn, plan)
    for spec in ffn.linears:
        yield replacement_of(model, narrowed, spec, prepared, plan)


def replacement_of(
    model: nn.Module, ffn: FFN, spec: LinearSpec, prepared: PreparedModel, plan: Plan
) -> Replacement:
    """The new layer of the linear `spec` from its weight in `ffn`, which is already narrowed."""
    rank, narrowed_spec = plan.ranks.get(spec.name), plan.spec(spec)
    shape = (narrowed_spec.out_features, narrowed_spec.in_features)
    statistics = ffn.statistics[spec.name]
    result = LinearResult(spec, None, shape, None, spec.dense_parameters, statistics.outlier_shares)
    if rank is None and spec.ffn not in plan.widths:
        return Replacement(result, None)
    dense, form = model.get_submodule(spec.name), NARROWED if rank is None else prepared.form
    layer = empty_like(dense, form, shape, rank)
    result = replace(result, form=form, rank=rank, parameters=parameter_count(layer))
    if isinstance(layer, NarrowedLinear):
        _fill_narrowed(layer, ffn.weights[spec.name])
    else:
        assert rank is not None
        factors = prepared.decompositions.factors(ffn, spec, rank)
        input_sizes = _input_sizes(statistics)
        result = replace(
            result,
            error=factors.error / factors.energy if factors.energy > 0 else 0.0,
            largest_coefficient=fill(layer, factors.A, factors.B, input_sizes),
            spectrum=_sampled(factors.spectrum),
        )
    return Replacement(result, _like_dense(layer, dense, ffn.biases[spec.name]))


def _input_sizes(statistics: Statistics) -> Tensor | None:
    """Root mean squares of the inputs (in,), if they were measured.

    Those below the median count as the median, since other text may make them larger.
    """
    if statistics.second_moment is None:
        return None
    sizes = to_float64(statistics.second_moment).diagonal().sqrt()
    median = sizes.median()
    return sizes.clamp_min(median) if median > 0 else None


def _sampled(energies: Tensor) -> tuple[tuple[int, float], ...]:
    """Some singular values with their numbers, evenly spread, from the first to the last."""
    values = energies.cpu().clamp_min(0).sqrt()
    numbers = torch.linspace(0, len(values) - 1, min(len(values), SPECTRUM_POINTS)).round().long()
    return tuple((int(n) + 1, float(f"{float(values[n]):.4g}")) for n in numbers)


@torch.no_grad()
def _fill_narrowed(layer: NarrowedLinear, weight: Tensor) -> None:
    layer.weight.copy_(weight)


@torch.no_grad()
def fill(layer: LowRankLinear, A: Tensor, B: Tensor, sizes: Tensor | None = None) -> float | None:
    """Writes W = B A, A (rank, in) and B (out, rank), into a low-rank layer.

    Returns the largest pivot coefficient, None for the factored form. `sizes` (in,), the root mean
    squares of the inputs, make the pivoted form lose less to rounding.
    """
    if isinstance(layer, FactoredLinear):
        layer.A.weight.copy_(A)
        layer.B.weight.copy_(B)
        return None
    assert isinstance(layer, PivotedLinear)
    with stage("pivots"):
        pivoted = pivot(A, B, sizes)
    layer.C.weight.copy_(pivoted.columns)
    layer.Z.weight.copy_(pivoted.coefficients)
    layer.order.copy_(pivoted.order)
    return float(pivoted.coefficients.abs().max())


@torch.no_grad()
def _like_dense(
    layer: LowRankLinear | NarrowedLinear, dense: nn.Module, bias: Tensor | None
) -> nn.Module:
    """`layer` with `bias`, and with the mode and the gradient flags of `dense`."""
    if bias is not None and layer.bias is not None:
        layer.bias.copy_(bias)
    for parameter in layer.parameters():
        parameter.requires_grad_(dense.weight.requires_grad)  # type: ignore[arg-type]
    return layer.train(dense.training)
