"""What each form of a linear costs on this machine: its time for one token over that of dense."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from lrcompress.benchmark.timer import run_alternating, seconds_per_call
from lrcompress.layers.lowrank import PivotedLinear, empty_like
from lrcompress.methods.candidates import CandidateGrid
from lrcompress.methods.costs import FormCosts, LineCost
from lrcompress.methods.types import LayerForm, LinearSpec
from lrcompress.runtime.progress import Progress

# shares of a linear's parameters at which its forms are timed
SHARES = (0.4, 0.8)
REPEATS = 9
# a model reads other weights for every linear, so no cache helps it: so much weight is read in turn
MAX_BYTES = 64 * 2**20


@dataclass(frozen=True)
class FormTiming:
    """A linear with `parameters` in one form takes `ratio` of the time of the dense one."""

    parameters: int
    ratio: float


@dataclass(frozen=True)
class ShapeTimings:
    """The timings of linears like `linear`, by form, with ascending parameters."""

    linear: LinearSpec
    by_form: Mapping[LayerForm, Sequence[FormTiming]]

    def lines(self) -> dict[LayerForm, LineCost]:
        """The cost of each form, by the line through its timings."""
        dense = self.linear.dense_parameters
        return {form: _line(timings, dense) for form, timings in self.by_form.items()}

    def __str__(self) -> str:
        forms = (
            f"{form} {' and '.join(f'{timing.ratio:.2f}' for timing in timings)}"
            for form, timings in self.by_form.items()
        )
        return f"{self.linear.out_features} x {self.linear.in_features} {', '.join(forms)}"


@dataclass(frozen=True)
class MeasuredCosts:
    """The costs of the linears of a model, and a sentence that says what was measured."""

    costs: FormCosts
    sentence: str


def measure_costs(
    linears: Sequence[LinearSpec], grid: CandidateGrid, like: Tensor, progress: Progress
) -> MeasuredCosts:
    """Times each shape of `linears` once, dense, narrowed and low rank, for one token.

    Widths, ranks and the form are those of `grid`, device and dtype those of `like`.
    """
    counts = Counter((spec.out_features, spec.in_features) for spec in linears)
    shapes = {(spec.out_features, spec.in_features): spec for spec in linears}
    timings = {
        shape: _timings(spec, _layers(spec, grid, like), counts[shape], progress)
        for shape, spec in shapes.items()
    }
    lines = {shape: timing.lines() for shape, timing in timings.items()}
    costs = {spec.name: lines[spec.out_features, spec.in_features] for spec in linears}
    return MeasuredCosts(FormCosts(costs), _sentence(timings.values(), like))


def _sentence(timings: Iterable[ShapeTimings], like: Tensor) -> str:
    shares = " and ".join(f"{share:.0%}" for share in SHARES)
    return (
        f"time for one token over dense with about {shares} of the parameters, in "
        f"{str(like.dtype).removeprefix('torch.')} on {like.device.type}: "
        + "; ".join(map(str, timings))
    )


# what a layer is: its form, None for dense, and the share of the parameters that it is near
Label = tuple[LayerForm | None, float]
DENSE: Label = (None, 1.0)


def _layers(spec: LinearSpec, grid: CandidateGrid, like: Tensor) -> dict[Label, nn.Module]:
    """The layers to time in the place of `spec`; no form for which it is too small."""
    layers: dict[Label, nn.Module] = {DENSE: _dense_of(spec, like)}
    channels = spec.in_features if spec.role == "down" else spec.out_features
    full_width = channels // 2 if spec.role == "gate_up" else channels
    widths, ranks = grid.widths([spec], full_width), grid.ranks(spec)
    for share in SHARES:
        if widths:
            width = min(widths, key=lambda width: abs(width - share * full_width))
            layers["narrowed", share] = _dense_of(spec.narrowed(width), like)
        if ranks and grid.low_rank:
            layers[grid.form, share] = _low_rank_of(spec, grid, share, layers[DENSE])
    return layers


def _timings(
    spec: LinearSpec, layers: Mapping[Label, nn.Module], count: int, progress: Progress
) -> ShapeTimings:
    """The timings of `layers`, of each as many copies as the model has linears of this shape."""
    size = sum(parameter.nbytes for parameter in layers[DENSE].parameters())
    copies = max(1, min(count, MAX_BYTES // size))
    passes = {str(label): _Pass.of(layer, copies) for label, layer in layers.items()}
    title = f"Timing {spec.out_features} x {spec.in_features}"
    seconds = run_alternating(passes, REPEATS, _Pass.seconds, progress, title)
    by_form: dict[LayerForm, list[FormTiming]] = {}
    for label, layer in layers.items():
        ratio = median(seconds[str(label)]) / median(seconds[str(DENSE)])
        if label[0] is not None:
            by_form.setdefault(label[0], []).append(FormTiming(_parameters(layer), ratio))
    return ShapeTimings(spec, by_form)


def _parameters(layer: nn.Module) -> int:
    return sum(parameter.numel() for parameter in layer.parameters())


def _dense_of(spec: LinearSpec, like: Tensor) -> nn.Module:
    return nn.Linear(
        spec.in_features, spec.out_features, spec.bias, device=like.device, dtype=like.dtype
    )


@torch.no_grad()
def _low_rank_of(
    spec: LinearSpec, grid: CandidateGrid, share: float, dense: nn.Module
) -> nn.Module:
    """A random layer with the rank whose parameters are nearest to `share` of the dense ones."""
    target = share * spec.dense_parameters
    rank = min(grid.ranks(spec), key=lambda rank: abs(spec.parameters(rank, grid.form) - target))
    layer = empty_like(dense, grid.form, (spec.out_features, spec.in_features), rank)
    for parameter in layer.parameters():
        parameter.normal_(std=parameter.shape[-1] ** -0.5)
    if isinstance(layer, PivotedLinear):
        layer.order.copy_(torch.randperm(spec.in_features))
    return layer


@dataclass(frozen=True)
class _Pass:
    """One token through `layers`, one after the other."""

    layers: Sequence[nn.Module]
    x: Tensor

    @classmethod
    def of(cls, layer: nn.Module, copies: int) -> _Pass:
        weight = next(layer.parameters())
        x = torch.randn(1, layer.in_features, device=weight.device, dtype=weight.dtype)  # type: ignore[call-overload]
        return cls([copy.deepcopy(layer) for _ in range(copies)], x)

    @torch.no_grad()
    def seconds(self) -> float:
        """The median of a layer; few are interrupted by other work on the machine."""
        x, device = self.x, self.x.device
        return median(seconds_per_call(partial(layer, x), device, 1) for layer in self.layers)


def _line(timings: Sequence[FormTiming], dense: int) -> LineCost:
    """The line through the first and the last timing, in parameters of the dense linear.

    It does not fall: smaller layers that took longer did so by chance, and count as equal.
    """
    first, last = timings[0], timings[-1]
    if last.parameters == first.parameters or last.ratio <= first.ratio:
        return LineCost(dense * max(first.ratio, last.ratio), 0.0)
    rise = dense * (last.ratio - first.ratio) / (last.parameters - first.parameters)
    return LineCost(dense * first.ratio - rise * first.parameters, rise)
