"""What a model's own numbers say: its parameter count and the lengths and modes it runs in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lrcompress.runtime.protocols import InputError

DEFAULT_LENGTH = 1024
POSITIONS = ("max_position_embeddings", "max_seq_len", "n_positions")


def parameter_count(model: nn.Module) -> int:
    """Parameters of the model, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def embedding_count(model: Any) -> int:
    """Parameters of the token embedding and the output layer, tied ones once."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = {id(end.weight): end.weight for end in ends if end is not None}
    return sum(int(weight.numel()) for weight in weights.values())


def maximum_length(model: Any) -> int | None:
    """Positions that the model has, under any of the names that families give it."""
    config = model.config.get_text_config(decoder=True)
    found = (getattr(config, name, None) for name in POSITIONS)
    return next((limit for limit in found if isinstance(limit, int) and limit > 0), None)


def sequence_length(model: Any, wanted: int | None) -> int:
    """`wanted` tokens, or 1024 or the model's maximum. InputError where wanted exceeds that."""
    limit = maximum_length(model)
    if wanted is None:
        return min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH)
    if limit is not None and wanted > limit:
        raise InputError(f"a length of {wanted} tokens exceeds the model's maximum of {limit}")
    return wanted


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
