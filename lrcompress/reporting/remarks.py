"""What a reader has to know about the numbers of a report before using them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isfinite, sqrt

from lrcompress.reporting.metric import Summary, title
from lrcompress.reporting.tables import number

# condition of a task's metrics: questions of which a prompt was cut; left out where there are none
PROMPTS_CUT = "prompts_cut"
# condition of a metric whose standard error is a bootstrap of fewer resamples than lm-eval's
RESAMPLES = "bootstrap_resamples"


def remarks(metrics: Sequence[Summary]) -> tuple[str, ...]:
    """Sentences without a full stop on metrics that are not finite, prompts that were cut, and
    standard errors of fewer resamples than lm-eval's."""
    return (*_not_finite(metrics), *_cut(metrics), *_resampled(metrics))


def _not_finite(metrics: Sequence[Summary]) -> Iterator[str]:
    for metric in metrics:
        if not isfinite(metric.value):
            yield (
                f"{title(metric)} of {metric.model} is {number(metric.value)}: it shows nothing, "
                "and is not compared"
            )


def _cut(metrics: Sequence[Summary]) -> Iterator[str]:
    """One sentence for each context length, with the tasks in it."""
    tasks: dict[object, dict[str, None]] = {}
    for metric in metrics:
        cut, asked = metric.conditions.get(PROMPTS_CUT), metric.conditions.get("samples")
        if cut and asked:  # a group of tasks has no number of its own
            length = metric.conditions.get("context_length")
            tasks.setdefault(length, {})[f"{cut} of {asked} in {metric.task}"] = None
    for length, counts in tasks.items():
        yield (
            f"prompts longer than the context of {length} tokens, with room for the answer, lost "
            f"their beginning: {', '.join(counts)}"
        )


def _resampled(metrics: Sequence[Summary]) -> Iterator[str]:
    """One sentence for each number of resamples, with the metrics that have it."""
    names: dict[int, dict[str, None]] = {}
    for metric in metrics:
        if isinstance(count := metric.conditions.get(RESAMPLES), int):
            names.setdefault(count, {})[title(metric)] = None
    for count, of_count in names.items():
        yield (
            f"the standard error of {', '.join(of_count)} is of {count:,} bootstrap resamples, and "
            f"may be off by {1 / sqrt(2 * count):.1%}: lm-eval draws more, which takes long"
        )
