"""`bench serve`: a served model and its dense baseline, timed in turn through their API."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import median

from lrcompress.benchmark.serving.api_client import BatchSpeed
from lrcompress.benchmark.serving.engines import ENGINES
from lrcompress.benchmark.serving.served_model import ServedModel, Tokens
from lrcompress.benchmark.serving.servers import ModelToServe, serving
from lrcompress.benchmark.timer import run_alternating
from lrcompress.checkpoint.record import check_writable_checkpoint, read_record, write_served
from lrcompress.config import ServeBenchSettings
from lrcompress.data.corpora import EMBEDDED, read_corpus
from lrcompress.models.loading import locate
from lrcompress.reporting import report
from lrcompress.reporting.metric import Metric
from lrcompress.reporting.report import Report
from lrcompress.reporting.tables import labels
from lrcompress.runtime.atomic_io import writing
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.paths import check_free, user_path
from lrcompress.runtime.progress import Progress, ShowMessage, show_nothing, silent

# field of BatchSpeed -> name of its metric, unit, factor to the unit, and what it is of
METRICS = {
    "first_token": ("time to first token", "ms", 1000, "the median of the requests"),
    "decode": ("decode", "tokens/s", 1, "all requests, once each has its first token"),
    "total": ("total", "tokens/s", 1, "prompts and answers of all requests"),
}
# prompts start so many tokens apart: a prime, so that a text has as many prompts as tokens
PROMPT_DISTANCE = 997
MAX_CHARACTERS = 100_000  # of the text that prompts are taken from
LOGS = "servers"  # folder of a report


def bench_serve_to(
    source: str,
    settings: ServeBenchSettings,
    out: Path | None = None,
    card: bool = False,
    progress: Progress = silent,
    say: ShowMessage = show_nothing,
) -> Report:
    """Measures `source`, served, beside its dense baseline; writes the report to `out`, if given.

    With `card` the numbers are also written to lrcompress.json and README.md of the checkpoint.
    Servers that were started are stopped. Raises InputError where one cannot be started or asked.
    """
    if out is not None:
        check_free(out)
    checkpoint = settings.checkpoint or source
    if card:
        check_writable_checkpoint(checkpoint)
    record = _record(checkpoint)
    name = settings.engine or ("llama.cpp" if source.endswith(".gguf") else "vllm")
    with _log_folder() as logs:
        models = _models(source, settings, record)
        with serving(models, ENGINES[name], settings, logs, say) as served:
            metrics = measure(served, settings, progress)
        evaluation = Report(
            title=f"{source}: served by {name}",
            metrics=tuple(metrics),
            record={key: value for key, value in record.items() if key != "served"},
        )
        if out is not None:
            _write(out, evaluation, logs)
    if card:
        write_served(user_path(checkpoint), name, metrics)
    return evaluation


def _record(checkpoint: str) -> dict[str, object]:
    """lrcompress.json of a checkpoint folder; empty where there is none."""
    folder = user_path(checkpoint)
    return (read_record(folder) if folder.is_dir() else None) or {}


def _models(
    source: str, settings: ServeBenchSettings, record: Mapping[str, object]
) -> list[ModelToServe]:
    """The baseline, if there is one, and the model."""
    models = [ModelToServe(_kind(source, record), source, settings.url)]
    dense = "" if settings.url else settings.baseline or _dense_source(source, record)
    if dense or settings.baseline_url:
        models.insert(0, ModelToServe("dense", dense, settings.baseline_url))
    titles = labels([model.label for model in models], [model.source for model in models])
    return [replace(model, label=title) for model, title in zip(models, titles, strict=True)]


def _dense_source(source: str, record: Mapping[str, object]) -> str:
    """What the checkpoint was made from, where it is in the same format; else empty."""
    dense = str(record.get("source") or "")
    if not dense or (locate(source).gguf_file is None) != (locate(dense).gguf_file is None):
        return ""
    return dense


def _kind(source: str, record: Mapping[str, object]) -> str:
    if not record.get("counts"):
        return Path(source).name
    name = "finetuned" if "finetuned" in record else "factorized"
    return f"quantized {name}" if "quantized" in record else name


def measure(
    models: Sequence[ServedModel], settings: ServeBenchSettings, progress: Progress = silent
) -> list[Metric]:
    """The speeds of every model at every batch size; the models take turns.

    In each round all models get the same prompts, which no earlier round had. Raises InputError
    where the models do not have the same tokenizer.
    """
    text = _text()
    tokens = _common_tokens(models, text, settings.prompt_length)
    prompts = {model.label: _prompts(tokens, settings.prompt_length) for model in models}
    metrics: list[Metric] = []
    for size in settings.batch_sizes:

        def run(model: ServedModel, size: int = size) -> BatchSpeed:
            batch = list(islice(prompts[model.label], size))
            return model.batch_speed(batch, settings.new_tokens)

        by_label = {model.label: model for model in models}
        description = f"Timing {size} at a time"
        speeds = run_alternating(by_label, settings.repeats, run, progress, description)
        for model in models:
            metrics += _metrics(model, speeds[model.label], size, settings)
    return sorted(metrics, key=lambda metric: [m.label for m in models].index(metric.model))


def _text() -> str:
    """Prose that every installation has."""
    return "\n".join(read_corpus(EMBEDDED, "test").documents)[:MAX_CHARACTERS]


def _common_tokens(models: Sequence[ServedModel], text: str, length: int) -> Tokens:
    first, *others = models
    tokens = first.tokenize(text)
    if len(tokens) <= length:
        raise InputError(
            f"--prompt-length {length} is more than the {len(tokens)} tokens of the text that "
            "prompts are taken from: use a shorter one"
        )
    for other in others:
        if other.tokenize(text) != tokens:
            raise InputError(
                f"{first.label} and {other.label} have different tokenizers, so that they cannot "
                "get the same prompts: compare models with one tokenizer"
            )
    return tokens


def _prompts(tokens: Tokens, length: int) -> Iterator[Tokens]:
    """Pieces of `tokens` that start at different places, without end."""
    count, number = len(tokens) - length, 0
    while True:
        start = number * PROMPT_DISTANCE % count
        yield tokens[start : start + length]
        number += 1


def _metrics(
    model: ServedModel, speeds: Sequence[BatchSpeed], size: int, settings: ServeBenchSettings
) -> Iterator[Metric]:
    conditions: dict[str, object] = {
        "engine": model.engine.name,
        "version": model.version,
        "batch_size": size,
        "prompt_length": settings.prompt_length,
        "new_tokens": settings.new_tokens,
        "runs": len(speeds),
    }
    if settings.threads is not None:
        conditions["threads"] = settings.threads
    if settings.arguments:
        conditions["arguments"] = " ".join(settings.arguments)
    for field, (name, unit, factor, of) in METRICS.items():
        rounds = [factor * getattr(speed, field) for speed in speeds]
        yield Metric(
            model=model.label,
            name=f"{name}, batch {size}",
            value=median(rounds),
            unit=unit,
            higher_is_better=unit == "tokens/s",
            conditions={"of": of} | conditions,
            low=min(rounds),
            high=max(rounds),
            rounds=rounds,
        )


@contextmanager
def _log_folder() -> Iterator[Path]:
    """A folder for the logs of servers; it stays only where an error tells the user to look."""
    folder = Path(tempfile.mkdtemp(prefix="lrcompress-servers-"))
    try:
        yield folder
    except InputError:
        with suppress(OSError):  # has logs
            folder.rmdir()
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _write(out: Path, evaluation: Report, logs: Path) -> None:
    with writing(out) as folder:
        report.write(folder, evaluation)
        shutil.copytree(logs, folder / LOGS)
