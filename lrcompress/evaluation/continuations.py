"""Greedy continuations of prompts, for each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lrcompress.data.packing import bos_token
from lrcompress.layers.model_info import maximum_length
from lrcompress.layers.token_ids import check_token_ids
from lrcompress.models.loading import Loaded
from lrcompress.reporting.differences import Continuation
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.progress import Progress, silent


def continuations(
    models: Mapping[str, Loaded],
    prompts: Sequence[str],
    new_tokens: int,
    progress: Progress = silent,
) -> list[Continuation]:
    """Continues every prompt with every model by the most likely token at each step.

    A continuation ends after `new_tokens` tokens, or at the model's end-of-text token. Raises
    InputError where a prompt is empty, too long for the model, or has a token that the model lacks.
    """
    if not prompts:
        return []
    texts: dict[str, dict[str, str]] = {prompt: {} for prompt in prompts}
    work = [(prompt, label) for prompt in texts for label in models]
    for prompt, label in progress(work, "Continuing prompts", len(work)):
        texts[prompt][label] = _continuation(*models[label], prompt, new_tokens)
    return [Continuation(prompt, by_model) for prompt, by_model in texts.items()]


@torch.no_grad()
def _continuation(model: Any, tokenizer: Any, prompt: str, new_tokens: int) -> str:
    bos = bos_token(tokenizer)
    tokens = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    input_ids = torch.tensor([tokens if bos is None else [bos, *tokens]], device=model.device)
    limit, eos = maximum_length(model), tokenizer.eos_token_id
    if not tokens or (limit and input_ids.shape[1] + new_tokens > limit):
        raise InputError(
            f"the prompt {prompt[:40]!r} has {input_ids.shape[1]} tokens: it needs at least one "
            f"and, with {new_tokens} new ones, at most the {limit} positions of the model"
        )
    check_token_ids(model, input_ids)
    generated = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    new_ids = generated[0, input_ids.shape[1] :]
    return str(tokenizer.decode(new_ids, skip_special_tokens=True))
