"""The memory that the process holds, and the largest that it held while something ran."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
RESET_PEAK = "5"


@dataclass
class Memory:
    """Resident bytes at the `start`, and at the `peak`; None where the system does not tell."""

    start: int | None = None
    peak: int | None = None

    @property
    def rise(self) -> int | None:
        return None if self.start is None or self.peak is None else self.peak - self.start


@contextmanager
def peak_memory() -> Iterator[Memory]:
    """Fills `peak` when the block ends. Linux only: elsewhere both stay None."""
    memory = Memory()
    with suppress(OSError):
        CLEAR.write_text(RESET_PEAK)
        memory.start = _status("VmRSS:")
    yield memory
    if memory.start is not None:
        memory.peak = _status("VmHWM:")


def resident() -> int:
    """Bytes of memory that the process holds now; 0 where the system does not tell."""
    return (_status("VmRSS:") or 0) if STATUS.is_file() else 0


def _status(field: str) -> int | None:
    """Bytes."""
    lines = (line.split() for line in STATUS.read_text().splitlines())
    return next((int(line[1]) * 1024 for line in lines if line and line[0] == field), None)
