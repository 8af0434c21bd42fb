"""Shards: every model of a ladder is in exactly one of them."""

from __future__ import annotations

from lrcompress.workflows.scaling.point import Shard


def test_shards_are_the_whole() -> None:
    items = list(range(11))
    parts = [Shard(number, 3).of(items) for number in (1, 2, 3)]
    assert sorted(item for part in parts for item in part) == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
