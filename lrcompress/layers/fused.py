"""Low-rank layers as they run fastest; `fusing.py` puts those of a model into these forms.

Nothing that a checkpoint holds changes in name or shape: the layers keep their parameters, and
run them in another order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from lrcompress.layers.lowrank import FactoredLinear, PivotedLinear

# from so many tokens on, the CPU's kernels are faster with the weight on the left
COLUMNS = 16


class Shared(NamedTuple):
    """In the place of the input of gate and up: what each of them makes of it first.

    `inner` are tensors (tokens, rank), `batch` is the shape of the tokens, and `columns` says that
    these are columns in memory.
    """

    batch: torch.Size
    inner: tuple[Tensor, ...]
    columns: bool


class Bare(nn.Module):
    """Knows whether the linears that it holds are still the stock ones, whose weights may be read
    directly; an adapter or a quantizer puts others in their places."""

    bare: bool

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):
            self.__dict__["bare"] = is_bare(*self.children())


def is_bare(*linears: nn.Module) -> bool:
    return all(type(one) is nn.Linear and type(one.weight) is nn.Parameter for one in linears)


class FusedFactored(Bare, FactoredLinear):
    """y = B A x; reads a `Shared` at `position`. `ends` says that it is the FFN's last."""

    position: int
    ends: bool

    def inner(self, x: Tensor, columns: bool) -> Tensor:
        """A x (tokens, rank) of x (tokens, in)."""
        return _product(x, self.A.weight, None, columns)

    def forward(self, x: Tensor | Shared) -> Tensor:
        if self.bare or isinstance(x, Shared):
            return _forward(self, self.B, x)
        return super().forward(x)


class FusedPivoted(Bare, PivotedLinear):
    """y = C [I Z] Pᵀ x; reads a `Shared` at `position`. `ends` says that it is the FFN's last.

    `absorbed` says that the input comes in the order of the pivots.
    """

    position: int
    ends: bool
    absorbed: bool

    def inner(self, x: Tensor, columns: bool) -> Tensor:
        """[I Z] Pᵀ x (tokens, rank) of x (tokens, in)."""
        order, Z = None if self.absorbed else self.order, self.Z.weight
        if _is_traced(x, Z):
            inner: Tensor = PivotedProduct.apply(x, Z, order, columns)  # type: ignore[no-untyped-call]
            return inner
        return _pivoted_product(x, Z, order, columns)[0]

    def forward(self, x: Tensor | Shared) -> Tensor:
        if self.bare or isinstance(x, Shared):
            return _forward(self, self.C, x)
        return super().forward(x)


Fused = FusedFactored | FusedPivoted
FUSED: Mapping[type[nn.Module], type[Fused]] = {
    FactoredLinear: FusedFactored,
    PivotedLinear: FusedPivoted,
}


def _forward(layer: Fused, outer: nn.Linear, x: Tensor | Shared) -> Tensor:
    if isinstance(x, Shared):
        batch, inner, columns = x.batch, x.inner[layer.position], x.columns
    else:
        batch, rows = x.shape[:-1], _rows(x)
        columns = _in_columns(rows)
        inner = layer.inner(rows, columns)
    y = _product(inner, outer.weight, outer.bias, columns and not layer.ends)
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


def _pivoted_product(
    x: Tensor, Z: Tensor, order: Tensor | None, columns: bool
) -> tuple[Tensor, Tensor]:
    """[I Z] of x (tokens, in) in `order`, (tokens, rank), and the inputs that Z has read."""
    if order is not None:
        x = _gather(x, order, columns)
    pivots, rest = x.tensor_split([len(Z)], 1)
    return _product(rest, Z, pivots, columns), rest


def _is_traced(x: Tensor, weight: Tensor) -> bool:
    """Whether autograd, and neither a compiler nor autocast, asks for a backward pass."""
    return (
        torch.is_grad_enabled()
        and (x.requires_grad or weight.requires_grad)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(x.device.type)
    )


class PivotedProduct(torch.autograd.Function):
    """`_pivoted_product` whose backward pass writes both parts of the gradient of x into one piece
    of memory, in the layout of the forward pass: autograd alone would fill, copy and add them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, Z: Tensor, order: Tensor | None, columns: bool) -> Tensor:
        inner, rest = _pivoted_product(x, Z, order, columns)
        ctx.save_for_backward(rest, Z, order)
        ctx.columns = columns
        return inner

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        rest, Z, order = ctx.saved_tensors
        for_x = for_Z = None
        if ctx.needs_input_grad[0]:
            for_x = _unpivoted(gradient, Z, order, ctx.columns)
        if ctx.needs_input_grad[1]:
            for_Z = gradient.t() @ rest
        return for_x, for_Z, None, None


def _unpivoted(gradient: Tensor, Z: Tensor, order: Tensor | None, columns: bool) -> Tensor:
    """The gradient of x (tokens, in) from that of [I Z] Pᵀ x (tokens, rank)."""
    tokens, rank = gradient.shape
    both = gradient.new_empty((sum(Z.shape), tokens) if columns else (tokens, sum(Z.shape)))
    if columns:
        both[:rank] = gradient.t()
        torch.mm(Z.t(), gradient.t(), out=both[rank:])
        both = both.t()
    else:
        both[:, :rank] = gradient
        torch.mm(gradient, Z, out=both[:, rank:])
    return both if order is None else _gather(both, order.argsort(), columns)


@dataclass(frozen=True)
class Packed:
    """The weights (rank, in) of two `linears`, one behind the other in `whole`: `rows` of the first
    and then those of the second."""

    whole: Tensor
    rows: int
    linears: tuple[nn.Linear, nn.Linear]

    def is_current(self) -> bool:
        """Whether the weights still lie there, and need no gradients of their own.

        Not for a compiler, which cannot ask where a tensor lies.
        """
        if torch.compiler.is_compiling():
            return False
        first, second = self.linears[0].weight, self.linears[1].weight
        return (
            not (torch.is_grad_enabled() and (first.requires_grad or second.requires_grad))
            and first.data_ptr() == self.whole.data_ptr()
            and second.data_ptr() == self.whole.data_ptr() + first.nbytes
        )


class SharesInput:
    """Forward pre-hook of an FFN: gate and up, `readers` by their names in it, get a `Shared`,
    made once for both."""

    def __init__(self, readers: Mapping[str, Fused], packed: Packed | None) -> None:
        self.readers = dict(readers)
        self.packed = packed

    def __call__(self, ffn: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not (arguments and self._can_share(ffn)):
            return None  # gate and up read it one by one
        x, *others = arguments
        rows = _rows(x)
        columns = _in_columns(rows)
        return Shared(x.shape[:-1], self._inner(rows, columns), columns), *others

    def _can_share(self, ffn: nn.Module) -> bool:
        """Whether the readers are still in their places, and bare."""
        for name, reader in self.readers.items():
            if ffn._modules[name] is not reader or not reader.bare:
                return False
        return True

    def _inner(self, x: Tensor, columns: bool) -> tuple[Tensor, ...]:
        if self.packed is not None and self.packed.is_current():
            both = _product(x, self.packed.whole, None, columns)
            return both.tensor_split([self.packed.rows], 1)
        first, second = self.readers.values()
        if columns and isinstance(first, FusedPivoted):
            x = x.t().contiguous().t()  # once for both gathers
        return first.inner(x, columns), second.inner(x, columns)
