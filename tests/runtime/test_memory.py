"""The memory that the process holds, and how far it rises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lrcompress.runtime import memory


def test_memory_rises_from_its_start() -> None:
    with memory.peak_memory() as measured:
        held = torch.ones(16 * 2**20)  # 64 MiB
    assert measured.rise is None or measured.rise > 2**24
    assert held.numel() == 16 * 2**20


def test_an_outer_block_keeps_the_peak_before_an_inner_one() -> None:
    with memory.peak_memory() as outer:
        held = torch.ones(16 * 2**20)  # 64 MiB
        del held
        with memory.peak_memory() as inner:
            pass
    assert outer.rise is None or outer.rise > 2**24
    assert inner.rise is None or inner.rise < 2**24


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    machine = memory.available()
    assert machine > 2**27  # no such files: the whole machine
    for name, content in (("max", 2**27), ("current", 2**26), ("stat", f"inactive_file {2**20}\n")):
        (tmp_path / f"memory.{name}").write_text(str(content))
    assert memory.available() == 2**27 - 2**26 + 2**20
    (tmp_path / "memory.max").write_text("max")
    assert memory.available() > 2**27
