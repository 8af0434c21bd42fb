"""Low-rank linear layers and the swap between them and the dense layers of a model.

This file depends on torch and transformers alone: `lrcompress export --standalone` ships it,
as it is, inside checkpoints that load without lrcompress.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class LowRankLinear(nn.Module):
    """y = B(A x) + bias, the factored form: A is (rank x in), B is (out x rank).

    The factors are plain `nn.Linear` children, so quantizers and adapters find them. The
    one-element buffer `weight` holds no information: it sits under the dense layer's own key,
    so that a loader which does not know this layer fails on its shape instead of filling the
    model with random weights.
    """

    weight: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool,
        dense_type: type[nn.Module] = nn.Linear,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.dense_type = dense_type
        self.A = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.B = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)
        self.register_buffer("weight", torch.zeros(1, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.B(self.A(x))
        return y

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"

    @classmethod
    def shaped_like(cls, dense: nn.Module, rank: int) -> LowRankLinear:
        """An uninitialized low-rank layer in the place, device and dtype of `dense`."""
        out_features, in_features = linear_shape(dense)
        weight, bias = dense.weight, dense.bias
        assert isinstance(weight, Tensor)
        return cls(
            in_features,
            out_features,
            rank,
            bias is not None,
            type(dense),
            device=weight.device,
            dtype=weight.dtype,
        )

    @classmethod
    def from_factors(cls, dense: nn.Module, A: Tensor, B: Tensor) -> LowRankLinear:
        """Replaces `dense` by W ~ B A; A is (rank, in), B is (out, rank), any float dtype."""
        layer = cls.shaped_like(dense, A.shape[0])
        with torch.no_grad():
            layer.A.weight.copy_(A)
            layer.B.weight.copy_(B)
            if layer.B.bias is not None:
                layer.B.bias.copy_(dense.bias)  # type: ignore[arg-type]
        for parameter in layer.parameters():
            parameter.requires_grad_(dense.weight.requires_grad)  # type: ignore[arg-type]
        return layer.train(dense.training)

    def to_dense(self) -> nn.Module:
        """The stock layer with weight B A; the product is taken in float32 or better."""
        precision = torch.promote_types(self.A.weight.dtype, torch.float32)
        weight = (self.B.weight.to(precision) @ self.A.weight.to(precision)).detach()
        return dense_layer(self.dense_type, weight.to(self.A.weight.dtype), self.B.bias).train(
            self.training
        )


def dense_layer(kind: type[nn.Module], weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A stock layer of class `kind` (nn.Linear or one of its kind, or Conv1D) from W (out, in)."""
    out_features, in_features = weight.shape
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


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a dense linear, whichever way its class stores the weight."""
    rows, columns = module.weight.shape  # type: ignore[misc]
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def dense_weight(module: nn.Module) -> Tensor:
    """The weight of a dense linear as W (out, in); a view."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().T if isinstance(module, Conv1D) else weight.detach()


def low_rank_layers(model: nn.Module) -> Iterator[tuple[str, LowRankLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            yield name, module


def install(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Puts `layer` in the place of the submodule called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def layout(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Module name -> {form, rank} of every low-rank layer: what a checkpoint has to remember."""
    return {
        name: {"form": "factored", "rank": layer.rank} for name, layer in low_rank_layers(model)
    }


def rebuild(model: nn.Module, modules: Mapping[str, Mapping[str, Any]]) -> None:
    """Swaps empty low-rank layers into a dense skeleton as `layout` recorded them.

    Raises ValueError naming the module when a record does not fit the model.
    """
    prefix = getattr(model, "base_model_prefix", "") + "."
    for name, record in modules.items():
        # a base model has no prefix in its names; a model with a head has one
        spellings = (name, name.removeprefix(prefix), prefix + name)
        found = next((s for s in spellings if _has_linear(model, s)), None)
        if found is None:
            raise ValueError(f"low-rank record for {name!r}: the model has no such linear layer")
        dense = model.get_submodule(found)
        install(model, found, LowRankLinear.shaped_like(dense, _rank(name, record, dense)))


def _has_linear(model: nn.Module, name: str) -> bool:
    try:
        return is_linear(model.get_submodule(name))
    except AttributeError:
        return False


def _rank(name: str, record: Mapping[str, Any], dense: nn.Module) -> int:
    form, rank = record.get("form"), record.get("rank")
    if form != "factored":
        raise ValueError(f"low-rank record for {name!r}: unknown form {form!r}")
    if type(rank) is not int or not 1 <= rank <= min(linear_shape(dense)):
        raise ValueError(
            f"low-rank record for {name!r}: rank {rank!r} is not in 1..{min(linear_shape(dense))}"
        )
    return rank


def merge_dense(model: nn.Module) -> None:
    """Turns every low-rank layer of `model` back into the stock layer it replaced."""
    for name, layer in list(low_rank_layers(model)):
        install(model, name, layer.to_dense())
