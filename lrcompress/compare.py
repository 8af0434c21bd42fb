"""Measures several models side by side: size, perplexity, tasks and speed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lrcompress import benchmark
from lrcompress.data import read_corpus
from lrcompress.ffn import find_ffns
from lrcompress.lowrank import compressed_layers
from lrcompress.perplexity import perplexity
from lrcompress.protocols import InputError, Metric, Progress, silent
from lrcompress.recipe import EvaluateSettings, from_flat
from lrcompress.sizes import parameter_count, sequence_length
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
    models = label_models(model, baseline)
    return measure(models, tokenizer, checked, resolve_tasks(checked), progress)


def label_models(model: Any, baseline: Any = None) -> dict[str, Any]:
    """Names for the columns of a report; the baseline comes first."""
    label = "factorized" if any(compressed_layers(model)) else "dense"
    if baseline is None:
        return {label: model}
    return (
        {"dense": baseline, label: model}
        if label != "dense"
        else {"baseline": baseline, "model": model}
    )


def resolve_tasks(settings: EvaluateSettings) -> Tasks | None:
    """The tasks of `settings`, found before any model is loaded; None where there are none."""
    return resolve(settings.tasks) if settings.tasks else None


def measure(
    models: Mapping[str, Any],
    tokenizer: Any,
    settings: EvaluateSettings,
    tasks: Tasks | None,
    progress: Progress = silent,
) -> list[Metric]:
    """Every metric of every model, models in the order given."""
    found: list[Metric] = []
    for label, model in models.items():
        found += quality(label, model, tokenizer, settings, tasks, progress)
    if settings.speed:
        lengths = (settings.prompt_length, settings.new_tokens, settings.repeats)
        found += benchmark.speed(models, *lengths, progress)
    return found


def quality(
    label: str,
    model: Any,
    tokenizer: Any,
    settings: EvaluateSettings,
    tasks: Tasks | None,
    progress: Progress = silent,
) -> Iterator[Metric]:
    """Size, perplexities and task metrics of one model."""
    if tokenizer is None and (settings.perplexity or tasks):
        raise InputError("the model has no tokenizer: add the tokenizer's files to its folder")
    model.eval()
    yield from size(label, model)
    length = sequence_length(model, settings.context_length)
    for spec in settings.perplexity:
        corpus = read_corpus(spec, "test")
        yield perplexity(
            label, model, tokenizer, corpus, length, settings.stride, settings.limit, progress
        )
    if tasks:
        yield from run_tasks(
            label,
            model,
            tokenizer,
            tasks,
            length,
            settings.limit,
            settings.num_fewshot,
            settings.batch_size,
        )


def size(label: str, model: Any) -> Iterator[Metric]:
    """Parameters of the FFNs and of the model, and the bytes of its weights in memory."""
    linears = [model.get_submodule(spec.name) for spec in find_ffns(model).linears]
    ffn = sum(parameter_count(linear) for linear in linears)
    bytes_ = sum(p.numel() * p.element_size() for p in model.parameters())
    yield Metric(label, "FFN parameters", ffn, "", False)
    yield Metric(label, "parameters", parameter_count(model), "", False)
    yield Metric(label, "weight bytes", bytes_, "B", False, {"dtype": str(model.dtype)[6:]})
