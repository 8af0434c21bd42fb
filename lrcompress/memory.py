"""The memory that the process holds, and the largest that it held while something ran."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
RESET_PEAK = "5"


@dataclass
class Memory:
    """`peak` in bytes of resident memory; None where the system does not tell."""

    peak: int | None = None


@contextmanager
def peak_memory() -> Iterator[Memory]:
    """Fills `peak` when the block ends. Linux only: elsewhere it stays None."""
    memory, known = Memory(), True
    try:
        CLEAR.write_text(RESET_PEAK)
    except OSError:
        known = False
    yield memory
    if known:
        memory.peak = _status("VmHWM:")


def resident() -> int:
    """Bytes of memory that the process holds now; 0 where the system does not tell."""
    return (_status("VmRSS:") or 0) if STATUS.is_file() else 0


def _status(key: str) -> int | None:
    lines = STATUS.read_text().splitlines()
    found = [line.split() for line in lines if line.startswith(key)]
    return int(found[0][1]) * 1024 if found else None
