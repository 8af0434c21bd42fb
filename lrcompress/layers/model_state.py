"""States that a model has for a while: modes, gradients, precision."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

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
def _frozen(model: Any) -> Iterator[None]:
    """No parameter takes a gradient; the embedded input does, so that there is a graph."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    hook = model.get_input_embeddings().register_forward_hook(
        # a clone is no leaf, so that a family may scale its embedding in place
        lambda _, __, output: output.detach().requires_grad_(True).clone()
    )
    try:
        yield
    finally:
        hook.remove()
        for parameter in wanted:
            parameter.requires_grad_(True)


@contextmanager
def _all_trainable(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Every parameter that can have a gradient wants one inside; restored after."""
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    wanted = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield parameters
    finally:
        for parameter, was in zip(parameters, wanted, strict=True):
            parameter.requires_grad_(was)


@contextmanager
def _training(block: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """`parameters` take gradients and nothing else in the block does."""
    wanted = [(parameter, parameter.requires_grad) for parameter in block.parameters()]
    try:
        block.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, was in wanted:
            parameter.requires_grad_(was)
