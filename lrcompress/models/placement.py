"""Where a model goes for a factorization: on one GPU, on several, or in the machine's memory."""

from __future__ import annotations

import sys

import torch

from lrcompress.models.loading import checked_device
from lrcompress.runtime import distributed, memory
from lrcompress.runtime.errors import MachineError
from lrcompress.runtime.memory import gibibytes


def device_for(device: str, total: int, least: int) -> str:
    """The device of a run in memory that takes about `total` bytes, of which `least` are certain.

    `device` is a torch device, or `auto`. Without a GPU that stands for the CPU, and otherwise for
    the GPU with the most free memory; where `total` is more than that and there are several, it
    stays `auto`, by which accelerate spreads the blocks over all of them. Raises MachineError where
    not even `least` fits, except where the system makes more swap when it is needed.
    """
    if device == "auto":
        device = _automatic(total)
    if least > (room := free_memory(device)) and (_is_gpu(device) or sys.platform == "linux"):
        raise MachineError(
            f"factorizing in memory takes at least {gibibytes(least)} for weights and moments, "
            f"and {_place(device)} {gibibytes(room)} free: {_remedy(device, least)}"
        )
    return device


def _automatic(total: int) -> str:
    gpus = _gpus()
    largest = max(gpus, key=free_memory, default="auto")
    return largest if len(gpus) == 1 or total <= free_memory(largest) else "auto"


def _gpus() -> list[str]:
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())]


def free_memory(device: str) -> int:
    """Bytes that are free for this process on `device`; `auto` stands for all GPUs together."""
    if device == "auto" and (gpus := _gpus()):
        return sum(map(free_memory, gpus))
    if device != "auto" and torch.device(checked_device(device)).type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    return memory.available() // distributed.processes_here()


def _is_gpu(device: str) -> bool:
    return device.startswith("cuda") or (device == "auto" and bool(_gpus()))


def _place(device: str) -> str:
    if device == "auto" and _gpus():
        return f"the {len(_gpus())} GPUs have together"
    if device.startswith("cuda"):
        return f"{device} has"
    processes = distributed.processes_here()
    return "this machine has" + (f" for each of {processes} processes" if processes > 1 else "")


def _remedy(device: str, least: int) -> str:
    """What takes less memory of `device`."""
    remedies = ["use --streaming, which holds one block and its moments at a time"]
    if device.startswith("cuda") and least <= free_memory("auto"):
        is_shared = distributed.world_size() > 1
        start = "start it without torchrun" if is_shared else "--device auto"
        remedies.append(f"{start}, which spreads the blocks over all GPUs")
    if device.startswith(("cuda", "auto")) and _gpus() and least <= free_memory("cpu"):
        remedies.append("--device cpu")
    return ", or ".join(remedies)
