"""The pictures of one evaluation: tasks, tokens, blocks, ranks, spectra, refinement, training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lrcompress.reporting.differences import BlockChange, Differences, TokenChange
from lrcompress.reporting.figures import COLOURS, INK, Picture, draw, legend, plain_logarithms
from lrcompress.reporting.metric import Metric
from lrcompress.reporting.provenance import TRAININGS
from lrcompress.runtime.paths import unique_file_names

NORMAL_95 = 1.96
# linears that are told apart by their role, in the order of the forward pass
ROLES = ("gate", "up", "gate_up", "down")

Linears = Sequence[Mapping[str, Any]]


def pictures(
    metrics: Sequence[Metric], details: Differences, record: Mapping[str, Any]
) -> Iterator[Picture]:
    """Those for which there are numbers. `record` is the lrcompress.json of the last model."""
    if scores := [metric for metric in metrics if _is_score(metric)]:
        yield _tasks(scores)
    names = unique_file_names(change.data for change in details.tokens)
    for data, name in names.items():
        changes = [change for change in details.tokens if change.data == data]
        yield _positions("positions" + (f"-{name}" if len(names) > 1 else ""), changes)
    if details.blocks:
        yield _blocks(details.blocks)
    if refined := record.get("refined"):
        yield _refined(refined)
    if linears := record.get("linears"):
        yield _ranks(linears)
        if decomposed := [linear for linear in linears if _has_spectrum(linear)]:
            yield _spectra(decomposed)
    for done in (record[key] for key in TRAININGS if record.get(key)):
        measured = [(step, loss) for step, loss in done.get("losses", ()) if loss is not None]
        if len(measured) > 1:
            yield _training(measured, done["best_step"])
            break  # of the latest


def _is_score(metric: Metric) -> bool:
    of_task = "task_version" in metric.conditions and metric.low is not None
    return of_task and metric.higher_is_better and 0 <= metric.value <= 1


def _tasks(scores: Sequence[Metric]) -> Picture:
    models = list(dict.fromkeys(score.model for score in scores))
    names = list(dict.fromkeys(score.name for score in scores))
    found = {(score.name, score.model): score for score in scores}
    text = "; ".join(
        f"{name}: "
        + ", ".join(f"{m} {found[name, m].value:.3f}" for m in models if (name, m) in found)
        for name in names
    )
    onto = partial(_draw_tasks, models, names, found)
    size = (7.5, 1.0 + 0.24 * len(names) * (len(models) + 0.6))
    title = "Tasks, with 95 % intervals of each score alone"
    return draw("tasks", "metrics", title, f"Scores of tasks. {text}.", onto, size)


def _draw_tasks(
    models: Sequence[str],
    names: Sequence[str],
    found: Mapping[tuple[str, str], Metric],
    figure: Figure,
) -> None:
    axes = figure.subplots()
    high = 1 / (len(models) + 0.6)
    for index, model in enumerate(models):
        rows = [
            (row, found[name, model]) for row, name in enumerate(names) if (name, model) in found
        ]
        places = [row + (index - (len(models) - 1) / 2) * high for row, _ in rows]
        spread = [NORMAL_95 * (score.value - (score.low or 0.0)) for _, score in rows]
        values, colour = [score.value for _, score in rows], COLOURS[index % len(COLOURS)]
        axes.barh(places, values, high, xerr=spread, label=model, color=colour, ecolor=INK)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlim(0, 1)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    legend(figure)


def _positions(name: str, changes: Sequence[TokenChange]) -> Picture:
    first = changes[0]
    words = "; ".join(
        f"{change.model} {change.positions[0].ratio:.3g}x after few tokens, "
        f"{change.positions[-1].ratio:.3g}x after many"
        for change in changes
        if change.positions
    )
    title = f"Perplexity by tokens of context, {first.data}"
    text = f"{title}, over {first.baseline}: {words}."
    return draw(name, "tokens", title, text, partial(_draw_positions, changes))


def _draw_positions(changes: Sequence[TokenChange], figure: Figure) -> None:
    axes = figure.subplots()
    lines = {changes[0].baseline: [p.baseline_perplexity for p in changes[0].positions]}
    lines |= {change.model: [p.perplexity for p in change.positions] for change in changes}
    ends = [p.last for p in changes[0].positions]
    for label, values in lines.items():
        axes.plot(ends, values, marker="o", markersize=4, label=label)
    axes.set(xscale="log", yscale="log", xlabel="tokens of context, up to", ylabel="perplexity")
    axes.set_xticks(ends, [str(end) for end in ends])
    axes.minorticks_off()
    plain_logarithms(axes.yaxis)
    legend(figure)


def _blocks(changes: Sequence[BlockChange]) -> Picture:
    words = "; ".join(
        f"{c.model}: most in block {c.worst}, {c.errors[c.worst]:.3g}, median {c.median:.3g}"
        for c in changes
    )
    title = f"Error of each block, given what the same block of {changes[0].baseline} is given"
    lines = {change.model: list(change.errors) for change in changes}
    onto = partial(_draw_by_block, range(len(changes[0].errors)), lines, "squared error, relative")
    return draw("blocks", "blocks", title, f"{title}. {words}.", onto)


def _refined(blocks: Sequence[Mapping[str, Any]]) -> Picture:
    lines = {key: [block[key] for block in blocks] for key in ("before", "after")}
    gained = sum(block["after"] < block["before"] for block in blocks)
    title = "Held-out loss of each block before and after refinement"
    text = f"{title}: lower after it in {gained} of {len(blocks)} blocks."
    numbers = [block["block"] for block in blocks]
    return draw(
        "refined", "refinement", title, text, partial(_draw_by_block, numbers, lines, "loss")
    )


def _draw_by_block(
    blocks: Sequence[int], lines: Mapping[str, Sequence[float]], ylabel: str, figure: Figure
) -> None:
    axes = figure.subplots()
    for label, values in lines.items():
        axes.plot(blocks, values, marker="o", markersize=4, label=label)
    if all(value > 0 for values in lines.values() for value in values):
        axes.set_yscale("log")
        plain_logarithms(axes.yaxis)
    axes.set(xlabel="block", ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(figure)


def _ranks(linears: Linears) -> Picture:
    roles = [role for role in ROLES if any(linear["role"] == role for linear in linears)]
    changed = [linear["rank"] for linear in linears if linear["rank"] is not None]
    span = f"ranks {min(changed)} to {max(changed)}" if changed else "no linear has a lower rank"
    energies = [1 - (linear["relative_error"] or 0.0) for linear in linears]
    title = "Rank, and energy kept, by block and role"
    text = f"{title}: {span}; energy kept {min(energies):.4f} to {max(energies):.4f}."
    size = (7.5, 1.6 + 0.7 * len(roles))
    return draw("ranks", "ranks", title, text, partial(_draw_ranks, linears, roles), size)


def _draw_ranks(linears: Linears, roles: Sequence[str], figure: Figure) -> None:
    panels: dict[str, Any] = {
        "rank": lambda linear: linear["rank"] or min(linear["shape"]),
        "energy kept": lambda linear: 1 - (linear["relative_error"] or 0.0),
    }
    for axes, (title, value) in zip(figure.subplots(2, sharex=True), panels.items(), strict=True):
        shown = axes.imshow(_grid(linears, roles, value), aspect="auto", interpolation="none")
        axes.set_yticks(range(len(roles)), roles)
        axes.set_title(title, loc="left")
        axes.grid(visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(shown, ax=axes, pad=0.01).outline.set_visible(False)
    axes.set_xlabel("block")


def _grid(linears: Linears, roles: Sequence[str], value: Any) -> Any:
    """(roles, blocks); the mean of several linears in one place, NaN for none."""
    places: dict[tuple[str, int], list[float]] = {}
    for linear in linears:
        places.setdefault((linear["role"], linear["block"]), []).append(value(linear))
    blocks = range(max(linear["block"] for linear in linears) + 1)
    found = [[places.get((role, block), [np.nan]) for block in blocks] for role in roles]
    return np.array([[np.mean(cell) for cell in row] for row in found])


def _has_spectrum(linear: Mapping[str, Any]) -> bool:
    values = linear.get("spectrum") or [[1, 0.0]]
    return float(values[0][1]) > 0 and linear["rank"] is not None


def _spectra(linears: Linears) -> Picture:
    roles = [role for role in ROLES if any(linear["role"] == role for linear in linears)]
    title = (
        "Singular values in the metric of the method, over the largest; dots: where they are cut"
    )
    text = f"{title}. {len(linears)} linears of the roles {', '.join(roles)}."
    onto = partial(_draw_spectra, linears, roles)
    return draw("spectra", "ranks", title, text, onto)


def _draw_spectra(linears: Linears, roles: Sequence[str], figure: Figure) -> None:
    last = max(linear["block"] for linear in linears)
    panels = figure.subplots(1, len(roles), sharey=True, squeeze=False)[0]
    for axes, role in zip(panels, roles, strict=True):
        for linear in (linear for linear in linears if linear["role"] == role):
            ranks, values = np.array(linear["spectrum"]).T
            colour = colormaps["viridis"](linear["block"] / max(last, 1))
            axes.plot(ranks, values / values[0], color=colour, linewidth=0.8)
            cut = np.interp(linear["rank"], ranks, values / values[0])
            axes.plot(linear["rank"], cut, "o", color=colour, markersize=3)
        axes.set(xlabel="rank", yscale="log")
        plain_logarithms(axes.yaxis)
        axes.set_title(role, loc="left")
    blocks = ScalarMappable(Normalize(0, last), "viridis")
    figure.colorbar(blocks, ax=panels, label="block", pad=0.01).outline.set_visible(False)


def _training(losses: Sequence[Sequence[float]], best: int) -> Picture:
    title = "Held-out loss while training, nats per token"
    start, end = losses[0][1], min(loss for _, loss in losses)
    text = f"{title}: from {start:.4f} to {end:.4f}, the best at step {best}."
    return draw("training", "training", title, text, partial(_draw_training, losses, best))


def _draw_training(losses: Sequence[Sequence[float]], best: int, figure: Figure) -> None:
    axes = figure.subplots()
    axes.plot(*zip(*losses, strict=True), marker="o", markersize=4)
    axes.axvline(best, color=INK, linestyle=":", label=f"best: step {best}")
    axes.set(xlabel="step", ylabel="loss")
    legend(figure)
