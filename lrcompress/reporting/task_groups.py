"""Which metrics are parts of a group of tasks, and the order that reports show them in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lrcompress.reporting.metric import Summary, title


@dataclass(frozen=True)
class Place:
    """Where a metric stands among the groups of tasks."""

    group: str
    """The outermost group that it is a part of; empty where it is a part of none."""
    depth: int
    """How many groups it is a part of."""


NO_PART = Place("", 0)


def places(metrics: Sequence[Summary]) -> dict[str, Place]:
    """The place of each metric by its title, in the order of `metrics`, but for the parts of a
    group, which follow it."""
    titles = defaultdict[str, dict[str, None]](dict)
    group_of = dict[str, Summary]()
    for metric in metrics:
        titles[metric.name][title(metric)] = None
        group_of |= dict.fromkeys(metric.parts, metric)
    parts = defaultdict[str, list[str]](list)
    for name in titles:
        parts[group_of[name].name if name in group_of else ""].append(name)
    tasks = {metric.name: metric.task for metric in group_of.values()}
    ordered = dict(_below("", NO_PART, parts, tasks))
    # groups in a circle, which only a damaged file has
    ordered |= {name: NO_PART for name in titles if name not in ordered}
    return {each: place for name, place in ordered.items() for each in titles[name]}


def _below(
    group: str, place: Place, parts: Mapping[str, Sequence[str]], tasks: Mapping[str, str]
) -> Iterator[tuple[str, Place]]:
    """The name of every metric below that called `group`, with its place.

    `place` is that of those directly below. `parts` maps a metric to these, and `tasks` the metric
    of a group to the name of the group.
    """
    for name in parts.get(group, ()):
        yield name, place
        below = Place(place.group or tasks.get(name, name), place.depth + 1)
        yield from _below(name, below, parts, tasks)
