"""Turns a compressed model into one of stock layers that its own config describes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lrcompress.checkpoint.folder import save_checkpoint
from lrcompress.layers.experts import Experts
from lrcompress.layers.ffn_layouts import find_ffns
from lrcompress.layers.lowrank import (
    compressed_layers,
    dense_layer,
    dense_weight,
    install,
    linear_shape,
)
from lrcompress.layers.moe import unpack, unpacked
from lrcompress.methods.types import LinearSpec

# config keys that hold the number of intermediate channels; None there means 4 x hidden size
WIDTH_KEYS = (
    "intermediate_size",
    "moe_intermediate_size",
    "ffn_dim",
    "n_inner",
    "ffn_hidden_size",
)
# grouped products of experts read rows of whole 16 bytes: channels of every dtype from 16 bits up
ALIGNED = 8


def to_stock(model: Any) -> None:
    """Replaces low-rank and narrowed layers by stock layers, in place, and mends the config.

    All FFNs get one width: that of the widest if the config can say so, the original one
    otherwise. Missing channels are filled with zeros, which changes no output.
    """
    with unpacked(model):
        _make_dense(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, Experts):
            install(model, name, module.to_fused())


def _make_dense(model: Any) -> None:
    linears = find_ffns(model).linears
    for name, layer in list(compressed_layers(model)):
        install(model, name, layer.to_dense())
    model.config.__dict__.pop("quantization_config", None)
    stock = _skeleton(model.config)
    if _differs(model, stock, linears):
        widest = max(spec.in_features for spec in linears if spec.role == "down")
        if any(spec.mixture for spec in linears):
            widest += -widest % ALIGNED
        for smaller in _with_width(model.config, widest):
            candidate = _skeleton(smaller)
            if _fits(candidate, linears, widest):
                model.config.__dict__.update(smaller.__dict__)
                stock = candidate
                break
        for spec in linears:
            _pad(model, spec, linear_shape(stock.get_submodule(spec.name)))


def _skeleton(config: Any) -> Any:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    unpack(model)
    return model


def _differs(model: nn.Module, stock: nn.Module, linears: tuple[LinearSpec, ...]) -> bool:
    return any(
        linear_shape(model.get_submodule(s.name)) != linear_shape(stock.get_submodule(s.name))
        for s in linears
    )


def _with_width(config: Any, width: int) -> Iterator[Any]:
    """Copies of `config` with one of its width keys, if it has a larger one, set to `width`."""
    for key in WIDTH_KEYS:
        if hasattr(config, key) and (getattr(config, key) or width) >= width:
            changed = copy.deepcopy(config)
            setattr(changed, key, width)
            yield changed


def _fits(stock: nn.Module, linears: tuple[LinearSpec, ...], width: int) -> bool:
    shapes = {s.name: linear_shape(stock.get_submodule(s.name)) for s in linears}
    return all(shapes[s.name][1] == width for s in linears if s.role == "down")


def _pad(model: nn.Module, spec: LinearSpec, shape: tuple[int, int]) -> None:
    """Zeros for the channels that `spec` lacks; both halves of a fused gate_up get theirs."""
    layer = model.get_submodule(spec.name)
    weight, bias = dense_weight(layer), layer.bias
    rows, columns = shape
    halves = 2 if spec.role == "gate_up" else 1
    padded = torch.cat([_zeros_to(w, rows // halves, columns) for w in weight.chunk(halves)])
    if bias is not None:
        assert isinstance(bias, Tensor)
        parts = [_zeros_to(b[:, None], rows // halves, 1) for b in bias.chunk(halves)]
        bias = torch.cat(parts).flatten()
    install(model, spec.name, dense_layer(type(layer), padded, bias).train(layer.training))


def _zeros_to(matrix: Tensor, rows: int, columns: int) -> Tensor:
    wide = matrix.new_zeros(rows, columns)
    wide[: matrix.shape[0], : matrix.shape[1]] = matrix
    return wide


def export_dense(model: Any, tokenizer: Any, out: Path, record: Mapping[str, Any]) -> None:
    """Writes `model` with every compressed layer turned back into a stock layer.

    Narrowed FFNs get the width of the widest, with zeros for the channels that others lack,
    where the family's config has one intermediate size; else their original width. Anything
    that loads the original architecture loads the result.
    """
    to_stock(model)
    origin = {"source": record.get("source"), "export": "dense", "factorized_from": dict(record)}
    save_checkpoint(model, tokenizer, out, origin)
