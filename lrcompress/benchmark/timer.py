"""Timings of several alternatives in alternation, and the speed-up that their costs would allow."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

import torch

from lrcompress.runtime.progress import Progress

T = TypeVar("T")
R = TypeVar("R")

# one timing repeats its call until it lasts about so long, but not more often than this
TARGET_SECONDS, MAX_CALLS = 0.02, 1000
# with at most so many tokens in a pass, reading the weights takes longer than multiplying
MEMORY_BOUND_TOKENS = 16


@dataclass(frozen=True)
class Cost:
    """Exact costs of one pass.

    `flops` are the floating point operations of its matrix products (2 for a multiplication and an
    addition), `weight_bytes` the bytes of the weights that it reads.
    """

    flops: int
    weight_bytes: int


@dataclass(frozen=True)
class Timing:
    """The seconds of a pass of one alternative in one `setting`, for each repeat.

    All alternatives of a setting were timed in alternation. `baseline` is the name of the one that
    they are compared with. The matrix products of the pass have `tokens` rows. `about` describes
    the alternative. `peak` is the largest memory of the pass in bytes; None where not measured.
    """

    setting: Mapping[str, object]
    name: str
    baseline: str
    seconds: tuple[float, ...]
    cost: Cost
    tokens: int
    about: Mapping[str, object]
    peak: int | None = None

    @property
    def is_baseline(self) -> bool:
        return self.name == self.baseline


@dataclass(frozen=True)
class Speedup:
    """How many times faster a timing is than its baseline.

    `ratio`, `low` and `high` are the median, lowest and highest ratio of the seconds of one repeat.
    `by_flops` and `by_bytes` are the ratios of the costs: the ideal speed-up where only operations,
    or only bytes, take time.
    """

    timing: Timing
    ratio: float
    low: float
    high: float
    by_flops: float
    by_bytes: float

    @property
    def ideal(self) -> float:
        """`by_bytes` for a pass of few tokens, else `by_flops`."""
        memory_bound = self.timing.tokens <= MEMORY_BOUND_TOKENS
        return self.by_bytes if memory_bound else self.by_flops

    @property
    def share(self) -> float:
        """The measured ratio as a share of the ideal one."""
        return self.ratio / self.ideal


def speedups(timings: Sequence[Timing]) -> list[Speedup]:
    """The speed-up of every timing that is not a baseline, in the same order."""
    by_setting_and_name = {(_key(timing), timing.name): timing for timing in timings}
    return [
        _speedup(timing, by_setting_and_name[_key(timing), timing.baseline])
        for timing in timings
        if not timing.is_baseline
    ]


def _key(timing: Timing) -> tuple[tuple[str, object], ...]:
    return tuple(timing.setting.items())


def _speedup(timing: Timing, baseline: Timing) -> Speedup:
    ratios = [slow / fast for slow, fast in zip(baseline.seconds, timing.seconds, strict=True)]
    return Speedup(
        timing,
        ratio=median(ratios),
        low=min(ratios),
        high=max(ratios),
        by_flops=baseline.cost.flops / timing.cost.flops,
        by_bytes=baseline.cost.weight_bytes / timing.cost.weight_bytes,
    )


def run_alternating(
    subjects: Mapping[str, T],
    repeats: int,
    run: Callable[[T], R],
    progress: Progress,
    description: str,
) -> dict[str, list[R]]:
    """What `run` returns for each subject in each repeat.

    All subjects run once in every repeat, in an order that is reversed from repeat to repeat, so
    that a change in the machine's speed meets all alike. A first run of each is not counted.
    """
    results: dict[str, list[R]] = {label: [] for label in subjects}
    order = list(subjects)
    for repeat in progress(range(repeats + 1), description, repeats + 1):
        for label in order if repeat % 2 else reversed(order):
            result = run(subjects[label])
            if repeat:
                results[label].append(result)
    return results


def calls_per_timing(run: Callable[[], object], device: torch.device) -> int:
    """How many calls of `run` take about TARGET_SECONDS, measured after a call to warm up."""
    run()
    calls = math.ceil(TARGET_SECONDS / seconds_per_call(run, device, 1))
    return max(1, min(MAX_CALLS, calls))


def seconds_per_call(run: Callable[[], object], device: torch.device, calls: int) -> float:
    """The mean over `calls` calls in a row: by CUDA events on a GPU, else by the clock."""
    if device.type == "cuda":
        return _device_seconds(run, calls)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def _device_seconds(run: Callable[[], object], calls: int) -> float:
    start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000 / calls


def describe_machine(device: torch.device) -> dict[str, object]:
    """The device's name and the number of CPU threads, to be reported with a timing."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "threads": torch.get_num_threads()}
