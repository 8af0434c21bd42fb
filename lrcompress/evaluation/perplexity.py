"""Token perplexity of a text in windows of a fixed context length."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lrcompress.data.corpora import Corpus
from lrcompress.data.packing import bos_token, encode, token_hash
from lrcompress.layers.nonfinite import cause
from lrcompress.reporting.differences import LARGEST
from lrcompress.reporting.metric import PERPLEXITY, Metric
from lrcompress.runtime.protocols import InputError, NotFiniteError, Progress, silent

# logits rows turned into float32 at a time: a whole window times a large vocabulary is gigabytes
LOSS_ROWS = 256


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


@torch.no_grad()
def scored_logits(model: Any, window: Window) -> tuple[Tensor, Tensor]:
    """Logits (scored, vocabulary) and the tokens (scored,) that they predict."""
    tokens = window.tokens.to(model.device)
    logits = model(input_ids=tokens[None], use_cache=False).logits[0]
    return logits[-window.scored - 1 : -1], tokens[-window.scored :]


def token_losses(model: Any, window: Window) -> Tensor:
    """Negative log-likelihood (nats) of the scored tokens, shape (scored,), float32."""
    rows, targets = scored_logits(model, window)
    losses = [
        cross_entropy(rows[i : i + LOSS_ROWS].float(), targets[i : i + LOSS_ROWS], reduction="none")
        for i in range(0, window.scored, LOSS_ROWS)
    ]
    return torch.cat(losses)


def perplexity(
    label: str,
    model: Any,
    tokenizer: Any,
    corpus: Corpus,
    length: int,
    stride: int | None = None,
    limit: int | None = None,
    progress: Progress = silent,
) -> Metric:
    """exp(mean negative log-likelihood per token). Raises InputError where it is not finite."""
    bos, chosen = bos_token(tokenizer), corpus_windows(corpus, tokenizer, length, stride, limit)
    samples: list[list[float]] = []
    for index, window in enumerate(progress(chosen, f"Perplexity of {label}", len(chosen))):
        loss = float(token_losses(model, window).double().sum())
        if not math.isfinite(loss):
            raise NotFiniteError(
                f"the loss of the {label} model on window {index} of {corpus.spec!r} is {loss}, "
                f"{cause(model, window.tokens[None])}"
            )
        samples.append([loss, window.scored])
    count = sum(window.scored for window in chosen)
    conditions = {
        "data": corpus.spec,
        "context_length": length,
        "stride": window_step(length, stride, bos),
        "bos": "none" if bos is None else "at each window",
        "windows": len(chosen),
        "tokens": count,
        "sha256": token_hash(torch.cat([window.tokens for window in chosen])),
    }
    mean = sum(loss for loss, _ in samples) / count
    value = math.exp(min(mean, LARGEST))
    return Metric(label, PERPLEXITY, value, "", False, conditions, samples=samples)
