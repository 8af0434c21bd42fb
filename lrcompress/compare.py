"""Measures several models side by side: size, perplexity, tasks and speed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

from lrcompress import benchmark
from lrcompress.data import read_corpus
from lrcompress.ffn import find_ffns
from lrcompress.lowrank import is_compressed
from lrcompress.perplexity import perplexity
from lrcompress.protocols import InputError, Metric, Progress, silent
from lrcompress.recipe import from_flat
from lrcompress.settings import EvaluateSettings
from lrcompress.sizes import evaluation_mode, parameter_count, sequence_length
from lrcompress.sources import Loaded
from lrcompress.tasks import Tasks, resolve, run_tasks


def evaluate(
    model: Any,
    tokenizer: Any,
    *,
    baseline: Any = None,
    progress: Progress = silent,
    **settings: Any,
) -> list[Metric]:
    """Measures `model`, and `baseline` beside it in the same run; both are loaded models.

    `settings` are the keys of the recipe's `evaluate` section: perplexity, tasks, limit,
    context_length, ... Raises InputError where a setting is refused, a text or task cannot be
    read, or a loss is not finite.
    """
    checked = from_flat({"evaluate": EvaluateSettings}, settings)["evaluate"]
    pairs = None if baseline is None else (baseline, tokenizer)
    models = label_models((model, tokenizer), pairs)
    return measure(models, checked, resolve_tasks(checked), progress)


def label_models(
    model: Loaded, baseline: Loaded | None = None, trained: bool = False
) -> dict[str, Loaded]:
    """Names for the columns of a report; the baseline comes first."""
    compressed = "finetuned" if trained else "factorized"
    label = compressed if is_compressed(model[0]) else "dense"
    if baseline is None:
        return {label: model}
    if label == "dense" or is_compressed(baseline[0]):
        return {"baseline": baseline, "model": model}
    return {"dense": baseline, label: model}


def resolve_tasks(settings: EvaluateSettings) -> Tasks | None:
    """The tasks of `settings`, found before any model is loaded; None where there are none."""
    return resolve(settings.tasks) if settings.tasks else None


def measure(
    models: Mapping[str, Loaded],
    settings: EvaluateSettings,
    tasks: Tasks | None,
    progress: Progress = silent,
) -> list[Metric]:
    """Every metric of every model, models in the order given, each with its own tokenizer."""
    length = min(sequence_length(model, settings.context_length) for model, _ in models.values())
    found: list[Metric] = []
    for label, loaded in models.items():
        found += quality(label, loaded, settings, tasks, length, progress)
    return found + speed(models, settings, progress)


def speed(
    models: Mapping[str, Loaded], settings: EvaluateSettings, progress: Progress = silent
) -> list[Metric]:
    """Prefill and decode speed of all models in alternation, if the settings ask for it."""
    if not settings.speed:
        return []
    lengths = (settings.prompt_length, settings.new_tokens, settings.repeats)
    with ExitStack() as stack:
        for model, _ in models.values():
            stack.enter_context(evaluation_mode(model))
        return benchmark.speed({k: model for k, (model, _) in models.items()}, *lengths, progress)


def quality(
    label: str,
    loaded: Loaded,
    settings: EvaluateSettings,
    tasks: Tasks | None,
    length: int,
    progress: Progress = silent,
) -> list[Metric]:
    """Size, perplexities and task metrics of one model, in windows of `length` tokens."""
    model, tokenizer = loaded
    if tokenizer is None and (settings.perplexity or tasks):
        raise InputError("the model has no tokenizer: add the tokenizer's files to its folder")
    corpora = [read_corpus(spec, "test") for spec in settings.perplexity]
    found = list(size(label, model))
    with evaluation_mode(model):
        for corpus in corpora:
            window = (length, settings.stride, settings.limit)
            found.append(perplexity(label, model, tokenizer, corpus, *window, progress))
        if tasks:
            options = (settings.limit, settings.num_fewshot, settings.batch_size)
            found += run_tasks(label, model, tokenizer, tasks, length, *options)
    return found


def size(label: str, model: Any) -> Iterator[Metric]:
    """Parameters of the FFNs, if they are known, and of the model, and its weights' bytes."""
    linears = [model.get_submodule(spec.name) for spec in find_ffns(model).linears]
    if linears:
        yield Metric(label, "FFN parameters", sum(map(parameter_count, linears)), "", False)
    yield Metric(label, "parameters", parameter_count(model), "", False)
    bytes_ = sum(p.numel() * p.element_size() for p in model.parameters())
    yield Metric(label, "weight bytes", bytes_, "B", False, {"dtype": str(model.dtype)[6:]})
