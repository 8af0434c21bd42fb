"""Tokens that a model has no embedding for, because only its tokenizer got more of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lrcompress.runtime.errors import InputError


def check_token_ids(model: Any, tokens: Tensor) -> None:
    """Raises InputError where one of `tokens` (any shape) is beyond the embedding of `model`.

    The model would read memory that is not its own, or stop the GPU.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if tokens.numel() and (highest := int(tokens.max())) >= rows:
        raise InputError(
            f"the tokenizer gives token {highest}, and the embedding of the model has {rows} rows, "
            f"for the tokens 0 to {rows - 1}: call resize_token_embeddings of the model and train "
            "it, or give it the tokenizer that it was trained with"
        )
