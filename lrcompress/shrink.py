"""Carries out a plan: narrowed and low-rank layers in the place of the dense ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.linalg import pivot
from lrcompress.lowrank import (
    NARROWED,
    FactoredLinear,
    LowRankLinear,
    NarrowedLinear,
    PivotedLinear,
    empty_like,
    install,
)
from lrcompress.prepare import Prepared
from lrcompress.protocols import FFN, Factors, Form, LinearSpec, Plan, Progress
from lrcompress.sizes import parameter_count


@dataclass(frozen=True)
class ShrunkLinear:
    """What became of one linear: `form` is None where it stayed dense.

    `error` is the squared error relative to the weight, in the metric of the method, of the
    truncation; `largest_coefficient` that of the pivoted form.
    """

    spec: LinearSpec
    form: str | None
    shape: tuple[int, int]
    rank: int | None
    kept: int
    error: float | None
    largest_coefficient: float | None = None

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
        }


def shrink(
    model: nn.Module, prepared: Prepared, plan: Plan, form: Form, progress: Progress
) -> tuple[ShrunkLinear, ...]:
    """Replaces the linears of `model` as `plan` says, in place.

    All layers are computed before the first is installed: whatever fails, the model is whole.
    """
    layers: dict[str, nn.Module] = {}
    done = tuple(_layers(model, prepared, plan, form, layers, progress))
    for name, layer in layers.items():
        install(model, name, layer)
    return done


def _layers(
    model: nn.Module,
    prepared: Prepared,
    plan: Plan,
    form: Form,
    layers: dict[str, nn.Module],
    progress: Progress,
) -> Iterator[ShrunkLinear]:
    """What becomes of each linear; its new layer, if it gets one, goes into `layers`."""
    for ffn in progress(prepared.ffns(model), "Factorizing", len(prepared.choices)):
        width = plan.widths.get(ffn.name)
        if width is None:
            left = ffn
        else:
            left = prepared.method.narrow(ffn, prepared.channels[ffn.name][:width])
        for spec, now in zip(ffn.linears, left.linears, strict=True):
            rank = plan.ranks.get(spec.name)
            if rank is None and width is None:
                yield ShrunkLinear(spec, None, _shape(spec), None, spec.dense_parameters, None)
                continue
            kind = form if rank is not None else NARROWED
            dense = model.get_submodule(spec.name)
            layer = empty_like(dense, kind, _shape(now), rank)
            if rank is None:
                yield _narrow(layer, left, spec, now)
            else:
                yield _truncate(layer, prepared, left, spec, now, rank)
            layers[spec.name] = _finished(layer, dense, left.biases[spec.name])


def _shape(spec: LinearSpec) -> tuple[int, int]:
    return spec.out_features, spec.in_features


def _truncate(
    layer: LowRankLinear | NarrowedLinear,
    prepared: Prepared,
    ffn: FFN,
    spec: LinearSpec,
    now: LinearSpec,
    rank: int,
) -> ShrunkLinear:
    assert isinstance(layer, LowRankLinear)
    factors = prepared.method.factorize(ffn.weights[spec.name], ffn.statistics[spec.name], rank)
    largest = _fill(layer, factors)
    error = factors.error / factors.energy if factors.energy > 0 else 0.0
    kept = parameter_count(layer)
    return ShrunkLinear(spec, layer.form, _shape(now), rank, kept, error, largest)


@torch.no_grad()
def _fill(layer: nn.Module, factors: Factors) -> float | None:
    """Writes W ~ B A into a low-rank layer; returns the largest pivot coefficient."""
    if isinstance(layer, FactoredLinear):
        layer.A.weight.copy_(factors.A)
        layer.B.weight.copy_(factors.B)
        return None
    assert isinstance(layer, PivotedLinear)
    pivoted = pivot(factors.A, factors.B)
    layer.C.weight.copy_(pivoted.columns)
    layer.Z.weight.copy_(pivoted.coefficients)
    layer.order.copy_(pivoted.order)
    return float(pivoted.coefficients.abs().max())


@torch.no_grad()
def _narrow(
    layer: LowRankLinear | NarrowedLinear, ffn: FFN, spec: LinearSpec, now: LinearSpec
) -> ShrunkLinear:
    assert isinstance(layer, NarrowedLinear)
    layer.weight.copy_(ffn.weights[spec.name])
    return ShrunkLinear(spec, NARROWED, _shape(now), None, now.dense_parameters, None)


@torch.no_grad()
def _finished(
    layer: LowRankLinear | NarrowedLinear, dense: nn.Module, bias: Tensor | None
) -> nn.Module:
    if bias is not None and layer.bias is not None:
        layer.bias.copy_(bias)
    for parameter in layer.parameters():
        parameter.requires_grad_(dense.weight.requires_grad)  # type: ignore[arg-type]
    return layer.train(dense.training)
