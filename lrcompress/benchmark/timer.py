"""Timing of alternatives in turn, beside the speed-up that their costs would allow."""

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
Measured = TypeVar("Measured")

# seconds that one timing should last, and the most calls that it may take to that end
SPAN, MOST_CALLS = 0.02, 1000
# with so few tokens in a pass, reading the weights takes the time, and not multiplying
FEW_TOKENS = 16


@dataclass(frozen=True)
class Cost:
    """Exact counts for one pass: floating point operations of its matrix products (two for each
    multiplication and addition), and the bytes of the weights that it reads."""

    flops: int
    weight_bytes: int


@dataclass(frozen=True)
class Timing:
    """One alternative in one `setting`: the seconds of a pass in each repeat, in their order.

    All of a setting took turns. `baseline` names the one that the others are compared with; a pass
    has `tokens` rows in its products; `peak` is the most memory it took, in bytes, where measured.
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
    """A timing over its baseline's, repeat by repeat: the median, the lowest and the highest ratio.

    `by_flops` and `by_bytes` are the baseline's costs over its own, the best that could be had
    where either is all that counts: the bytes with few tokens, else the operations.
    """

    timing: Timing
    ratio: float
    low: float
    high: float
    by_flops: float
    by_bytes: float

    @property
    def ideal(self) -> float:
        return self.by_bytes if self.timing.tokens <= FEW_TOKENS else self.by_flops

    @property
    def share(self) -> float:
        """Of the ideal."""
        return self.ratio / self.ideal


def speedups(timings: Sequence[Timing]) -> list[Speedup]:
    """Of every timing that is no baseline, in the order given."""
    known = {(_key(timing), timing.name): timing for timing in timings}
    return [
        _speedup(timing, known[_key(timing), timing.baseline])
        for timing in timings
        if not timing.is_baseline
    ]


def _key(timing: Timing) -> tuple[tuple[str, object], ...]:
    return tuple(timing.setting.items())


def _speedup(timing: Timing, base: Timing) -> Speedup:
    ratios = [b / own for b, own in zip(base.seconds, timing.seconds, strict=True)]
    by_flops = base.cost.flops / timing.cost.flops
    by_bytes = base.cost.weight_bytes / timing.cost.weight_bytes
    return Speedup(timing, median(ratios), min(ratios), max(ratios), by_flops, by_bytes)


def in_turn(
    subjects: Mapping[str, T],
    repeats: int,
    run: Callable[[T], Measured],
    progress: Progress,
    description: str,
) -> dict[str, list[Measured]]:
    """The subjects take turns within every repeat, the order turning round each time, after one
    uncounted run of each."""
    measured: dict[str, list[Measured]] = {label: [] for label in subjects}
    order = list(subjects)
    for repeat in progress(range(repeats + 1), description, repeats + 1):
        for label in order if repeat % 2 else reversed(order):
            found = run(subjects[label])
            if repeat:
                measured[label].append(found)
    return measured


def calls_for(run: Callable[[], object], device: torch.device) -> int:
    """How many calls in a row are long enough to be timed, found after one that warms up."""
    run()
    return max(1, min(MOST_CALLS, math.ceil(SPAN / seconds(run, device, 1))))


def seconds(run: Callable[[], object], device: torch.device, calls: int) -> float:
    """Of one call, as the mean of several in a row: by the events of a GPU, else by the clock."""
    if device.type == "cuda":
        return _device_seconds(run, calls)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def _device_seconds(run: Callable[[], object], calls: int) -> float:
    events = torch.cuda.Event
    start, end = (events(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000 / calls


def machine(device: torch.device) -> dict[str, object]:
    """What a timing was made on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "threads": torch.get_num_threads()}
