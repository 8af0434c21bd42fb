"""Prefill and decode speed of several models, measured in alternation in one process."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lrcompress.protocols import InputError, Metric, Progress, silent
from lrcompress.sizes import maximum_length


def speed(
    models: Mapping[str, Any],
    prompt_length: int,
    new_tokens: int,
    repeats: int,
    progress: Progress = silent,
) -> list[Metric]:
    """Tokens per second at batch size 1: medians, with the slowest and the fastest run.

    Prefill is one forward pass over a random prompt, decode the greedy generation of
    `new_tokens` from its cache. The models take turns within every repeat, the order turning
    round each time, after one uncounted run of each. A prompt that does not fit the models'
    positions is shortened. Raises InputError where `new_tokens` alone do not fit.
    """
    limits = [limit for model in models.values() if (limit := maximum_length(model))]
    prompt_length = min([prompt_length, *(limit - new_tokens for limit in limits)])
    if prompt_length < 1:
        raise InputError(f"{new_tokens} new tokens do not fit the model's {min(limits)} positions")
    seconds: dict[str, list[tuple[float, float]]] = {label: [] for label in models}
    order = list(models)
    for repeat in progress(range(repeats + 1), "Measuring speed", repeats + 1):
        for label in order if repeat % 2 else reversed(order):
            measured = _one_run(models[label], prompt_length, new_tokens)
            if repeat:
                seconds[label].append(measured)
    found = []
    for label, runs in seconds.items():
        conditions = _conditions(models[label], repeats)
        rates = [prompt_length / prefill for prefill, _ in runs]
        about: dict[str, object] = {"prompt_length": prompt_length}
        found.append(_metric(label, "prefill", rates, about | conditions))
        rates = [new_tokens / decode for _, decode in runs]
        found.append(
            _metric(label, "decode", rates, about | {"new_tokens": new_tokens} | conditions)
        )
    return found


def _metric(label: str, name: str, rates: list[float], conditions: dict[str, object]) -> Metric:
    return Metric(label, name, median(rates), "tokens/s", True, conditions, min(rates), max(rates))


def _conditions(model: Any, repeats: int) -> dict[str, object]:
    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "batch_size": 1,
        "runs": repeats,
        "device": name,
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


@torch.no_grad()
def _one_run(model: Any, prompt_length: int, new_tokens: int) -> tuple[float, float]:
    """Seconds of prefill and of decoding."""
    prompt = _prompt(model, prompt_length)
    known = inspect.signature(model.forward).parameters
    keep = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    cache = "cache" if "cache" in known else "past_key_values"
    start = _now(model)
    out = model(input_ids=prompt, use_cache=True, **keep)
    prefilled = _now(model)
    for _ in range(new_tokens):
        token = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=token, use_cache=True, **{cache: getattr(out, cache)})
    return prefilled - start, _now(model) - prefilled


def _prompt(model: Any, length: int) -> Tensor:
    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (1, length), generator=generator).to(model.device)


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
