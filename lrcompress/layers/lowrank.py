"""Low-rank and narrowed linear layers, and their exchange with the dense layers of a model.

This file and `experts.py` import only torch and transformers: `lrcompress export --to standalone`
copies both into checkpoints that load without lrcompress.
"""

from __future__ import annotations

import copy
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .experts import EXPERT_LIST, Experts, fused_experts


class LowRankLinear(nn.Module, ABC):
    """y = W x + bias with W (out, in) of rank r; each subclass stores W in its own way.

    The factors are `nn.Linear` children, so that quantizers and adapters find them. The one-element
    buffer `weight` holds no information. It has the dense layer's own key in a checkpoint, so that
    a loader which does not know this layer fails on the shape instead of filling the model with
    random weights. `tensor_options` are the device and dtype of the new tensors.
    """

    form: ClassVar[str]
    weight: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        dense_type: type[nn.Module],
        **tensor_options: Any,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.dense_type = dense_type
        self.register_buffer("weight", torch.zeros(1, **tensor_options))

    @property
    @abstractmethod
    def bias(self) -> Tensor | None: ...

    @abstractmethod
    def product(self) -> Tensor:
        """W (out, in), in float32 or a more precise dtype."""

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"

    def to_dense(self) -> nn.Module:
        """The stock layer of class `dense_type` with the same weight, in the dtype of this one."""
        weight = self.product().detach().to(self.weight.dtype)
        return dense_layer(self.dense_type, weight, self.bias).train(self.training)


class FactoredLinear(LowRankLinear):
    """W = B A with A (rank, in) and B (out, rank): r(out + in) parameters."""

    form = "factored"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool,
        dense_type: type[nn.Module] = nn.Linear,
        **tensor_options: Any,
    ) -> None:
        super().__init__(in_features, out_features, rank, dense_type, **tensor_options)
        self.A = nn.Linear(in_features, rank, bias=False, **tensor_options)
        self.B = nn.Linear(rank, out_features, bias=bias, **tensor_options)

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
    """W = C [I Z] Pᵀ with C (out, rank), the pivot columns of W, and Z (rank, in - rank).

    C Z are the other columns of W, and P is a permutation: `order` (in,) lists the inputs of the
    pivot columns first, then the others. r(out + in - r) parameters, and as many multiplications
    for a token.
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
        **tensor_options: Any,
    ) -> None:
        super().__init__(in_features, out_features, rank, dense_type, **tensor_options)
        self.Z = nn.Linear(in_features - rank, rank, bias=False, **tensor_options)
        self.C = nn.Linear(rank, out_features, bias=bias, **tensor_options)
        order = torch.arange(in_features, dtype=torch.int32, device=tensor_options.get("device"))
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
    """An nn.Linear of an FFN with fewer intermediate channels than the model's config says."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        dense_type: type[nn.Module],
        **tensor_options: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, **tensor_options)
        self.dense_type = dense_type

    def to_dense(self) -> nn.Module:
        return dense_layer(self.dense_type, self.weight, self.bias).train(self.training)


FORMS: dict[str, type[FactoredLinear] | type[PivotedLinear]] = {
    "factored": FactoredLinear,
    "pivoted": PivotedLinear,
}
NARROWED = "narrowed"


def dense_layer(dense_type: type[nn.Module], weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A stock layer from W (out, in); `dense_type` is nn.Linear, a subclass of it, or Conv1D."""
    out_features, in_features = weight.shape
    weight = weight.detach()
    with torch.device("meta"):
        if issubclass(dense_type, Conv1D):
            layer: nn.Module = dense_type(out_features, in_features)
            weight = weight.T
        else:
            layer = dense_type(in_features, out_features, bias=bias is not None)
    layer.weight = nn.Parameter(weight.contiguous())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


def is_linear(module: nn.Module | None) -> bool:
    """Whether `module` is a dense linear: nn.Linear, a subclass of it, or Conv1D."""
    return isinstance(module, nn.Linear | Conv1D)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear, dense or compressed; Conv1D stores its weight as (in, out)."""
    if isinstance(module, LowRankLinear):
        return module.out_features, module.in_features
    rows, columns = module.weight.shape  # type: ignore[misc]
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def dense_weight(module: nn.Module) -> Tensor:
    """The weight of a dense linear as W (out, in), without a copy."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().T if isinstance(module, Conv1D) else weight.detach()


def compressed_layers(model: nn.Module) -> Iterator[tuple[str, LowRankLinear | NarrowedLinear]]:
    """Name and module of every low-rank or narrowed layer in `model`; tied ones come once."""
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear | NarrowedLinear) and not is_tied(model, name):
            yield name, module


def is_compressed(model: Any) -> bool:
    """Whether any layer of `model` is low-rank or narrowed; recognizes standalone exports too."""
    return any(compressed_layers(model)) or hasattr(model.config, "low_rank_modules")


def install(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Puts `layer` in the place of the submodule called `name`, and of those tied to it."""
    tied = tied_modules(model, name)
    for place in (name, *tied):
        parent, _, child = place.rpartition(".")
        setattr(model.get_submodule(parent), child, layer if place == name else _twin(layer))
    if tied:
        _declare_ties(model)


def tied_modules(model: Any, name: str) -> list[str]:
    """The modules that have their parameters from that called `name`, as `model` declares it.

    Blocks of zamba share one FFN.
    """
    ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    own = {target: source for target, source in ties.items() if source.startswith(f"{name}.")}
    places = (target.removesuffix(source.removeprefix(name)) for target, source in own.items())
    return list(dict.fromkeys(places))


def is_tied(model: Any, name: str) -> bool:
    """Whether the module called `name` has its parameters from another, as `model` declares it."""
    ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    return any(target.startswith(f"{name}.") for target in ties)


def _twin(layer: nn.Module) -> nn.Module:
    """A module with the parameters of `layer`; it has its own buffers, which are never tied."""
    buffers = dict(layer.named_buffers(recurse=False))
    if not buffers:
        return layer
    twin = copy.copy(layer)
    twin.__dict__["_buffers"] = {name: buffer.clone() for name, buffer in buffers.items()}
    return twin


def _declare_ties(model: Any) -> None:
    """Tells transformers which parameters are tied, after the modules that have them changed."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    ties = model.get_expanded_tied_weights_keys(all_submodels=True)
    model.all_tied_weights_keys = {name: ties[name] for name in ties if name in parameters}


def empty_like(
    dense: nn.Module, form: str, shape: tuple[int, int], rank: int | None
) -> LowRankLinear | NarrowedLinear:
    """An uninitialized layer of `form` and `shape` (out, in), with device and dtype of `dense`.

    `rank` is needed for every form but "narrowed".
    """
    out_features, in_features = shape
    weight, bias = dense.weight, dense.bias is not None
    assert isinstance(weight, Tensor)
    tensor_options = {"device": weight.device, "dtype": weight.dtype}
    if form == NARROWED:
        return NarrowedLinear(in_features, out_features, bias, type(dense), **tensor_options)
    assert rank is not None
    return FORMS[form](in_features, out_features, rank, bias, type(dense), **tensor_options)


def layout(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Module name -> {form, shape, rank} of every compressed layer, as checkpoints record it."""
    records: dict[str, dict[str, Any]] = {}
    for name, layer in compressed_layers(model):
        shape = {"shape": list(linear_shape(layer))}
        if isinstance(layer, LowRankLinear):
            records[name] = {"form": layer.form, "rank": layer.rank} | shape
        else:
            records[name] = {"form": NARROWED} | shape
    return records


def rebuild(model: nn.Module, modules: Mapping[str, Mapping[str, Any]]) -> None:
    """Replaces dense layers of `model` by the empty compressed layers that `layout` recorded.

    Raises ValueError with the module's name where a record does not fit the model.
    """
    prefix = getattr(model, "base_model_prefix", "") + "."
    candidates = {name: tuple(_spellings(name, prefix)) for name in modules}
    _unpack_experts(model, itertools.chain.from_iterable(candidates.values()))
    for name, record in modules.items():
        path = next((path for path in candidates[name] if _has_linear(model, path)), None)
        if path is None:
            raise ValueError(f"low-rank record for {name!r}: the model has no such linear layer")
        dense = model.get_submodule(path)
        form, shape, rank = _checked(name, record, linear_shape(dense))
        install(model, path, empty_like(dense, form, shape, rank))


def _spellings(name: str, prefix: str) -> Iterator[str]:
    """The names that a module can have in another class of model than the one that was saved.

    They start with `prefix` in a model with a head and without it in a base model, and name the
    `language_model` where there are more, such as an encoder of images.
    """
    base = name.removeprefix(prefix)
    text = base.removeprefix("language_model.")
    yield from (name, base, prefix + name, text, prefix + text)
    yield from (f"language_model.{text}", f"{prefix}language_model.{text}")


def _unpack_experts(model: nn.Module, linears: Iterable[str]) -> None:
    """Replaces fused experts by `Experts` where one of `linears` names a linear of an expert."""
    mixtures = {name.partition(f".{EXPERT_LIST}.")[0] for name in linears}
    for name, fused in list(fused_experts(model)):
        if name in mixtures:
            install(model, name, Experts(fused))


def _has_linear(model: nn.Module, name: str) -> bool:
    try:
        return is_linear(model.get_submodule(name))
    except AttributeError:
        return False


def _checked(
    name: str, record: Mapping[str, Any], dense_shape: tuple[int, int]
) -> tuple[str, tuple[int, int], int | None]:
    """(form, shape, rank) of a record; ValueError where they are invalid for the dense layer."""
    form, shape, rank = record.get("form"), record.get("shape"), record.get("rank")
    subject = f"low-rank record for {name!r}: "
    if form != NARROWED and form not in FORMS:
        raise ValueError(f"{subject}unknown form {form!r}")
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int for n in shape)):
        raise ValueError(f"{subject}shape {shape!r} is not [out, in]")
    if not all(1 <= n <= limit for n, limit in zip(shape, dense_shape, strict=True)):
        raise ValueError(f"{subject}shape {shape!r} does not fit into {list(dense_shape)}")
    if form != NARROWED and (type(rank) is not int or not 1 <= rank <= min(shape)):
        raise ValueError(f"{subject}rank {rank!r} is not in 1..{min(shape)}")
    return form, (shape[0], shape[1]), rank
