"""Windows of a text in which every token is predicted once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lrcompress.data.corpora import Corpus
from lrcompress.data.packing import bos_token, encode
from lrcompress.runtime.errors import InputError


@dataclass(frozen=True)
class Window:
    """Token ids (length,) of one forward pass, of which the last `scored` are predicted."""

    tokens: Tensor
    scored: int


def windows(tokens: list[int], length: int, stride: int, bos: int | None) -> Iterator[Window]:
    """Windows that score every token of a document once.

    Without BOS the very first token has nothing to be predicted from and is not scored; with
    non-overlapping windows (stride = length) that holds for the first token of each window.
    """
    room = length if bos is None else length - 1
    done = 0
    for begin in range(0, len(tokens), min(stride, room)):
        end = min(begin + room, len(tokens))
        content = tokens[begin:end] if bos is None else [bos, *tokens[begin:end]]
        scored = min(end - max(done, begin), len(content) - 1)
        if scored > 0:
            yield Window(torch.tensor(content), scored)
        done = end
        if end == len(tokens):
            return


def window_step(length: int, stride: int | None, bos: int | None) -> int:
    """Tokens from one window's begin to the next's; InputError where some would be left out."""
    step = length if stride is None else stride
    if step > length:
        raise InputError(f"stride {step} exceeds the context length {length}: tokens would be lost")
    return min(step, length if bos is None else length - 1)  # BOS takes a place in the window


def corpus_windows(
    corpus: Corpus, tokenizer: Any, length: int, stride: int | None, limit: int | None
) -> list[Window]:
    """The first `limit` windows (all if None) of the documents; none reaches over two documents."""
    bos = bos_token(tokenizer)
    step = window_step(length, stride, bos)
    found = (
        window
        for document in corpus.documents
        for window in windows(encode(tokenizer, document), length, step, bos)
    )
    chosen = list(islice(found, limit))
    if not chosen:
        raise InputError(f"{corpus.spec!r} holds too little text to measure perplexity on")
    return chosen
