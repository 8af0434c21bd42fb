"""Speed and memory of a whole model beside its dense baseline: prefill, decode, training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lrcompress.benchmark import throughput
from lrcompress.benchmark.flops import executed_flops
from lrcompress.benchmark.report import Bench, make_bench, write_bench
from lrcompress.benchmark.timer import Cost, Timing, run_alternating
from lrcompress.checkpoint.record import ModelWithRecord, record_of
from lrcompress.config import ModelBenchSettings, ModelSettings
from lrcompress.layers.model_info import check_predicts_next_token
from lrcompress.layers.model_state import evaluation_mode
from lrcompress.layers.moe import unpacked
from lrcompress.layers.optimize import optimize
from lrcompress.models.loading import with_source
from lrcompress.reporting.tables import labels
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.memory import peak_memory
from lrcompress.runtime.paths import check_free
from lrcompress.runtime.progress import Progress, silent


@dataclass(frozen=True)
class ModelPass:
    """One timed pass of a model; its matrix products have `tokens` rows."""

    name: str
    setting: Mapping[str, object]
    tokens: int


@dataclass(frozen=True)
class ModelWorkload:
    """Passes that are timed together.

    `run` takes a model and returns the seconds of each pass; `count_flops` returns their FLOPs.
    """

    passes: Sequence[ModelPass]
    run: Callable[[Any], Sequence[float]]
    count_flops: Callable[[Any], Sequence[int]]

    @property
    def description(self) -> str:
        setting = self.passes[0].setting
        words = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in setting.items())
        return f"Timing {' and '.join(timed.name for timed in self.passes)}, {words}"


def bench_models(
    models: Mapping[str, Any], settings: ModelBenchSettings, progress: Progress = silent
) -> list[Timing]:
    """Times the models in alternation; the first is the baseline.

    Raises InputError where prompt and new tokens, or the training sequences, do not fit a model.
    """
    _check_lengths(models, settings)
    for model in models.values():
        check_predicts_next_token(model, "the benchmark")
    workloads = [_generation(models, settings, size) for size in settings.batch_sizes]
    if settings.training:
        workloads.append(_training(models, settings))
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(evaluation_mode(model))
        return [
            timing
            for workload in workloads
            for timing in _timings(models, workload, settings.repeats, progress)
        ]


def _check_lengths(models: Mapping[str, Any], settings: ModelBenchSettings) -> None:
    limit = min(throughput.position_limits(models), default=None)
    lengths = {
        "--prompt-length and --new-tokens": settings.prompt_length + settings.new_tokens,
        "--training-length": settings.training_length if settings.training else 0,
    }
    for flags, length in lengths.items():
        if limit is not None and length > limit:
            raise InputError(f"{flags}: {length} tokens exceed the model's {limit} positions")


def _generation(
    models: Mapping[str, Any], settings: ModelBenchSettings, batch_size: int
) -> ModelWorkload:
    prompt = throughput.random_tokens(models.values(), batch_size, settings.prompt_length)
    new_tokens = settings.new_tokens

    def run(model: Any, count: int = new_tokens) -> tuple[float, float]:
        return throughput.generation_seconds(model, prompt, count)

    def count_flops(model: Any) -> list[int]:
        prefill = executed_flops(partial(run, model, 0))
        return [prefill, executed_flops(partial(run, model)) - prefill]

    setting = {"batch_size": batch_size, "prompt_length": settings.prompt_length}
    passes = [
        ModelPass("prefill", setting, prompt.numel()),
        ModelPass("decode", setting | {"new_tokens": new_tokens}, batch_size),
    ]
    return ModelWorkload(passes, run, count_flops)


def _training(models: Mapping[str, Any], settings: ModelBenchSettings) -> ModelWorkload:
    batch_size, length = settings.training_batch_size, settings.training_length
    batch = throughput.random_tokens(models.values(), batch_size, length)

    def run(model: Any) -> tuple[float]:
        return (throughput.training_step_seconds(model, batch),)

    def count_flops(model: Any) -> list[int]:
        return [executed_flops(partial(run, model))]

    setting = {"batch_size": batch_size, "sequence_length": length}
    return ModelWorkload([ModelPass("training", setting, batch.numel())], run, count_flops)


def _timings(
    models: Mapping[str, Any], workload: ModelWorkload, repeats: int, progress: Progress
) -> Iterator[Timing]:
    seconds = run_alternating(models, repeats, workload.run, progress, workload.description)
    peaks = {label: _peak_bytes(model, workload.run) for label, model in models.items()}
    flops = {label: _flops(model, workload) for label, model in models.items()}
    for i, timed in enumerate(workload.passes):
        for label, model in models.items():
            dtype = str(model.dtype).removeprefix("torch.")
            yield Timing(
                setting={"pass": timed.name} | dict(timed.setting) | {"dtype": dtype},
                name=label,
                baseline=next(iter(models)),
                seconds=tuple(run[i] for run in seconds[label]),
                cost=Cost(flops[label][i], _weight_bytes(model)),
                tokens=timed.tokens,
                about={"parameters": sum(p.numel() for p in model.parameters())},
                peak=peaks[label],
            )


def _flops(model: Any, workload: ModelWorkload) -> Sequence[int]:
    """FLOPs of each pass, with the experts as separate linears.

    torch's counter does not know the grouped products by which transformers runs fused experts.
    """
    with unpacked(model):
        return workload.count_flops(model)


def _weight_bytes(model: Any) -> int:
    """Bytes of the parameters that a pass reads whole.

    An embedding is not among them, unless it is the output layer too.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    total: int = sum(parameter.nbytes for parameter in model.parameters())
    return total if tied else total - int(embedding.weight.nbytes)


def _peak_bytes(model: Any, run: Callable[[Any], object]) -> int | None:
    """Bytes of the parameters, plus the rise of memory while `run` runs; None if not measurable."""
    rise = _memory_rise(model.device, partial(run, model))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return None if rise is None else weights + rise


def _memory_rise(device: torch.device, run: Callable[[], object]) -> int | None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - start
    with peak_memory() as memory:
        run()
    return memory.rise


def bench_model_to(
    source: ModelSettings,
    settings: ModelBenchSettings,
    out: Path | None = None,
    progress: Progress = silent,
) -> Bench:
    """Times a model beside its dense baseline; writes the report to `out` if that is a path."""
    if out is not None:
        check_free(out)
    record = record_of(source) or {}
    baseline_name = settings.baseline or record.get("source")
    baselines = [] if baseline_name is None else [with_source(source, baseline_name)]
    loaded = [ModelWithRecord.load(model_source) for model_source in (*baselines, source)]
    names = [entry.source.source for entry in loaded]
    titles = labels([entry.kind for entry in loaded], names)
    models = {title: entry.loaded[0] for title, entry in zip(titles, loaded, strict=True)}
    model = loaded[-1].loaded[0]
    if settings.optimize:
        optimize(model)
    timings = bench_models(models, settings, progress)
    bench = make_bench(f"{source.source}: speed", settings, model.device, timings)
    if out is not None:
        write_bench(out, bench)
    return bench
