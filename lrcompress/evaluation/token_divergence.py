"""Later models against the first one, token by token: divergence, agreement, loss by position."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrcompress.data.corpora import Corpus
from lrcompress.data.windows import Window, corpus_windows
from lrcompress.evaluation.perplexity import LOSS_ROWS, scored_logits
from lrcompress.reporting.differences import PositionLoss, Token, TokenChange
from lrcompress.runtime.progress import Progress, silent

PERCENTILES = (50, 90, 99, 99.9)
# tokens of context from which each bin of positions begins
POSITIONS = (1, *(4**power for power in range(2, 12)))
WORST = 10
CONTEXT = 16


@dataclass(frozen=True)
class Measured:
    """By token, each of shape (tokens,): losses and divergences in nats, guesses as token ids."""

    baseline_loss: np.ndarray
    loss: np.ndarray
    divergence: np.ndarray
    baseline_guess: np.ndarray
    baseline_probability: np.ndarray
    guess: np.ndarray
    probability: np.ndarray


def token_changes(
    models: Mapping[str, tuple[Any, Any]],
    corpus: Corpus,
    length: int,
    stride: int | None = None,
    limit: int | None = None,
    progress: Progress = silent,
) -> list[TokenChange]:
    """Of every later model whose tokenizer and vocabulary are the first one's.

    The first model runs once for all others. Windows are those of perplexity, the first `limit`.
    """
    (baseline, (first, tokenizer)), *later = models.items()
    chosen = corpus_windows(corpus, tokenizer, length, stride, limit)
    others = {
        label: model
        for label, (model, own) in later
        if _alike(first, model, chosen, corpus_windows(corpus, own, length, stride, limit))
    }
    found: dict[str, list[Measured]] = {label: [] for label in others}
    if not others:
        return []
    for window in progress(chosen, f"Comparing tokens of {corpus.spec}", len(chosen)):
        logits, targets = scored_logits(first, window)
        for label, model in others.items():
            found[label].append(_measured(logits, scored_logits(model, window)[0], targets))
    return [
        _change((baseline, label, corpus.spec, length), chosen, _joined(parts), tokenizer)
        for label, parts in found.items()
    ]


def _alike(first: Any, other: Any, ours: Sequence[Window], theirs: Sequence[Window]) -> bool:
    sizes = {model.get_output_embeddings().weight.shape[0] for model in (first, other)}
    same = len(ours) == len(theirs) and all(
        torch.equal(a.tokens, b.tokens) for a, b in zip(ours, theirs, strict=True)
    )
    return same and len(sizes) == 1


def _measured(baseline: Tensor, other: Tensor, targets: Tensor) -> Measured:
    parts = []
    for start in range(0, len(targets), LOSS_ROWS):
        rows = slice(start, start + LOSS_ROWS)
        p = baseline[rows].float().log_softmax(-1)
        q = other[rows].to(p.device).float().log_softmax(-1)
        aim = targets[rows, None].to(p.device)
        # 0 log 0 = 0: a model may give a token no probability at all
        divergence = torch.where(p > -math.inf, p.exp() * (p - q), 0.0).sum(-1)
        columns = (-p.gather(1, aim)[:, 0], -q.gather(1, aim)[:, 0], divergence, *_guess(p))
        parts.append(Measured(*(_numbers(column) for column in (*columns, *_guess(q)))))
    return _joined(parts)


def _guess(log_probabilities: Tensor) -> tuple[Tensor, Tensor]:
    top = log_probabilities.max(-1)
    return top.indices, top.values.exp()


def _numbers(column: Tensor) -> np.ndarray:
    dtype = torch.float64 if column.is_floating_point() else torch.int64
    return column.to("cpu", dtype).numpy()


def _joined(parts: Sequence[Measured]) -> Measured:
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    return Measured(*(np.concatenate(column) for column in columns))


def _change(
    names: tuple[str, str, str, int], chosen: Sequence[Window], found: Measured, tokenizer: Any
) -> TokenChange:
    places = [
        (index, position)
        for index, window in enumerate(chosen)
        for position in range(len(window.tokens) - window.scored, len(window.tokens))
    ]
    levels = np.percentile(found.divergence, PERCENTILES)
    return TokenChange(
        *names,
        len(chosen),
        len(places),
        float(found.divergence.mean()),
        {f"{share:g}": float(level) for share, level in zip(PERCENTILES, levels, strict=True)},
        float((found.guess == found.baseline_guess).mean()),
        tuple(_by_position(np.array([position for _, position in places]), found)),
        tuple(_worst(places, chosen, found, tokenizer)),
    )


def _by_position(positions: np.ndarray, found: Measured) -> Iterator[PositionLoss]:
    for first, after in pairwise(POSITIONS):
        here = (positions >= first) & (positions < after)
        if here.any():
            last = int(positions[here].max())
            losses = float(found.baseline_loss[here].mean()), float(found.loss[here].mean())
            yield PositionLoss(first, last, int(here.sum()), *losses)


def _worst(
    places: Sequence[tuple[int, int]], chosen: Sequence[Window], found: Measured, tokenizer: Any
) -> Iterator[Token]:
    for row in np.argsort(-found.divergence, kind="stable")[:WORST]:
        window, position = places[row]
        tokens = chosen[window].tokens
        yield Token(
            window,
            position,
            tokenizer.decode(tokens[max(0, position - CONTEXT) : position]),
            tokenizer.decode(tokens[position : position + 1]),
            tokenizer.decode([int(found.baseline_guess[row])]),
            float(found.baseline_probability[row]),
            tokenizer.decode([int(found.guess[row])]),
            float(found.probability[row]),
            float(found.divergence[row]),
        )
