"""Short names for the long paths of models and texts: pages show these, and a legend of both."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from lrcompress.reporting.metric import Metric, Summary, title
from lrcompress.reporting.provenance import Text
from lrcompress.reporting.significance import Comparison

# characters; a longer path pushes numbers out of view
MAX_PATH = 24
# from the first word that is an absolute path, or has two separators, to the end
PATH = re.compile(r"(?:^|(?<=\s))(?:~?[/\\]|[A-Za-z]:[/\\]|\S+[/\\]\S+[/\\]).*$", re.DOTALL)


def separate(data: str) -> list[str]:
    """The texts in the name of several, which has commas between them."""
    return re.split(r",\s*", data)


@dataclass(frozen=True)
class ShortNames:
    """Distinct short forms of long paths."""

    short_of: Mapping[str, str]
    """By the path; the paths that have one."""
    names: tuple[str, ...]
    """All that the paths were found in."""

    @classmethod
    def of(cls, names: Iterable[str]) -> ShortNames:
        """For the paths at the end of `names`, which are labels of models and names of texts."""
        names = tuple(dict.fromkeys(names))
        paths = dict.fromkeys(match[0] for name in names if (match := PATH.search(name)))
        ends = _distinct_ends(list(paths))
        counts = Counter(ends.values())
        short = {p: end for p, end in ends.items() if len(p) > MAX_PATH and counts[end] == 1}
        return cls(short, names)

    @classmethod
    def of_metrics(cls, metrics: Sequence[Summary], *names: str) -> ShortNames:
        """For the models, texts and files of questions of `metrics`, and for `names`."""
        data = (str(m.conditions["data"]) for m in metrics if m.conditions.get("data"))
        titles = (title(metric) for metric in metrics)
        return cls.of([*(metric.model for metric in metrics), *titles, *data, *names])

    def shorten(self, text: str) -> str:
        """`text` with the short form of every long path in it."""
        return self._pattern.sub(lambda match: self.short_of[match[0]], text) if self else text

    def metric(self, metric: Metric) -> Metric:
        """`metric` with the short names of its model and text."""
        conditions = dict(metric.conditions)
        if data := conditions.get("data"):
            conditions["data"] = self.shorten(str(data))
        return replace(metric, model=self.shorten(metric.model), conditions=conditions)

    def text(self, text: Text) -> Text:
        """`text` with the short names of its model and of the text."""
        return replace(text, data=self.shorten(text.data), model=self.shorten(text.model))

    def comparison(self, comparison: Comparison) -> Comparison:
        """`comparison` with the short names of its models and text."""
        return replace(
            comparison,
            metric=self.shorten(comparison.metric),
            baseline=self.shorten(comparison.baseline),
            model=self.shorten(comparison.model),
        )

    @cached_property
    def full_of(self) -> dict[str, str]:
        """By its shortened form, each of `names` that has one."""
        shortened = {self.shorten(name): name for name in self.names}
        return {short: name for short, name in shortened.items() if short != name}

    def __bool__(self) -> bool:
        return bool(self.short_of)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.short_of, key=len, reverse=True)
        return re.compile(f"(?:{'|'.join(map(re.escape, longest_first))})(?![\\w/\\\\-])")


def _distinct_ends(paths: Sequence[str]) -> dict[str, str]:
    """The short form of each path; it tells apart the paths with the same last part."""
    parts = {path: re.split(r"[/\\](?=.)", path) for path in paths}
    ends = dict[str, str]()
    for last in dict.fromkeys(path_parts[-1] for path_parts in parts.values()):
        alike = [path for path in paths if parts[path][-1] == last]
        ends |= zip(alike, _shortest([parts[path] for path in alike]), strict=True)
    return ends


def _shortest(paths: Sequence[Sequence[str]]) -> Iterator[str]:
    """As few last parts of `paths` as differ, without those between the first and the last of them
    where these two differ as well."""
    deepest = max(map(len, paths))
    counts = (n for n in range(1, deepest) if _are_distinct(path[-n:] for path in paths))
    count = next(counts, deepest)
    ends = [path[-count:] for path in paths]
    if count > 2 and _are_distinct((end[0], end[-1]) for end in ends):
        ends = [(end[0], "…", end[-1]) for end in ends]
    return map("/".join, ends)


def _are_distinct(values: Iterable[Sequence[str]]) -> bool:
    counts = Counter(map(tuple, values))
    return counts.total() == len(counts)
