"""How models go on from the same prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lrcompress.data.packing import bos_token
from lrcompress.layers.model_info import maximum_length
from lrcompress.reporting.differences import Continuation
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.progress import Progress, silent


def continuations(
    models: Mapping[str, tuple[Any, Any]],
    prompts: Sequence[str],
    new_tokens: int,
    progress: Progress = silent,
) -> list[Continuation]:
    """By the likeliest token each time, up to `new_tokens` or the model's end of text.

    Raises InputError where a prompt is empty or does not fit the model's positions.
    """
    if not prompts:
        return []
    found: dict[str, dict[str, str]] = {prompt: {} for prompt in prompts}
    work = [(prompt, label) for prompt in found for label in models]
    for prompt, label in progress(work, "Continuing prompts", len(work)):
        found[prompt][label] = _continued(*models[label], prompt, new_tokens)
    return [Continuation(prompt, texts) for prompt, texts in found.items()]


@torch.no_grad()
def _continued(model: Any, tokenizer: Any, prompt: str, new_tokens: int) -> str:
    bos = bos_token(tokenizer)
    tokens = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    given = torch.tensor([tokens if bos is None else [bos, *tokens]], device=model.device)
    limit, end = maximum_length(model), tokenizer.eos_token_id
    if not tokens or (limit and given.shape[1] + new_tokens > limit):
        raise InputError(
            f"the prompt {prompt[:40]!r} has {given.shape[1]} tokens: it needs at least one and, "
            f"with {new_tokens} new ones, at most the {limit} positions of the model"
        )
    mask = torch.ones_like(given)
    padding = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    made = model.generate(
        given, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=padding
    )
    return str(tokenizer.decode(made[0, given.shape[1] :], skip_special_tokens=True))
