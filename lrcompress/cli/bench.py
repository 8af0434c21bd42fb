"""The commands `bench ffn` and `bench model`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lrcompress.cli.options import JSON, OUT, SettingsCommand, build_sections


@click.group()
def bench() -> None:
    """Time an FFN or a whole model against its dense baseline."""


FFN_SECTIONS = ("ffn_bench",)


@bench.command("ffn", cls=SettingsCommand, sections=FFN_SECTIONS)
@OUT
@JSON
def bench_ffn_command(out: Path | None, as_json: bool, **options: Any) -> None:
    """Time one FFN with random weights, dense and compressed.

    The measured speed-up is shown beside the ideal one, by operations and by bytes read.
    """
    settings = build_sections(FFN_SECTIONS, options)["ffn_bench"]
    from lrcompress.benchmark import ffn
    from lrcompress.cli import display, progress_bars

    results = ffn.bench_ffn_to(settings, out, progress_bars.progress)
    display.show_bench(results, out, as_json)


MODEL_SECTIONS = ("model_bench", "model")


@bench.command("model", cls=SettingsCommand, sections=MODEL_SECTIONS)
@click.argument("source", metavar="MODEL")
@OUT
@JSON
def bench_model_command(source: str, out: Path | None, as_json: bool, **options: Any) -> None:
    """Time prefill, decode and a training step of MODEL.

    Each is timed in alternation with the dense baseline, and peak memory is measured.
    """
    checked = build_sections(MODEL_SECTIONS, options, source=source)
    from lrcompress.benchmark import model
    from lrcompress.cli import display, progress_bars

    results = model.bench_model_to(
        checked["model"], checked["model_bench"], out, progress_bars.progress
    )
    display.show_bench(results, out, as_json)
