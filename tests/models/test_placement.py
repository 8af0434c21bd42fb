"""The device of a run follows from what it takes and what is free."""

from __future__ import annotations

import pytest
import torch

from lrcompress.models import placement
from lrcompress.models.placement import device_for
from lrcompress.runtime import memory
from lrcompress.runtime.errors import MachineError

GIB = 2**30


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with GPUs of which 30 and 40 GiB are free, and 50 GiB of memory."""
    free = {"cuda:0": 30 * GIB, "cuda:1": 40 * GIB}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device], 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(placement, "checked_device", lambda device: device)
    monkeypatch.setattr(memory, "available", lambda: 50 * GIB)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("device", "total", "expected"),
    [
        ("auto", 35, "cuda:1"),
        ("auto", 60, "auto"),
        ("auto", 75, "auto"),
        ("cuda:0", 35, "cuda:0"),
        ("cpu", 55, "cpu"),
    ],
)
def test_one_gpu_is_used_if_it_is_enough(device: str, total: int, expected: str) -> None:
    assert device_for(device, total * GIB, 25 * GIB) == expected


def test_without_gpus_auto_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert device_for("auto", 2, 1) == "auto"
    assert 0 < placement.free_memory("auto") < 2**50


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("device", "least", "message"),
    [
        ("auto", 71, r"71\.0 GiB .* the 2 GPUs have together 70\.0 GiB free: use --streaming"),
        ("cuda:0", 65, r"cuda:0 has 30\.0 GiB free: .* or --device auto, which spreads .* GPUs$"),
        ("cuda:0", 45, r"cuda:0 has 30\.0 GiB free: .* or --device cpu$"),
        ("cpu", 51, r"this machine has 50\.0 GiB free: use --streaming, .* at a time$"),
    ],
)
def test_what_fits_nowhere_is_refused(device: str, least: int, message: str) -> None:
    with pytest.raises(MachineError, match=message):
        device_for(device, 2 * least * GIB, least * GIB)


@pytest.mark.usefixtures("machine")
def test_processes_share_the_memory_and_not_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert device_for("cpu", 30 * GIB, 25 * GIB) == "cpu"
    with pytest.raises(MachineError, match=r"for each of 2 processes 25\.0 GiB free"):
        device_for("cpu", 30 * GIB, 26 * GIB)
    with pytest.raises(MachineError, match="or start it without torchrun, which spreads"):
        device_for("cuda:1", 45 * GIB, 41 * GIB)
