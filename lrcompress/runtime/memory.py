"""Resident memory of this process, now and at its peak; from Linux' /proc."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
RESET_PEAK = "5"  # written to clear_refs, it sets VmHWM back to VmRSS


@dataclass
class Memory:
    """Resident bytes at the `start` of a block and at its `peak`; None outside Linux."""

    start: int | None = None
    peak: int | None = None

    @property
    def rise(self) -> int | None:
        return None if self.start is None or self.peak is None else self.peak - self.start


@contextmanager
def peak_memory() -> Iterator[Memory]:
    """Measures the block; `peak` is set when the block ends."""
    memory = Memory()
    with suppress(OSError):
        CLEAR_REFS.write_text(RESET_PEAK)
        memory.start = _status("VmRSS:")
    yield memory
    if memory.start is not None:
        memory.peak = _status("VmHWM:")


def resident() -> int:
    """Bytes of memory that the process holds now; 0 outside Linux."""
    return (_status("VmRSS:") or 0) if STATUS.is_file() else 0


def _status(field: str) -> int | None:
    """A field of /proc/self/status, in bytes; None if it is missing."""
    lines = (line.split() for line in STATUS.read_text().splitlines())
    return next((int(line[1]) * 1024 for line in lines if line and line[0] == field), None)
