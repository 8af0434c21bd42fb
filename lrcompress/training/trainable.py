"""How compressed layers are written down while they train, and what is added to them."""

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

PREFERRED = 4.0


@torch.no_grad()
def balance(model: nn.Module) -> dict[str, LowRankLinear]:
    """Writes every low-rank layer as two factors that share its singular values: B A with
    B = U S^1/2 and A = S^1/2 Vᵀ. Returns the layers that gave way, for `pack`."""
    stored = {n: layer for n, layer in compressed_layers(model) if isinstance(layer, LowRankLinear)}
    for name, layer in stored.items():
        install(model, name, _balanced(layer))
    return stored


@torch.no_grad()
def pack(model: nn.Module, stored: Mapping[str, LowRankLinear]) -> None:
    """Puts the layers that `balance` took back, with the weights that their factors have now."""
    for name, layer in stored.items():
        factors = model.get_submodule(name)
        assert isinstance(factors, FactoredLinear)
        fill(layer, factors.A.weight, factors.B.weight, _preference(layer))
        if layer.bias is not None and factors.bias is not None:
            layer.bias.copy_(factors.bias)
        install(model, name, layer)


def _preference(layer: LowRankLinear) -> Tensor | None:
    """Sizes of the inputs (in,) by which a pivoted layer tends to keep the pivots that it has: they
    were chosen for the inputs, which are not measured here."""
    if not isinstance(layer, PivotedLinear):
        return None
    sizes = torch.ones(layer.in_features)
    sizes[layer.order[: layer.rank].long().cpu()] = PREFERRED
    return sizes


def _balanced(layer: LowRankLinear) -> FactoredLinear:
    product = layer.product()
    place: dict[str, Any] = {"device": product.device, "dtype": product.dtype}
    shape, has_bias = (layer.in_features, layer.out_features), layer.bias is not None
    factored = FactoredLinear(*shape, layer.rank, has_bias, layer.dense_type, **place)
    factors = decompose(product, rank=layer.rank).factors(product, layer.rank)
    fill(factored, factors.A, factors.B)
    if layer.bias is not None and factored.bias is not None:
        factored.bias.copy_(layer.bias)
    return factored.train(layer.training)


def with_adapters(model: Any, rank: int, seed: int) -> Any:
    """`model` with a LoRA adapter of `rank` on every matrix of every compressed layer, by PEFT.

    Their scale is one, alpha = rank; `seed` draws one of their two matrices, the other is zero.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(_matrices(model)))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def _matrices(model: nn.Module) -> Iterator[str]:
    for name, layer in compressed_layers(model):
        if isinstance(layer, LowRankLinear):
            children = (child for child, m in layer.named_children() if isinstance(m, nn.Linear))
            yield from (f"{name}.{child}" for child in children)
        else:
            yield name


def trainable(model: nn.Module, what: str) -> Iterator[nn.Parameter]:
    """The parameters that `train` names: factors, norms (and factors), all, or lora."""
    if what == "all":
        yield from model.parameters()
    elif what == "lora":
        yield from (p for name, p in model.named_parameters() if "lora_" in name)
    else:
        for _, layer in compressed_layers(model):
            yield from layer.parameters()
    if what == "norms":
        for module in model.modules():
            if type(module).__name__.endswith("Norm"):
                yield from module.parameters(recurse=False)
