"""Calibration text that the model itself writes, for models whose training data is not available.

Sampled at temperature 1, the text has the domains of the model's training data in about the same
proportions (Williams et al. 2024, arXiv 2410.17170, compare it with web text). The gradients of the
loss on it give the true Fisher matrix, not the empirical one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from lrcompress.layers.bfloat16_linears import bfloat16_linears
from lrcompress.layers.model_state import evaluation_mode
from lrcompress.layers.nonfinite import explain_nonfinite
from lrcompress.layers.token_ids import check_token_ids
from lrcompress.runtime.errors import InputError, NotFiniteError
from lrcompress.runtime.progress import Progress

# at most; a step costs nearly the same for few documents as for many
DOCUMENTS_PER_BATCH = 128
# tokens of a document at most: each further token of a longer document costs more time
MAX_DOCUMENT_LENGTH = 256
MIN_BLOCK_LENGTH = 8


@torch.no_grad()
def sampled_blocks(
    model: Any, bos: int | None, num_samples: int, seq_len: int, seed: int, progress: Progress
) -> Tensor:
    """Token blocks (num_samples, seq_len) of packed documents that each start with a random token.

    With `bos` every document, and so every block, starts with `bos` and then the random token.
    Equal seeds give equal text on one machine. Raises InputError where blocks are too short, and
    NotFiniteError where the model's logits are not finite.
    """
    length = min(MAX_DOCUMENT_LENGTH, seq_len)
    if length < MIN_BLOCK_LENGTH:
        raise InputError(
            f"blocks of {seq_len} tokens are too short for text that the model writes: use "
            f"--seq-len {MIN_BLOCK_LENGTH} or more"
        )
    documents_per_block = -(-seq_len // length)
    count = documents_per_block * num_samples
    batches = torch.arange(count).tensor_split(-(-count // DOCUMENTS_PER_BATCH))
    generator = torch.Generator().manual_seed(seed)
    steps = len(batches) * length
    tokens = iter(progress(range(steps), "Writing calibration text", steps))
    sampling = _InverseTransformSampling(tokens)
    with (
        evaluation_mode(model),
        bfloat16_linears(model),
        _plain_decoding(model),
        torch.random.fork_rng(range(torch.cuda.device_count())),
    ):
        torch.manual_seed(seed)
        starts = (_first_tokens(model, len(batch), bos, generator) for batch in batches)
        documents = torch.cat([_continued(model, start, length, sampling) for start in starts])
    for _ in tokens:  # the first ones were not sampled
        pass
    packed = documents.view(num_samples, documents_per_block * length)
    return packed[:, :seq_len].contiguous()


def _first_tokens(model: Any, count: int, bos: int | None, generator: torch.Generator) -> Tensor:
    """A random token for each document, after `bos` if there is one; (count, 1 or 2)."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    start = torch.randint(vocabulary, (count, 1), generator=generator)
    if bos is not None:
        start = torch.cat([torch.full((count, 1), bos), start], dim=1)
    check_token_ids(model, start)
    start = start.to(model.device)
    if not bool(model(input_ids=start, use_cache=False).logits.isfinite().all()):
        raise NotFiniteError(
            f"the model's logits are not finite, {explain_nonfinite(model, start)}"
        )
    return start


def _continued(model: Any, start: Tensor, length: int, sampling: LogitsProcessor) -> Tensor:
    """Documents (count, length) that begin with `start` (count, 1 or 2)."""
    documents: Tensor = model.generate(
        input_ids=start,
        attention_mask=torch.ones_like(start),
        max_length=length,
        logits_processor=LogitsProcessorList([sampling]),
    )
    return documents.cpu()


class _InverseTransformSampling(LogitsProcessor):  # type: ignore[misc]
    """Draws each next token from the softmax of its logits, and leaves that token the highest.

    One random number a row, looked up in the cumulative distribution, is several times faster than
    `torch.multinomial`, which draws one for each entry of the vocabulary. Every token is one of the
    `steps` of a progress display.
    """

    def __init__(self, steps: Iterator[int]) -> None:
        self.steps = steps

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        next(self.steps)
        # in place: new tensors of this size take as long as what is computed
        weights = scores.sub_(scores.amax(-1, keepdim=True)).exp_()
        tokens = _drawn(weights, torch.rand_like(weights[:, :1]))
        return weights.zero_().scatter_(-1, tokens, 1.0)


def _drawn(weights: Tensor, uniform: Tensor) -> Tensor:
    """The columns (rows, 1) of `weights` (rows, columns) where their running sum passes a share
    `uniform` (rows, 1) of the whole sum.

    Running sums are slow: first one over sums of groups, then one inside the group that was drawn.
    """
    groups = weights.view(len(weights), -1, _group_size(weights.shape[-1]))
    sums = groups.sum(-1)
    group, rest = _passed(sums, uniform * sums.sum(-1, keepdim=True))
    inside = groups.take_along_dim(group[..., None], 1)[:, 0]
    column: Tensor = group * groups.shape[-1] + _passed(inside, rest)[0]
    return column


def _passed(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The columns (rows, 1) in which the running sum of `weights` passes `target` (rows, 1), and
    what `target` is above the sum before them."""
    cumulative = weights.cumsum(-1)
    columns = torch.searchsorted(cumulative, target, right=True)
    # of rounded sums the last can be below the target
    columns = columns.clamp(max=weights.shape[-1] - 1)
    before = cumulative.take_along_dim(columns, -1) - weights.take_along_dim(columns, -1)
    return columns, target - before


def _group_size(columns: int) -> int:
    """The largest divisor of `columns` that is at most its root."""
    return max(size for size in range(1, math.isqrt(columns) + 1) if columns % size == 0)


@contextmanager
def _plain_decoding(model: Any) -> Iterator[None]:
    """Inside, `generate` takes the highest logits up to the full length.

    No penalty of the model's own changes them, and no end token ends a document.
    """
    original = model.generation_config
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    try:
        yield
    finally:
        model.generation_config = original
