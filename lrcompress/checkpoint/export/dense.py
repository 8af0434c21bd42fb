"""Export to stock layers, which the original architecture's config describes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
    "shared_intermediate_size",
    "shared_expert_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "ffn_dim",
    "n_inner",
    "ffn_hidden_size",
)
# experts' widths are multiples of this: grouped matrix products need rows of a multiple of 16
# bytes, which 8 channels have in every dtype from 16 bits up
EXPERT_WIDTH_MULTIPLE = 8


def to_stock(model: Any) -> None:
    """Replaces low-rank and narrowed layers by stock layers, in place, and adapts the config.

    A config holds one width for FFNs of a kind: they get the width of the widest if the config has
    a key for it, else the original width. Missing channels are filled with zeros, which changes no
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
    stock = _stock_skeleton(type(model), model.config)
    if _shapes_differ(model, stock, linears):
        stock = _adapt_width(model, stock, linears)
        for spec in linears:
            pad(model, spec, linear_shape(stock.get_submodule(spec.name)))


def _adapt_width(model: Any, stock: Any, linears: tuple[LinearSpec, ...]) -> Any:
    """Sets the widths in the config of `model` to those of its widest FFNs.

    Returns a skeleton of these widths: `stock`, of the original widths, where no key helps.
    """
    config, skeleton = _narrowest(type(model), model.config, stock, linears)
    model.config.__dict__.update(config.__dict__)
    return skeleton


def _narrowest(
    stock_class: Any, config: Any, stock: Any, linears: Sequence[LinearSpec]
) -> tuple[Any, Any]:
    """The config and skeleton of the smallest stock model, from `stock`, that `linears` fit into.

    Key by key of WIDTH_KEYS.
    """
    for key in WIDTH_KEYS:
        for candidate in _narrower_configs(config, key, stock, linears):
            skeleton = _stock_skeleton(stock_class, candidate)
            if _holds(skeleton, linears) and parameter_count(skeleton) < parameter_count(stock):
                config, stock = candidate, skeleton
                break
    return config, stock


def can_name_width(model: Any, linears: Sequence[LinearSpec], width: int) -> bool:
    """Whether a stock model of the class of `model` can have FFNs of `width`."""
    stock = _stock_skeleton(type(model), model.config)
    narrowed = [spec.narrowed(width) for spec in linears]
    _, skeleton = _narrowest(type(model), model.config, stock, narrowed)
    downs = [spec for spec in linears if spec.role == "down"]
    return all(linear_shape(skeleton.get_submodule(spec.name))[1] == width for spec in downs)


def _stock_skeleton(stock_class: Any, config: Any) -> Any:
    """A model of `config` on the meta device, its experts as separate linears."""
    with torch.device("meta"):
        model = stock_class._from_config(config)
    unpack(model)
    return model


def _shapes_differ(model: nn.Module, stock: nn.Module, linears: tuple[LinearSpec, ...]) -> bool:
    return any(
        linear_shape(model.get_submodule(s.name)) != linear_shape(stock.get_submodule(s.name))
        for s in linears
    )


def _narrower_configs(
    config: Any, key: str, stock: nn.Module, linears: Sequence[LinearSpec]
) -> Iterator[Any]:
    """Copies of `config` with smaller widths under `key` of the language model, ascending.

    `stock` has the widths of `config`.
    """
    original: Any = getattr(config.get_text_config(decoder=True), key, None)
    downs = [spec for spec in linears if spec.role == "down"]
    values: list[Any] = (
        [_width_of_each_block(original, downs)]
        if isinstance(original, list)
        else _widths(original, stock, downs)
    )
    for value in values:
        changed = copy.deepcopy(config)
        text_config = changed.get_text_config(decoder=True)
        if hasattr(text_config, key):
            setattr(text_config, key, value)
            yield changed


def _width_of_each_block(original: list[int], downs: list[LinearSpec]) -> list[int]:
    """For a key that holds a list: the widest FFN of each block."""
    widths: dict[int, int] = {}
    for spec in downs:
        widths[spec.block] = max(_needed(spec), widths.get(spec.block, 0))
    return [widths.get(block, width) for block, width in enumerate(original)]


def _widths(original: int | None, stock: nn.Module, downs: list[LinearSpec]) -> list[int]:
    """For a key that holds one number: the widest of the FFNs that have equal widths in `stock`.

    In some families the number is a multiple of the width. None stands for a width that follows
    from others.
    """
    widest: dict[int, int] = {}
    for spec in downs:
        full = linear_shape(stock.get_submodule(spec.name))[1]
        widest[full] = max(_needed(spec), widest.get(full, 0))
    if original is None:
        return sorted(widest.values())
    values = (original * width // full for full, width in widest.items())
    return sorted(value for value in values if value < original)


def _needed(spec: LinearSpec) -> int:
    """The smallest width that a stock FFN may have for the down_proj of `spec`."""
    width = spec.in_features
    return width + -width % EXPERT_WIDTH_MULTIPLE if spec.mixture else width


def _holds(stock: nn.Module, linears: Sequence[LinearSpec]) -> bool:
    """Whether each of `linears` fits into that of `stock`."""
    shapes = ((s, linear_shape(stock.get_submodule(s.name))) for s in linears)
    return all(s.out_features <= rows and s.in_features <= columns for s, (rows, columns) in shapes)


def pad(model: nn.Module, spec: LinearSpec, shape: tuple[int, int]) -> None:
    """Fills the linear of `spec`, a stock layer, with zeros up to `shape` (out, in).

    A fused gate_up is two halves that are filled one by one.
    """
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
