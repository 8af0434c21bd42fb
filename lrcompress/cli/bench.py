"""The commands `bench ffn` and `bench model`: parse, call one function, print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lrcompress.cli.options import JSON, OUT, SettingsCommand, build_sections


@click.group()
def bench() -> None:
    """Time an FFN alone, or a whole model, in turn with its dense baseline."""


FFN_BENCH = ("ffn_bench",)


@bench.command("ffn", cls=SettingsCommand, sections=FFN_BENCH)
@OUT
@JSON
def bench_ffn_command(out: Path | None, as_json: bool, **options: Any) -> None:
    """Time one FFN with random weights, dense against compressed, beside the ideal speed-up."""
    settings = build_sections(FFN_BENCH, options)["ffn_bench"]
    from lrcompress.benchmark import ffn
    from lrcompress.cli import display, progress_bars

    display.show_bench(ffn.bench_ffn_to(settings, out, progress_bars.progress), out, as_json)


MODEL_BENCH = ("model_bench", "model")


@bench.command("model", cls=SettingsCommand, sections=MODEL_BENCH)
@click.argument("source", metavar="MODEL")
@OUT
@JSON
def bench_model_command(source: str, out: Path | None, as_json: bool, **options: Any) -> None:
    """Time MODEL: prefill, decode and a training step, with peak memory, beside its baseline."""
    given = build_sections(MODEL_BENCH, options, source=source)
    from lrcompress.benchmark import model
    from lrcompress.cli import display, progress_bars

    found = model.bench_model_to(given["model"], given["model_bench"], out, progress_bars.progress)
    display.show_bench(found, out, as_json)
