"""What the stages of `factorize` cost: seconds, CPU seconds and peak memory.

`stage` marks a stage wherever its work is done. Stages that take turns, block by block, are summed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from lrcompress.runtime.memory import Memory, peak_memory

StageName = Literal[
    "loading",
    "text",
    "second_moments",
    "gradients",
    "choices_of_channels",
    "choices_of_ranks",
    "probes",
    "allocation",
    "factors",
    "pivots",
    "refinement",
    "search",
    "saving",
]


@dataclass
class StageCost:
    """Wall `seconds`; `cpu_seconds` of all threads of this process; peak resident bytes.

    Seconds leave out the stages inside this one, `memory` does not. It is None outside Linux.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    memory: int | None = None


@dataclass
class StageCosts:
    """The costs of each stage that has run, in this process.

    `expected_memory` are the bytes that were estimated before the start; None where none were.
    """

    by_stage: dict[StageName, StageCost] = field(default_factory=dict)
    expected_memory: int | None = None
    _running: list[StageName] = field(default_factory=list)
    _charged: tuple[float, float] = (0.0, 0.0)

    @contextmanager
    def stage(self, name: StageName) -> Iterator[None]:
        """Charges the block to the stage `name`."""
        self._charge()
        self._running.append(name)
        cost = self.by_stage.setdefault(name, StageCost())
        memory = Memory()  # should an interruption come before it is measured
        try:
            with peak_memory() as memory:
                yield
        finally:
            self._charge()
            self._running.pop()
            cost.memory = max(cost.memory or 0, memory.peak or 0) or None

    def _charge(self) -> None:
        """Adds the time since the last call to the innermost stage that is running."""
        _wait_for_gpu()
        now = time.perf_counter(), time.process_time()
        if self._running:
            cost = self.by_stage[self._running[-1]]
            cost.seconds += now[0] - self._charged[0]
            cost.cpu_seconds += now[1] - self._charged[1]
        self._charged = now

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """For lrcompress.json, in the order of the stages."""
        return {
            name: {key: _rounded(value) for key, value in asdict(self.by_stage[name]).items()}
            for name in get_args(StageName)
            if name in self.by_stage
        }

    def memory(self) -> dict[str, int | None]:
        """For lrcompress.json: the `estimated` and the `measured` peak, in bytes."""
        peaks = [cost.memory for cost in self.by_stage.values() if cost.memory is not None]
        measured = _gpu_peak() or max(peaks, default=None)
        return {"estimated": self.expected_memory, "measured": measured}


def _rounded(value: float | None) -> float | None:
    return round(value, 2) if isinstance(value, float) else value


def _wait_for_gpu() -> None:
    """Kernels run on after the call that started them."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _gpu_peak() -> int:
    """The most bytes that torch held on all GPUs; 0 where none is used."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return sum(map(torch.cuda.max_memory_reserved, range(torch.cuda.device_count())))


def _reset_gpu_peak() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)


RECORDER: ContextVar[StageCosts | None] = ContextVar("stage_costs", default=None)


@contextmanager
def recording() -> Iterator[StageCosts]:
    """Inside, stages are recorded; where they are already, the same costs go on."""
    costs = RECORDER.get()
    if costs is None:
        costs = StageCosts()
        _reset_gpu_peak()
    token = RECORDER.set(costs)
    try:
        yield costs
    finally:
        RECORDER.reset(token)


def stages_until_now() -> dict[str, Any]:
    """The fields `stages` and `memory` of lrcompress.json; those that are recorded."""
    if (costs := RECORDER.get()) is None:
        return {}
    memory = {} if costs.expected_memory is None else {"memory": costs.memory()}
    return {"stages": costs.to_dict()} | memory


def expect_memory(size: int) -> None:
    """Records the bytes that the work is estimated to take, inside `recording`."""
    if (costs := RECORDER.get()) is not None:
        costs.expected_memory = size


@contextmanager
def stage(name: StageName) -> Iterator[None]:
    """Charges the block to the stage `name`, inside `recording`; elsewhere it does nothing."""
    if (costs := RECORDER.get()) is None:
        yield
        return
    with costs.stage(name):
        yield
