"""Factorizes a model from folder to folder, in memory or streaming: the command `factorize`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lrcompress.checkpoint import fingerprints
from lrcompress.checkpoint.folder import save_checkpoint
from lrcompress.checkpoint.record import record_of
from lrcompress.compression.factorize import factorize_model
from lrcompress.compression.footprint import MemoryEstimate
from lrcompress.compression.result import Factorization
from lrcompress.compression.streaming.factorize import StreamingCompressor
from lrcompress.config.recipe import Recipe
from lrcompress.models.gguf_files import parsed_once
from lrcompress.models.loading import load_model, shapes_of
from lrcompress.models.offload import OffloadedModel
from lrcompress.models.placement import device_for, free_memory
from lrcompress.reporting.provenance import provenance_of
from lrcompress.runtime import distributed, locks
from lrcompress.runtime.atomic_io import discard
from lrcompress.runtime.distributed import run_on_all, run_on_main
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.memory import gibibytes
from lrcompress.runtime.progress import Progress, ShowMessage, show_nothing, silent
from lrcompress.runtime.stage_costs import expect_memory, recording, stage


def factorize_to(
    recipe: Recipe,
    out: Path,
    progress: Progress = silent,
    replace: bool = False,
    say: ShowMessage = show_nothing,
) -> dict[str, Any]:
    """Loads, factorizes and saves to the folder `out`; returns what lrcompress.json holds.

    `say` receives a sentence on the memory, and on the disk if it streams, before it starts.
    Under torchrun every process calls this function, and the main process writes. Raises
    InputError if `out` exists, unless `replace` allows replacing an older result there.
    """
    if not distributed.is_main():
        progress, say = silent, show_nothing
    with (
        distributed.process_group(recipe.model.device),
        locks.beside(out, replace),
        recording(),
    ):
        if recipe.factorize.streaming:
            return _streamed(recipe, out, progress, replace, say)
        return _in_memory(recipe, out, progress, replace, say)


def _in_memory(
    recipe: Recipe, out: Path, progress: Progress, replace: bool, say: ShowMessage
) -> dict[str, Any]:
    with stage("loading"), parsed_once():
        device = run_on_all(lambda: _device(recipe, say))
        model, tokenizer = run_on_all(lambda: load_model(recipe.model, device=device))
    # keeps refined blocks until the whole model is saved
    work = out.with_name(f".{out.name}.refine")
    result = run_on_all(
        lambda: factorize_model(
            model,
            tokenizer,
            recipe.calibration,
            recipe.factorize,
            recipe.refine,
            progress=progress,
            work=work,
        )
    )
    saved = run_on_main(
        lambda: save_checkpoint(model, tokenizer, out, _record(recipe, result), replace)
    )
    run_on_main(lambda: discard(work, out))
    return saved


def _device(recipe: Recipe, say: ShowMessage) -> str:
    """Says how much memory the run will take, and returns the device that has it.

    Raises MachineError where none has.
    """
    device = distributed.local_device(recipe.model.device)
    if (estimate := _estimate(recipe)) is None:
        return device
    expect_memory(estimate.total)
    say(f"Factorizing in memory takes {estimate}.")
    device = device_for(device, estimate.total, estimate.least)
    if (free := free_memory(device)) < estimate.total:
        say(
            f"Only {gibibytes(free)} are free, so the run may fail: --streaming takes less, and so "
            "do --dtype bfloat16 and a shorter --seq-len."
        )
    return device


def _estimate(recipe: Recipe) -> MemoryEstimate | None:
    """None where the model cannot be factorized, for a reason that the run then gives."""
    try:
        model = shapes_of(recipe.model)
        return None if model is None else MemoryEstimate.of(model, recipe)
    except InputError:
        return None


def _streamed(
    recipe: Recipe, out: Path, progress: Progress, replace: bool, say: ShowMessage
) -> dict[str, Any]:
    # keeps the blocks of every run to `out`, in a folder per settings
    work = out.with_name(f".{out.name}.streaming")
    key = run_on_main(
        lambda: fingerprints.digest(fingerprints.factorize_inputs(recipe), "factorize")
    )
    run_work = work / key[:16]
    distributed.make_shared_folder(run_work)
    try:
        with stage("loading"):
            source = run_on_all(lambda: OffloadedModel.load(recipe.model, run_work))
        compressor = run_on_all(
            lambda: StreamingCompressor(recipe, source, run_work, progress, say)
        )
        record = _record(recipe, run_on_all(compressor.run))
    except InputError:
        _remove_empty(work)
        raise
    saved = run_on_main(
        lambda: save_checkpoint(
            source.model,
            source.tokenizer,
            out,
            record,
            replace,
            source.outside(),
            compressor.shards,
        )
    )
    run_on_main(lambda: discard(work, out))
    return saved


def _remove_empty(folder: Path) -> None:
    """Removes the folders below `folder`, and `folder` itself, that hold no file."""
    subfolders = sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True)
    for path in (*subfolders, folder):
        if not any(path.iterdir()):
            path.rmdir()


def _record(recipe: Recipe, result: Factorization) -> dict[str, Any]:
    """What lrcompress.json says of this result, and of earlier training of the source model."""
    record = {
        "source": recipe.model.source,
        "recipe": recipe.model_dump(mode="json"),
        **result.to_dict(),
    }
    if before := provenance_of(record_of(recipe.model) or {}):
        record["before"] = before
    return record
