"""What the stages of a factorization cost, as text for reports and the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StageRow:
    """One stage: `seconds` and `cpu_seconds` in seconds, `memory` in MiB; a dash for unknown."""

    stage: str
    seconds: str
    cpu_seconds: str
    memory: str


def stage_rows(record: Mapping[str, Any]) -> list[StageRow]:
    """A row for each stage in `record` (lrcompress.json), in the order of the record."""
    return [
        StageRow(
            stage=name.replace("_", " "),
            seconds=f"{cost['seconds']:,.1f}",
            cpu_seconds=f"{cost['cpu_seconds']:,.1f}",
            memory="–" if cost["memory"] is None else f"{cost['memory'] / 2**20:,.0f}",
        )
        for name, cost in record.get("stages", {}).items()
    ]


def stage_sentence(record: Mapping[str, Any]) -> str:
    """The stages of at least a second, longest first; empty where there is none."""
    seconds = {name: cost["seconds"] for name, cost in record.get("stages", {}).items()}
    longest = sorted((name for name in seconds if seconds[name] >= 1), key=lambda n: -seconds[n])
    parts = [f"{name.replace('_', ' ')} {seconds[name]:,.0f}" for name in longest]
    return f"Seconds: {', '.join(parts)}." if parts else ""


def memory_sentence(record: Mapping[str, Any]) -> str:
    """The peak of memory beside its estimate, in GiB; empty where either is unknown."""
    memory = record.get("memory") or {}
    if not memory.get("estimated") or not memory.get("measured"):
        return ""
    measured, estimated = (memory[key] / 2**30 for key in ("measured", "estimated"))
    return f"Memory at its peak: {measured:,.1f} GiB; {estimated:,.1f} GiB were estimated."
