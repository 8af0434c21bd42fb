"""Changes to a model that end with a block of code: its mode, precision and gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout inside; every module's own mode is restored after."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def in_float32(block: nn.Module) -> Iterator[None]:
    """Weights of lower precision in float32; those that did not change come back bit for bit."""
    before = [
        (tensor, tensor.dtype)
        for tensor in (*block.parameters(), *block.buffers())
        if tensor.dtype in (torch.float16, torch.bfloat16)
    ]
    try:
        for tensor, _ in before:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, dtype in before:
            tensor.data = tensor.data.to(dtype)


@contextmanager
def requires_grad_restored(module: nn.Module) -> Iterator[None]:
    """At the end every parameter of `module` requires a gradient as it did before, or does not."""
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


@contextmanager
def only_trainable(module: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, `parameters` require gradients and nothing else in `module` does."""
    with requires_grad_restored(module):
        module.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
