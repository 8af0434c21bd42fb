"""Tokens that a model has no embedding for, because only its tokenizer got more of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lrcompress.runtime.errors import InputError
from lrcompress.runtime.notices import notice

NAMED_TOKENS = 3  # tokens that a sentence names


def check_token_ids(model: Any, tokens: Tensor) -> None:
    """Raises InputError where one of `tokens` (any shape) is beyond the embedding of `model`.

    The model would read memory that is not its own, or stop the GPU.
    """
    rows = _embedding_rows(model)
    if tokens.numel() and (highest := int(tokens.max())) >= rows:
        raise InputError(
            f"the tokenizer gives token {highest}, and the embedding of the model has {rows} rows, "
            f"for the tokens 0 to {rows - 1}: call resize_token_embeddings of the model and train "
            "it, or give it the tokenizer that it was trained with"
        )


def notice_missing_rows(model: Any, tokenizer: Any) -> None:
    """Shows a sentence where `tokenizer` has tokens beyond the embedding of `model`.

    No error: stock models have such tokens too, which no text holds. Does nothing for a tokenizer
    of None.
    """
    rows = _embedding_rows(model)
    vocabulary = {} if tokenizer is None else tokenizer.get_vocab()
    missing = sorted((index, token) for token, index in vocabulary.items() if index >= rows)
    if missing:
        names = ", ".join(repr(token) for _, token in missing[:NAMED_TOKENS])
        notice(
            f"The tokenizer has tokens for which the embedding of the model, of {rows} rows, has "
            f"none: {names}{', ...' if len(missing) > NAMED_TOKENS else ''}. Text with them will "
            "be refused; if they are to be used, call resize_token_embeddings of the model first."
        )


def _embedding_rows(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])
