"""The memory that the process holds, and how far it rises."""

from __future__ import annotations

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
