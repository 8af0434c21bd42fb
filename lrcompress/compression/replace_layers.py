"""Carries out a plan: narrowed and low-rank layers in the place of the dense ones."""

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
from lrcompress.methods.decomposition_cache import DecompositionCache
from lrcompress.methods.linalg import pivot, to_float64
from lrcompress.methods.plan import Plan
from lrcompress.methods.types import FFN, Form, LinearSpec, Statistics
from lrcompress.runtime import distributed
from lrcompress.runtime.distributed import map_sharded
from lrcompress.runtime.progress import Progress

# singular values of a linear that are kept for its picture
SPECTRUM = 32


@dataclass(frozen=True)
class LinearResult:
    """What became of one linear: `form` is None where it stayed dense.

    `error` is the squared error relative to the weight, in the metric of the method, of the
    truncation; `largest_coefficient` that of the pivoted form. `spectrum` has singular values of
    the weight in that metric, each with its number from 1 on, down to the smallest known.
    """

    spec: LinearSpec
    form: str | None
    shape: tuple[int, int]
    rank: int | None
    kept: int
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
            "parameters_kept": self.kept,
            "relative_error": self.error,
            "largest_coefficient": self.largest_coefficient,
            "spectrum": [list(value) for value in self.spectrum],
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], spec: LinearSpec) -> Self:
        """What `to_dict` gave for `spec`."""
        form, (rows, columns) = content["form"], content["shape"]
        return cls(
            spec,
            None if form == "dense" else form,
            (rows, columns),
            content["rank"],
            content["parameters_kept"],
            content["relative_error"],
            content["largest_coefficient"],
            tuple((number, value) for number, value in content["spectrum"]),
        )

    @property
    def layout(self) -> dict[str, Any]:
        """What a checkpoint's config keeps of the layer, as in `lowrank.layout`."""
        rank = {} if self.rank is None else {"rank": self.rank}
        return {"form": self.form, "shape": list(self.shape)} | rank


Replacement = tuple[
    LinearResult, nn.Module | None
]  # what was done, and the new layer if there is one


def apply_plan(
    model: nn.Module, prepared: PreparedModel, plan: Plan, form: Form, progress: Progress
) -> tuple[LinearResult, ...]:
    """Replaces the linears of `model` as `plan` says, in place.

    All layers are computed before the first is installed: whatever fails, the model is whole.
    Several processes share the FFNs, and all install all layers.
    """

    def shrunk(specs: tuple[LinearSpec, ...]) -> list[Replacement]:
        own = replace(prepared, linears=specs)
        found = [
            one
            for ffn in own.ffns(model)
            for one in replacements_of_ffn(model, ffn, own, plan, form)
        ]
        return (
            found
            if distributed.world_size() == 1
            else [(w, layer and layer.cpu()) for w, layer in found]
        )

    groups = by_ffn(prepared.linears)
    done = [one for part in map_sharded(groups, shrunk, progress, "Factorizing") for one in part]
    for what, layer in done:
        if layer is not None:
            dense = dense_weight(model.get_submodule(what.spec.name))
            install(model, what.spec.name, layer.to(dense.device))
    return tuple(what for what, _ in done)


def replacements_of_ffn(
    model: nn.Module, ffn: FFN, prepared: PreparedModel, plan: Plan, form: Form
) -> Iterator[Replacement]:
    """What becomes of each linear of `ffn`; nothing is installed."""
    width = plan.widths.get(ffn.name)
    left = ffn
    if width is not None:
        left = prepared.method.narrow(ffn, prepared.channels[ffn.name][:width])
    for spec in ffn.linears:
        yield replacement_of(model, left, spec, prepared.decompositions, plan, form)


def replacement_of(
    model: nn.Module,
    left: FFN,
    spec: LinearSpec,
    decompositions: DecompositionCache,
    plan: Plan,
    form: Form,
) -> Replacement:
    """The new layer of one linear from its weight in `left`, the FFN after narrowing."""
    rank, now = plan.ranks.get(spec.name), plan.spec(spec)
    shape = (now.out_features, now.in_features)
    if rank is None and spec.ffn not in plan.widths:
        return LinearResult(spec, None, shape, None, spec.dense_parameters), None
    dense = model.get_submodule(spec.name)
    layer = empty_like(dense, NARROWED if rank is None else form, shape, rank)
    error = largest = None
    spectrum: tuple[tuple[int, float], ...] = ()
    if isinstance(layer, NarrowedLinear):
        _fill_narrowed(layer, left.weights[spec.name])
    else:
        assert rank is not None
        factors = decompositions.factors(left, spec, rank)
        largest = fill(layer, factors.A, factors.B, _input_sizes(left.statistics[spec.name]))
        error = factors.error / factors.energy if factors.energy > 0 else 0.0
        spectrum = _sampled(factors.spectrum)
    finished = _finished(layer, dense, left.biases[spec.name])
    kind = NARROWED if rank is None else form
    kept = parameter_count(layer)
    return LinearResult(spec, kind, shape, rank, kept, error, largest, spectrum), finished


def _input_sizes(statistics: Statistics) -> Tensor | None:
    """Root mean squares of the inputs (in,), where they were measured; those below the median count
    as the median, since other text may make them larger."""
    if statistics.second_moment is None:
        return None
    sizes = to_float64(statistics.second_moment).diagonal().sqrt()
    median = sizes.median()
    return sizes.clamp_min(median) if median > 0 else None


def _sampled(energies: Tensor) -> tuple[tuple[int, float], ...]:
    """Singular values of some evenly spread numbers, the first and the last among them."""
    values = energies.clamp_min(0).sqrt()
    numbers = torch.linspace(0, len(values) - 1, min(len(values), SPECTRUM)).round().long()
    return tuple((int(n) + 1, float(f"{float(values[n]):.4g}")) for n in numbers)


@torch.no_grad()
def _fill_narrowed(layer: NarrowedLinear, weight: Tensor) -> None:
    layer.weight.copy_(weight)


@torch.no_grad()
def fill(layer: LowRankLinear, A: Tensor, B: Tensor, sizes: Tensor | None = None) -> float | None:
    """Writes W = B A into a low-rank layer; returns the largest pivot coefficient.

    `sizes` (in,) of its inputs make the pivoted form bear rounding better.
    """
    if isinstance(layer, FactoredLinear):
        layer.A.weight.copy_(A)
        layer.B.weight.copy_(B)
        return None
    assert isinstance(layer, PivotedLinear)
    pivoted = pivot(A, B, sizes)
    layer.C.weight.copy_(pivoted.columns)
    layer.Z.weight.copy_(pivoted.coefficients)
    layer.order.copy_(pivoted.order)
    return float(pivoted.coefficients.abs().max())


@torch.no_grad()
def _finished(
    layer: LowRankLinear | NarrowedLinear, dense: nn.Module, bias: Tensor | None
) -> nn.Module:
    if bias is not None and layer.bias is not None:
        layer.bias.copy_(bias)
    for parameter in layer.parameters():
        parameter.requires_grad_(dense.weight.requires_grad)  # type: ignore[arg-type]
    return layer.train(dense.training)
