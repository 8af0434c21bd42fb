"""Speed and memory of a whole model beside its dense baseline: prefill, decode, training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lrcompress.benchmark import throughput
from lrcompress.benchmark.flops import count_operations
from lrcompress.benchmark.report import Bench, write_bench
from lrcompress.benchmark.timer import Cost, Timing, in_turn
from lrcompress.checkpoint.record import ModelWithRecord, record_of
from lrcompress.config import ModelBenchSettings, ModelSettings
from lrcompress.layers.model_state import evaluation_mode
from lrcompress.layers.moe import unpacked
from lrcompress.layers.optimize import optimize
from lrcompress.models.loading import with_source
from lrcompress.reporting.tables import labels
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.memory import peak_memory
from lrcompress.runtime.paths import check_free
from lrcompress.runtime.progress import Progress, silent

Passes = Mapping[str, tuple[Mapping[str, object], int]]  # name -> its setting, rows of its products


def bench_models(
    models: Mapping[str, Any], settings: ModelBenchSettings, progress: Progress = silent
) -> list[Timing]:
    """Times the models in turn, the first of which is the baseline.

    Raises InputError where prompt and new tokens, or the sequences of training, do not fit them.
    """
    _check_lengths(models, settings)
    timings: list[Timing] = []
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(evaluation_mode(model))
        for size in settings.batch_sizes:
            timings += _generation(models, settings, size, progress)
        if settings.training:
            timings += _training(models, settings, progress)
    return timings


def _check_lengths(models: Mapping[str, Any], settings: ModelBenchSettings) -> None:
    limit = min(throughput.position_limits(models), default=None)
    wanted = {
        "--prompt-length and --new-tokens": settings.prompt_length + settings.new_tokens,
        "--training-length": settings.training_length if settings.training else 0,
    }
    for flags, length in wanted.items():
        if limit is not None and length > limit:
            raise InputError(f"{flags}: {length} tokens exceed the model's {limit} positions")


def _generation(
    models: Mapping[str, Any], settings: ModelBenchSettings, size: int, progress: Progress
) -> Iterator[Timing]:
    prompt = _tokens(models, size, settings.prompt_length)
    new = settings.new_tokens
    shape: dict[str, object] = {"batch_size": size, "prompt_length": settings.prompt_length}
    passes = {
        "prefill": (shape, prompt.numel()),
        "decode": (shape | {"new_tokens": new}, size),
    }

    def run(model: Any, count: int = new) -> tuple[float, ...]:
        return throughput.generation(model, prompt, count)

    def flops(model: Any) -> list[int]:
        prefill = count_operations(partial(run, model, 0))
        return [prefill, count_operations(partial(run, model)) - prefill]

    yield from _timed(models, passes, run, flops, settings.repeats, progress)


def _training(
    models: Mapping[str, Any], settings: ModelBenchSettings, progress: Progress
) -> Iterator[Timing]:
    size, length = settings.training_batch_size, settings.training_length
    batch = _tokens(models, size, length)
    shape: dict[str, object] = {"batch_size": size, "sequence_length": length}

    def run(model: Any) -> tuple[float, ...]:
        return (throughput.training_step(model, batch),)

    def flops(model: Any) -> list[int]:
        return [count_operations(partial(run, model))]

    passes = {"training": (shape, batch.numel())}
    yield from _timed(models, passes, run, flops, settings.repeats, progress)


def _tokens(models: Mapping[str, Any], size: int, length: int) -> torch.Tensor:
    vocabulary = min(model.get_input_embeddings().num_embeddings for model in models.values())
    return throughput.random_tokens(vocabulary, size, length)


def _timed(
    models: Mapping[str, Any],
    passes: Passes,
    run: Callable[[Any], tuple[float, ...]],
    flops: Callable[[Any], Sequence[int]],
    repeats: int,
    progress: Progress,
) -> Iterator[Timing]:
    """`run` gives the seconds of each of `passes`, `flops` their operations."""
    setting = ", ".join(
        f"{k.replace('_', ' ')} {v}" for k, v in next(iter(passes.values()))[0].items()
    )
    described = f"Timing {' and '.join(passes)}, {setting}"
    found = in_turn(models, repeats, run, progress, described)
    peaks = {label: _peak(model, run) for label, model in models.items()}
    counts = {label: _of_linears(flops, model) for label, model in models.items()}
    baseline = next(iter(models))
    for i, (name, (shape, rows)) in enumerate(passes.items()):
        for label, model in models.items():
            yield Timing(
                {"pass": name} | dict(shape) | {"dtype": str(model.dtype).removeprefix("torch.")},
                label,
                baseline,
                tuple(seconds[i] for seconds in found[label]),
                Cost(counts[label][i], _weight_bytes(model)),
                rows,
                {"parameters": sum(p.numel() for p in model.parameters())},
                peaks[label],
            )


def _of_linears(flops: Callable[[Any], Sequence[int]], model: Any) -> Sequence[int]:
    """torch's counter knows no grouped products, by which transformers runs fused experts."""
    with unpacked(model):
        return flops(model)


def _weight_bytes(model: Any) -> int:
    """Of the parameters that a pass reads whole: all but an embedding that is not the head too."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    whole: int = sum(parameter.nbytes for parameter in model.parameters())
    return whole if tied else whole - int(embedding.weight.nbytes)


def _peak(model: Any, run: Callable[[Any], object]) -> int | None:
    """Bytes: the model's parameters, and the rise of memory while it runs."""
    with _rise(model.device) as risen:
        run(model)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return None if not risen else weights + risen[0]


@contextmanager
def _rise(device: torch.device) -> Iterator[list[int]]:
    """Fills the list with the bytes, when the block ends, where the machine tells."""
    found: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        yield found
        found.append(torch.cuda.max_memory_allocated(device) - start)
        return
    with peak_memory() as memory:
        yield found
    if memory.rise is not None:
        found.append(memory.rise)


def bench_model_to(
    source: ModelSettings,
    settings: ModelBenchSettings,
    out: Path | None = None,
    progress: Progress = silent,
) -> Bench:
    """Times a model beside its dense baseline; writes the report to `out`, if given."""
    if out is not None:
        check_free(out)
    record = record_of(source) or {}
    dense = settings.baseline or record.get("source")
    others = [] if dense is None else [with_source(source, dense)]
    found = [ModelWithRecord.load(one) for one in (*others, source)]
    names = [column.source.source for column in found]
    titles = labels([column.kind for column in found], names)
    models = {t: column.loaded[0] for t, column in zip(titles, found, strict=True)}
    if settings.optimize:
        optimize(found[-1].loaded[0])
    timings = bench_models(models, settings, progress)
    device = found[-1].loaded[0].device
    return write_bench(f"{source.source}: speed", settings, device, timings, out)
