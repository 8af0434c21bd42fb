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
    Packed,
    SharesInput,
    is_bare,
)
from lrcompress.layers.lowrank import LowRankLinear, is_linear

# FFNs whose intermediate channels are made by the other linears, each channel by itself
WHOLE = ({"gate", "up", "down"}, {"gate_up", "down"}, {"up", "down"})


def optimize(model: nn.Module) -> ExitStack:
    """Makes the compressed FFNs of `model` run faster, in place, with the same outputs.

    Gate and up read their input by one product, or after one gather; the order of the pivots of
    down is absorbed by the rows of gate and up; sums are part of products. Names, shapes, training
    and saving stay as they were; from_pretrained gives a model that is not optimized. Layers with
    adapters, quantized or offloaded weights are left as they are. What is returned puts everything
    back, bit for bit, at its `close()` or as a context: `with optimize(model): ...`.
    """
    linears = find_ffns(model).linears
    with ExitStack() as undo, torch.no_grad():
        for name, specs in groupby(linears, key=lambda spec: spec.ffn):
            modules = {str(spec.role): model.get_submodule(spec.name) for spec in specs}
            optimize_ffn(model.get_submodule(name), modules, undo)
        return undo.pop_all()


def optimize_ffn(ffn: nn.Module, linears: Mapping[str, nn.Module], undo: ExitStack) -> None:
    """One FFN, whose linears are given by role; what puts it back goes onto `undo`."""
    for role, layer in linears.items():
        if type(layer) in FUSED and _is_plain(layer):
            _fuse(layer, role, undo)  # type: ignore[arg-type]
    down = linears.get("down")
    if isinstance(down, FusedPivoted) and _can_permute(ffn, linears, down.in_features):
        _absorb(down, [layer for role, layer in linears.items() if role != "down"], undo)
    gate, up = linears.get("gate"), linears.get("up")
    if isinstance(gate, Fused) and isinstance(up, Fused):
        packed = None
        if isinstance(gate, FusedFactored) and isinstance(up, FusedFactored):
            packed = _packed(gate.A, up.A, undo)
        places = {layer: name for name, layer in ffn.named_children()}
        hook = SharesInput({places[gate]: gate, places[up]: up}, packed)
        undo.callback(ffn.register_forward_pre_hook(hook).remove)


def _is_plain(layer: nn.Module) -> bool:
    """Whether the layer's own forward pass reads its weights, and no loader brings them first."""
    if any(hasattr(module, "_hf_hook") for module in layer.modules()):
        return False
    matrices = list(layer.children())
    return is_bare(*matrices) if matrices else type(layer.weight) is nn.Parameter


def _fuse(layer: LowRankLinear, role: str, undo: ExitStack) -> None:
    plain = type(layer)
    layer.__class__ = FUSED[plain]
    about = {"position": int(role == "up"), "ends": role == "down"}
    about |= {"absorbed": False, "bare": True}
    layer.__dict__.update(about)

    def back() -> None:
        layer.__class__ = plain
        for name in about:
            del layer.__dict__[name]

    undo.callback(back)
    _by_columns(_outer(layer).weight, undo)


def _outer(layer: nn.Module) -> nn.Linear:
    """The matrix of a fused layer that gives its output."""
    assert isinstance(layer, FusedFactored | FusedPivoted)
    return layer.B if isinstance(layer, FusedFactored) else layer.C


def _by_columns(weight: Tensor, undo: ExitStack) -> None:
    """Lays the columns of a tall matrix (out, rank) behind each other in memory, where its product
    with one token then takes half the time: on the CPU in float32."""
    rows, columns = weight.shape
    if weight.is_cpu and weight.dtype == torch.float32 and rows > columns:
        weight.data = weight.data.t().contiguous().t()
        undo.callback(_by_rows, weight)


def _can_permute(ffn: nn.Module, linears: Mapping[str, nn.Module], width: int) -> bool:
    """Whether nothing but these linears knows one intermediate channel from another."""
    own = {id(p) for layer in linears.values() for p in (*layer.parameters(), *layer.buffers())}
    others = (t for t in (*ffn.parameters(), *ffn.buffers()) if id(t) not in own)
    return (
        set(linears) in WHOLE
        and all(isinstance(m, Fused) or (is_linear(m) and _is_plain(m)) for m in linears.values())
        and not any(width in tensor.shape for tensor in others)
    )


def _absorb(down: FusedPivoted, makers: Sequence[nn.Module], undo: ExitStack) -> None:
    """The linears that make the channels make them in the order that `down` reads them in."""
    order = down.order.clone()
    _permute_channels(makers, order.long())
    down.order.copy_(torch.arange(len(order)))
    down.absorbed = True

    def back() -> None:
        _permute_channels(makers, order.long().argsort())
        down.order.copy_(order)

    undo.callback(back)


@torch.no_grad()
def _permute_channels(makers: Sequence[nn.Module], order: Tensor) -> None:
    for weight, dim in (found for maker in makers for found in _channels(maker)):
        halves = weight.shape[dim] // len(order)  # two where gate and up are one matrix
        whole = torch.cat([order + half * len(order) for half in range(halves)])
        weight.copy_(weight.index_select(dim, whole))


def _channels(maker: nn.Module) -> Iterator[tuple[Tensor, int]]:
    """What has a row, or an entry, for each output: with the dimension of the outputs."""
    if isinstance(maker, FusedFactored | FusedPivoted):
        maker = _outer(maker)
    weight, bias = maker.weight, maker.bias
    assert isinstance(weight, Tensor)
    yield weight, 1 if isinstance(maker, Conv1D) else 0
    if isinstance(bias, Tensor):
        yield bias, 0


def _packed(first: nn.Linear, second: nn.Linear, undo: ExitStack) -> Packed:
    """Moves the weights behind each other in memory; each stays a parameter of its own."""
    whole = torch.cat([first.weight.detach(), second.weight.detach()])
    for linear, part in zip((first, second), whole.tensor_split([len(first.weight)]), strict=True):
        linear.weight.data = part
        undo.callback(_by_rows, linear.weight)
    return Packed(whole, len(first.weight), (first, second))


def _by_rows(weight: Tensor) -> None:
    """In memory of its own, row by row."""
    weight.data = weight.data.clone(memory_format=torch.contiguous_format)
