"""The commands `bench ffn`, `bench model` and `bench serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lrcompress.cli.options import JSON, OUT, WRITE_CARD, SettingsCommand, build_sections


@click.group()
def bench() -> None:
    """Time an FFN, a whole model or a served model against its dense baseline."""


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


SERVE_SECTIONS = ("serve_bench",)


@bench.command("serve", cls=SettingsCommand, sections=SERVE_SECTIONS)
@click.argument("source", metavar="MODEL")
@OUT
@WRITE_CARD
@JSON
def bench_serve_command(
    source: str, out: Path | None, write_card: bool, as_json: bool, **options: Any
) -> None:
    """Time MODEL where it is served: by vLLM or llama.cpp.

    Time to first token, decode and total tokens per second are measured through the HTTP API, in
    turn with the dense baseline. The command starts the servers and stops them again.
    """
    settings = build_sections(SERVE_SECTIONS, options)["serve_bench"]
    from lrcompress.benchmark.serving import bench as serve
    from lrcompress.cli import display, progress_bars

    results = serve.bench_serve_to(
        source, settings, out, write_card, progress_bars.progress, progress_bars.say
    )
    display.show_report(results, out, as_json)
