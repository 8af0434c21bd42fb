"""Checks of a model whose weights were just loaded: all there, floating point, valid pivot orders.

Imports nothing of transformers: `hf_quantizer.py` needs it while transformers is being imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.layers.lowrank import PivotedLinear, compressed_layers
from lrcompress.runtime.errors import InputError

# the attribute that transformers sets on tensors that it read from the checkpoint
READ_FLAG = "_is_hf_initialized"


def check_loaded(model: nn.Module) -> None:
    """Raises InputError with the name of a weight that does not come from the checkpoint as it is.

    Such a weight is missing, has another shape, or is not floating point. A pivoted layer whose
    `order` is not a permutation is an error too. Offloaded weights are not examined.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise InputError(f"{name} is stored as {parameter.dtype}: get an intact copy")
    if any(hasattr(parameter, READ_FLAG) for parameter in model.parameters()):
        for name, tensor in _expected_tensors(model):
            if not tensor.is_meta and not getattr(tensor, READ_FLAG, False):
                raise InputError(
                    f"{name} is not in the checkpoint, or not in the shape that its config.json "
                    "records: get an intact copy"
                )
    check_pivot_orders(model)


def _expected_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors that the checkpoint has to hold, by name.

    A model of another class than the saved one may have a new head, which is not expected.
    """
    for name, layer in compressed_layers(model):
        for key, tensor in layer.state_dict(keep_vars=True).items():
            yield f"{name}.{key}", tensor
    is_saved_class = type(model).__name__ in (model.config.architectures or ())
    yield from (model if is_saved_class else model.base_model).named_parameters()


def check_pivot_orders(model: nn.Module) -> None:
    """Raises InputError with the name of a pivoted layer whose `order` is not a permutation."""
    for name, layer in compressed_layers(model):
        if isinstance(layer, PivotedLinear) and not layer.order.is_meta:
            order = layer.order.long().sort().values.cpu()
            if not torch.equal(order, torch.arange(len(order))):
                raise InputError(
                    f"the order of {name} does not name each of its {len(order)} inputs once: get "
                    "an intact copy"
                )
