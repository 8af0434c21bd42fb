"""Timings in alternation, and speed-ups against the baseline of the same repeat."""

from __future__ import annotations

import torch

from lrcompress.benchmark.timer import Cost, Timing, run_alternating, seconds_per_call, speedups

CPU = torch.device("cpu")


def test_speedups_are_over_the_baseline_of_the_same_repeat() -> None:
    about: dict[str, object] = {"parameters": 1}
    dense = Timing({"pass": "a"}, "dense", "dense", (4.0, 8.0, 6.0), Cost(30, 80), 1, about)
    small = Timing({"pass": "a"}, "small", "dense", (2.0, 2.0, 2.0), Cost(10, 20), 1, about)
    many = Timing({"pass": "b"}, "small", "dense", (1.0,), Cost(10, 20), 17, about)
    other = Timing({"pass": "b"}, "dense", "dense", (3.0,), Cost(30, 80), 17, about)
    few, more = speedups([dense, small, other, many])
    assert (few.low, few.ratio, few.high) == (2, 3, 4)
    assert (few.by_flops, few.by_bytes) == (3, 4)
    assert (few.ideal, few.share) == (4, 0.75)  # one token: reading the weights
    assert (more.ideal, more.share) == (3, 1)


def test_the_order_alternates_after_a_run_that_does_not_count() -> None:
    order: list[str] = []

    def run(name: str) -> int:
        order.append(name)
        return len(order)

    results = run_alternating({"a": "a", "b": "b"}, 2, run, lambda items, *_: items, "")
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert results == {"a": [3, 6], "b": [4, 5]}


def test_seconds_are_those_of_one_call() -> None:
    calls: list[int] = []
    assert 0 < seconds_per_call(lambda: calls.append(1), CPU, 50) < 1e-2
    assert len(calls) == 50
