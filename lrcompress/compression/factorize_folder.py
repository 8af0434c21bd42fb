"""What the command factorize does, in memory or streaming, from folder to folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lrcompress.checkpoint import fingerprints
from lrcompress.checkpoint.folder import save_checkpoint
from lrcompress.checkpoint.record import record_of
from lrcompress.compression.factorize import apply
from lrcompress.compression.result import Factorization
from lrcompress.compression.streaming.factorize import StreamingCompressor
from lrcompress.config.recipe import Recipe
from lrcompress.models.loading import load_model
from lrcompress.models.offload import OffloadedModel
from lrcompress.reporting.provenance import provenance_of
from lrcompress.runtime import distributed, locks
from lrcompress.runtime.atomic_io import discard
from lrcompress.runtime.distributed import run_on_all, run_on_main
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.progress import Progress, Say, silent, unsaid


def factorize_to(
    recipe: Recipe,
    out: Path,
    progress: Progress = silent,
    replace: bool = False,
    say: Say = unsaid,
) -> dict[str, Any]:
    """Loads, factorizes and saves to `out`; returns what lrcompress.json holds.

    `say` is told what streaming will need, before it starts.
    Under torchrun every process calls it, and the main one writes. Raises InputError if `out`
    exists, unless an older result there is to be replaced.
    """
    if not distributed.is_main():
        progress, say = silent, unsaid
    with distributed.group(recipe.model.device), locks.beside(out, replace):
        if recipe.factorize.streaming:
            return _streamed(recipe, out, progress, replace, say)
        return _in_memory(recipe, out, progress, replace)


def _in_memory(recipe: Recipe, out: Path, progress: Progress, replace: bool) -> dict[str, Any]:
    device = run_on_all(lambda: distributed.own_device(recipe.model.device))
    model, tokenizer = run_on_all(lambda: load_model(recipe.model, device=device))
    work = out.with_name(f".{out.name}.refine")  # refined blocks, until the whole is saved
    parts = (recipe.calibration, recipe.factorize, recipe.refine, progress, work)
    done = run_on_all(lambda: apply(model, tokenizer, *parts))
    saved = run_on_main(
        lambda: save_checkpoint(model, tokenizer, out, _made(recipe, done), replace)
    )
    run_on_main(lambda: discard(work, out))
    return saved


def _streamed(
    recipe: Recipe, out: Path, progress: Progress, replace: bool, say: Say
) -> dict[str, Any]:
    work = out.with_name(f".{out.name}.streaming")  # of this output: blocks of all settings
    own = (
        work
        / run_on_main(lambda: fingerprints.digest(fingerprints.factorizing(recipe), "factorize"))[
            :16
        ]
    )
    distributed.check_shared(own)
    try:
        source = run_on_all(lambda: OffloadedModel.load(recipe.model, own))
        run = run_on_all(lambda: StreamingCompressor(recipe, source, own, progress, say))
        record = _made(recipe, run_on_all(run.run))
    except InputError:
        _remove_empty(work)
        raise
    saved = run_on_main(
        lambda: save_checkpoint(
            source.model, source.tokenizer, out, record, replace, source.outside(), run.shards
        )
    )
    run_on_main(lambda: discard(work, out))
    return saved


def _remove_empty(folder: Path) -> None:
    """Removes the folders below `folder`, and itself, in which there is no file."""
    below = sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True)
    for one in (*below, folder):
        if not any(one.iterdir()):
            one.rmdir()


def _made(recipe: Recipe, done: Factorization) -> dict[str, Any]:
    """The record of what was done, and of what had been learned before."""
    record = {
        "source": recipe.model.source,
        "recipe": recipe.model_dump(mode="json"),
        **done.to_dict(),
    }
    if before := provenance_of(record_of(recipe.model) or {}):
        record["before"] = before
    return record
