"""Linears of a float32 model that multiply in bfloat16, for passes whose results are means.

The results are then shrunk and damped, and other text moves them far more than this rounding. Only
products with weights are rounded: autocast would also round attention, which is slower in bfloat16
on CPUs when one token at a time is computed, and convert each weight again in every pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lrcompress.layers.block_runner import replaced_forwards

# width of hidden states from which on the products are faster by more than the conversions cost
MINIMUM_WIDTH = 512
LINEAR_FORWARD = nn.Linear.forward


@contextmanager
def bfloat16_linears(model: Any, wanted: bool = True) -> Iterator[None]:
    """Inside, if `wanted`, linears of a wide float32 model multiply bfloat16 and sum float32.

    It takes half the time on CPUs that have instructions for it; elsewhere, and for other models,
    nothing changes. Weights are frozen inside: copies of them are made at their first use. Enter
    it where the weights that will be used are in memory.
    """
    is_wanted = wanted and model.device.type == "cpu" and _is_faster(model)
    linears = list(_plain_linears(model)) if is_wanted else []
    with replaced_forwards(linears, lambda index, _: _Bfloat16Product(linears[index])):
        yield


def copied_bytes(model: Any, part: nn.Module | None = None) -> int:
    """Bytes of the copies of the weights in `part` of `model`, on a CPU; None stands for all.

    The model may be on the meta device.
    """
    if not _is_faster(model):
        return 0
    linears = _plain_linears(model if part is None else part)
    return sum(linear.weight.numel() for linear in linears) * torch.bfloat16.itemsize


def _is_faster(model: Any) -> bool:
    """Whether a CPU like this one multiplies the weights of `model` faster in bfloat16."""
    width = int(getattr(model.config.get_text_config(decoder=True), "hidden_size", 0))
    is_supported = bool(torch.cpu._is_avx512_bf16_supported())
    return is_supported and model.dtype == torch.float32 and width >= MINIMUM_WIDTH


def _plain_linears(model: nn.Module) -> Iterator[nn.Linear]:
    """Linears with the forward pass of their class, which accelerate and quantizers replace."""
    for module in model.modules():
        if (
            type(module) is nn.Linear
            and getattr(module.forward, "__func__", None) is LINEAR_FORWARD
        ):
            yield module


class _Bfloat16Product:
    """The forward pass of a linear: inputs and results (..., features) are float32."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear

    @cached_property
    def _weight(self) -> Tensor:
        return self.linear.weight.detach().bfloat16()

    def __call__(self, inputs: Tensor) -> Tensor:
        product = functional.linear(inputs.bfloat16(), self._weight).float()
        bias = self.linear.bias
        return product if bias is None else product + bias.detach()
