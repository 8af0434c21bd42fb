"""Timings -> a table, Markdown, JSON, and a plot of speed-ups against what would be ideal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import median

import torch
from matplotlib.figure import Figure

from lrcompress.benchmark.timer import FEW_TOKENS, Speedup, Timing, machine, speedups
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
    """What was timed, by what `settings` and on what `machine`."""

    title: str
    settings: Mapping[str, object]
    machine: Mapping[str, object]
    timings: Sequence[Timing]

    @cached_property
    def speedups(self) -> list[Speedup]:
        return speedups(self.timings)


@dataclass(frozen=True)
class Row:
    """One timing as text; speed-up, ideals and share are empty for a baseline."""

    setting: str
    name: str
    parameters: str
    time: str
    speedup: str = ""
    by_flops: str = ""
    by_bytes: str = ""
    share: str = ""
    peak: str = ""


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


def rows(bench: Bench) -> list[Row]:
    """In the order of the timings."""
    found = {id(one.timing): one for one in bench.speedups}
    return [_row(timing, found.get(id(timing))) for timing in bench.timings]


def columns(shown: Sequence[Row]) -> dict[str, str]:
    """Field -> title of what any row has."""
    return {k: v for k, v in COLUMNS.items() if any(getattr(row, k) for row in shown)}


def _row(timing: Timing, speedup: Speedup | None) -> Row:
    ms = sorted(1000 * second for second in timing.seconds)
    time = f"{median(ms):.4g} ({ms[0]:.4g}–{ms[-1]:.4g})"
    peak = "" if timing.peak is None else f"{timing.peak / 2**20:,.1f}"
    parameters = f"{timing.about['parameters']:,}"
    start = Row(_setting(timing), timing.name, parameters, time, peak=peak)
    if speedup is None:
        return start
    return Row(
        *(start.setting, start.name, start.parameters, start.time),
        f"{speedup.ratio:.2f}x ({speedup.low:.2f}–{speedup.high:.2f})",
        f"{speedup.by_flops:.2f}x",
        f"{speedup.by_bytes:.2f}x",
        f"{speedup.share:.0%}",
        peak,
    )


def _setting(timing: Timing) -> str:
    """Such as "forward, tokens 1,024, bfloat16"."""
    words = []
    for key, value in timing.setting.items():
        shown = f"{value:,}" if isinstance(value, int) else str(value)
        words.append(shown if key in {"pass", "dtype"} else f"{key.replace('_', ' ')} {shown}")
    return ", ".join(words)


def markdown(bench: Bench) -> str:
    shown = rows(bench)
    titles = columns(shown)
    cells = [[getattr(row, field) for field in titles] for row in shown]
    values = {
        "bench": bench,
        "titles": list(titles.values()),
        "cells": cells,
        "few": FEW_TOKENS,
        "plot": FILES[-1],
    }
    return render("bench.md.jinja", escape=False, **values)


def to_json(bench: Bench) -> str:
    ratios = {id(one.timing): one for one in bench.speedups}
    content = {
        "title": bench.title,
        "settings": bench.settings,
        "machine": bench.machine,
        "timings": [_entry(timing, ratios.get(id(timing))) for timing in bench.timings],
    }
    return json.dumps(content, indent=2) + "\n"


def _entry(timing: Timing, speedup: Speedup | None) -> dict[str, object]:
    own = asdict(timing) | {"median": median(timing.seconds)}
    if speedup is None:
        return own
    fields = ("ratio", "low", "high", "by_flops", "by_bytes", "ideal", "share")
    return own | {"speedup": {field: getattr(speedup, field) for field in fields}}


def roofline(bench: Bench) -> Picture | None:
    """Each speed-up against its ideal, with its spread; on the line all of the ideal is reached."""
    if not bench.speedups:
        return None
    text = "Measured speed-ups over dense against the ideal ones: " + "; ".join(
        f"{_setting(one.timing)}, {one.timing.name}: {one.ratio:.2f} of {one.ideal:.2f}"
        for one in bench.speedups
    )
    title = f"{bench.title}: speed-up over dense"
    return draw(ROOFLINE, "speed", title, text, partial(_draw, bench), (7.5, 5.5))


def _draw(bench: Bench, figure: Figure) -> None:
    axes = figure.add_subplot()
    groups: dict[str, list[Speedup]] = {}
    for one in bench.speedups:
        groups.setdefault(_setting(one.timing), []).append(one)
    for setting, group in groups.items():
        spread = [[o.ratio - o.low for o in group], [o.high - o.ratio for o in group]]
        x, y = [one.ideal for one in group], [one.ratio for one in group]
        axes.errorbar(x, y, spread, fmt="o", capsize=2, label=setting)
        for one in group:
            axes.annotate(one.timing.name, (one.ideal, one.ratio), fontsize=6)
    most = 1.05 * max(one.ideal for one in bench.speedups)
    axes.plot([1, most], [1, most], color=INK, linewidth=1, label="ideal")
    axes.axhline(1, color="grey", linewidth=1, linestyle="dashed", label="as fast as dense")
    axes.set(xlabel="ideal speed-up over dense", ylabel="measured speed-up")
    legend(figure)


def write(folder: Path, bench: Bench) -> None:
    """Writes bench.json, bench.md and, where there is a speed-up, its plot into `folder`."""
    replace_text(folder / "bench.json", to_json(bench))
    replace_text(folder / "bench.md", markdown(bench))
    picture = roofline(bench)
    figures.write(folder, [] if picture is None else [picture])


def write_bench(
    title: str,
    settings: Section,
    device: torch.device,
    timings: Sequence[Timing],
    out: Path | None,
) -> Bench:
    asked = settings.model_dump(mode="json")
    found = Bench(title, asked, machine(device) | versions(), timings)
    if out is not None:
        with writing(out) as partial:
            write(partial, found)
    return found
