"""Memory of this process, now and at its peak, from Linux' /proc; and what is free for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import psutil

CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
# the limit of a container's memory, by control groups of version 2
CGROUP = Path("/sys/fs/cgroup")
RESET_PEAK = "5"  # written to clear_refs, it sets VmHWM back to VmRSS


@dataclass
class Memory:
    """Resident bytes at the `start` of a block and at its `peak`; None outside Linux."""

    start: int | None = None
    peak: int | None = None

    @property
    def rise(self) -> int | None:
        return None if self.start is None or self.peak is None else self.peak - self.start


# the blocks that are measured now, outermost first: each reset of VmHWM is first noted in all
MEASURED: ContextVar[tuple[Memory, ...]] = ContextVar("measured", default=())


@contextmanager
def peak_memory() -> Iterator[Memory]:
    """Measures the block; `peak` is set when the block ends. Blocks may be nested."""
    memory = Memory()
    _note_peak()
    with suppress(OSError):
        CLEAR_REFS.write_text(RESET_PEAK)
        memory.start = _status("VmRSS:")
    token = MEASURED.set((*MEASURED.get(), memory))
    try:
        yield memory
    finally:
        _note_peak()
        MEASURED.reset(token)


def _note_peak() -> None:
    """Raises the peaks of all blocks that are measured now to that since the last reset."""
    for memory in MEASURED.get():
        if memory.start is not None:
            memory.peak = max(memory.peak or 0, _status("VmHWM:") or 0)


def resident() -> int:
    """Bytes of memory that the process holds now; 0 outside Linux."""
    return (_status("VmRSS:") or 0) if STATUS.is_file() else 0


def available() -> int:
    """Bytes of memory and swap that this process can still take, within its container."""
    machine = int(psutil.virtual_memory().available + psutil.swap_memory().free)
    try:
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        statistics = dict(
            line.split() for line in (CGROUP / "memory.stat").read_text().splitlines()
        )
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return machine
    return min(machine, limit - used + int(statistics.get("inactive_file", 0)))


def gibibytes(size: int) -> str:
    """`size` (bytes) as words."""
    return f"{size / 2**30:,.1f} GiB"


def _status(field: str) -> int | None:
    """A field of /proc/self/status, in bytes; None if it is missing."""
    lines = (line.split() for line in STATUS.read_text().splitlines())
    return next((int(line[1]) * 1024 for line in lines if line and line[0] == field), None)
