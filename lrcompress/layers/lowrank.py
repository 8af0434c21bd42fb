"""Low-rank and narrowed linear layers, and the swap between them and a model's dense layers.

This file and `experts.py` depend on torch and transformers alone: `lrcompress export --standalone`
ships both, as they are, inside checkpoints that load without lrcompress.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .experts import LIST, Experts, fused_experts


class LowRankLinear(nn.Module, ABC):
    """y = W x + bias with W (out, in) of rank r; subclasses say how W is stored.

    What is stored are plain `nn.Linear` children, so quantizers and adapters find them. The
    one-element buffer `weight` holds no information: it sits under the dense layer's own key,
    so that a loader which does not know this layer fails on its shape instead of filling the
    model with random weights.
    """

    form: ClassVar[str]
    weight: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        dense_type: type[nn.Module],
        **place: Any,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.dense_type = dense_type
        self.register_buffer("weight", torch.zeros(1, **place))

    @property
    @abstractmethod
    def bias(self) -> Tensor | None: ...

    @abstractmethod
    def product(self) -> Tensor:
        """W (out, in), in float32 or better."""

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"

    def to_dense(self) -> nn.Module:
        """The stock layer with the same weight, in the dtype of this one."""
        weight = self.product().detach().to(self.weight.dtype)
        return dense_layer(self.dense_type, weight, self.bias).train(self.training)


class FactoredLinear(LowRankLinear):
    """W = B A: A is (rank x in), B is (out x rank); r(out + in) numbers."""

    form = "factored"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool,
        dense_type: type[nn.Module] = nn.Linear,
        **place: Any,
    ) -> None:
        super().__init__(in_features, out_features, rank, dense_type, **place)
        self.A = nn.Linear(in_features, rank, bias=False, **place)
        self.B = nn.Linear(rank, out_features, bias=bias, **place)

    @property
    def bias(self) -> Tensor | None:
        return self.B.bias

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.B(self.A(x))
        return y

    def product(self) -> Tensor:
        precision = torch.promote_types(self.A.weight.dtype, torch.float32)
        return self.B.weight.to(precision) @ self.A.weight.to(precision)


class PivotedLinear(LowRankLinear):
    """W = C [I Z] Pᵀ: C (out x rank) are columns of W, Z (rank x (in - rank)) gives the others.

    `order` (in,) lists the inputs of the pivot columns first, then the rest. r(out + in - r)
    numbers and as many multiplications.
    """

    form = "pivoted"
    order: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool,
        dense_type: type[nn.Module] = nn.Linear,
        **place: Any,
    ) -> None:
        super().__init__(in_features, out_features, rank, dense_type, **place)
        self.Z = nn.Linear(in_features - rank, rank, bias=False, **place)
        self.C = nn.Linear(rank, out_features, bias=bias, **place)
        order = torch.arange(in_features, dtype=torch.int32, device=place.get("device"))
        self.register_buffer("order", order)

    @property
    def bias(self) -> Tensor | None:
        return self.C.bias

    def forward(self, x: Tensor) -> Tensor:
        pivots, rest = x.index_select(-1, self.order).tensor_split([self.rank], -1)
        y: Tensor = self.C(pivots + self.Z(rest))
        return y

    def product(self) -> Tensor:
        precision = torch.promote_types(self.C.weight.dtype, torch.float32)
        C, Z = self.C.weight.to(precision), self.Z.weight.to(precision)
        weight = torch.empty(self.out_features, self.in_features, dtype=C.dtype, device=C.device)
        return weight.index_copy(1, self.order.long(), torch.cat([C, C @ Z], dim=1))


class NarrowedLinear(nn.Linear):
    """A linear layer of an FFN with fewer channels than the config says; otherwise a stock one."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool, dense_type: type[nn.Module], **p: Any
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, **p)
        self.dense_type = dense_type

    def to_dense(self) -> nn.Module:
        return dense_layer(self.dense_type, self.weight, self.bias).train(self.training)


FORMS: dict[str, type[FactoredLinear] | type[PivotedLinear]] = {
    "factored": FactoredLinear,
    "pivoted": PivotedLinear,
}
NARROWED = "narrowed"


def dense_layer(kind: type[nn.Module], weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A stock layer of class `kind` (nn.Linear or one of its kind, or Conv1D) from W (out, in)."""
    out_features, in_features = weight.shape
    weight = weight.detach()
    with torch.device("meta"):
        if issubclass(kind, Conv1D):
            layer: nn.Module = kind(out_features, in_features)
            weight = weight.T
        else:
            layer = kind(in_features, out_features, bias=bias is not None)
    layer.weight = nn.Parameter(weight.contiguous())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


def is_linear(module: nn.Module | None) -> bool:
    """A dense linear: nn.Linear and its kind, or Conv1D."""
    return isinstance(module, nn.Linear | Conv1D)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear in any form, whichever way its class stores the weight."""
    if isinstance(module, LowRankLinear):
        return module.out_features, module.in_features
    rows, columns = module.weight.shape  # type: ignore[misc]
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def dense_weight(module: nn.Module) -> Tensor:
    """The weight of a dense linear as W (out, in); a view."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().T if isinstance(module, Conv1D) else weight.detach()


def compressed_layers(model: nn.Module) -> Iterator[tuple[str, LowRankLinear | NarrowedLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear | NarrowedLinear):
            yield name, module


def is_compressed(model: Any) -> bool:
    """Whether any layer is low-rank or narrowed, in a standalone export too."""
    return any(compressed_layers(model)) or hasattr(model.config, "low_rank_modules")


def install(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Puts `layer` in the place of the submodule called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def empty_like(
    dense: nn.Module, form: str, shape: tuple[int, int], rank: int | None
) -> LowRankLinear | NarrowedLinear:
    """An uninitialized layer of `form` and W (out, in) in the place and dtype of `dense`."""
    out_features, in_features = shape
    weight, bias = dense.weight, dense.bias is not None
    assert isinstance(weight, Tensor)
    place = {"device": weight.device, "dtype": weight.dtype}
    if form == NARROWED:
        return NarrowedLinear(in_features, out_features, bias, type(dense), **place)
    assert rank is not None
    return FORMS[form](in_features, out_features, rank, bias, type(dense), **place)


def layout(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Module name -> {form, shape, rank} of every compressed layer: what a checkpoint keeps."""
    found: dict[str, dict[str, Any]] = {}
    for name, layer in compressed_layers(model):
        shape = {"shape": list(linear_shape(layer))}
        if isinstance(layer, LowRankLinear):
            found[name] = {"form": layer.form, "rank": layer.rank} | shape
        else:
            found[name] = {"form": NARROWED} | shape
    return found


def rebuild(model: nn.Module, modules: Mapping[str, Mapping[str, Any]]) -> None:
    """Swaps empty layers into a dense skeleton as `layout` recorded them.

    Raises ValueError naming the module when a record does not fit the model.
    """
    prefix = getattr(model, "base_model_prefix", "") + "."
    # a base model has no prefix in its names; a model with a head has one
    spelled = {name: (name, name.removeprefix(prefix), prefix + name) for name in modules}
    _unpack(model, (spelling for spellings in spelled.values() for spelling in spellings))
    for name, record in modules.items():
        found = next((s for s in spelled[name] if _has_linear(model, s)), None)
        if found is None:
            raise ValueError(f"low-rank record for {name!r}: the model has no such linear layer")
        dense = model.get_submodule(found)
        install(model, found, empty_like(dense, *_checked(name, record, linear_shape(dense))))


def _unpack(model: nn.Module, linears: Iterable[str]) -> None:
    """Makes the mixtures of experts that `linears` are in lists of linears."""
    wanted = {name.partition(f".{LIST}.")[0] for name in linears}
    for name, fused in list(fused_experts(model)):
        if name in wanted:
            install(model, name, Experts(fused))


def _has_linear(model: nn.Module, name: str) -> bool:
    try:
        return is_linear(model.get_submodule(name))
    except AttributeError:
        return False


def _checked(
    name: str, record: Mapping[str, Any], limit: tuple[int, int]
) -> tuple[str, tuple[int, int], int | None]:
    form, shape, rank = record.get("form"), record.get("shape"), record.get("rank")
    wrong = f"low-rank record for {name!r}: "
    if form != NARROWED and form not in FORMS:
        raise ValueError(f"{wrong}unknown form {form!r}")
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int for n in shape)):
        raise ValueError(f"{wrong}shape {shape!r} is not [out, in]")
    if not all(1 <= n <= most for n, most in zip(shape, limit, strict=True)):
        raise ValueError(f"{wrong}shape {shape!r} does not fit into {list(limit)}")
    if form != NARROWED and (type(rank) is not int or not 1 <= rank <= min(shape)):
        raise ValueError(f"{wrong}rank {rank!r} is not in 1..{min(shape)}")
    return form, (shape[0], shape[1]), rank
