"""Replaces the fused experts of a model by lists of linears, for a while or for good."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lrcompress.layers.experts import Experts, fused_experts
from lrcompress.layers.lowrank import compressed_layers, install


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """Inside, every expert is an FFN of linears that are views of the fused weights.

    At the end mixtures without compressed linears are fused again; after an error all of them are.
    """
    fused = unpack(model)
    try:
        yield
    except BaseException:
        for name, module in fused.items():
            install(model, name, module)
        raise
    for name, module in fused.items():
        if any(compressed_layers(model.get_submodule(name))):
            _copy_views(model.get_submodule(name))
        else:
            install(model, name, module)


def _copy_views(experts: nn.Module) -> None:
    """Copies the weights that are still views, so that the memory of the fused ones is freed."""
    for parameter in experts.parameters():
        if parameter.untyped_storage().nbytes() > parameter.nbytes:
            parameter.data = parameter.data.clone()


def unpack(model: nn.Module) -> dict[str, nn.Module]:
    """Replaces all fused experts by `Experts`; returns the fused modules by name."""
    fused = dict(fused_experts(model))
    for name, module in fused.items():
        install(model, name, Experts(module))
    return fused
