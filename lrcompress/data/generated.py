"""Text that the model itself writes: calibration data for a model whose own data is not at hand.

Sampled from the model at temperature 1, it has the model's domains in the model's proportions
(Williams et al. 2024, arXiv 2410.17170, compare it with web text), and on it the gradients of
the loss are those of the true Fisher matrix, not of the empirical one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from lrcompress.layers.model_state import evaluation_mode
from lrcompress.layers.nonfinite import explain_nonfinite
from lrcompress.runtime.errors import InputError, NotFiniteError
from lrcompress.runtime.progress import Progress

# documents written at a time, and their length: a step costs more the longer a document has become
BATCH = 64
DOCUMENT = 256
MINIMUM = 8


@torch.no_grad()
def sampled_blocks(
    model: Any, bos: int | None, num_samples: int, seq_len: int, seed: int, progress: Progress
) -> Tensor:
    """Token blocks (num_samples, seq_len) of packed documents, each begun with a random token.

    With `bos` every document, and so every block, starts with it. Equal seeds give equal text
    on one machine. Raises InputError where blocks are too short or the model's output is no
    number.
    """
    length = min(DOCUMENT, seq_len)
    if length < MINIMUM:
        raise InputError(f"blocks of {seq_len} tokens are too short to write: use --seq-len 8")
    each = -(-seq_len // length)
    documents = each * num_samples
    generator = torch.Generator().manual_seed(seed)
    batches = -(-documents // BATCH)
    with evaluation_mode(model), _plain_sampling(model), torch.random.fork_rng():
        torch.manual_seed(seed)
        written = [
            _write(model, min(BATCH, documents - index * BATCH), length, bos, generator)
            for index in progress(range(batches), "Writing calibration text", batches)
        ]
    return torch.cat(written).view(num_samples, each * length)[:, :seq_len].contiguous()


def _write(
    model: Any, count: int, length: int, bos: int | None, generator: torch.Generator
) -> Tensor:
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    start = torch.randint(vocabulary, (count, 1), generator=generator)
    if bos is not None:
        start = torch.cat([torch.full((count, 1), bos), start], dim=1)
    start = start.to(model.device)
    if not bool(model(input_ids=start, use_cache=False).logits.isfinite().all()):
        raise NotFiniteError(
            f"the model's logits are not finite, {explain_nonfinite(model, start)}"
        )
    mask = torch.ones_like(start)
    found: Tensor = model.generate(input_ids=start, attention_mask=mask, max_length=length)
    return found.cpu()


@contextmanager
def _plain_sampling(model: Any) -> Iterator[None]:
    """The model's distribution as it is: no penalty, no cut, no end before the length."""
    own = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0
    )
    try:
        yield
    finally:
        model.generation_config = own
