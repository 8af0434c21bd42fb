"""The forms in which low-rank layers run fastest; `optimize.py` puts the layers into them.

Parameters and buffers keep their names and shapes, so checkpoints do not change. Only the order of
the operations changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from lrcompress.layers.lowrank import FactoredLinear, PivotedLinear

# from this number of tokens on, the CPU's kernels are faster for W Xᵀ than for X Wᵀ
MIN_TOKENS_FOR_COLUMNS = 16


class MemoryLayout(Enum):
    """How an activation matrix x (tokens, features) lies in memory."""

    TOKENS_AS_ROWS = "rows"  # the features of one token are contiguous
    TOKENS_AS_COLUMNS = "columns"  # the values of one feature are contiguous

    @classmethod
    def fastest_for(cls, x: Tensor) -> MemoryLayout:
        """The layout in which the products of x (tokens, in) are fastest on its device."""
        if x.is_cpu and x.shape[0] >= MIN_TOKENS_FOR_COLUMNS:
            return cls.TOKENS_AS_COLUMNS
        return cls.TOKENS_AS_ROWS

    def linear(self, x: Tensor, weight: Tensor, addend: Tensor | None) -> Tensor:
        """x Wᵀ + addend (tokens, out) in this layout; `addend` is (out,) or (tokens, out)."""
        if self is MemoryLayout.TOKENS_AS_ROWS:
            if addend is None or addend.ndim == 1:
                return functional.linear(x, weight, addend)
            return torch.addmm(addend, x, weight.t())
        if addend is None:
            return torch.mm(weight, x.t()).t()
        addend = addend[:, None] if addend.ndim == 1 else addend.t()
        return torch.addmm(addend, weight, x.t()).t()

    def gather(self, x: Tensor, order: Tensor) -> Tensor:
        """x[:, order]; far faster with tokens as columns, where whole rows of memory move."""
        if self is MemoryLayout.TOKENS_AS_COLUMNS:
            return x.t().contiguous().index_select(0, order).t()
        return x.index_select(1, order)

    def append_product(self, x: Tensor, weight: Tensor) -> Tensor:
        """[x, x W] (tokens, rank + n) in one new tensor, for x (tokens, rank) and W (rank, n)."""
        tokens, rank = x.shape
        width = rank + weight.shape[1]
        if self is MemoryLayout.TOKENS_AS_COLUMNS:
            columns = x.new_empty((width, tokens))
            columns[:rank] = x.t()
            torch.mm(weight.t(), x.t(), out=columns[rank:])
            return columns.t()
        rows = x.new_empty((tokens, width))
        rows[:, :rank] = x
        torch.mm(x, weight, out=rows[:, rank:])
        return rows


class SharedInput(NamedTuple):
    """Given to gate and up instead of their input: the inner activations of both, computed at once.

    `inner` holds one tensor (tokens, rank) for each of the two, in `layout`; `batch_shape` is the
    input's shape without its last dimension.
    """

    batch_shape: torch.Size
    inner: tuple[Tensor, ...]
    layout: MemoryLayout


class TracksStockLinears(nn.Module):
    """Knows whether all its children are stock linears, whose weights may be read directly.

    An adapter or a quantizer replaces them by other modules, which have to be called.
    """

    has_stock_linears: bool

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):
            self.__dict__["has_stock_linears"] = are_stock_linears(*self.children())


def are_stock_linears(*modules: nn.Module) -> bool:
    """Whether each module is exactly an nn.Linear with an ordinary parameter as weight."""
    return all(
        type(module) is nn.Linear and type(module.weight) is nn.Parameter for module in modules
    )


class FusedFactored(TracksStockLinears, FactoredLinear):
    """y = B A x, for x (..., in) or a `SharedInput`.

    Of a `SharedInput` it reads number `shared_index` of the inner activations. `is_ffn_output`
    tells that the layer is the FFN's last one.
    """

    shared_index: int
    is_ffn_output: bool

    def inner_activations(self, x: Tensor, layout: MemoryLayout) -> Tensor:
        """A x (tokens, rank) of x (tokens, in)."""
        return layout.linear(x, self.A.weight, None)

    def forward(self, x: Tensor | SharedInput) -> Tensor:
        if self.has_stock_linears or isinstance(x, SharedInput):
            return _forward(self, self.B, x)
        return super().forward(x)


class FusedPivoted(TracksStockLinears, PivotedLinear):
    """y = C [I Z] Pᵀ x, for x (..., in) or a `SharedInput`.

    Of a `SharedInput` it reads number `shared_index` of the inner activations. `is_ffn_output`
    tells that the layer is the FFN's last one, `order_absorbed` that its inputs already come in the
    order of the pivots.
    """

    shared_index: int
    is_ffn_output: bool
    order_absorbed: bool

    def inner_activations(self, x: Tensor, layout: MemoryLayout) -> Tensor:
        """[I Z] Pᵀ x (tokens, rank) of x (tokens, in)."""
        order, Z = None if self.order_absorbed else self.order, self.Z.weight
        if _needs_autograd(x, Z):
            inner: Tensor = PivotedProduct.apply(x, Z, order, layout)  # type: ignore[no-untyped-call]
            return inner
        return _pivoted_product(x, Z, order, layout)[0]

    def forward(self, x: Tensor | SharedInput) -> Tensor:
        if self.has_stock_linears or isinstance(x, SharedInput):
            return _forward(self, self.C, x)
        return super().forward(x)


Fused = FusedFactored | FusedPivoted
FUSED: Mapping[type[nn.Module], type[Fused]] = {
    FactoredLinear: FusedFactored,
    PivotedLinear: FusedPivoted,
}


def _forward(layer: Fused, outer: nn.Linear, x: Tensor | SharedInput) -> Tensor:
    if isinstance(x, SharedInput):
        batch_shape, inner, layout = x.batch_shape, x.inner[layer.shared_index], x.layout
    else:
        batch_shape, rows = x.shape[:-1], _as_matrix(x)
        layout = MemoryLayout.fastest_for(rows)
        inner = layer.inner_activations(rows, layout)
    if layer.is_ffn_output:  # the rest of the model reads tokens as rows
        layout = MemoryLayout.TOKENS_AS_ROWS
    y = layout.linear(inner, outer.weight, outer.bias)
    return y.view(*batch_shape, layer.out_features)


def _as_matrix(x: Tensor) -> Tensor:
    """x (..., in) as (tokens, in)."""
    return x.reshape(-1, x.shape[-1])


def _pivoted_product(
    x: Tensor, Z: Tensor, order: Tensor | None, layout: MemoryLayout
) -> tuple[Tensor, Tensor]:
    """[I Z] Pᵀ x (tokens, rank) of x (tokens, in), and the inputs that Z has read.

    Without `order` the inputs of x already come in the order of the pivots.
    """
    if order is not None:
        x = layout.gather(x, order)
    pivots, rest = x.tensor_split([len(Z)], 1)
    return layout.linear(rest, Z, pivots), rest


def _needs_autograd(x: Tensor, weight: Tensor) -> bool:
    """Whether eager autograd will run a backward pass; not under a compiler or autocast."""
    return (
        torch.is_grad_enabled()
        and (x.requires_grad or weight.requires_grad)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(x.device.type)
    )


class PivotedProduct(torch.autograd.Function):
    """`_pivoted_product` with a backward pass of its own.

    It writes the gradient of x into one tensor in the layout of the forward pass. Autograd alone
    would compute the gradient's two parts apart, pad them with zeros and add them.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, Z: Tensor, order: Tensor | None, layout: MemoryLayout
    ) -> Tensor:
        inner, rest = _pivoted_product(x, Z, order, layout)
        ctx.save_for_backward(rest, Z, order)
        ctx.layout = layout
        return inner

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        rest, Z, order = ctx.saved_tensors
        x_gradient = Z_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = ctx.layout.append_product(gradient, Z)
            if order is not None:
                x_gradient = ctx.layout.gather(x_gradient, order.argsort())
        if ctx.needs_input_grad[1]:
            Z_gradient = gradient.t() @ rest
        return x_gradient, Z_gradient, None, None


@dataclass(frozen=True)
class PackedWeights:
    """The weights (rank, in) of two `linears`, one below the other in the tensor `stacked`.

    The first `first_rank` rows are those of the first linear.
    """

    stacked: Tensor
    first_rank: int
    linears: tuple[nn.Linear, nn.Linear]

    def is_current(self) -> bool:
        """Whether the linears still use this memory, and need no gradients for it.

        Never under a compiler, which cannot ask for the address of a tensor.
        """
        if torch.compiler.is_compiling():
            return False
        first, second = self.linears[0].weight, self.linears[1].weight
        return (
            not (torch.is_grad_enabled() and (first.requires_grad or second.requires_grad))
            and first.data_ptr() == self.stacked.data_ptr()
            and second.data_ptr() == self.stacked.data_ptr() + first.nbytes
        )


class ShareInputHook:
    """Forward pre-hook of an FFN that gives gate and up one `SharedInput` instead of their input.

    `readers` are gate and up by their names in the FFN.
    """

    def __init__(self, readers: Mapping[str, Fused], packed: PackedWeights | None) -> None:
        self.readers = dict(readers)
        self.packed = packed

    def __call__(self, ffn: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not (arguments and self._can_share(ffn)):
            return None  # gate and up each read the input itself
        x, *others = arguments
        rows = _as_matrix(x)
        layout = MemoryLayout.fastest_for(rows)
        return SharedInput(x.shape[:-1], self._inner_activations(rows, layout), layout), *others

    def _can_share(self, ffn: nn.Module) -> bool:
        """Whether the readers are still in the FFN, and made of stock linears."""
        for name, reader in self.readers.items():
            if ffn._modules[name] is not reader or not reader.has_stock_linears:
                return False
        return True

    def _inner_activations(self, x: Tensor, layout: MemoryLayout) -> tuple[Tensor, ...]:
        if self.packed is not None and self.packed.is_current():
            joined = layout.linear(x, self.packed.stacked, None)
            return joined.tensor_split([self.packed.first_rank], 1)
        first, second = self.readers.values()
        if layout is MemoryLayout.TOKENS_AS_COLUMNS and isinstance(first, FusedPivoted):
            x = x.t().contiguous().t()  # once, and not in the gather of each reader
        return first.inner_activations(x, layout), second.inner_activations(x, layout)
