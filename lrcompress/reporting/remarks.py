"""What a reader has to know about the numbers of a report before using them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isfinite

from lrcompress.reporting.metric import Summary, title
from lrcompress.reporting.tables import number

# condition of a task's metrics: questions of which a prompt was cut; left out where there are none
PROMPTS_CUT = "prompts_cut"


def remarks(metrics: Sequence[Summary]) -> tuple[str, ...]:
    """Sentences without a full stop on metrics that are not finite, and prompts that were cut."""
    return (*_not_finite(metrics), *_cut(metrics))


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
