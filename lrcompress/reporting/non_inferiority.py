"""Decides whether a model is shown to have lost at most so much (tests of non-inferiority)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lrcompress.reporting.metric import Metric, title
from lrcompress.reporting.significance import MIN_SAMPLES, Comparison, comparisons
from lrcompress.reporting.tables import number
from lrcompress.reporting.task_groups import places
from lrcompress.runtime.errors import InputError

# name of a limit that is for every metric without a limit of its own, but for parts of groups
EVERY = ""
# name (of a metric, a task, a group or a text) -> largest loss: a share of a perplexity, or points
# of an accuracy
Limits = Mapping[str, float]


@dataclass(frozen=True)
class Failure:
    """A comparison that does not show a loss of at most `limit`."""

    comparison: Comparison
    limit: float


def non_inferiority_failures(metrics: Sequence[Metric], limits: Limits) -> list[Failure]:
    """The metrics by which the last model may have lost more than `limits` against the first.

    A metric passes the test of non-inferiority where the whole 95 % interval of the loss lies below
    its limit. Fewer than MIN_SAMPLES samples always fail. Raises InputError where there is nothing
    to compare, where a limit names nothing, and where a metric that has a limit was measured under
    other conditions on the first model or is not finite.
    """
    first, last = (metrics[0].model, metrics[-1].model) if metrics else ("", "")
    measured = [metric for metric in metrics if metric.model == last]
    _check_names(measured, limits)
    limit_of = _limits_by_title(measured, limits)
    _check_finite([m for m in metrics if m.model in (first, last) and title(m) in limit_of])
    results = [r for r in comparisons(metrics) if r.model == last and r.metric in limit_of]
    if not results:
        raise InputError(
            "max_loss needs a first model to compare with, and a text or task that both models are "
            "measured on"
        )
    compared = {result.metric for result in results}
    _check_all_compared([m for m in measured if title(m) in limit_of.keys() - compared], first)
    failures = [Failure(result, limit_of[result.metric]) for result in results]
    return [f for f in failures if not _is_shown(f.comparison, f.limit)]


def _is_shown(comparison: Comparison, limit: float) -> bool:
    return comparison.samples >= MIN_SAMPLES and comparison.worst <= limit


def _check_names(metrics: Sequence[Metric], limits: Limits) -> None:
    """Raises InputError where a limit names no metric that has samples."""
    names = dict.fromkeys(name for m in metrics if m.samples for name in _names(m))
    if unknown := limits.keys() - names - {EVERY}:
        raise InputError(
            f"max_loss names {min(unknown)!r}, and nothing of that name is a mean over windows or "
            f"items (measured so: {', '.join(names) or 'nothing'})"
        )


def _limits_by_title(metrics: Sequence[Metric], limits: Limits) -> dict[str, float]:
    """The limit of every metric that has one."""
    place_of = places(metrics)
    limit_of: dict[str, float] = {}
    for metric in metrics:
        named = [name for name in _names(metric) if name in limits]
        if named:
            limit_of[title(metric)] = limits[named[0]]
        elif EVERY in limits and not place_of[title(metric)].group:
            limit_of[title(metric)] = limits[EVERY]
    return limit_of


def _names(metric: Metric) -> Iterator[str]:
    """What a limit may call a metric: its name, its task or group, its text or file."""
    yield metric.name
    if "task_version" in metric.conditions:
        yield metric.task
    if data := metric.conditions.get("data"):
        yield str(data)


def _check_finite(metrics: Sequence[Metric]) -> None:
    """Raises InputError for a metric that is NaN or infinite."""
    for metric in metrics:
        if not math.isfinite(metric.value):
            raise InputError(
                f"{title(metric)!r} of {metric.model!r} is {number(metric.value)}, which shows "
                "nothing: leave it out of what max_loss decides"
            )


def _check_all_compared(metrics: Sequence[Metric], baseline: str) -> None:
    """Raises InputError for one of `metrics`, which have no comparison, that has samples."""
    for metric in metrics:
        if metric.samples:
            raise InputError(
                f"{title(metric)!r} was measured in another way on {baseline!r}: leave it out of "
                "what max_loss decides, or compare with a model of the same tokenizer"
            )
