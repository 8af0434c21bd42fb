"""What each process of tests/test_devices.py does: several finetunings, one after another.

Its argument is a folder with jobs.json, a list of {name, source, out, settings, stop}. With `stop`
every process is interrupted in that pass. What a process saw goes to NAME.RANK.json there.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from lrcompress import processes, tune
from lrcompress.distill import DistillationTrainer
from lrcompress.protocols import InputError
from lrcompress.settings import FinetuneSettings, ModelSettings


def run(job: dict[str, Any]) -> dict[str, Any]:
    """The sequences of every pass, and the error that ended the job."""
    original = DistillationTrainer.training_step
    passes: list[Any] = []
    error = None

    def recorded(self: Any, model: Any, inputs: Any, *rest: Any) -> Any:
        if len(passes) + 1 == job.get("stop"):
            raise KeyboardInterrupt
        passes.append(inputs["input_ids"].tolist())
        return original(self, model, inputs, *rest)

    DistillationTrainer.training_step = recorded
    try:
        source, settings = ModelSettings(source=job["source"]), FinetuneSettings(**job["settings"])
        tune.finetune_to(source, settings, Path(job["out"]))
    except (InputError, processes.SaidElsewhereError, KeyboardInterrupt) as caught:
        error = [type(caught).__name__, str(caught)]
    finally:
        DistillationTrainer.training_step = original
    return {"passes": passes, "error": error}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with processes.group("auto"):
        for job in json.loads((folder / "jobs.json").read_text()):
            seen = run(job)
            (folder / f"{job['name']}.{os.environ['RANK']}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
