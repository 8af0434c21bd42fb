"""The parameters that train: balanced factors, LoRA adapters, or those that the layers store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.compression.replace_layers import fill
from lrcompress.layers.lowrank import (
    FactoredLinear,
    LowRankLinear,
    PivotedLinear,
    compressed_layers,
    install,
)
from lrcompress.methods.linalg import decompose

# the present pivots of a layer count as this many times as large as other columns
PIVOT_PREFERENCE = 4.0


@torch.no_grad()
def balance(model: nn.Module) -> dict[str, LowRankLinear]:
    """Replaces every low-rank layer by balanced factors B = U S^1/2 and A = S^1/2 Vᵀ.

    U S Vᵀ is the SVD of the layer's weight. Returns the replaced layers by name, for `pack`.
    """
    stored = {
        name: layer for name, layer in compressed_layers(model) if isinstance(layer, LowRankLinear)
    }
    for name, layer in stored.items():
        install(model, name, _balanced(layer))
    return stored


@torch.no_grad()
def pack(model: nn.Module, stored: Mapping[str, LowRankLinear]) -> None:
    """Puts back the layers that `balance` replaced, with the product of the trained factors."""
    for name, layer in stored.items():
        factors = model.get_submodule(name)
        assert isinstance(factors, FactoredLinear)
        fill(layer, factors.A.weight, factors.B.weight, _column_sizes(layer))
        if layer.bias is not None and factors.bias is not None:
            layer.bias.copy_(factors.bias)
        install(model, name, layer)


def _column_sizes(layer: LowRankLinear) -> Tensor | None:
    """Sizes of the inputs (in,) by which pivots are chosen; None if the layer is not pivoted.

    The present pivots were chosen with measured sizes of the inputs. Nothing is measured here, so
    that they get a larger size than the rest and most of them stay pivots.
    """
    if not isinstance(layer, PivotedLinear):
        return None
    sizes = torch.ones(layer.in_features, device=layer.order.device)
    sizes[layer.order[: layer.rank].long()] = PIVOT_PREFERENCE
    return sizes


def _balanced(layer: LowRankLinear) -> FactoredLinear:
    product = layer.product()
    factored = FactoredLinear(
        in_features=layer.in_features,
        out_features=layer.out_features,
        rank=layer.rank,
        bias=layer.bias is not None,
        dense_type=layer.dense_type,
        device=product.device,
        dtype=product.dtype,
    )
    factors = decompose(product, rank=layer.rank).factors(product, layer.rank)
    fill(factored, factors.A, factors.B)
    if layer.bias is not None and factored.bias is not None:
        factored.bias.copy_(layer.bias)
    return factored.train(layer.training)


def with_adapters(model: Any, rank: int, seed: int) -> Any:
    """The PEFT model of `model` with a LoRA adapter on every matrix of every compressed layer.

    The scale of an adapter is 1 (alpha = rank). One of its two matrices is drawn by `seed`, the
    other is zero.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(_linear_names(model)))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def _linear_names(model: nn.Module) -> Iterator[str]:
    for name, layer in compressed_layers(model):
        if isinstance(layer, LowRankLinear):
            for child_name, child in layer.named_children():
                if isinstance(child, nn.Linear):
                    yield f"{name}.{child_name}"
        else:
            yield name


def trainable(model: nn.Module, train: str) -> Iterator[nn.Parameter]:
    """The parameters that the setting `train` names: factors, norms (and factors), all, or lora."""
    if train == "all":
        yield from model.parameters()
    elif train == "lora":
        yield from (p for name, p in model.named_parameters() if "lora_" in name)
    else:
        for _, layer in compressed_layers(model):
            yield from layer.parameters()
    if train == "norms":
        for module in model.modules():
            if type(module).__name__.endswith("Norm"):
                yield from module.parameters(recurse=False)
