"""Finds the weight or module that first gives NaN or infinity."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lrcompress.runtime.errors import InputError, NotFiniteError


def explain_nonfinite(model: Any, tokens: Tensor) -> str:
    """The cause of NaN or infinity in the logits of `tokens` (1, length), and the remedy.

    The text continues a sentence such as "the logits are not finite, ...".
    """
    weight = next(nonfinite_weights(model), None)
    if weight is not None:
        return f"because {weight} is not finite: use another copy or an earlier checkpoint"
    module = _first_overflow(model, tokens)
    where = "" if module is None else f", first in the output of {module}"
    return f"because a value overflows the precision of the model{where}: use --dtype float32"


def nonfinite_weights(model: nn.Module) -> Iterator[str]:
    """Names of weights with NaN or infinity; quantized and offloaded weights are not examined."""
    for name, parameter in model.named_parameters():
        readable = type(parameter) is nn.Parameter and not parameter.is_meta
        if readable and not bool(parameter.isfinite().all()):
            yield name


def check_weights_finite(label: str, model: nn.Module) -> None:
    """Raises InputError with the first weight of the model `label` that has NaN or infinity."""
    if (weight := next(nonfinite_weights(model), None)) is not None:
        raise InputError(
            f"{weight} of the {label} model is not finite: use another copy or an earlier "
            "checkpoint"
        )


@contextmanager
def checked_logits(label: str, model: Any) -> Iterator[None]:
    """Inside, a pass of `model` raises NotFiniteError where its logits are not finite.

    Minus infinity is allowed, which is how models exclude tokens, but not as all logits of a
    position.
    """

    def check(_: nn.Module, args: Any, options: Mapping[str, Any], output: Any) -> None:
        # the maximum over the vocabulary is NaN where one logit is
        if bool(output.logits.amax(-1).isfinite().all()):
            return
        hook.remove()  # the explanation runs the model again
        tokens = options["input_ids"] if "input_ids" in options else args[0]
        raise NotFiniteError(
            f"the logits of the {label} model are not finite, {explain_nonfinite(model, tokens)}"
        )

    hook = model.register_forward_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


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
