"""Cuts a text into windows of tokens, so that every token is scored once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lrcompress.config.field_types import LossOn
from lrcompress.data.corpora import Corpus
from lrcompress.data.packing import IGNORED, bos_token, encode_with_labels
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.notices import notice


@dataclass(frozen=True)
class Window:
    """Token ids (length,) of one forward pass; the losses of the last `scored` tokens count.

    Of these, only those that `counts` (scored,) marks, where it is there.
    """

    tokens: Tensor
    scored: int
    counts: Tensor | None = None

    @property
    def positions(self) -> Tensor:
        """The positions in `tokens` of those whose losses count, in order."""
        last = torch.arange(len(self.tokens) - self.scored, len(self.tokens))
        return last if self.counts is None else last[self.counts]


@dataclass(frozen=True)
class Windowing:
    """How texts are cut: into windows of at most `length` tokens, the next one `stride` tokens on.

    Without `stride` windows do not overlap. The first `limit` windows of a text are used, or all.
    With `loss_on` answers only their tokens are scored, and windows without any are left out.
    """

    length: int
    stride: int | None = None
    limit: int | None = None
    loss_on: LossOn = "all"

    def step(self, bos: int | None) -> int:
        """Tokens from the begin of a window to that of the next.

        Raises InputError where tokens would be left out.
        """
        step = self.length if self.stride is None else self.stride
        if step > self.length:
            raise InputError(
                f"stride {step} exceeds the context length {self.length}: tokens would be lost"
            )
        # BOS is one token of the window
        return min(step, self.length if bos is None else self.length - 1)


def windows(
    tokens: list[int],
    length: int,
    stride: int,
    bos: int | None,
    labels: list[int] | None = None,
) -> Iterator[Window]:
    """Windows of up to `length` tokens, `stride` apart, that score every token of a document once.

    Without BOS the first token of the document has no context and is not scored; with windows that
    do not overlap (stride = length) this holds for the first token of each window. With `labels`
    only the tokens that have one are scored, and windows without any are left out.
    """
    capacity = length if bos is None else length - 1
    scored_end = 0
    for begin in range(0, len(tokens), min(stride, capacity)):
        end = min(begin + capacity, len(tokens))
        content = tokens[begin:end] if bos is None else [bos, *tokens[begin:end]]
        scored = min(end - max(scored_end, begin), len(content) - 1)
        counts = None if labels is None else torch.tensor(labels[end - scored : end]) != IGNORED
        if scored > 0 and (counts is None or bool(counts.any())):
            yield Window(torch.tensor(content), scored, counts)
        scored_end = end
        if end == len(tokens):
            return


def corpus_windows(corpus: Corpus, tokenizer: Any, windowing: Windowing) -> list[Window]:
    """The windows of the documents of `corpus`; none spans two documents.

    Raises InputError where there is none.
    """
    bos = bos_token(tokenizer)
    length, step = windowing.length, windowing.step(bos)
    by_answers = windowing.loss_on == "answers"
    counts: Counter[str] = Counter()

    def candidates() -> Iterator[Window]:
        for document in corpus.documents:
            ids, labels = encode_with_labels(corpus.spec, tokenizer, document, windowing.loss_on)
            marked = labels if by_answers else None
            of_document = list(windows(ids, length, step, bos, marked))
            counts["documents"] += 1
            counts["not scored"] += not of_document
            yield from of_document

    first_windows = list(islice(candidates(), windowing.limit))
    count, total = counts["not scored"], counts["documents"]
    if not first_windows:
        raise InputError(
            f"{corpus.spec!r} holds too little text to measure perplexity on: none of its "
            f"{total} documents has {'an answer' if by_answers else 'two tokens'}"
        )
    if count:
        reason = "each without an answer" if by_answers else "each of one token"
        notice(f"Not scored: {count} of {total} documents of {corpus.spec!r}, {reason}.")
    return first_windows
