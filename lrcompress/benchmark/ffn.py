"""Speed of one FFN with random weights: dense, and compressed to a share of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lrcompress.benchmark.report import Bench, write_bench
from lrcompress.benchmark.timer import Cost, Timing, calls_for, in_turn, seconds
from lrcompress.config import FFNBenchSettings
from lrcompress.layers.lowrank import NARROWED, PivotedLinear, compressed_layers, empty_like
from lrcompress.layers.optimize import optimize_ffn
from lrcompress.methods.types import LinearSpec
from lrcompress.models.loading import checked_device
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.paths import check_free
from lrcompress.runtime.progress import Progress, silent

DENSE = "dense"
PASSES = {"forward": 1, "forward and backward": 3}  # and the products of each, over forward's


class FeedForward(nn.Module):
    """down(silu(gate x) * up x), or down(gelu(up x))."""

    def __init__(self, width: int, channels: int, gated: bool, **place: Any) -> None:
        super().__init__()
        bias: dict[str, Any] = {"bias": False} | place
        self.gate = nn.Linear(width, channels, **bias) if gated else None
        self.up = nn.Linear(width, channels, **bias)
        self.down = nn.Linear(channels, width, **bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            y: Tensor = self.down(functional.gelu(self.up(x)))
        else:
            y = self.down(functional.silu(self.gate(x)) * self.up(x))
        return y

    @property
    def linears(self) -> dict[str, nn.Module]:
        """By role."""
        return dict(self.named_children())


@dataclass(frozen=True)
class Alternative:
    """An FFN to be timed: `form` None is dense."""

    form: str | None
    keep_ratio: float
    path: str

    @property
    def name(self) -> str:
        what = DENSE if self.form is None else f"{self.form} {self.keep_ratio:g}"
        return what if self.path == "optimized" or self.is_stock else f"{what}, {self.path}"

    @property
    def is_stock(self) -> bool:
        """Of stock layers, which have one path but to be compiled."""
        return self.form in (None, NARROWED) and self.path != "compiled"

    @property
    def baseline(self) -> str:
        return Alternative(None, 1.0, self.path).name


def bench_ffn(settings: FFNBenchSettings, progress: Progress = silent) -> list[Timing]:
    """Times every alternative of `settings` in every dtype, number of tokens and pass.

    Raises InputError where a width is too small for any rank, or the device is not there.
    """
    device = device_of(settings.device)
    timings: list[Timing] = []
    for dtype in settings.dtypes:
        made = {a.name: (a, make(a, settings, device, dtype)) for a in _alternatives(settings)}
        passes = list(PASSES) if settings.backward else ["forward"]
        for tokens, name in product(settings.tokens, passes):
            timings += _timed(made, settings, tokens, name, dtype, device, progress)
    return timings


def device_of(name: str) -> torch.device:
    """The device called `name`, or for auto a GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(checked_device(name))


def _alternatives(settings: FFNBenchSettings) -> Iterator[Alternative]:
    for path in settings.paths:
        yield Alternative(None, 1.0, path)
        for keep_ratio, form in product(settings.keep_ratios, settings.forms):
            yield Alternative(form, keep_ratio, path)


def make(
    what: Alternative, settings: FFNBenchSettings, device: torch.device, dtype: str
) -> FeedForward:
    """With the random weights of a seed, in a scale that keeps values near 1."""
    torch.manual_seed(0)
    place = {"device": device, "dtype": getattr(torch, dtype)}
    channels = settings.channels
    if what.form == NARROWED:
        multiple = settings.rank_multiple
        channels = max(multiple, multiple * round(what.keep_ratio * channels / multiple))
    ffn = FeedForward(settings.width, channels, settings.gated, **place)
    if what.form not in (None, NARROWED):
        for role, linear in ffn.linears.items():
            layer = _low_rank(role, linear, what.form, what.keep_ratio, settings.rank_multiple)
            setattr(ffn, role, layer)
    if what.path != "plain":
        optimize_ffn(ffn, ffn.linears, ExitStack())
    if what.path == "compiled":
        ffn.compile(fullgraph=True, dynamic=False)
    return ffn


@torch.no_grad()
def _low_rank(
    role: Any, dense: nn.Module, form: Any, keep_ratio: float, multiple: int
) -> nn.Module:
    rows, columns = dense.weight.shape  # type: ignore[misc]
    spec = LinearSpec(role, 0, role, columns, rows, False, role, "")
    ranks = [r for r in range(multiple, spec.full_rank, multiple) if spec.saves(r, form)]
    if not ranks:
        raise InputError(
            f"a {rows} x {columns} matrix has no {form} rank that is a multiple of {multiple} and "
            "saves parameters: use a larger --width and --ffn-width"
        )
    target = keep_ratio * spec.dense_parameters
    rank = min(ranks, key=lambda r: abs(spec.parameters(r, form) - target))
    layer = empty_like(dense, form, (rows, columns), rank)
    for parameter in layer.parameters():
        parameter.normal_(std=parameter.shape[1] ** -0.5)
    if isinstance(layer, PivotedLinear):
        layer.order.copy_(torch.randperm(columns))
    return layer


def _timed(
    made: dict[str, tuple[Alternative, FeedForward]],
    settings: FFNBenchSettings,
    tokens: int,
    name: str,
    dtype: str,
    device: torch.device,
    progress: Progress,
) -> Iterator[Timing]:
    if "compiled" in settings.paths:
        torch._dynamo.reset()  # a graph for each shape, and the number of graphs has a limit
    x = torch.randn(tokens, settings.width, device=device, dtype=getattr(torch, dtype))
    x.requires_grad_(name != "forward")
    runs = {n: _pass(ffn, x, name) for n, (_, ffn) in made.items()}
    calls = {n: calls_for(run, device) for n, run in runs.items()}
    todo = {n: (run, calls[n]) for n, run in runs.items()}
    described = f"Timing {name}, {tokens:,} tokens, {dtype}"
    found = in_turn(
        todo, settings.repeats, lambda one: seconds(one[0], device, one[1]), progress, described
    )
    setting = {"pass": name, "tokens": tokens, "dtype": dtype}
    for label, (what, ffn) in made.items():
        cost = _cost(ffn, tokens * PASSES[name])
        yield Timing(
            setting, label, what.baseline, tuple(found[label]), cost, tokens, _about(what, ffn)
        )


def _pass(ffn: FeedForward, x: Tensor, name: str) -> Callable[[], object]:
    @torch.no_grad()
    def forward() -> object:
        return ffn(x)

    def both() -> object:
        y = ffn(x)
        return torch.autograd.grad(y, [x, *ffn.parameters()], y.detach())

    return forward if name == "forward" else both


def _cost(ffn: FeedForward, tokens: int) -> Cost:
    """Every weight is multiplied with every token once; a permutation is read as well."""
    weights = list(ffn.parameters())
    read = [*weights, *(m.order for _, m in compressed_layers(ffn) if isinstance(m, PivotedLinear))]
    return Cost(2 * tokens * sum(w.numel() for w in weights), sum(t.nbytes for t in read))


def _about(what: Alternative, ffn: FeedForward) -> dict[str, object]:
    return {
        "form": what.form or DENSE,
        "keep_ratio": what.keep_ratio,
        "path": what.path,
        "parameters": sum(p.numel() for p in ffn.parameters()),
    }


def bench_ffn_to(
    settings: FFNBenchSettings, out: Path | None = None, progress: Progress = silent
) -> Bench:
    """Times an FFN alone; writes the report to `out`, if given."""
    if out is not None:
        check_free(out)
    timings = bench_ffn(settings, progress)
    gate = "gated" if settings.gated else "no gate"
    title = f"FFN of width {settings.width}, {settings.channels} channels, {gate}"
    return write_bench(title, settings, device_of(settings.device), timings, out)
