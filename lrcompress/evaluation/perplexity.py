"""Token perplexity of a text, measured in windows of a fixed context length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lrcompress.data.corpora import Corpus
from lrcompress.data.packing import bos_token, token_hash
from lrcompress.data.windows import Window, Windowing, corpus_windows
from lrcompress.layers.nonfinite import explain_nonfinite
from lrcompress.layers.token_ids import check_token_ids
from lrcompress.models.loading import Loaded
from lrcompress.reporting.differences import MAX_EXPONENT
from lrcompress.reporting.metric import PERPLEXITY, Metric
from lrcompress.runtime.errors import NotFiniteError
from lrcompress.runtime.progress import Progress, silent

# rows of logits converted to float32 at a time: a whole window of a large vocabulary takes
# gigabytes
LOSS_ROWS = 256


@torch.no_grad()
def scored_logits(model: Any, window: Window) -> tuple[Tensor, Tensor]:
    """Logits (count, vocabulary) and the tokens (count,) that they predict: those whose losses
    count in `window`.

    Raises InputError where the embedding of `model` does not have a token.
    """
    check_token_ids(model, window.tokens)
    tokens = window.tokens.to(model.device)
    logits = model(input_ids=tokens[None], use_cache=False).logits[0]
    rows, targets = logits[-window.scored - 1 : -1], tokens[-window.scored :]
    if window.counts is None:
        return rows, targets
    counts = window.counts.to(model.device)
    return rows[counts], targets[counts]


def token_losses(model: Any, window: Window) -> Tensor:
    """Negative log-likelihood (nats) of the tokens that count, shape (count,), float32."""
    rows, targets = scored_logits(model, window)
    losses = [
        cross_entropy(rows[i : i + LOSS_ROWS].float(), targets[i : i + LOSS_ROWS], reduction="none")
        for i in range(0, len(targets), LOSS_ROWS)
    ]
    return torch.cat(losses)


def perplexity(
    label: str,
    loaded: Loaded,
    corpus: Corpus,
    windowing: Windowing,
    progress: Progress = silent,
) -> Metric:
    """exp of the mean negative log-likelihood per token; its samples are [nats, tokens] of each
    window.

    Raises NotFiniteError where the loss of a window is NaN or infinite.
    """
    model, tokenizer = loaded
    windows = corpus_windows(corpus, tokenizer, windowing)
    samples: list[list[float]] = []
    for index, window in enumerate(progress(windows, f"Perplexity of {label}", len(windows))):
        loss = float(token_losses(model, window).double().sum())
        if not math.isfinite(loss):
            raise NotFiniteError(
                f"the loss of the {label} model on window {index} of {corpus.spec!r} is {loss}, "
                f"{explain_nonfinite(model, window.tokens[None])}"
            )
        samples.append([loss, len(window.positions)])
    count = sum(tokens for _, tokens in samples)
    mean = sum(loss for loss, _ in samples) / count
    return Metric(
        model=label,
        name=PERPLEXITY,
        value=math.exp(min(mean, MAX_EXPONENT)),
        unit="",
        higher_is_better=False,
        conditions=_conditions(corpus, windowing, windows, bos_token(tokenizer)),
        samples=samples,
    )


def _conditions(
    corpus: Corpus, windowing: Windowing, windows: Sequence[Window], bos: int | None
) -> dict[str, object]:
    """What has to be equal for two perplexities to be compared."""
    answers = {"loss_on": windowing.loss_on} if windowing.loss_on != "all" else {}
    return answers | {
        "data": corpus.spec,
        "context_length": windowing.length,
        "stride": windowing.step(bos),
        "bos": "none" if bos is None else "at each window",
        "windows": len(windows),
        "tokens": sum(len(window.positions) for window in windows),
        "sha256": token_hash(torch.cat([window.tokens for window in windows])),
    }
