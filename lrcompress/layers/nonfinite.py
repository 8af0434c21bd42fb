"""Where a number that is none comes from: which weight has it, or which module computes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def explain_nonfinite(model: Any, tokens: Tensor) -> str:
    """Why the logits of `tokens` (1, length) are not finite, and the remedy."""
    weight = next(unsound(model), None)
    if weight is not None:
        return f"as {weight} is not finite: get an intact copy"
    module = _first_overflow(model, tokens)
    where = "" if module is None else f", first in the output of {module}"
    return f"which numbers of its precision cannot hold{where}: use --dtype float32"


def unsound(model: nn.Module) -> Iterator[str]:
    """Names of weights with a number that is none: of those that are here and not quantized."""
    for name, parameter in model.named_parameters():
        here = type(parameter) is nn.Parameter and not parameter.is_meta
        if here and not bool(parameter.isfinite().all()):
            yield name


@torch.no_grad()
def _first_overflow(model: Any, tokens: Tensor) -> str | None:
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(_: nn.Module, __: Any, output: Any) -> None:
            tensors = (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
            if not found and not all(bool(one.isfinite().all()) for one in tensors):
                found.append(name)

        return look

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if name:
                hooks.callback(module.register_forward_hook(watch(name)).remove)
        model(input_ids=tokens.to(model.device), use_cache=False)
    return found[0] if found else None
