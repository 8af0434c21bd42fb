"""Prints the results of commands: tables and sentences on stdout."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from lrcompress.benchmark import report as bench_report
from lrcompress.benchmark.report import Bench
from lrcompress.cli.stdout import print_json
from lrcompress.models.inspection import Inspection
from lrcompress.reporting import projection
from lrcompress.reporting.differences import Differences
from lrcompress.reporting.intervals import ROUNDING
from lrcompress.reporting.metric import Metric
from lrcompress.reporting.non_inferiority import EVERY, Failure, Limits
from lrcompress.reporting.report import FORMATS, Report, to_json
from lrcompress.reporting.significance import ALPHA, MIN_SAMPLES, Comparison
from lrcompress.reporting.stage_table import memory_sentence, stage_sentence
from lrcompress.reporting.tables import table as metric_table
from lrcompress.runtime.sanitize import printable
from lrcompress.workflows.sweep import report as sweep_report
from lrcompress.workflows.sweep.report import Grid, SweepReport

MAX_COLUMNS = 100_000  # width of a table that is written to a file


def _print_line(text: str, err: bool = False) -> None:
    """Prints without control characters: names of models and texts come from other people."""
    click.echo(printable(text), err=err)


def show_factorization(record: Mapping[str, Any], out: object) -> None:
    """Forms, ranks, parameter counts and warnings of a new low-rank checkpoint."""
    counts = record["counts"]
    forms = Counter(linear["form"] for linear in record["linears"])
    ranks = [linear["rank"] for linear in record["linears"] if linear["rank"] is not None]
    span = f", ranks {min(ranks)} to {max(ranks)}" if ranks else ""
    kinds = ", ".join(f"{count} {form}" for form, count in sorted(forms.items()))
    _print_line(f"{len(record['linears'])} linears: {kinds}{span}.")
    for key, title in (("ffn", "FFN"), ("model", "Model")):
        count = counts[key]
        if not count["dense"]:
            continue  # the FFNs of this model family are unknown
        _print_line(
            f"{title} parameters: {count['dense']:,} -> {count['kept']:,} "
            f"({100 * count['keep_ratio']:.2f} % kept)"
        )
    for note in record["notes"]:
        _print_line(f"Note: {note}.")
    for costs in filter(None, (stage_sentence(record), memory_sentence(record))):
        _print_line(costs)
    _print_line(f"Wrote {out} ({record['saved']['bytes'] / 1e6:,.1f} MB of weights).")


def show_quantization(record: Mapping[str, Any], out: object) -> None:
    """Sizes before and after quantization, from the record of the new checkpoint."""
    quantized = record["quantized"]
    before, now = quantized["bytes_before"] / 1e6, quantized["bytes"] / 1e6
    click.echo(f"{quantized['linears']} linears now have {quantized['weights']} weights.")
    click.echo(f"Weights in memory: {before:,.1f} MB -> {now:,.1f} MB ({now / before:.1%}).")
    click.echo(f"Wrote {out} ({record['saved']['bytes'] / 1e6:,.1f} MB of weights).")


def show_training(training: Mapping[str, Any], out: object) -> None:
    """Steps, speed and held-out loss of a training, as lrcompress.json records it."""
    rate = training["tokens_per_second"]  # None where a resumed run had no step left
    pace = f" in {training['seconds']:.0f} s ({rate:,.0f} tokens/s)" if rate else ""
    _print_line(
        f"Trained {training['trained_parameters']:,} parameters for {training['steps']} steps, "
        f"{training['tokens']:,} tokens{pace}."
    )
    if (guided := training["guided_share"]) is not None:
        _print_line(f"Dense weights guided {guided:.0%} of the compressed layers at first.")
    _print_line(
        f"Held-out loss: {training['before']:.4f} -> {training['after']:.4f}, of step "
        f"{training['best_step']}."
    )
    _print_line(projection.sentence(training["projection"]))
    _print_line(f"Wrote {out}.")


def show_report(report: Report, out: Path | None, as_json: bool) -> None:
    """Prints metrics, comparisons and details of a report, or only its JSON."""
    if as_json:
        print_json(to_json(report))
        return
    _show_metrics(report.metrics)
    for comparison in report.comparisons:
        interval = f"({comparison.low:+.4f} to {comparison.high:+.4f})"
        _print_line(
            f"{comparison.metric}: {comparison.model} against {comparison.baseline}: "
            f"{comparison.difference:+.4f} {interval}: {comparison.verdict}."
        )
    _show_details(report.details)
    for note in report.sentences:
        _print_line(f"Note: {note}.")
    if out is not None:
        _print_line(f"Wrote {out}: {', '.join(FORMATS)}.")


def show_sweep(report: SweepReport, out: Path | None, as_json: bool) -> None:
    """Prints all points and the knees of the Pareto fronts, or only the JSON of the report."""
    if as_json:
        print_json(sweep_report.to_json(report))
        return
    shares = [f"{point.kept:.4f}" for point in report.points]
    sizes = [report.size(point) for point in report.points]
    _show_grid(report.perplexities, {"kept": shares, "parameters": sizes})
    for grid in (report.tasks, report.speeds):
        if grid.titles:
            _show_grid(grid, {})
    for note in report.sentences:
        _print_line(f"Note: {note}.")
    for front in report.fronts:
        if front.knee:
            _print_line(f"Knee of {front.quality.title}, {front.cost.title}: {front.knee.label}.")
    if out is not None:
        _print_line(f"Wrote {out}: {', '.join(sweep_report.FORMATS)}; {len(report.points)} points.")


def _show_grid(grid: Grid, first_columns: Mapping[str, Sequence[str]]) -> None:
    """A row per point; `first_columns` (title -> cells) stand before the columns of the grid."""
    table = Table(box=None, pad_edge=False)
    table.add_column("point", overflow="fold")
    for title in (*first_columns, *grid.titles):
        table.add_column(printable(title), justify="right")
    for index, (point, cells) in enumerate(grid.rows):
        first_cells = (column[index] for column in first_columns.values())
        table.add_row(*map(printable, (point.label, *first_cells, *cells)))
    _print_table(table)


def _show_metrics(metrics: Sequence[Metric]) -> None:
    """A row per metric; columns for every model and for the ratios of later models to the first."""
    content = metric_table(metrics)
    first, *later = content.labels or ("",)
    table = Table(box=None, pad_edge=False)
    table.add_column("metric", overflow="fold")
    for label in (*content.labels, *(f"{label} / {first}" for label in later)):
        table.add_column(printable(label), justify="right")
    for row in content.rows:
        table.add_row(*map(printable, (row.title, *row.cells, *row.ratios)))
    _print_table(table)


def _show_details(details: Differences) -> None:
    for change in details.tokens:
        _print_line(
            f"{change.data}: {change.model} against {change.baseline}: divergence "
            f"{change.divergence:.4f} nats per token, the same most likely token "
            f"{change.agreement:.1%} of the time."
        )
    for block in details.blocks:
        largest, count = block.errors[block.worst], len(block.errors)
        _print_line(
            f"{block.model}: changed most in block {block.worst}, by {largest:.3g} of what it "
            f"computes (median of {count} blocks {block.median:.3g})."
        )
    for continuation in details.continuations:
        _print_line(f"{continuation.prompt!r}")
        for label, text in continuation.texts.items():
            _print_line(f"  {label}: {text!r}")


def show_verdict(
    metrics: Sequence[Metric], failed: Sequence[Failure], limits: Limits, err: bool = False
) -> None:
    """Says whether every loss of the last model in `metrics` is shown to be within `limits`.

    Lists the `failed` ones. With `err` it goes to stderr, so that stdout stays JSON.
    """
    for failure in failed:
        _print_line(f"{_failure_text(failure.comparison)}.", err=err)
    verdict = "FAIL: it is not" if failed else "PASS: it is"
    _print_line(
        f"{verdict} shown that {metrics[-1].model} lost at most {_limits_text(limits)}, against "
        f"{metrics[0].model}.",
        err=err,
    )


def _failure_text(comparison: Comparison) -> str:
    """Why a loss is not shown to be small: what it may be, or that there are too few samples."""
    subject = f"{comparison.metric}: {comparison.model}"
    if comparison.samples < MIN_SAMPLES:
        return f"{subject} has {comparison.samples} windows or items, and {MIN_SAMPLES} are needed"
    text = f"{subject} may have lost {comparison.worst:.2%}, by the 95 % interval of this row alone"
    if comparison.confidence - (1 - ALPHA) < ROUNDING:
        return text
    confidence = f"{100 * comparison.confidence:.4g} %"
    return f"{text} (the interval above has {confidence}: it is adjusted for all rows)"


def _limits_text(limits: Limits) -> str:
    everywhere = "elsewhere" if len(limits) > 1 else "in every metric compared"
    named = {name: limit for name, limit in limits.items() if name != EVERY}
    places = {f"in {name}": limit for name, limit in named.items()}
    places |= {everywhere: limits[EVERY]} if EVERY in limits else {}
    return ", ".join(f"{100 * limit:.6g} % {place}" for place, limit in places.items())


def show_bench(results: Bench, out: Path | None, as_json: bool) -> None:
    """Prints a table of timings, or only their JSON."""
    if as_json:
        print_json(bench_report.to_json(results))
        return
    _print_line(results.title)
    rows = bench_report.rows(results)
    titles = bench_report.columns(rows)
    table = Table(box=None, pad_edge=False)
    for field, title in titles.items():
        table.add_column(title, justify="left" if field in {"setting", "name"} else "right")
    for row in rows:
        table.add_row(*(printable(getattr(row, field)) for field in titles))
    _print_table(table)
    if out is not None:
        _print_line(f"Wrote {out}: {', '.join(bench_report.FILES)}.")


def show_inspection(inspection: Inspection) -> None:
    """A row per FFN linear, and the totals of the model."""
    table = Table(box=None, pad_edge=False)
    has_energy = any(row.energy_ranks for row in inspection.rows)
    titles = ("module", "shape", "parameters", "share", "break-even", "rank")
    for title in titles + (("rank for 90 %", "rank for 99 %") if has_energy else ()):
        table.add_column(title, justify="left" if title == "module" else "right", no_wrap=True)
    for row in inspection.rows:
        table.add_row(
            row.name,
            f"{row.shape[0]} x {row.shape[1]}",
            f"{row.parameters:,}",
            f"{100 * row.share:.2f} %",
            f"{row.break_even_rank:.0f}",
            str(row.rank or "dense"),
            *(str(rank) for rank in row.energy_ranks or ()),
        )
    _print_table(table)
    share = 100 * inspection.ffn_parameters / inspection.parameters
    _print_line(
        f"{inspection.model_type}: {inspection.parameters:,} parameters, "
        f"{inspection.ffn_parameters:,} of them ({share:.1f} %) in {len(inspection.rows)} FFN "
        "linears."
    )
    if experts := inspection.experts:
        _print_line(f"Left dense: {len(experts)} expert tensors, such as {experts[0]}.")


def _print_table(table: Table) -> None:
    """Prints a table; where stdout is not a terminal, as wide as needed, so that nothing is cut.
    Brackets in labels are text, not rich's markup."""
    is_terminal = sys.stdout.isatty()
    console = Console(markup=False, width=None if is_terminal else MAX_COLUMNS)
    if not is_terminal:
        console.width = console.measure(table).maximum
    console.print(table)
