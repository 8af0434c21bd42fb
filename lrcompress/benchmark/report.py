"""The report of a benchmark: a table, Markdown, JSON, and a plot of speed-ups and their ideals."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import median

import torch
from matplotlib.figure import Figure

from lrcompress.benchmark.timer import (
    MEMORY_BOUND_TOKENS,
    Speedup,
    Timing,
    describe_machine,
    speedups,
)
from lrcompress.config import Section
from lrcompress.reporting import figures
from lrcompress.reporting.figures import INK, Picture, draw, legend
from lrcompress.reporting.render import render
from lrcompress.runtime.atomic_io import replace_text, writing
from lrcompress.runtime.packages import versions

ROOFLINE = "roofline"
FILES = ("bench.json", "bench.md", f"{figures.FOLDER}/{ROOFLINE}.svg")


@dataclass(frozen=True)
class Bench:
    """The timings of a benchmark, with its `settings`, and the `machine` and package versions."""

    title: str
    settings: Mapping[str, object]
    machine: Mapping[str, object]
    timings: Sequence[Timing]

    @cached_property
    def speedups(self) -> list[Speedup]:
        """Of the timings that are not baselines."""
        return speedups(self.timings)

    @cached_property
    def timings_and_speedups(self) -> list[tuple[Timing, Speedup | None]]:
        """Every timing; baselines have no speed-up."""
        by_timing = {id(speedup.timing): speedup for speedup in self.speedups}
        return [(timing, by_timing.get(id(timing))) for timing in self.timings]


@dataclass(frozen=True)
class BenchRow:
    """One timing as text; the speed-up and what belongs to it are empty for a baseline."""

    setting: str
    name: str
    parameters: str
    time: str
    speedup: str = ""
    by_flops: str = ""
    by_bytes: str = ""
    share: str = ""
    peak: str = ""


# field of BenchRow -> title of its column
COLUMNS = {
    "setting": "setting",
    "name": "model",
    "parameters": "parameters",
    "time": "ms a pass",
    "speedup": "speed-up",
    "by_flops": "ideal by FLOPs",
    "by_bytes": "ideal by bytes",
    "share": "of ideal",
    "peak": "peak MiB",
}


def rows(bench: Bench) -> list[BenchRow]:
    """One row for each timing, in their order."""
    return [_row(timing, speedup) for timing, speedup in bench.timings_and_speedups]


def columns(rows: Sequence[BenchRow]) -> dict[str, str]:
    """Field -> title of the columns that are not empty in all rows."""
    return {
        field: title for field, title in COLUMNS.items() if any(getattr(row, field) for row in rows)
    }


def _row(timing: Timing, speedup: Speedup | None) -> BenchRow:
    ms = sorted(1000 * second for second in timing.seconds)
    row = BenchRow(
        setting=_setting(timing),
        name=timing.name,
        parameters=f"{timing.about['parameters']:,}",
        time=f"{median(ms):.4g} ({ms[0]:.4g}–{ms[-1]:.4g})",
        peak="" if timing.peak is None else f"{timing.peak / 2**20:,.1f}",
    )
    if speedup is None:
        return row
    return replace(
        row,
        speedup=f"{speedup.ratio:.2f}x ({speedup.low:.2f}–{speedup.high:.2f})",
        by_flops=f"{speedup.by_flops:.2f}x",
        by_bytes=f"{speedup.by_bytes:.2f}x",
        share=f"{speedup.share:.0%}",
    )


def _setting(timing: Timing) -> str:
    """Such as "forward, tokens 1,024, bfloat16"."""
    words = []
    for key, value in timing.setting.items():
        text = f"{value:,}" if isinstance(value, int) else str(value)
        words.append(text if key in {"pass", "dtype"} else f"{key.replace('_', ' ')} {text}")
    return ", ".join(words)


def markdown(bench: Bench) -> str:
    table = rows(bench)
    titles = columns(table)
    return render(
        "bench.md.jinja",
        escape=False,
        bench=bench,
        titles=list(titles.values()),
        cells=[[getattr(row, field) for field in titles] for row in table],
        few=MEMORY_BOUND_TOKENS,
        plot=FILES[-1],
    )


def to_json(bench: Bench) -> str:
    content = {
        "title": bench.title,
        "settings": bench.settings,
        "machine": bench.machine,
        "timings": [_json_entry(*pair) for pair in bench.timings_and_speedups],
    }
    return json.dumps(content, indent=2) + "\n"


def _json_entry(timing: Timing, speedup: Speedup | None) -> dict[str, object]:
    entry = asdict(timing) | {"median": median(timing.seconds)}
    if speedup is None:
        return entry
    fields = ("ratio", "low", "high", "by_flops", "by_bytes", "ideal", "share")
    return entry | {"speedup": {field: getattr(speedup, field) for field in fields}}


def roofline(bench: Bench) -> Picture | None:
    """Each speed-up with its spread, against the ideal one; None without a speed-up.

    A point on the diagonal reaches its ideal.
    """
    if not bench.speedups:
        return None
    alternative_text = "Measured speed-ups over dense against the ideal ones: " + "; ".join(
        f"{_setting(speedup.timing)}, {speedup.timing.name}: {speedup.ratio:.2f} of "
        f"{speedup.ideal:.2f}"
        for speedup in bench.speedups
    )
    title = f"{bench.title}: speed-up over dense"
    return draw(ROOFLINE, "speed", title, alternative_text, partial(_draw, bench), (7.5, 5.5))


def _draw(bench: Bench, figure: Figure) -> None:
    axes = figure.add_subplot()
    by_setting: dict[str, list[Speedup]] = {}
    for speedup in bench.speedups:
        by_setting.setdefault(_setting(speedup.timing), []).append(speedup)
    for setting, group in by_setting.items():
        ideals, ratios = [s.ideal for s in group], [s.ratio for s in group]
        spread = [[s.ratio - s.low for s in group], [s.high - s.ratio for s in group]]
        axes.errorbar(ideals, ratios, spread, fmt="o", capsize=2, label=setting)
        for speedup in group:
            axes.annotate(speedup.timing.name, (speedup.ideal, speedup.ratio), fontsize=6)
    end = 1.05 * max(speedup.ideal for speedup in bench.speedups)
    axes.plot([1, end], [1, end], color=INK, linewidth=1, label="ideal")
    axes.axhline(1, color="grey", linewidth=1, linestyle="dashed", label="as fast as dense")
    axes.set(xlabel="ideal speed-up over dense", ylabel="measured speed-up")
    legend(figure)


def make_bench(
    title: str, settings: Section, device: torch.device, timings: Sequence[Timing]
) -> Bench:
    machine = describe_machine(device) | versions()
    return Bench(title, settings.model_dump(mode="json"), machine, timings)


def write_bench(folder: Path, bench: Bench) -> None:
    """Writes bench.json, bench.md and, if there is a speed-up, its plot to the new `folder`."""
    picture = roofline(bench)
    with writing(folder) as unfinished:
        replace_text(unfinished / "bench.json", to_json(bench))
        replace_text(unfinished / "bench.md", markdown(bench))
        figures.write(unfinished, [] if picture is None else [picture])
