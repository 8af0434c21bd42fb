"""Speed of several models, in use and in training, measured in alternation in one process."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.benchmark.timer import in_turn, machine
from lrcompress.layers.ffn_layouts import find_ffns
from lrcompress.layers.model_info import maximum_length
from lrcompress.layers.model_state import only_trainable
from lrcompress.reporting.metric import Metric
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.progress import Progress, silent


def generation_throughput(
    models: Mapping[str, Any],
    prompt_length: int,
    new_tokens: int,
    repeats: int,
    progress: Progress = silent,
) -> list[Metric]:
    """Tokens per second at batch size 1: medians, with the slowest and the fastest run.

    Prefill is one forward pass over a random prompt, decode the greedy generation of
    `new_tokens` from its cache. A prompt that does not fit the models' positions is shortened.
    Raises InputError where `new_tokens` alone do not fit.
    """
    limits = position_limits(models)
    prompt_length = min([prompt_length, *(limit - new_tokens for limit in limits)])
    if prompt_length < 1:
        raise InputError(f"{new_tokens} new tokens do not fit the model's {min(limits)} positions")

    def run(model: Any) -> tuple[float, float]:
        return generation(model, _prompt(model, 1, prompt_length), new_tokens)

    found = []
    for label, runs in in_turn(models, repeats, run, progress, "Measuring speed").items():
        conditions = _conditions(models[label], repeats, 1)
        rates = [prompt_length / prefill for prefill, _ in runs]
        about: dict[str, object] = {"prompt_length": prompt_length}
        found.append(_metric(label, "prefill", rates, about | conditions))
        rates = [new_tokens / decode for _, decode in runs]
        found.append(
            _metric(label, "decode", rates, about | {"new_tokens": new_tokens} | conditions)
        )
    return found


def training_throughput(
    models: Mapping[str, Any],
    batch_size: int,
    length: int,
    repeats: int,
    progress: Progress = silent,
) -> list[Metric]:
    """Tokens per second of the forward and backward pass of a training step of all parameters.

    Every model gets the same random batch (batch_size, length), shortened where it does not fit
    the models' positions. The loss is the mean cross-entropy of the next tokens. There is no step
    of an optimizer. Medians, with the slowest and the fastest run; no gradient is kept.
    """
    length = min([length, *position_limits(models)])
    if length < 2:
        raise InputError(f"a training step of {length} token predicts none: use more")
    vocabulary = min(model.get_input_embeddings().num_embeddings for model in models.values())
    batch = random_tokens(vocabulary, batch_size, length)

    def run(model: Any) -> float:
        return training_step(model, batch)

    found = []
    for label, runs in in_turn(models, repeats, run, progress, "Measuring training").items():
        about: dict[str, object] = {"of": "forward and backward", "sequence_length": length}
        conditions = about | _conditions(models[label], repeats, batch_size)
        rates = [batch.numel() / seconds for seconds in runs]
        found.append(_metric(label, "training", rates, conditions))
    return found


def ffn_training_throughput(
    models: Mapping[str, Any],
    batch_size: int,
    length: int,
    repeats: int,
    progress: Progress = silent,
) -> list[Metric]:
    """Tokens per second of the forward and backward pass of the last block's FFN alone.

    Every FFN gets the same random input (batch_size, length, width), which wants a gradient too.
    Medians, with the slowest and the fastest run. Raises InputError where a model has no FFN that
    is known.
    """
    widths = {model.config.get_text_config(decoder=True).hidden_size for model in models.values()}
    if len(widths) > 1:
        raise InputError(f"models of widths {sorted(widths)} have no FFN input in common")
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(batch_size, length, widths.pop(), generator=generator)

    def run(model: Any) -> float:
        return _ffn_step(model, _last_ffn(model), states)

    found = []
    for label, runs in in_turn(models, repeats, run, progress, "Measuring FFNs").items():
        about: dict[str, object] = {"of": "forward and backward", "sequence_length": length}
        conditions = about | _conditions(models[label], repeats, batch_size)
        rates = [batch_size * length / seconds for seconds in runs]
        found.append(_metric(label, "FFN training", rates, conditions))
    return found


def _last_ffn(model: Any) -> nn.Module:
    found = find_ffns(model).linears
    if not found:
        raise InputError(f"no feed-forward linears known for {model.config.model_type!r}")
    ffn: nn.Module = model.get_submodule(found[-1].ffn)
    return ffn


def _ffn_step(model: Any, ffn: nn.Module, states: Tensor) -> float:
    entry = states.to(model.device, model.dtype).requires_grad_()
    parameters = _trainable_parameters(ffn)
    with only_trainable(ffn, parameters), torch.enable_grad():
        start = _now(model)
        torch.autograd.grad(ffn(entry).float().square().mean(), [entry, *parameters])
        return _now(model) - start


def position_limits(models: Mapping[str, Any]) -> list[int]:
    return [limit for model in models.values() if (limit := maximum_length(model))]


def _metric(label: str, name: str, rates: list[float], conditions: dict[str, object]) -> Metric:
    return Metric(label, name, median(rates), "tokens/s", True, conditions, min(rates), max(rates))


def _conditions(model: Any, repeats: int, batch_size: int) -> dict[str, object]:
    counts: dict[str, object] = {"batch_size": batch_size, "runs": repeats}
    return counts | machine(model.device) | {"dtype": str(model.dtype).removeprefix("torch.")}


def _prompt(model: Any, batch_size: int, length: int) -> Tensor:
    vocabulary = model.get_input_embeddings().num_embeddings
    return random_tokens(vocabulary, batch_size, length)


@torch.no_grad()
def generation(model: Any, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds of the pass over `prompt` (sequences, tokens), and of `new_tokens` passes after it
    that add one token to each sequence, the likeliest, from the cache."""
    prompt = prompt.to(model.device)
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


def training_step(model: Any, batch: Tensor) -> float:
    """Seconds of a forward and a backward pass over `batch` (sequences, tokens); the gradients of
    all parameters are dropped."""
    tokens = batch.to(model.device)
    parameters = _trainable_parameters(model)
    with only_trainable(model, parameters), torch.enable_grad():
        start = _now(model)
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        targets = tokens[:, 1:].flatten().to(logits.device)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets)
        torch.autograd.grad(loss, parameters, allow_unused=True)
        return _now(model) - start


def _trainable_parameters(module: nn.Module) -> list[nn.Parameter]:
    """All that can have a gradient: integers cannot."""
    return [parameter for parameter in module.parameters() if parameter.is_floating_point()]


def random_tokens(vocabulary: int, count: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (count, length), generator=generator)


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
