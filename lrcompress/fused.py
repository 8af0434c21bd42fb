"""Compressed FFNs as they run fastest: `optimize` puts low-rank layers into their fused forms.

Nothing that a checkpoint holds changes in name or shape: the layers keep their parameters, and
run them in another order. Inside a layer tokens are columns, so that an input is gathered by
whole rows and the halves of a matrix are contiguous.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
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


class Shared(NamedTuple):
    """In the place of the input of gate and up: what each of them would make of it first.

    `inner` are tensors (rank, tokens), `batch` is the shape of the tokens.
    """

    batch: torch.Size
    inner: tuple[Tensor, ...]


class FusedFactored(FactoredLinear):
    """y = B A x, tokens as columns inside; reads a `Shared` at `position`."""

    position: int
    ends: bool

    def inner(self, columns: Tensor) -> Tensor:
        """A x (rank, tokens) of x (in, tokens)."""
        return self.A.weight @ columns

    def forward(self, x: Tensor | Shared) -> Tensor:
        return _forward(self, self.B, x)


class FusedPivoted(PivotedLinear):
    """y = C [I Z] Pᵀ x, tokens as columns inside; reads a `Shared` at `position`.

    `absorbed` says that the input comes in the order of the pivots.
    """

    position: int
    ends: bool
    absorbed: bool

    def inner(self, columns: Tensor) -> Tensor:
        """[I Z] Pᵀ x (rank, tokens) of x (in, tokens): a gather of rows, and one fused product."""
        if not self.absorbed:
            columns = columns.contiguous().index_select(0, self.order)
        pivots, rest = columns.tensor_split([self.rank])
        return torch.addmm(pivots, self.Z.weight, rest)

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
        batch, inner = x.shape[:-1], layer.inner(_columns(x))
    return _output(outer, inner, layer.ends).view(*batch, layer.out_features)


def _columns(x: Tensor) -> Tensor:
    """x (..., in) as a view (in, tokens)."""
    return x.reshape(-1, x.shape[-1]).t()


def _output(outer: nn.Linear, inner: Tensor, ends: bool) -> Tensor:
    """(tokens, out). On the CPU, intermediate channels stay (out, tokens) in memory: its kernels for
    bfloat16 are faster with the weight on the left."""
    weight, bias = outer.weight, outer.bias
    if ends or inner.is_cuda:
        return functional.linear(inner.t(), weight, bias)
    made = weight @ inner if bias is None else torch.addmm(bias[:, None], weight, inner)
    return made.t()


class SharesInput:
    """Forward pre-hook of an FFN: gate and up get a `Shared`, made once for both."""

    def __init__(self, readers: Sequence[Fused]) -> None:
        self.readers = tuple(readers)

    def __call__(self, _: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not arguments:
            return None  # given by keyword: gate and up read it one by one
        x, *others = arguments
        return Shared(x.shape[:-1], self._inner(_columns(x))), *others

    def _inner(self, columns: Tensor) -> tuple[Tensor, ...]:
        joined = _joined([r.A.weight for r in self.readers if isinstance(r, FusedFactored)])
        if joined is not None:
            return (joined @ columns).split([reader.rank for reader in self.readers])
        if any(isinstance(reader, FusedPivoted) for reader in self.readers):
            columns = columns.contiguous()  # once for all gathers
        return tuple(reader.inner(columns) for reader in self.readers)


def _joined(weights: Sequence[Tensor]) -> Tensor | None:
    """Two matrices (rank, in) that lie one behind the other in memory as one, without a copy.

    None where they do not, and where each needs a gradient of its own or is traced by a compiler.
    """
    if len(weights) != 2 or torch.compiler.is_compiling():
        return None
    first, second = weights
    if torch.is_grad_enabled() and (first.requires_grad or second.requires_grad):
        return None
    if second.data_ptr() != first.data_ptr() + first.nbytes or not _same_storage(first, second):
        return None
    rows, columns = len(first) + len(second), first.shape[1]
    return first.detach().as_strided((rows, columns), (columns, 1))


def _same_storage(first: Tensor, second: Tensor) -> bool:
    return first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


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
            modules = {spec.role: model.get_submodule(spec.name) for spec in specs}
            _optimize_ffn(model.get_submodule(name), modules, undo)
        return undo.pop_all()


def _optimize_ffn(ffn: nn.Module, linears: Mapping[str, nn.Module], undo: ExitStack) -> None:
    for role, layer in linears.items():
        if type(layer) in FUSED and _is_plain(layer):
            _fuse(layer, role, undo)  # type: ignore[arg-type]
    down = linears.get("down")
    if isinstance(down, FusedPivoted) and _can_permute(ffn, linears, down.in_features):
        _absorb(down, [layer for role, layer in linears.items() if role != "down"], undo)
    readers = [layer for r, layer in linears.items() if r != "down" and isinstance(layer, Fused)]
    if len(readers) == 2:
        _join([reader.A for reader in readers if isinstance(reader, FusedFactored)], undo)
        undo.callback(ffn.register_forward_pre_hook(SharesInput(readers)).remove)


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


def _join(matrices: Sequence[nn.Linear], undo: ExitStack) -> None:
    """Moves the weights behind each other in memory; each stays a parameter of its own."""
    if len(matrices) != 2:
        return
    packed = torch.cat([matrix.weight for matrix in matrices])
    parts = packed.split([len(matrix.weight) for matrix in matrices])
    for matrix, part in zip(matrices, parts, strict=True):
        matrix.weight.data = part
        undo.callback(_own_memory, matrix.weight)


def _own_memory(weight: Tensor) -> None:
    weight.data = weight.data.clone()
