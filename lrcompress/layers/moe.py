"""Models whose experts are linears for a while, or as long as some of them are low-rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lrcompress.layers.experts import Experts, fused_experts
from lrcompress.layers.lowrank import compressed_layers, install


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """Inside, every expert is an FFN of linears; the weights are those of the fused tensors.

    After it, mixtures of which nothing was compressed are fused again, and after an error all.
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
            _own_memory(model.get_submodule(name))
        else:
            install(model, name, module)


def _own_memory(experts: nn.Module) -> None:
    """What stayed dense is no view any more, so that the fused tensors are freed."""
    for parameter in experts.parameters():
        if parameter.untyped_storage().nbytes() > parameter.nbytes:
            parameter.data = parameter.data.clone()


def unpack(model: nn.Module) -> dict[str, nn.Module]:
    """Puts `Experts` in the place of fused ones, which are returned by name."""
    fused = dict(fused_experts(model))
    for name, module in fused.items():
        install(model, name, Experts(module))
    return fused
