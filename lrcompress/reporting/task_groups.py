"""Which metrics are parts of a group of tasks, and the order that reports show them in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from lrcompress.reporting.metric import Summary, task_of, title

# condition of a task's or group's metrics: the group of tasks that it is a part of; left out where
# it is a part of none
GROUP: Final = "group"


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
    group, which follow it.

    A part whose group has no metric stands by itself.
    """
    titles = defaultdict[str, dict[str, None]](dict)
    group_of = dict[str, str]()
    for metric in metrics:
        name = task_of(metric) if "task_version" in metric.conditions else title(metric)
        titles[name][title(metric)] = None
        group_of[name] = str(metric.conditions.get(GROUP) or group_of.get(name, ""))
    group_of = {name: group if group in titles else "" for name, group in group_of.items()}
    ordered = dict(_below("", NO_PART, group_of))
    # groups in a circle, which only a damaged file has
    ordered |= {name: NO_PART for name in titles if name not in ordered}
    return {each: place for name, place in ordered.items() for each in titles[name]}


def _below(group: str, place: Place, group_of: Mapping[str, str]) -> Iterator[tuple[str, Place]]:
    """Every task and group below `group`, which maps their names to their groups, with its place.

    `place` is that of those directly below.
    """
    for name, parent in group_of.items():
        if parent == group:
            yield name, place
            yield from _below(name, Place(place.group or name, place.depth + 1), group_of)
