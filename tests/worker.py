"""Starts torchrun in tests; run as a module, does several jobs in each of its processes.

The module's argument is a folder with jobs.json: a list of {name, source, out, settings, stop} for
trainings; without `source` the model is a new one, and `stop` is the pass in which every process
is interrupted. {name, out, recipe} is a factorization. Each process writes what it did to
NAME.RANK.json in the folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from lrcompress.compression import factorize_folder
from lrcompress.config import FinetuneSettings, ModelSettings, PretrainSettings
from lrcompress.config.recipe import Recipe
from lrcompress.methods.decomposition_cache import DecompositionCache
from lrcompress.runtime import distributed
from lrcompress.runtime.errors import InputError
from lrcompress.training import finetune, pretrain
from lrcompress.training.trainer import TextTrainer

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
TIMEOUT = 600  # seconds, on a machine that is busy with other tests


def start_torchrun(*command: str) -> subprocess.Popen[str]:
    """Starts a module in two processes."""
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*TORCHRUN, *command], env=ENVIRONMENT, text=True, stdout=pipe, stderr=pipe
    )


def wait_for(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, output and errors; after TIMEOUT torchrun is ended with its processes."""
    try:
        output, errors = process.communicate(timeout=TIMEOUT)
    finally:
        process.terminate()
    return process.returncode, output, errors


def run_torchrun(*command: str) -> None:
    """Runs a module in two processes, which have to succeed."""
    code, _, errors = wait_for(start_torchrun(*command))
    assert code == 0, errors


def run(job: dict[str, Any]) -> dict[str, Any]:
    """The sequences of every pass, and the error that ended the job."""
    original = TextTrainer.training_step
    passes: list[Any] = []
    error = None

    def recorded(self: Any, model: Any, inputs: Any, *rest: Any) -> Any:
        if len(passes) + 1 == job.get("stop"):
            raise KeyboardInterrupt
        passes.append(inputs["input_ids"].tolist())
        return original(self, model, inputs, *rest)

    TextTrainer.training_step = recorded
    try:
        _train(job.get("source"), job["settings"], Path(job["out"]))
    except (InputError, distributed.MainProcessFailedError, KeyboardInterrupt) as caught:
        error = [type(caught).__name__, str(caught)]
    finally:
        TextTrainer.training_step = original
    return {"passes": passes, "error": error}


def _train(source: str | None, settings: dict[str, Any], out: Path) -> None:
    if source is None:
        pretrain.pretrain_to(PretrainSettings(**settings), out)
    else:
        finetune.finetune_to(ModelSettings(source=source), FinetuneSettings(**settings), out)


def factorize(job: dict[str, Any]) -> dict[str, Any]:
    """The error that ended the job, and the linears that this process decomposed."""
    original, linears, error = DecompositionCache.factors, list[str](), None

    def recorded(self: Any, ffn: Any, linear: Any, rank: int) -> Any:
        linears.append(linear.name)
        return original(self, ffn, linear, rank)

    with mock.patch.object(DecompositionCache, "factors", recorded):
        try:
            factorize_folder.factorize_to(Recipe(**job["recipe"]), Path(job["out"]))
        except (InputError, distributed.MainProcessFailedError) as caught:
            error = [type(caught).__name__, str(caught)]
    return {"linears": linears, "error": error}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with distributed.process_group("auto"):
        for job in json.loads((folder / "jobs.json").read_text()):
            seen = factorize(job) if "recipe" in job else run(job)
            (folder / f"{job['name']}.{os.environ['RANK']}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
