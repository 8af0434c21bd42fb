"""Speed of one FFN with random weights: dense, and compressed to a share of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lrcompress.benchmark.report import Bench, make_bench, write_bench
from lrcompress.benchmark.timer import (
    Cost,
    Timing,
    calls_per_timing,
    run_alternating,
    seconds_per_call,
)
from lrcompress.config import FFNBenchSettings
from lrcompress.layers.lowrank import NARROWED, PivotedLinear, compressed_layers, empty_like
from lrcompress.layers.optimize import optimize_ffn
from lrcompress.methods.types import LinearSpec
from lrcompress.models.loading import checked_device
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.paths import check_free
from lrcompress.runtime.progress import Progress, silent

DENSE = "dense"
FORWARD, FORWARD_AND_BACKWARD = "forward", "forward and backward"
# pass -> the number of its matrix products over those of the forward pass
PASSES = {FORWARD: 1, FORWARD_AND_BACKWARD: 3}


class FeedForward(nn.Module):
    """down(silu(gate x) * up x), or down(gelu(up x)) where it is not gated."""

    def __init__(self, width: int, channels: int, gated: bool, **place: Any) -> None:
        super().__init__()
        options: dict[str, Any] = {"bias": False} | place
        self.gate = nn.Linear(width, channels, **options) if gated else None
        self.up = nn.Linear(width, channels, **options)
        self.down = nn.Linear(channels, width, **options)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            y: Tensor = self.down(functional.gelu(self.up(x)))
        else:
            y = self.down(functional.silu(self.gate(x)) * self.up(x))
        return y

    @property
    def linears(self) -> dict[str, nn.Module]:
        """Its linears by role."""
        return dict(self.named_children())


@dataclass(frozen=True)
class Alternative:
    """A kind of FFN to time; `form` is None for the dense one."""

    form: str | None
    keep_ratio: float
    path: str

    @property
    def name(self) -> str:
        kind = DENSE if self.form is None else f"{self.form} {self.keep_ratio:g}"
        return kind if self.path == "optimized" or self.is_stock else f"{kind}, {self.path}"

    @property
    def is_stock(self) -> bool:
        """Whether it has stock layers only, which `optimize` does not change, not compiled."""
        return self.form in (None, NARROWED) and self.path != "compiled"

    @property
    def baseline(self) -> str:
        """The name of the dense alternative on the same path."""
        return Alternative(None, 1.0, self.path).name


@dataclass(frozen=True)
class FFNPass:
    """One setting in which all alternatives are timed: a pass, its tokens, and the precision."""

    name: str
    tokens: int
    dtype: str

    @property
    def setting(self) -> dict[str, object]:
        return {"pass": self.name, "tokens": self.tokens, "dtype": self.dtype}

    @property
    def description(self) -> str:
        return f"Timing {self.name}, {self.tokens:,} tokens, {self.dtype}"


def bench_ffn(settings: FFNBenchSettings, progress: Progress = silent) -> list[Timing]:
    """Times every alternative of `settings` in every dtype, number of tokens and pass.

    Raises InputError where a width is too small for any rank, or the device is not available.
    """
    device = device_of(settings.device)
    pass_names = list(PASSES) if settings.backward else [FORWARD]
    timings: list[Timing] = []
    for dtype in settings.dtypes:
        ffns = {
            alternative: build_ffn(alternative, settings, device, dtype)
            for alternative in _alternatives(settings)
        }
        for tokens, name in product(settings.tokens, pass_names):
            timings += _timings(ffns, FFNPass(name, tokens, dtype), settings, progress)
    return timings


def device_of(name: str) -> torch.device:
    """The device called `name`; for auto a GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(checked_device(name))


def _alternatives(settings: FFNBenchSettings) -> list[Alternative]:
    """All alternatives of `settings`; of those with equal names the last."""
    by_name: dict[str, Alternative] = {}
    for path in settings.paths:
        compressed = (
            Alternative(form, keep_ratio, path)
            for keep_ratio, form in product(settings.keep_ratios, settings.forms)
        )
        for alternative in (Alternative(None, 1.0, path), *compressed):
            by_name[alternative.name] = alternative
    return list(by_name.values())


def build_ffn(
    alternative: Alternative, settings: FFNBenchSettings, device: torch.device, dtype: str
) -> FeedForward:
    """An FFN with random weights, equal in every call, in a scale that keeps values near 1."""
    torch.manual_seed(0)
    channels = settings.channels
    if alternative.form == NARROWED:
        multiple = settings.rank_multiple
        channels = max(multiple, multiple * round(alternative.keep_ratio * channels / multiple))
    ffn = FeedForward(
        settings.width, channels, settings.gated, device=device, dtype=getattr(torch, dtype)
    )
    if alternative.form not in (None, NARROWED):
        for role, linear in ffn.linears.items():
            setattr(ffn, role, _low_rank(role, linear, alternative, settings.rank_multiple))
    if alternative.path != "plain":
        optimize_ffn(ffn, ffn.linears, ExitStack())
    if alternative.path == "compiled":
        ffn.compile(fullgraph=True, dynamic=False)
    return ffn


@torch.no_grad()
def _low_rank(role: Any, dense: nn.Module, alternative: Alternative, multiple: int) -> nn.Module:
    """A random low-rank layer in the place of `dense`, with the rank nearest to the keep ratio."""
    form: Any = alternative.form
    rows, columns = dense.weight.shape  # type: ignore[misc]
    spec = LinearSpec(
        name=role,
        block=0,
        role=role,
        in_features=columns,
        out_features=rows,
        bias=False,
        input_group=role,
        ffn="",
    )
    ranks = [r for r in range(multiple, spec.full_rank, multiple) if spec.saves(r, form)]
    if not ranks:
        raise InputError(
            f"a {rows} x {columns} matrix has no {form} rank that is a multiple of {multiple} and "
            "saves parameters: use a larger --width and --ffn-width"
        )
    target = alternative.keep_ratio * spec.dense_parameters
    rank = min(ranks, key=lambda r: abs(spec.parameters(r, form) - target))
    layer = empty_like(dense, form, (rows, columns), rank)
    for parameter in layer.parameters():
        parameter.normal_(std=parameter.shape[1] ** -0.5)
    if isinstance(layer, PivotedLinear):
        layer.order.copy_(torch.randperm(columns))
    return layer


@dataclass(frozen=True)
class _RepeatedCall:
    """A pass that is called `calls` times in a row for one timing."""

    run: Callable[[], object]
    device: torch.device
    calls: int

    def seconds(self) -> float:
        return seconds_per_call(self.run, self.device, self.calls)


def _timings(
    ffns: Mapping[Alternative, FeedForward],
    ffn_pass: FFNPass,
    settings: FFNBenchSettings,
    progress: Progress,
) -> Iterator[Timing]:
    if "compiled" in settings.paths:
        torch._dynamo.reset()  # a new graph for each shape: the number of graphs has a limit
    device, dtype = device_of(settings.device), getattr(torch, ffn_pass.dtype)
    x = torch.randn(ffn_pass.tokens, settings.width, device=device, dtype=dtype)
    x.requires_grad_(ffn_pass.name != FORWARD)
    runs = {alternative.name: _run_of(ffn, x, ffn_pass.name) for alternative, ffn in ffns.items()}
    repeated = {
        name: _RepeatedCall(run, device, calls_per_timing(run, device))
        for name, run in runs.items()
    }
    seconds = run_alternating(
        repeated, settings.repeats, _RepeatedCall.seconds, progress, ffn_pass.description
    )
    for alternative, ffn in ffns.items():
        yield Timing(
            setting=ffn_pass.setting,
            name=alternative.name,
            baseline=alternative.baseline,
            seconds=tuple(seconds[alternative.name]),
            cost=_cost(ffn, ffn_pass.tokens * PASSES[ffn_pass.name]),
            tokens=ffn_pass.tokens,
            about=_about(alternative, ffn),
        )


def _run_of(ffn: FeedForward, x: Tensor, pass_name: str) -> Callable[[], object]:
    """A call that makes the pass over x (tokens, width)."""

    @torch.no_grad()
    def forward() -> object:
        return ffn(x)

    def forward_and_backward() -> object:
        y = ffn(x)
        return torch.autograd.grad(y, [x, *ffn.parameters()], y.detach())

    return forward if pass_name == FORWARD else forward_and_backward


def _cost(ffn: FeedForward, rows: int) -> Cost:
    """Every weight is multiplied with every row once; a permutation is read but not multiplied."""
    weights = list(ffn.parameters())
    permutations = [
        layer.order for _, layer in compressed_layers(ffn) if isinstance(layer, PivotedLinear)
    ]
    return Cost(
        flops=2 * rows * sum(weight.numel() for weight in weights),
        weight_bytes=sum(tensor.nbytes for tensor in (*weights, *permutations)),
    )


def _about(alternative: Alternative, ffn: FeedForward) -> dict[str, object]:
    return {
        "form": alternative.form or DENSE,
        "keep_ratio": alternative.keep_ratio,
        "path": alternative.path,
        "parameters": sum(p.numel() for p in ffn.parameters()),
    }


def bench_ffn_to(
    settings: FFNBenchSettings, out: Path | None = None, progress: Progress = silent
) -> Bench:
    """Times an FFN alone; writes the report to `out` if that is a path."""
    if out is not None:
        check_free(out)
    timings = bench_ffn(settings, progress)
    gate = "gated" if settings.gated else "no gate"
    title = f"FFN of width {settings.width}, {settings.channels} channels, {gate}"
    bench = make_bench(title, settings, device_of(settings.device), timings)
    if out is not None:
        write_bench(out, bench)
    return bench
