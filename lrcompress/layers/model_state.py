"""Context managers that change the mode, precision or gradients of a model for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# width of hidden states from which on bfloat16 products pay for the conversion of weights
BFLOAT16_MINIMUM_WIDTH = 512


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Inside, every module is in evaluation mode (no dropout); afterwards modes are restored."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def in_float32(block: nn.Module) -> Iterator[None]:
    """Inside, float16 and bfloat16 weights are float32; unchanged ones come back bit for bit."""
    original_dtypes = [
        (tensor, tensor.dtype)
        for tensor in (*block.parameters(), *block.buffers())
        if tensor.dtype in (torch.float16, torch.bfloat16)
    ]
    try:
        for tensor, _ in original_dtypes:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, dtype in original_dtypes:
            tensor.data = tensor.data.to(dtype)


@contextmanager
def bfloat16_products(model: Any, wanted: bool = True) -> Iterator[None]:
    """Inside, if `wanted`, a wide float32 model on a CPU multiplies bfloat16 and sums float32.

    This is for passes whose results are means over many tokens, shrunk and damped afterwards: other
    text moves them far more. It takes half the time where the CPU has instructions
    for it; elsewhere, and for other models, nothing changes.
    """
    width = int(getattr(model.config.get_text_config(decoder=True), "hidden_size", 0))
    is_wide = width >= BFLOAT16_MINIMUM_WIDTH
    is_float32 = model.dtype == torch.float32 and model.device.type == "cpu"
    if wanted and is_wide and is_float32 and torch.cpu._is_avx512_bf16_supported():
        with torch.autocast("cpu", torch.bfloat16):
            yield
    else:
        yield


def exact_products() -> torch.autocast:
    """Inside, nothing is rounded to bfloat16, as in hooks that sum what a model computes."""
    return torch.autocast("cpu", enabled=False)


@contextmanager
def requires_grad_restored(module: nn.Module) -> Iterator[None]:
    """At the end every parameter of `module` gets back its value of `requires_grad`."""
    original_flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        yield
    finally:
        for parameter, flag in original_flags:
            parameter.requires_grad_(flag)


@contextmanager
def only_trainable(module: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, `parameters` require gradients and nothing else in `module` does."""
    with requires_grad_restored(module):
        module.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
