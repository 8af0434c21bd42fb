"""Context managers that change the mode, precision or gradients of a model for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


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
