"""Puts the compressed FFNs of a model into the forms in which they run fastest, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lrcompress.layers.ffn_layouts import find_ffns
from lrcompress.layers.fused import (
    FUSED,
    Fused,
    FusedFactored,
    FusedPivoted,
    PackedWeights,
    ShareInputHook,
    are_stock_linears,
)
from lrcompress.layers.lowrank import LowRankLinear, is_linear, tied_modules

# roles of FFNs that compute each intermediate channel by itself, so that channels may be reordered
PERMUTABLE_ROLES = ({"gate", "up", "down"}, {"gate_up", "down"}, {"up", "down"})


def optimize(model: nn.Module) -> ExitStack:
    """Makes the compressed FFNs of `model` run faster, in place, with the same outputs.

    Gate and up share one product, or one gather, for their input; the rows of gate and up are put
    into the order of down's pivots; sums become part of products. Names, shapes, training and
    saving do not change; a saved model loads without being optimized. Layers with adapters and
    layers with quantized, offloaded or tied weights stay as they are. The returned ExitStack
    restores the model bit for bit, by its `close()` or as a context: `with optimize(model): ...`.
    """
    linears = find_ffns(model).linears
    with ExitStack() as undo, torch.no_grad():
        for name, group in groupby(linears, key=lambda spec: spec.ffn):
            specs = list(group)
            if any(tied_modules(model, spec.name) for spec in specs):
                continue
            modules = {str(spec.role): model.get_submodule(spec.name) for spec in specs}
            optimize_ffn(model.get_submodule(name), modules, undo)
        return undo.pop_all()


def optimize_ffn(ffn: nn.Module, linears: Mapping[str, nn.Module], undo: ExitStack) -> None:
    """Optimizes one FFN with the `linears` by role; `undo` gets the callbacks that restore it."""
    for role, layer in linears.items():
        if type(layer) in FUSED and _reads_own_weights(layer):
            _fuse(layer, role, undo)  # type: ignore[arg-type]
    down = linears.get("down")
    if isinstance(down, FusedPivoted) and _can_permute(ffn, linears, down.in_features):
        _absorb_order(down, [layer for role, layer in linears.items() if role != "down"], undo)
    gate, up = linears.get("gate"), linears.get("up")
    if isinstance(gate, Fused) and isinstance(up, Fused):
        _share_input(ffn, gate, up, undo)


def _share_input(ffn: nn.Module, gate: Fused, up: Fused, undo: ExitStack) -> None:
    packed = None
    if isinstance(gate, FusedFactored) and isinstance(up, FusedFactored):
        packed = _pack(gate.A, up.A, undo)
    names = {layer: name for name, layer in ffn.named_children()}
    hook = ShareInputHook({names[gate]: gate, names[up]: up}, packed)
    undo.callback(ffn.register_forward_pre_hook(hook).remove)


def _reads_own_weights(layer: nn.Module) -> bool:
    """Whether the layer computes with ordinary weights that are always in memory."""
    if any(hasattr(module, "_hf_hook") for module in layer.modules()):  # accelerate offloads it
        return False
    children = list(layer.children())
    return are_stock_linears(*children) if children else type(layer.weight) is nn.Parameter


def _fuse(layer: LowRankLinear, role: str, undo: ExitStack) -> None:
    original_class = type(layer)
    layer.__class__ = FUSED[original_class]
    attributes = {
        "shared_index": int(role == "up"),
        "is_ffn_output": role == "down",
        "order_absorbed": False,
        "has_stock_linears": True,
    }
    layer.__dict__.update(attributes)

    def restore() -> None:
        layer.__class__ = original_class
        for name in attributes:
            del layer.__dict__[name]

    undo.callback(restore)
    _make_column_major(_outer(layer).weight, undo)


def _outer(layer: nn.Module) -> nn.Linear:
    """The second matrix of a fused layer, which computes its output."""
    assert isinstance(layer, FusedFactored | FusedPivoted)
    return layer.B if isinstance(layer, FusedFactored) else layer.C


def _make_column_major(weight: Tensor, undo: ExitStack) -> None:
    """Stores a tall float32 matrix (out, rank) on the CPU column by column: its product with one
    token then takes half the time."""
    rows, columns = weight.shape
    if weight.is_cpu and weight.dtype == torch.float32 and rows > columns:
        weight.data = weight.data.t().contiguous().t()
        undo.callback(_make_row_major, weight)


def _can_permute(ffn: nn.Module, linears: Mapping[str, nn.Module], channels: int) -> bool:
    """Whether the intermediate channels may be reordered: only these linears depend on the order.

    Any other tensor of the FFN with a dimension of `channels` could depend on it too.
    """
    in_linears = {
        id(tensor)
        for layer in linears.values()
        for tensor in (*layer.parameters(), *layer.buffers())
    }
    others = (t for t in (*ffn.parameters(), *ffn.buffers()) if id(t) not in in_linears)
    return (
        set(linears) in PERMUTABLE_ROLES
        and all(
            isinstance(layer, Fused) or (is_linear(layer) and _reads_own_weights(layer))
            for layer in linears.values()
        )
        and not any({channels, 2 * channels} & set(tensor.shape) for tensor in others)
    )


def _absorb_order(down: FusedPivoted, producers: Sequence[nn.Module], undo: ExitStack) -> None:
    """Permutes the outputs of `producers` (gate and up) so that `down` needs no gather."""
    order = down.order.clone()
    _permute_outputs(producers, order.long())
    down.order.copy_(torch.arange(len(order)))
    down.order_absorbed = True

    def restore() -> None:
        _permute_outputs(producers, order.long().argsort())
        down.order.copy_(order)

    undo.callback(restore)


@torch.no_grad()
def _permute_outputs(layers: Sequence[nn.Module], order: Tensor) -> None:
    for weight, dim in (pair for layer in layers for pair in _output_tensors(layer)):
        halves = weight.shape[dim] // len(order)  # two where gate and up are one matrix
        indices = torch.cat([order + half * len(order) for half in range(halves)])
        weight.copy_(weight.index_select(dim, indices))


def _output_tensors(layer: nn.Module) -> Iterator[tuple[Tensor, int]]:
    """The weight and the bias that compute the outputs, each with the dimension of the outputs."""
    if isinstance(layer, FusedFactored | FusedPivoted):
        layer = _outer(layer)
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    yield weight, 1 if isinstance(layer, Conv1D) else 0
    if isinstance(bias, Tensor):
        yield bias, 0


def _pack(first: nn.Linear, second: nn.Linear, undo: ExitStack) -> PackedWeights:
    """Stores both weights in one tensor, one below the other; each stays its own parameter."""
    stacked = torch.cat([first.weight.detach(), second.weight.detach()])
    views = stacked.tensor_split([len(first.weight)])
    for linear, view in zip((first, second), views, strict=True):
        linear.weight.data = view
        undo.callback(_make_row_major, linear.weight)
    return PackedWeights(stacked, len(first.weight), (first, second))


def _make_row_major(weight: Tensor) -> None:
    """Gives the weight its own memory again, row by row."""
    weight.data = weight.data.clone(memory_format=torch.contiguous_format)
