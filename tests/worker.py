"""The program of each process that tests start by torchrun: it runs several jobs in turn.

Its argument is a folder with jobs.json, a list of jobs. {name, source, out, settings, stop} is a
training; without `source`, of a new model; with `stop`, every process is interrupted in that pass.
{name, out, recipe} is a factorization. Each process writes its result to NAME.RANK.json.
"""

from __future__ import annotations

import json
import os
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
    with distributed.group("auto"):
        for job in json.loads((folder / "jobs.json").read_text()):
            seen = factorize(job) if "recipe" in job else run(job)
            (folder / f"{job['name']}.{os.environ['RANK']}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
