"""The result of refining one block, and the file that keeps it until the model is saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from lrcompress.runtime.atomic_io import replace_tensors, writing_state


@dataclass(frozen=True)
class RefinedBlock:
    """What refinement did to one block: the error on held-out samples before and after.

    With `estimates_loss` the error is twice the estimated rise of the model's loss, in nats per
    token; otherwise it is a squared error of the block's output.
    """

    block: int
    before: float
    after: float
    estimates_loss: bool
    steps: int
    seconds: float


@torch.no_grad()
def read_block(file: Path, parameters: Mapping[str, nn.Parameter]) -> RefinedBlock | None:
    """Fills `parameters` from the file of a finished block.

    Returns None, and changes nothing, where the file is missing, damaged or of other shapes.
    """
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in parameters}
            refined = RefinedBlock(**json.loads(stored.metadata()["block"]))
    except (OSError, SafetensorError, TypeError, KeyError, ValueError):
        return None
    if any(tensors[name].shape != parameter.shape for name, parameter in parameters.items()):
        return None
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])
    return refined


def write_block(file: Path, parameters: Mapping[str, nn.Parameter], refined: RefinedBlock) -> None:
    """Writes a finished block atomically. Raises MachineError where it cannot be written."""
    tensors = {name: p.detach().contiguous() for name, p in parameters.items()}
    with writing_state(f"the refined block in {str(file)!r}"):
        replace_tensors(file, tensors, {"block": json.dumps(asdict(refined))})
