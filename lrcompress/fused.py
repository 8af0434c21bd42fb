"""Compressed FFNs as they run fastest: `optimize` puts low-rank layers into their fused forms.

Nothing that a checkpoint holds changes in name or shape: the layers keep their parameters, and
run them in another order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from lrcompress.ffn import find_ffns
from lrcompress.lowrank import FactoredLinear, LowRankLinear, PivotedLinear, is_linear

# FFNs whose intermediate channels are made by the other linears, each channel by itself
WHOLE = ({"gate", "up", "down"}, {"gate_up", "down"}, {"up", "down"})


# from so many tokens on, the CPU's kernels are faster with the weight on the left
COLUMNS = 16


class Shared(NamedTuple):
    """In the place of the input of gate and up: what each of them makes of it first.

    `inner` are tensors (tokens, rank), `batch` is the shape of the tokens.
    """

    batch: torch.Size
    inner: tuple[Tensor, ...]


class FusedFactored(FactoredLinear):
    """y = B A x; reads a `Shared` at `position`. `ends` says that it is the FFN's last."""

    position: int
    ends: bool

    def inner(self, x: Tensor) -> Tensor:
        """A x (tokens, rank) of x (tokens, in)."""
        return _product(x, self.A.weight, None, _in_columns(x))

    def forward(self, x: Tensor | Shared) -> Tensor:
        return _forward(self, self.B, x)


class FusedPivoted(PivotedLinear):
    """y = C [I Z] Pᵀ x; reads a `Shared` at `position`. `ends` says that it is the FFN's last.

    `absorbed` says that the input comes in the order of the pivots.
    """

    position: int
    ends: bool
    absorbed: bool

    def inner(self, x: Tensor) -> Tensor:
        """[I Z] Pᵀ x (tokens, rank) of x (tokens, in)."""
        columns = _in_columns(x)
        if not self.absorbed:
            x = _gather(x, self.order, columns)
        pivots, rest = x.tensor_split([self.rank], 1)
        return _product(rest, self.Z.weight, pivots, columns)

    def forward(self, x: Tensor | Shared) -> Tensor:
        return _forward(self, self.C, x)


Fused = FusedFactored | FusedPivoted
FUSED: Mapping[type[nn.Module], type[Fused]] = {
    FactoredLinear: FusedFactored,
    PivotedLinear: FusedPivoted,
}


def _forward(layer: Fused, outer: nn.Linear, x: Tensor | Shared) -> Tensor:
    if isinstance(x, Shared):
        batch, inner = x.batch, x.inner[layer.position]
    else:
        batch, inner = x.shape[:-1], layer.inner(_rows(x))
    columns = not layer.ends and _in_columns(inner)
    y = _product(inner, outer.weight, outer.bias, columns)
    return y.view(*batch, layer.out_features)


def _rows(x: Tensor) -> Tensor:
    """x (..., in) as (tokens, in)."""
    return x.reshape(-1, x.shape[-1])


def _in_columns(x: Tensor) -> bool:
    """Whether tokens are to be columns in memory, for x (tokens, in)."""
    return x.is_cpu and x.shape[0] >= COLUMNS


def _product(x: Tensor, weight: Tensor, plus: Tensor | None, columns: bool) -> Tensor:
    """x Wᵀ + plus (tokens, out), with tokens as columns in memory or as rows."""
    if not columns:
        if plus is None or plus.ndim == 1:
            return functional.linear(x, weight, plus)
        return torch.addmm(plus, x, weight.t())
    if plus is None:
        return torch.mm(weight, x.t()).t()
    return torch.addmm(plus[:, None] if plus.ndim == 1 else plus.t(), weight, x.t()).t()


def _gather(x: Tensor, order: Tensor, columns: bool) -> Tensor:
    """x[:, order]: where tokens are columns whole rows of memory move, which is far faster."""
    return x.t().contiguous().index_select(0, order).t() if columns else x.index_select(1, order)


@dataclass(frozen=True)
class Packed:
    """The weights (rank, in) of two `linears`, one behind the other in `whole`."""

    whole: Tensor
    linears: tuple[nn.Linear, nn.Linear]

    def is_current(self) -> bool:
        """Whether the weights still lie there, and need no gradients of their own.

        Not for a compiler, which cannot ask where a tensor lies.
        """
        if torch.compiler.is_compiling():
            return False
        first, second = (linear.weight for linear in self.linears)
        return (
            not (torch.is_grad_enabled() and (first.requires_grad or second.requires_grad))
            and first.data_ptr() == self.whole.data_ptr()
            and second.data_ptr() == self.whole.data_ptr() + first.nbytes
        )


class SharesInput:
    """Forward pre-hook of an FFN: gate and up get a `Shared`, made once for both."""

    def __init__(self, readers: tuple[Fused, Fused], packed: Packed | None) -> None:
        self.readers = readers
        self.packed = packed

    def __call__(self, _: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not arguments:
            return None  # given by keyword: gate and up read it one by one
        x, *others = arguments
        return Shared(x.shape[:-1], self._inner(_rows(x))), *others

    def _inner(self, x: Tensor) -> tuple[Tensor, ...]:
        first, second = self.readers
        columns = _in_columns(x)
        if self.packed is not None and self.packed.is_current():
            both = _product(x, self.packed.whole, None, columns)
            return both.tensor_split([first.rank], 1)
        if columns and isinstance(first, FusedPivoted):
            x = x.t().contiguous().t()  # once for both gathers
        return first.inner(x), second.inner(x)


def optimize(model: nn.Module) -> ExitStack:
    """Makes the compressed FFNs of `model` run faster, in place, with the same outputs.

    Gate and up read their input by one product, or after one gather; the order of the pivots of
    down is absorbed by the rows of gate and up; sums are part of products. Names, shapes, training
    and saving stay as they were; from_pretrained gives a model that is not optimized. Layers with
    adapters, quantized or offloaded weights are left as they are. What is returned puts everything
    back, bit for bit, at its `close()` or as a context: `with optimize(model): ...`.
    """
    linears = find_ffns(model).linears
    with ExitStack() as undo, torch.no_grad():
        for name, specs in groupby(linears, key=lambda spec: spec.ffn):
            modules = {str(spec.role): model.get_submodule(spec.name) for spec in specs}
            _optimize_ffn(model.get_submodule(name), modules, undo)
        return undo.pop_all()


def _optimize_ffn(ffn: nn.Module, linears: Mapping[str, nn.Module], undo: ExitStack) -> None:
    for role, layer in linears.items():
        if type(layer) in FUSED and _is_plain(layer):
            _fuse(layer, role, undo)  # type: ignore[arg-type]
    down = linears.get("down")
    if isinstance(down, FusedPivoted) and _can_permute(ffn, linears, down.in_features):
        _absorb(down, [layer for role, layer in linears.items() if role != "down"], undo)
    gate, up = linears.get("gate"), linears.get("up")
    if isinstance(gate, Fused) and isinstance(up, Fused):
        packed = None
        if isinstance(gate, FusedFactored) and isinstance(up, FusedFactored):
            packed = _packed(gate.A, up.A, undo)
        hook = SharesInput((gate, up), packed)
        undo.callback(ffn.register_forward_pre_hook(hook).remove)


def _is_plain(layer: nn.Module) -> bool:
    """Whether the weights are what the layer's own products read: no hook, adapter or quantizer
    has come between."""
    leaves = [layer, *layer.children()]
    return all(
        not hasattr(leaf, "_hf_hook") and all(type(p) is nn.Parameter for p in leaf.parameters())
        for leaf in leaves
    ) and all(type(leaf) is nn.Linear for leaf in leaves[1:])


def _fuse(layer: LowRankLinear, role: str, undo: ExitStack) -> None:
    plain = type(layer)
    layer.__class__ = FUSED[plain]
    about = {"position": int(role == "up"), "ends": role == "down", "absorbed": False}
    layer.__dict__.update(about)

    def back() -> None:
        layer.__class__ = plain
        for name in about:
            del layer.__dict__[name]

    undo.callback(back)


def _can_permute(ffn: nn.Module, linears: Mapping[str, nn.Module], width: int) -> bool:
    """Whether nothing but these linears knows one intermediate channel from another."""
    own = {id(p) for layer in linears.values() for p in (*layer.parameters(), *layer.buffers())}
    others = (t for t in (*ffn.parameters(), *ffn.buffers()) if id(t) not in own)
    return (
        set(linears) in WHOLE
        and all(isinstance(m, Fused) or (is_linear(m) and _is_plain(m)) for m in linears.values())
        and not any(width in tensor.shape for tensor in others)
    )


def _absorb(down: FusedPivoted, makers: Sequence[nn.Module], undo: ExitStack) -> None:
    """The linears that make the channels make them in the order that `down` reads them in."""
    order = down.order.clone()
    _permute_channels(makers, order.long())
    down.order.copy_(torch.arange(len(order)))
    down.absorbed = True

    def back() -> None:
        _permute_channels(makers, order.long().argsort())
        down.order.copy_(order)

    undo.callback(back)


@torch.no_grad()
def _permute_channels(makers: Sequence[nn.Module], order: Tensor) -> None:
    for weight, dim in (found for maker in makers for found in _channels(maker)):
        halves = weight.shape[dim] // len(order)  # two where gate and up are one matrix
        whole = torch.cat([order + half * len(order) for half in range(halves)])
        weight.copy_(weight.index_select(dim, whole))


def _channels(maker: nn.Module) -> Iterator[tuple[Tensor, int]]:
    """What has a row, or an entry, for each output: with the dimension of the outputs."""
    if isinstance(maker, FusedFactored | FusedPivoted):
        maker = maker.B if isinstance(maker, FusedFactored) else maker.C
    weight, bias = maker.weight, maker.bias
    assert isinstance(weight, Tensor)
    yield weight, 1 if isinstance(maker, Conv1D) else 0
    if isinstance(bias, Tensor):
        yield bias, 0


def _packed(first: nn.Linear, second: nn.Linear, undo: ExitStack) -> Packed:
    """Moves the weights behind each other in memory; each stays a parameter of its own."""
    whole = torch.cat([first.weight.detach(), second.weight.detach()])
    for linear, part in zip((first, second), whole.tensor_split([len(first.weight)]), strict=True):
        linear.weight.data = part
        undo.callback(_own_memory, linear.weight)
    return Packed(whole, (first, second))


def _own_memory(weight: Tensor) -> None:
    weight.data = weight.data.clone()
