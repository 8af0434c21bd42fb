"""Export to stock layers, which the original architecture's config describes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
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
from lrcompress.layers.model_info import parameter_count
from lrcompress.layers.moe import unpack, unpacked
from lrcompress.methods.types import LinearSpec
from lrcompress.runtime.notices import notice

# config keys for the number of intermediate channels; the value None means 4 x hidden size
WIDTH_KEYS = (
    "intermediate_size",
    "moe_intermediate_size",
    "ffn_dim",
    "n_inner",
    "ffn_hidden_size",
)
# experts' widths are multiples of this: grouped matrix products need rows of a multiple of 16
# bytes, which 8 channels have in every dtype from 16 bits up
EXPERT_WIDTH_MULTIPLE = 8


def to_stock(model: Any) -> None:
    """Replaces low-rank and narrowed layers by stock layers, in place, and adapts the config.

    A config holds one width for all FFNs: they get the width of the widest if the config has a key
    for it, else the original width. Missing channels are filled with zeros, which changes no
    output.
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
    stock = _stock_skeleton(model.config)
    if _shapes_differ(model, stock, linears):
        stock = _adapt_width(model.config, stock, linears)
        for spec in linears:
            _pad(model, spec, linear_shape(stock.get_submodule(spec.name)))


def _adapt_width(config: Any, stock: Any, linears: tuple[LinearSpec, ...]) -> Any:
    """Sets the width in `config` to that of the widest FFN, and returns a skeleton of that width;
    where no key of the config does it, returns `stock`, which has the original width."""
    widest = max(spec.in_features for spec in linears if spec.role == "down")
    if any(spec.mixture for spec in linears):
        widest += -widest % EXPERT_WIDTH_MULTIPLE
    found = _stock_of_width(config, linears, widest)
    if found is None:
        return stock
    narrower_config, skeleton = found
    config.__dict__.update(narrower_config.__dict__)
    return skeleton


def _stock_of_width(
    config: Any, linears: Sequence[LinearSpec], width: int
) -> tuple[Any, Any] | None:
    """A copy of `config` whose model has FFNs of `width`, with a skeleton of that model; None where
    no key of the config does it."""
    for narrower_config in _configs_of_width(config, width):
        candidate = _stock_skeleton(narrower_config)
        if _has_width(candidate, linears, width):
            return narrower_config, candidate
    return None


def can_name_width(config: Any, linears: Sequence[LinearSpec], width: int) -> bool:
    """Whether a stock model of the family of `config` can have FFNs of `width`.

    False for a family that transformers does not ship.
    """
    try:
        return _stock_of_width(config, linears, width) is not None
    except ValueError:
        return False


def _stock_skeleton(config: Any) -> Any:
    """The stock model of `config` on the meta device, its experts as separate linears."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    unpack(model)
    return model


def _shapes_differ(model: nn.Module, stock: nn.Module, linears: tuple[LinearSpec, ...]) -> bool:
    return any(
        linear_shape(model.get_submodule(s.name)) != linear_shape(stock.get_submodule(s.name))
        for s in linears
    )


def _configs_of_width(config: Any, width: int) -> Iterator[Any]:
    """Copies of `config` with one of its width keys, if it has a larger one, set to `width`."""
    for key in WIDTH_KEYS:
        if hasattr(config, key) and (getattr(config, key) or width) >= width:
            changed = copy.deepcopy(config)
            setattr(changed, key, width)
            yield changed


def _has_width(stock: nn.Module, linears: Sequence[LinearSpec], width: int) -> bool:
    shapes = {s.name: linear_shape(stock.get_submodule(s.name)) for s in linears}
    return all(shapes[s.name][1] == width for s in linears if s.role == "down")


def _pad(model: nn.Module, spec: LinearSpec, shape: tuple[int, int]) -> None:
    """Fills the linear of `spec` with zeros up to `shape` (out, in); a fused gate_up is two halves
    that are filled one by one."""
    layer = model.get_submodule(spec.name)
    weight, bias = dense_weight(layer), layer.bias
    rows, columns = shape
    halves = 2 if spec.role == "gate_up" else 1
    padded = torch.cat([_zero_padded(w, rows // halves, columns) for w in weight.chunk(halves)])
    if bias is not None:
        assert isinstance(bias, Tensor)
        padded_halves = [_zero_padded(b[:, None], rows // halves, 1) for b in bias.chunk(halves)]
        bias = torch.cat(padded_halves).flatten()
    install(model, spec.name, dense_layer(type(layer), padded, bias).train(layer.training))


def _zero_padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    padded = matrix.new_zeros(rows, columns)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    return padded


def export_dense(model: Any, tokenizer: Any, out: Path, record: Mapping[str, Any]) -> None:
    """Writes `model` with every compressed layer turned back into a stock layer (see `to_stock`).

    Any program that loads the original architecture loads the result. `model` is changed. Says so
    where the stock layers are larger than the compressed ones.
    """
    compressed = parameter_count(model)
    to_stock(model)
    origin: dict[str, Any] = {
        "source": record.get("source"),
        "export": "dense",
        "factorized_from": dict(record),
    }
    if (stock := parameter_count(model)) > compressed:
        sentence = (
            f"stock layers make {stock:,} parameters of {compressed:,}: "
            "`lrcompress factorize --for stock` makes a model that an export leaves as small"
        )
        origin["notes"] = [sentence]
        notice(sentence)
    save_checkpoint(model, tokenizer, out, origin)
