"""Compares models token by token with the first one: divergence, agreement, loss by position."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrcompress.data.corpora import Corpus
from lrcompress.data.windows import Window, Windowing, corpus_windows
from lrcompress.evaluation.perplexity import LOSS_ROWS, scored_logits
from lrcompress.models.loading import Loaded
from lrcompress.reporting.differences import PositionLoss, Token, TokenChange
from lrcompress.runtime.progress import Progress, silent

PERCENTILES = (50, 90, 99, 99.9)
# first position (tokens of context) of each bin of positions: 1, 16, 64, 256, ...
POSITION_BINS = (1, *(4**power for power in range(2, 12)))
WORST_TOKENS = 10  # tokens listed with their context
CONTEXT_TOKENS = 16  # tokens of context shown with each of them


@dataclass(frozen=True)
class TokenStatistics:
    """Values for each scored token, each array of shape (tokens,).

    Losses and divergences are in nats; a guess is the id of the most likely token.
    """

    baseline_loss: np.ndarray
    loss: np.ndarray
    divergence: np.ndarray
    baseline_guess: np.ndarray
    baseline_probability: np.ndarray
    guess: np.ndarray
    probability: np.ndarray


def token_changes(
    models: Mapping[str, Loaded],
    corpus: Corpus,
    windowing: Windowing,
    progress: Progress = silent,
) -> list[TokenChange]:
    """Compares every later model with the first one; models with another tokenizer or vocabulary
    are left out.

    The first model runs once for all others. Windows are cut as for `perplexity`.
    """
    (baseline, (first, tokenizer)), *later = models.items()
    windows = corpus_windows(corpus, tokenizer, windowing)
    others = {
        label: model
        for label, (model, other_tokenizer) in later
        if _same_vocabulary(first, model)
        and _same_tokens(windows, corpus_windows(corpus, other_tokenizer, windowing))
    }
    if not others:
        return []
    statistics: dict[str, list[TokenStatistics]] = {label: [] for label in others}
    for window in progress(windows, f"Comparing tokens of {corpus.spec}", len(windows)):
        logits, targets = scored_logits(first, window)
        for label, model in others.items():
            other_logits, _ = scored_logits(model, window)
            statistics[label].append(_token_statistics(logits, other_logits, targets))
    return [
        TokenChange(
            baseline=baseline,
            model=label,
            data=corpus.spec,
            context_length=windowing.length,
            windows=len(windows),
            **_summary(_concatenated(chunks), windows, tokenizer),
        )
        for label, chunks in statistics.items()
    ]


def _same_vocabulary(first: Any, other: Any) -> bool:
    sizes = {model.get_output_embeddings().weight.shape[0] for model in (first, other)}
    return len(sizes) == 1


def _same_tokens(windows: Sequence[Window], other_windows: Sequence[Window]) -> bool:
    return len(windows) == len(other_windows) and all(
        torch.equal(window.tokens, other.tokens)
        for window, other in zip(windows, other_windows, strict=True)
    )


def _token_statistics(baseline: Tensor, other: Tensor, targets: Tensor) -> TokenStatistics:
    """Statistics from two models' logits (tokens, vocabulary) and the actual tokens (tokens,).

    The divergence is KL(baseline || other) of the two distributions.
    """
    chunks = []
    for start in range(0, len(targets), LOSS_ROWS):
        rows = slice(start, start + LOSS_ROWS)
        p = baseline[rows].float().log_softmax(-1)
        q = other[rows].to(p.device).float().log_softmax(-1)
        target = targets[rows, None].to(p.device)
        baseline_guess, baseline_probability = _guess(p)
        guess, probability = _guess(q)
        chunks.append(
            TokenStatistics(
                baseline_loss=_to_numpy(-p.gather(1, target)[:, 0]),
                loss=_to_numpy(-q.gather(1, target)[:, 0]),
                # 0 log 0 = 0: a model may give a token the probability 0
                divergence=_to_numpy(torch.where(p > -math.inf, p.exp() * (p - q), 0.0).sum(-1)),
                baseline_guess=_to_numpy(baseline_guess),
                baseline_probability=_to_numpy(baseline_probability),
                guess=_to_numpy(guess),
                probability=_to_numpy(probability),
            )
        )
    return _concatenated(chunks)


def _guess(log_probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """The most likely token of each row, and its probability."""
    top = log_probabilities.max(-1)
    return top.indices, top.values.exp()


def _to_numpy(values: Tensor) -> np.ndarray:
    dtype = torch.float64 if values.is_floating_point() else torch.int64
    return values.to("cpu", dtype).numpy()


def _concatenated(chunks: Sequence[TokenStatistics]) -> TokenStatistics:
    names = [field.name for field in fields(TokenStatistics)]
    return TokenStatistics(
        **{name: np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in names}
    )


def _summary(
    statistics: TokenStatistics, windows: Sequence[Window], tokenizer: Any
) -> dict[str, Any]:
    """The fields of a TokenChange that come from its tokens."""
    locations = [
        (index, position)
        for index, window in enumerate(windows)
        for position in window.positions.tolist()
    ]
    levels = np.percentile(statistics.divergence, PERCENTILES)
    positions = np.array([position for _, position in locations])
    return {
        "tokens": len(locations),
        "divergence": float(statistics.divergence.mean()),
        "percentiles": {
            f"{share:g}": float(level) for share, level in zip(PERCENTILES, levels, strict=True)
        },
        "agreement": float((statistics.guess == statistics.baseline_guess).mean()),
        "positions": tuple(_losses_by_position(positions, statistics)),
        "worst": tuple(_worst_tokens(locations, windows, statistics, tokenizer)),
    }


def _losses_by_position(
    positions: np.ndarray, statistics: TokenStatistics
) -> Iterator[PositionLoss]:
    """Mean losses in every bin of positions that has tokens; `positions` has shape (tokens,)."""
    for first, end in pairwise(POSITION_BINS):
        in_bin = (positions >= first) & (positions < end)
        if in_bin.any():
            yield PositionLoss(
                first=first,
                last=int(positions[in_bin].max()),
                tokens=int(in_bin.sum()),
                baseline=float(statistics.baseline_loss[in_bin].mean()),
                model=float(statistics.loss[in_bin].mean()),
            )


def _worst_tokens(
    locations: Sequence[tuple[int, int]],
    windows: Sequence[Window],
    statistics: TokenStatistics,
    tokenizer: Any,
) -> Iterator[Token]:
    """The tokens of largest divergence; `locations` are (window, position in it) of each token."""
    for row in np.argsort(-statistics.divergence, kind="stable")[:WORST_TOKENS]:
        window, position = locations[row]
        tokens = windows[window].tokens
        yield Token(
            window=window,
            position=position,
            context=tokenizer.decode(tokens[max(0, position - CONTEXT_TOKENS) : position]),
            actual=tokenizer.decode(tokens[position : position + 1]),
            baseline_guess=tokenizer.decode([int(statistics.baseline_guess[row])]),
            baseline_probability=float(statistics.baseline_probability[row]),
            guess=tokenizer.decode([int(statistics.guess[row])]),
            probability=float(statistics.probability[row]),
            divergence=float(statistics.divergence[row]),
        )
