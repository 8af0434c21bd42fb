"""Throughput of several models side by side: prefill and decode, training steps, one FFN."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.benchmark.timer import describe_machine, run_alternating
from lrcompress.layers.ffn_layouts import find_ffns
from lrcompress.layers.model_info import maximum_length
from lrcompress.layers.model_state import only_trainable
from lrcompress.reporting.metric import Metric
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.progress import Progress, silent


@dataclass(frozen=True)
class ThroughputPass:
    """One timed pass: the name of its metric, its tokens, and the conditions to report."""

    metric: str
    tokens: int
    conditions: Mapping[str, object]


@dataclass(frozen=True)
class Workload:
    """What is timed: `run` takes a model and returns the seconds of each of `passes`."""

    description: str
    passes: Sequence[ThroughputPass]
    run: Callable[[Any], Sequence[float]]


def generation_throughput(
    models: Mapping[str, Any],
    prompt_length: int,
    new_tokens: int,
    repeats: int,
    progress: Progress = silent,
) -> list[Metric]:
    """Tokens per second of prefill and decode at batch size 1.

    Prefill is one forward pass over a random prompt; decode is the greedy generation of
    `new_tokens` from its cache. A prompt is shortened where it does not fit the models' positions.
    Each value is the median of the runs; low and high are the slowest and the fastest run. Raises
    InputError where `new_tokens` alone do not fit.
    """
    limits = position_limits(models)
    prompt_length = min([prompt_length, *(limit - new_tokens for limit in limits)])
    if prompt_length < 1:
        raise InputError(f"{new_tokens} new tokens do not fit the model's {min(limits)} positions")

    def run(model: Any) -> tuple[float, float]:
        return generation_seconds(model, random_tokens([model], 1, prompt_length), new_tokens)

    prompt, batch = {"prompt_length": prompt_length}, {"batch_size": 1}
    passes = (
        ThroughputPass("prefill", prompt_length, prompt | batch),
        ThroughputPass("decode", new_tokens, prompt | {"new_tokens": new_tokens} | batch),
    )
    return _throughput(models, Workload("Measuring speed", passes, run), repeats, progress)


def training_throughput(
    models: Mapping[str, Any],
    batch_size: int,
    length: int,
    repeats: int,
    progress: Progress = silent,
) -> list[Metric]:
    """Tokens per second of a forward and backward pass with gradients of all parameters.

    Every model gets the same random batch (batch_size, length), shortened where it does not fit
    the models' positions. The loss is the mean cross-entropy of the next tokens. No optimizer step
    is made and no gradient is kept. Values are those of `generation_throughput`.
    """
    length = min([length, *position_limits(models)])
    if length < 2:
        raise InputError(
            f"a training sequence of {length} token has no next token to predict: use more"
        )
    batch = random_tokens(models.values(), batch_size, length)

    def run(model: Any) -> tuple[float]:
        return (training_step_seconds(model, batch),)

    passes = [_training_pass("training", batch_size, length)]
    return _throughput(models, Workload("Measuring training", passes, run), repeats, progress)


def ffn_training_throughput(
    models: Mapping[str, Any],
    batch_size: int,
    length: int,
    repeats: int,
    progress: Progress = silent,
) -> list[Metric]:
    """Tokens per second of a forward and backward pass of the last block's FFN alone.

    Every FFN gets the same random input (batch_size, length, width); its gradient is computed too.
    Values are those of `generation_throughput`. Raises InputError where the models have different
    widths, or where no FFN is found in a model.
    """
    widths = {model.config.get_text_config(decoder=True).hidden_size for model in models.values()}
    if len(widths) > 1:
        raise InputError(
            f"models of widths {sorted(widths)} cannot share one FFN input: compare models of one "
            "width"
        )
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(batch_size, length, widths.pop(), generator=generator)

    def run(model: Any) -> tuple[float]:
        return (_ffn_step_seconds(model, states),)

    passes = [_training_pass("FFN training", batch_size, length)]
    return _throughput(models, Workload("Measuring FFNs", passes, run), repeats, progress)


def _training_pass(metric: str, batch_size: int, length: int) -> ThroughputPass:
    conditions = {
        "of": "forward and backward",
        "sequence_length": length,
        "batch_size": batch_size,
    }
    return ThroughputPass(metric, batch_size * length, conditions)


def _throughput(
    models: Mapping[str, Any], workload: Workload, repeats: int, progress: Progress
) -> list[Metric]:
    """The tokens per second of every pass, for one model after another."""
    seconds = run_alternating(models, repeats, workload.run, progress, workload.description)
    return [
        _metric(label, timed, [run[i] for run in seconds[label]], model)
        for label, model in models.items()
        for i, timed in enumerate(workload.passes)
    ]


def _metric(label: str, timed: ThroughputPass, seconds: Sequence[float], model: Any) -> Metric:
    rates = [timed.tokens / second for second in seconds]
    conditions = {"runs": len(rates)} | describe_machine(model.device)
    return Metric(
        model=label,
        name=timed.metric,
        value=median(rates),
        unit="tokens/s",
        higher_is_better=True,
        conditions=dict(timed.conditions) | conditions | {"dtype": str(model.dtype)[6:]},
        low=min(rates),
        high=max(rates),
    )


def position_limits(models: Mapping[str, Any]) -> list[int]:
    """The maximum number of positions of each model that has one."""
    return [limit for model in models.values() if (limit := maximum_length(model))]


def random_tokens(models: Iterable[Any], sequences: int, length: int) -> Tensor:
    """Token ids (sequences, length) that are in the vocabulary of every model; always the same."""
    vocabulary = min(model.get_input_embeddings().num_embeddings for model in models)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (sequences, length), generator=generator)


@torch.no_grad()
def generation_seconds(model: Any, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds of the pass over `prompt` (sequences, length), and of `new_tokens` passes after it.

    Each of these appends the most likely token to every sequence, from the cache.
    """
    prompt = prompt.to(model.device)
    parameters = inspect.signature(model.forward).parameters
    last_logits = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
    cache = "cache" if "cache" in parameters else "past_key_values"
    start = _now(model)
    output = model(input_ids=prompt, use_cache=True, **last_logits)
    prefilled = _now(model)
    for _ in range(new_tokens):
        token = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, use_cache=True, **{cache: getattr(output, cache)})
    return prefilled - start, _now(model) - prefilled


def training_step_seconds(model: Any, batch: Tensor) -> float:
    """Seconds of a forward and backward pass over `batch` (sequences, length).

    Gradients of all parameters are computed and dropped.
    """
    tokens = batch.to(model.device)

    def loss() -> Tensor:
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        targets = tokens[:, 1:].flatten().to(logits.device)
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets)

    return _gradient_seconds(model, model, loss)


def _ffn_step_seconds(model: Any, states: Tensor) -> float:
    """Seconds of a forward and backward pass of the last FFN, states (batch, length, width)."""
    ffn = _last_ffn(model)
    states = states.to(model.device, model.dtype).requires_grad_()

    def loss() -> Tensor:
        square: Tensor = ffn(states).float().square()
        return square.mean()

    return _gradient_seconds(model, ffn, loss, [states])


def _last_ffn(model: Any) -> nn.Module:
    linears = find_ffns(model).linears
    if not linears:
        raise InputError(f"no feed-forward linears known for {model.config.model_type!r}")
    ffn: nn.Module = model.get_submodule(linears[-1].ffn)
    return ffn


def _gradient_seconds(
    model: Any, module: nn.Module, loss: Callable[[], Tensor], inputs: Sequence[Tensor] = ()
) -> float:
    """Seconds of computing `loss` and its gradients for `inputs` and all parameters of `module`."""
    # integers cannot have a gradient
    parameters = [parameter for parameter in module.parameters() if parameter.is_floating_point()]
    with only_trainable(module, parameters), torch.enable_grad():
        start = _now(model)
        torch.autograd.grad(loss(), [*inputs, *parameters], allow_unused=True)
        return _now(model) - start


def _now(model: Any) -> float:
    """Seconds on the clock, once the model's GPU has finished its work."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
