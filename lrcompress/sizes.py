"""What a model's own numbers say: its parameter count and the lengths that it takes."""

from __future__ import annotations

from typing import Any

from torch import nn

from lrcompress.protocols import InputError

DEFAULT_LENGTH = 1024


def parameter_count(model: nn.Module) -> int:
    """Parameters of the model, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def sequence_length(model: Any, wanted: int | None) -> int:
    """`wanted` tokens, or 1024 or the model's maximum. InputError where wanted exceeds that."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if wanted is None:
        return min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH)
    if limit is not None and wanted > limit:
        raise InputError(f"a length of {wanted} tokens exceeds the model's maximum of {limit}")
    return wanted
