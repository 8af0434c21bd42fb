"""Finds the weight or module that first gives NaN or infinity."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def explain_nonfinite(model: Any, tokens: Tensor) -> str:
    """The cause of NaN or infinity in the logits of `tokens` (1, length), and the remedy.

    The text continues a sentence such as "the logits are not finite, ...".
    """
    weight = next(nonfinite_weights(model), None)
    if weight is not None:
        return f"because {weight} is not finite: get an intact copy"
    module = _first_overflow(model, tokens)
    where = "" if module is None else f", first in the output of {module}"
    return f"because a value overflows the precision of the model{where}: use --dtype float32"


def nonfinite_weights(model: nn.Module) -> Iterator[str]:
    """Names of weights with NaN or infinity; quantized and offloaded weights are not examined."""
    for name, parameter in model.named_parameters():
        readable = type(parameter) is nn.Parameter and not parameter.is_meta
        if readable and not bool(parameter.isfinite().all()):
            yield name


@torch.no_grad()
def _first_overflow(model: Any, tokens: Tensor) -> str | None:
    """The name of the first module whose output has NaN or infinity."""
    names: list[str] = []

    def checker(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def check(_: nn.Module, __: Any, output: Any) -> None:
            tensors = (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
            if not names and not all(bool(tensor.isfinite().all()) for tensor in tensors):
                names.append(name)

        return check

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if name:
                hooks.callback(module.register_forward_hook(checker(name)).remove)
        model(input_ids=tokens.to(model.device), use_cache=False)
    return names[0] if names else None
