"""What the command line shows: progress on stderr, tables and sentences on stdout."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.table import Table

from lrcompress.benchmark import report as bench_report
from lrcompress.benchmark.report import Bench
from lrcompress.models.inspection import Inspection
from lrcompress.reporting.differences import Differences
from lrcompress.reporting.report import FORMATS, Report, to_json
from lrcompress.reporting.significance import Comparison
from lrcompress.reporting.tables import table as report_table
from lrcompress.runtime.sanitize import printable
from lrcompress.workflows.sweep import report as sweep_report
from lrcompress.workflows.sweep.report import Grid, SweepReport

T = TypeVar("T")

# columns of a table in a file, at most
WIDEST = 100_000


def _line(text: str, err: bool = False) -> None:
    """Names of models and texts are in it, which may come from others."""
    click.echo(printable(text), err=err)


def show_factorization(record: Mapping[str, Any], out: object) -> None:
    counts = record["counts"]
    forms = Counter(linear["form"] for linear in record["linears"])
    ranks = [linear["rank"] for linear in record["linears"] if linear["rank"] is not None]
    span = f", ranks {min(ranks)} to {max(ranks)}" if ranks else ""
    kinds = ", ".join(f"{count} {form}" for form, count in sorted(forms.items()))
    _line(f"{len(record['linears'])} linears: {kinds}{span}.")
    for name, title in (("ffn", "FFN"), ("model", "Model")):
        count = counts[name]
        if not count["dense"]:
            continue  # a family whose FFNs are not known
        _line(
            f"{title} parameters: {count['dense']:,} -> {count['kept']:,} "
            f"({100 * count['keep_ratio']:.2f} % kept)"
        )
    for note in record["notes"]:
        _line(f"Note: {note}.")
    _line(f"Wrote {out} ({record['saved']['bytes'] / 1e6:,.1f} MB of weights).")


def show_quantization(record: Mapping[str, Any], out: object) -> None:
    done = record["quantized"]
    before, now = done["bytes_before"] / 1e6, done["bytes"] / 1e6
    click.echo(f"{done['linears']} linears now have {done['weights']} weights.")
    click.echo(f"Weights in memory: {before:,.1f} MB -> {now:,.1f} MB ({now / before:.1%}).")
    click.echo(f"Wrote {out} ({record['saved']['bytes'] / 1e6:,.1f} MB of weights).")


def show_recovery(done: Mapping[str, Any], out: object) -> None:
    rate = done["tokens_per_second"]  # none where a run that goes on had no step left
    pace = f" in {done['seconds']:.0f} s ({rate:,.0f} tokens/s)" if rate else ""
    _line(
        f"Trained {done['trained_parameters']:,} parameters for {done['steps']} steps, "
        f"{done['tokens']:,} tokens{pace}."
    )
    if (guided := done["guided_share"]) is not None:
        _line(f"Dense weights guided {guided:.0%} of the compressed layers at first.")
    _line(
        f"Held-out loss: {done['before']:.4f} -> {done['after']:.4f}, of step {done['best_step']}."
    )
    _line(f"Wrote {out}.")


def show_report(found: Report, out: Path | None, as_json: bool) -> None:
    """The metrics beside each other, what they mean, and where the report is."""
    if as_json:
        click.echo(to_json(found), nl=False)
        return
    _show_metrics(found)
    for one in found.comparisons:
        span = f"{one.difference:+.4f} ({one.low:+.4f} to {one.high:+.4f})"
        _line(f"{one.metric}: {one.model} against {one.baseline}: {span}: {one.verdict}.")
    _show_details(found.details)
    for note in found.notes:
        _line(f"Note: {note}.")
    if out is not None:
        _line(f"Wrote {out}: {', '.join(FORMATS)}.")


def show_sweep(found: SweepReport, out: Path | None, as_json: bool) -> None:
    """Every point, the knees of its fronts, and where the report is; or its JSON alone."""
    if as_json:
        click.echo(sweep_report.to_json(found), nl=False)
        return
    kept = [f"{point.kept:.4f}" for point in found.points]
    sizes = [found.size(point) for point in found.points]
    _show_grid(found.perplexities, {"kept": kept, "parameters": sizes})
    for grid in (found.tasks, found.speeds):
        if grid.titles:
            _show_grid(grid, {})
    for front in found.fronts:
        if front.knee:
            _line(f"Knee of {front.quality.title}, {front.cost.title}: {front.knee.label}.")
    if out is not None:
        _line(f"Wrote {out}: {', '.join(sweep_report.FORMATS)}; {len(found.points)} points.")


def _show_grid(grid: Grid, first: Mapping[str, Sequence[str]]) -> None:
    """A point a row; `first` are columns before those of the grid."""
    shown = Table(box=None, pad_edge=False)
    shown.add_column("point", overflow="fold")
    for title in (*first, *grid.titles):
        shown.add_column(printable(title), justify="right")
    for index, (point, cells) in enumerate(grid.rows):
        sizes = (column[index] for column in first.values())
        shown.add_row(*map(printable, (point.label, *sizes, *cells)))
    _print(shown)


def _show_metrics(found: Report) -> None:
    rows = report_table(found.metrics)
    shown = Table(box=None, pad_edge=False)
    shown.add_column("metric", overflow="fold")
    for label in (*rows.labels, *(f"{label} / {rows.labels[0]}" for label in rows.labels[1:])):
        shown.add_column(printable(label), justify="right")
    for row in rows.rows:
        shown.add_row(*map(printable, (row.title, *row.cells, *row.ratios)))
    _print(shown)


def _show_details(details: Differences) -> None:
    for change in details.tokens:
        _line(
            f"{change.data}: {change.model} against {change.baseline}: divergence "
            f"{change.divergence:.4f} nats per token, the same likeliest token "
            f"{change.agreement:.1%} of the time."
        )
    for block in details.blocks:
        largest, count = block.errors[block.worst], len(block.errors)
        _line(
            f"{block.model}: changed most in block {block.worst}, by {largest:.3g} of what it "
            f"computes (median of {count} blocks {block.median:.3g})."
        )
    for continued in details.continuations:
        _line(f"{continued.prompt!r}")
        for label, text in continued.texts.items():
            _line(f"  {label}: {text!r}")


def show_verdict(failed: Sequence[Comparison], max_loss: float, err: bool = False) -> None:
    """Whether the loss is shown to be within `max_loss`, and where it is not.

    To stderr with `err`, where stdout is to be read by a program.
    """
    for one in failed:
        _line(f"{one.metric}: may have lost {one.worst:.2%} (95 % interval).", err=err)
    held = "FAIL: not every metric compared is" if failed else "PASS: every metric compared is"
    _line(f"{held} shown to have lost at most {max_loss:.3g}.", err=err)


def show_bench(found: Bench, out: Path | None, as_json: bool) -> None:
    if as_json:
        click.echo(bench_report.to_json(found), nl=False)
        return
    _line(found.title)
    rows = bench_report.rows(found)
    titles = bench_report.columns(rows)
    shown = Table(box=None, pad_edge=False)
    for field, name in titles.items():
        shown.add_column(name, justify="left" if field in {"setting", "name"} else "right")
    for row in rows:
        shown.add_row(*(printable(getattr(row, field)) for field in titles))
    _print(shown)
    if out is not None:
        _line(f"Wrote {out}: {', '.join(bench_report.FILES)}.")


def show_inspection(found: Inspection) -> None:
    shown = Table(box=None, pad_edge=False)
    energy = any(row.energy_ranks for row in found.rows)
    names = ("module", "shape", "parameters", "share", "break-even", "rank")
    for name in names + (("rank for 90 %", "rank for 99 %") if energy else ()):
        shown.add_column(name, justify="left" if name == "module" else "right", no_wrap=True)
    for row in found.rows:
        shown.add_row(
            row.name,
            f"{row.shape[0]} x {row.shape[1]}",
            f"{row.parameters:,}",
            f"{100 * row.share:.2f} %",
            f"{row.break_even_rank:.0f}",
            str(row.rank or "dense"),
            *(str(rank) for rank in row.energy_ranks or ()),
        )
    _print(shown)
    share = 100 * found.ffn_parameters / found.parameters
    _line(
        f"{found.model_type}: {found.parameters:,} parameters, {found.ffn_parameters:,} of them "
        f"({share:.1f} %) in {len(found.rows)} FFN linears."
    )
    if found.experts:
        _line(f"Left dense: {len(found.experts)} expert tensors, such as {found.experts[0]}.")


def _print(shown: Table) -> None:
    """As wide as needed where stdout is no terminal, so that nothing is cut in a file. Labels are
    text, whatever brackets they have."""
    console = Console(markup=False, width=None if sys.stdout.isatty() else WIDEST)
    if not sys.stdout.isatty():
        console.width = console.measure(shown).maximum
    console.print(shown)
