"""Loads an export in a process without lrcompress, and compares its outputs with the model's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lrcompress.layers.model_state import evaluation_mode
from lrcompress.models.architecture import auto_classes
from lrcompress.runtime.errors import InputError

TOKENS = 8
# the highest difference of an output, as a share of the largest one; wrong weights give about 1,
# and the rounding of float16 about 0.001
TOLERANCE = 0.01
EXCEPTION = re.compile(r"[\w.]*(Error|Exception)\b")
SCRIPT = """
import sys
sys.modules["lrcompress"] = None
import torch, transformers
from safetensors.torch import load_file, save_file
folder, auto_class, device, inputs, outputs = sys.argv[1:]
torch.set_num_threads(1)
model, report = getattr(transformers, auto_class).from_pretrained(
    folder, trust_remote_code=True, output_loading_info=True,
    device_map=device if device == "auto" else {"": device},
)
faults = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
assert not faults, f"tensors are {faults}"
with torch.no_grad():
    output = model.eval()(input_ids=load_file(inputs)["tokens"].to(model.device))
save_file({"output": output[0].float().cpu().contiguous()}, outputs)
"""


def check_loads_alone(model: Any, folder: Path) -> None:
    """Raises InputError where `folder` does not load without lrcompress, or to other outputs.

    The process loads the whole model, on the device of `model`, and runs the code in the folder.
    """
    tokens = torch.arange(1, TOKENS + 1)[None]
    with torch.no_grad(), evaluation_mode(model):
        # the first field: logits, or states of a model without a head
        expected = model(input_ids=tokens.to(model.device))[0].float().cpu()
    with tempfile.TemporaryDirectory() as work:
        actual = _output_of(folder, model, tokens, Path(work))
    difference = (actual - expected).abs().max()
    if not difference <= TOLERANCE * expected.abs().max():  # also where it is NaN
        raise InputError(
            f"the standalone export of {type(model).__name__} does not give the outputs of the "
            f"model (they differ by {float(difference):.3g}): use --to dense"
        )


def _output_of(folder: Path, model: Any, tokens: Tensor, work: Path) -> Tensor:
    """The first output for `tokens` of the model that another process loads from `folder`."""
    inputs, outputs = work / "inputs.safetensors", work / "outputs.safetensors"
    save_file({"tokens": tokens}, inputs)
    device = "auto" if len(getattr(model, "hf_device_map", ())) > 1 else str(model.device)
    arguments = (folder, auto_classes(model)[0], device, inputs, outputs)
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_MODULES_CACHE": str(work / "modules"), "HF_HUB_OFFLINE": "1"},
    )
    if process.returncode:
        reason = _error_line(process.stderr) or f"exit code {process.returncode}"
        raise InputError(
            f"the standalone export of {type(model).__name__} does not load without lrcompress "
            f"({reason[:300]}): use --to dense"
        )
    output: Tensor = load_file(outputs)["output"]
    return output


def _error_line(traceback: str) -> str:
    """The line of a traceback that names the exception; the text of one can have more lines."""
    return next((x for x in reversed(traceback.splitlines()) if EXCEPTION.match(x)), "")
