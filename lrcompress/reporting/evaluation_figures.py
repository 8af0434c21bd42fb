"""The pictures of one evaluation, from its tasks and tokens to calibration and training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lrcompress.reporting.block_calibration import BlockCalibration, by_block
from lrcompress.reporting.differences import BlockChange, Differences, TokenChange
from lrcompress.reporting.figures import (
    COLOURS,
    INK,
    WIDTH,
    Picture,
    draw,
    legend,
    plain_log_ticks,
)
from lrcompress.reporting.intervals import CONFIDENCE, normal_quantile, score_interval
from lrcompress.reporting.metric import Metric, title
from lrcompress.reporting.provenance import TRAININGS
from lrcompress.reporting.task_groups import places
from lrcompress.runtime.paths import unique_file_names

# panels and rows of figures, in the order of the forward pass
ROLES = ("gate", "up", "gate_up", "down")

Linears = Sequence[Mapping[str, Any]]


def pictures(
    metrics: Sequence[Metric], details: Differences, record: Mapping[str, Any]
) -> Iterator[Picture]:
    """Every picture for which there are numbers; `record` is lrcompress.json of the last model."""
    yield from _scores(metrics)
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
    yield from _calibration(by_block(record))
    for training in (record[key] for key in TRAININGS if record.get(key)):
        losses = [(step, loss) for step, loss in training.get("losses", ()) if loss is not None]
        if len(losses) > 1:
            yield _training(losses, training["best_step"])
            break  # the latest training comes first


def _scores(metrics: Sequence[Metric]) -> Iterator[Picture]:
    """The tasks and groups, and for each outermost group its parts."""
    place_of = places(metrics)
    scores = [metric for metric in metrics if _is_score(metric)]
    groups = unique_file_names(dict.fromkeys(place_of[title(score)].group for score in scores))
    for group in groups:
        of_group = [score for score in scores if place_of[title(score)].group == group]
        section = f"parts of {group}" if group else "metrics"
        yield _tasks("tasks" + (f"-{groups[group]}" if group else ""), section, of_group)


def _is_score(metric: Metric) -> bool:
    of_task = "task_version" in metric.conditions and metric.low is not None
    return of_task and metric.higher_is_better and 0 <= metric.value <= 1


def _tasks(name: str, section: str, scores: Sequence[Metric]) -> Picture:
    models = list(dict.fromkeys(score.model for score in scores))
    names = list(dict.fromkeys(score.name for score in scores))
    score_of = {(score.name, score.model): score for score in scores}
    text = "; ".join(
        f"{name}: "
        + ", ".join(f"{m} {score_of[name, m].value:.3f}" for m in models if (name, m) in score_of)
        for name in names
    )
    return draw(
        name=name,
        section=section,
        title="Tasks, with 95 % intervals of each score alone",
        text=f"Scores of tasks. {text}.",
        paint=partial(_draw_tasks, models, names, score_of),
        size=(WIDTH, 1.0 + 0.24 * len(names) * (len(models) + 0.6)),
    )


def _draw_tasks(
    models: Sequence[str],
    names: Sequence[str],
    score_of: Mapping[tuple[str, str], Metric],
    figure: Figure,
) -> None:
    axes = figure.subplots()
    height = 1 / (len(models) + 0.6)
    for index, model in enumerate(models):
        rows = [row for row, name in enumerate(names) if (name, model) in score_of]
        scores = [score_of[names[row], model] for row in rows]
        positions = [row + (index - (len(models) - 1) / 2) * height for row in rows]
        arms = [_arms(score) for score in scores]
        axes.barh(
            positions,
            [score.value for score in scores],
            height,
            xerr=np.transpose(arms),
            label=model,
            color=COLOURS[index % len(COLOURS)],
            ecolor=INK,
        )
    axes.set_yticks(range(len(names)), names)
    axes.set_xlim(0, 1)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    legend(figure)


def _arms(score: Metric) -> tuple[float, float]:
    """Of the 95 % interval of a score: its distances below and above the value."""
    error = ((score.high or 0.0) - (score.low or 0.0)) / 2
    interval = score_interval(
        score.value, error, score.samples, normal_quantile(CONFIDENCE), is_pooled=bool(score.parts)
    )
    assert interval is not None
    return max(score.value - interval.low, 0.0), max(interval.high - score.value, 0.0)


def _positions(name: str, changes: Sequence[TokenChange]) -> Picture:
    first = changes[0]
    ratios = "; ".join(
        f"{change.model} {change.positions[0].ratio:.3g}x after few tokens, "
        f"{change.positions[-1].ratio:.3g}x after many"
        for change in changes
        if change.positions
    )
    title = f"Perplexity by tokens of context, {first.data}"
    return draw(
        name=name,
        section="tokens",
        title=title,
        text=f"{title}, over {first.baseline}: {ratios}.",
        paint=partial(_draw_positions, changes),
    )


def _draw_positions(changes: Sequence[TokenChange], figure: Figure) -> None:
    axes = figure.subplots()
    lines = {changes[0].baseline: [p.baseline_perplexity for p in changes[0].positions]}
    lines |= {change.model: [p.perplexity for p in change.positions] for change in changes}
    contexts = [p.last for p in changes[0].positions]
    for label, perplexities in lines.items():
        axes.plot(contexts, perplexities, marker="o", markersize=4, label=label)
    axes.set(xscale="log", yscale="log", xlabel="tokens of context, up to", ylabel="perplexity")
    axes.set_xticks(contexts, [str(context) for context in contexts])
    axes.minorticks_off()
    plain_log_ticks(axes.yaxis)
    legend(figure)


def _blocks(changes: Sequence[BlockChange]) -> Picture:
    errors = "; ".join(
        f"{c.model}: most in block {c.worst}, {c.errors[c.worst]:.3g}, median {c.median:.3g}"
        for c in changes
    )
    title = f"Error of each block, on the inputs of the same block of {changes[0].baseline}"
    lines = {change.model: list(change.errors) for change in changes}
    blocks = range(len(changes[0].errors))
    return draw(
        name="blocks",
        section="blocks",
        title=title,
        text=f"{title}. {errors}.",
        paint=partial(_draw_by_block, blocks, lines, "squared error, relative"),
    )


def _refined(blocks: Sequence[Mapping[str, Any]]) -> Picture:
    lines = {key: [block[key] for block in blocks] for key in ("before", "after")}
    improved = sum(block["after"] < block["before"] for block in blocks)
    title = "Held-out loss of each block before and after refinement"
    indices = [block["block"] for block in blocks]
    return draw(
        name="refined",
        section="refinement",
        title=title,
        text=f"{title}: lower after it in {improved} of {len(blocks)} blocks.",
        paint=partial(_draw_by_block, indices, lines, "loss"),
    )


def _draw_by_block(
    blocks: Sequence[int], lines: Mapping[str, Sequence[float]], ylabel: str, figure: Figure
) -> None:
    axes = figure.subplots()
    for label, values in lines.items():
        axes.plot(blocks, values, marker="o", markersize=4, label=label)
    if all(value > 0 for values in lines.values() for value in values):
        axes.set_yscale("log")
        plain_log_ticks(axes.yaxis)
    axes.set(xlabel="block", ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(figure)


def _roles_of(linears: Linears) -> list[str]:
    return [role for role in ROLES if any(linear["role"] == role for linear in linears)]


def _ranks(linears: Linears) -> Picture:
    roles = _roles_of(linears)
    ranks = [linear["rank"] for linear in linears if linear["rank"] is not None]
    span = f"ranks {min(ranks)} to {max(ranks)}" if ranks else "no linear has a lower rank"
    energies = [_energy_kept(linear) for linear in linears if linear["form"] != "narrowed"]
    title = "Rank, and energy kept, by block and role"
    return draw(
        name="ranks",
        section="ranks",
        title=title,
        text=f"{title}: {span}; energy kept {_range(energies)}.",
        paint=partial(_draw_ranks, linears, roles),
        size=(WIDTH, 1.6 + 0.7 * len(roles)),
    )


def _energy_kept(linear: Mapping[str, Any]) -> float:
    """The share of the energy of W that low rank keeps; NaN for narrowed linears."""
    return np.nan if linear["form"] == "narrowed" else 1 - (linear["relative_error"] or 0.0)


def _range(values: Sequence[float]) -> str:
    return (
        f"{min(values):.4f} to {max(values):.4f}" if values else "is not that of narrowed linears"
    )


def _draw_ranks(linears: Linears, roles: Sequence[str], figure: Figure) -> None:
    panels: dict[str, Any] = {
        "rank": lambda linear: linear["rank"] or min(linear["shape"]),
        "energy kept": _energy_kept,
    }
    for axes, (name, value) in zip(figure.subplots(2, sharex=True), panels.items(), strict=True):
        image = axes.imshow(_grid(linears, roles, value), aspect="auto", interpolation="none")
        axes.set_yticks(range(len(roles)), roles)
        axes.set_title(name, loc="left")
        axes.grid(visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(image, ax=axes, pad=0.01).outline.set_visible(False)
    axes.set_xlabel("block")


def _grid(linears: Linears, roles: Sequence[str], value: Any) -> Any:
    """Shape (roles, blocks): the mean `value` of the linears of a role and block, NaN for none."""
    values: dict[tuple[str, int], list[float]] = {}
    for linear in linears:
        values.setdefault((linear["role"], linear["block"]), []).append(value(linear))
    blocks = range(max(linear["block"] for linear in linears) + 1)
    return np.array(
        [[np.mean(values.get((role, block), [np.nan])) for block in blocks] for role in roles]
    )


def _has_spectrum(linear: Mapping[str, Any]) -> bool:
    values = linear.get("spectrum") or [[1, 0.0]]
    return float(values[0][1]) > 0 and linear["rank"] is not None


def _spectra(linears: Linears) -> Picture:
    roles = _roles_of(linears)
    title = (
        "Singular values in the metric of the method, over the largest; dots: where they are cut"
    )
    return draw(
        name="spectra",
        section="ranks",
        title=title,
        text=f"{title}. {len(linears)} linears of the roles {', '.join(roles)}.",
        paint=partial(_draw_spectra, linears, roles),
    )


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
        plain_log_ticks(axes.yaxis)
        axes.set_title(role, loc="left")
    blocks = ScalarMappable(Normalize(0, last), "viridis")
    figure.colorbar(blocks, ax=panels, label="block", pad=0.01).outline.set_visible(False)


# attribute of BlockCalibration -> label of its line
ENERGIES = {
    "gate_up_inputs": "inputs of gate and up",
    "down_inputs": "inputs of down",
    "gradients": "gradients of outputs",
}


def _calibration(blocks: Sequence[BlockCalibration]) -> Iterator[Picture]:
    lines = {
        label: {c.block: getattr(c, name) for c in blocks if getattr(c, name) is not None}
        for name, label in ENERGIES.items()
    }
    if lines := {label: shares for label, shares in lines.items() if shares}:
        yield _outliers(lines)
    if factors := {c.block: c.factor for c in blocks if c.factor is not None}:
        yield _probes(factors)


def _outliers(lines: Mapping[str, Mapping[int, float]]) -> Picture:
    """`lines` has the share of each block by the label of a line."""
    largest = {label: max(shares, key=shares.__getitem__) for label, shares in lines.items()}
    text = "; ".join(
        f"{label}: at most {lines[label][block]:.1%}, in block {block}"
        for label, block in largest.items()
    )
    title = "Outlier tokens in calibration: their share of the energy, by block"
    return draw(
        name="outliers",
        section="calibration",
        title=title,
        text=f"{title}. {text}.",
        paint=partial(_draw_outliers, lines),
    )


def _draw_outliers(lines: Mapping[str, Mapping[int, float]], figure: Figure) -> None:
    axes = figure.subplots()
    for label, shares in lines.items():
        axes.plot([*shares], [*shares.values()], marker="o", markersize=4, label=label)
    axes.set(xlabel="block", ylabel="share of the energy", ylim=(-0.02, 1.02))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    legend(figure)


def _probes(factors: Mapping[int, float]) -> Picture:
    """`factors` are by block."""
    title = "Probes in calibration: measured cost over its estimate, by block"
    largest, smallest = max(factors, key=factors.__getitem__), min(factors, key=factors.__getitem__)
    return draw(
        name="probes",
        section="calibration",
        title=title,
        text=f"{title}: from {factors[smallest]:.3g} in block {smallest} to "
        f"{factors[largest]:.3g} in block {largest}.",
        paint=partial(_draw_probes, factors),
    )


def _draw_probes(factors: Mapping[int, float], figure: Figure) -> None:
    lines = {"factor of the estimates": [*factors.values()]}
    _draw_by_block([*factors], lines, "cost over estimate", figure)
    figure.axes[0].axhline(1, color=INK, linestyle=":")


def _training(losses: Sequence[Sequence[float]], best_step: int) -> Picture:
    title = "Held-out loss while training, nats per token"
    start, end = losses[0][1], min(loss for _, loss in losses)
    return draw(
        name="training",
        section="training",
        title=title,
        text=f"{title}: from {start:.4f} to {end:.4f}, the best at step {best_step}.",
        paint=partial(_draw_training, losses, best_step),
    )


def _draw_training(losses: Sequence[Sequence[float]], best_step: int, figure: Figure) -> None:
    axes = figure.subplots()
    axes.plot(*zip(*losses, strict=True), marker="o", markersize=4)
    axes.axvline(best_step, color=INK, linestyle=":", label=f"best: step {best_step}")
    axes.set(xlabel="step", ylabel="loss")
    legend(figure)
