"""Loads a compressed checkpoint, trains it towards its dense teacher, saves the result."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from lrcompress import checkpoint, stages
from lrcompress.data import fingerprint, in_turn, read_corpus, token_blocks
from lrcompress.distill import BlockDataset
from lrcompress.files import check_free
from lrcompress.models import locate
from lrcompress.protocols import InputError, Progress, silent
from lrcompress.recovery import check_pair, train
from lrcompress.settings import FinetuneSettings, ModelSettings
from lrcompress.sizes import sequence_length
from lrcompress.sources import Loaded, load_settings, other_source
from lrcompress.tables import learned
from lrcompress.teacher import TeacherCache

TRAIN_LENGTH = 512


def finetune_to(
    source: ModelSettings,
    settings: FinetuneSettings,
    out: Path,
    progress: Progress = silent,
    *,
    resume: bool = True,
    replace: bool = False,
    load_teacher: Callable[[ModelSettings], Loaded] = load_settings,
) -> dict[str, Any]:
    """Trains the checkpoint `source` and saves it to `out`; returns what lrcompress.json holds.

    Checkpoints are kept beside `out` until it is whole: the same call goes on from the last
    unless `resume` is off. Raises InputError if `out` exists and is not to be replaced, where
    text, teacher or checkpoint do not fit, and where training diverged; the best weights before
    that are saved.
    """
    if not replace:
        check_free(out)
    if not settings.data:
        raise InputError("finetune needs text to train on: give --data FILE.txt or another SPEC")
    record = checkpoint.read_record(Path(locate(source.source).path)) or {}
    name = settings.teacher or record.get("source")
    if name is None:
        raise InputError(f"{source.source!r} names no source: give --teacher MODEL")
    model, tokenizer = load_settings(source)
    dense = other_source(source, name)
    teacher, _ = load_teacher(dense)
    check_pair(model, teacher)
    tokens, text = training_tokens(model, tokenizer, settings)
    work = out.with_name(f".{out.name}.finetune")
    if not resume:
        shutil.rmtree(work, ignore_errors=True)
    cache = _taught(dense, teacher, tokens, settings, progress)
    stored, held = model.dtype, settings.held_out
    done = train(
        model.float(),  # steps as small as the rate asks for vanish in bfloat16 weights
        teacher if cache is None or settings.self_guided != "off" else None,
        BlockDataset(tokens[held:], cache, held),
        BlockDataset(tokens[:held], cache),
        settings,
        work / _identity(source, settings, text),
        progress,
    )
    record.pop("metrics", None)  # they are of the model before training
    if "finetuned" in record:
        record["before"] = learned(record)
    record |= {"finetuned": asdict(done) | {"settings": settings.model_dump(mode="json")} | text}
    saved = checkpoint.save(model.to(stored), tokenizer, out, record, replace)
    shutil.rmtree(work, ignore_errors=True)
    if done.diverged:
        raise InputError(
            f"training diverged: {done.diverged}; {str(out)!r} holds the best weights before it, "
            f"of step {done.best_step}: use a smaller --learning-rate"
        )
    return saved


def _taught(
    source: ModelSettings,
    teacher: Any,
    tokens: Tensor,
    settings: FinetuneSettings,
    progress: Progress,
) -> TeacherCache | None:
    """The teacher's predictions for all sequences, if they are to be kept; made where missing."""
    if settings.teacher_cache is None:
        return None
    kept = [settings.teacher_top_k, settings.temperature]
    state = stages.model_state(source)
    mark = fingerprint(settings.data, tokens, settings.seed).sha256
    folder = Path(settings.teacher_cache) / stages.digest([state, mark, kept])[:16]
    cache = TeacherCache(folder, settings.teacher_top_k, settings.temperature)
    cache.fill(teacher, tokens, cache.missing(len(tokens)), progress)
    return cache


def training_tokens(
    model: Any, tokenizer: Any, settings: FinetuneSettings
) -> tuple[Tensor, dict[str, Any]]:
    """Blocks (sequences, length), the held-out ones first, and what identifies them.

    As many as the steps need, or all that the texts hold; those are then read more than once.
    """
    if tokenizer is None:
        raise InputError("finetune reads text and the model has no tokenizer: add its files")
    length = sequence_length(model, settings.train_length)
    if settings.train_length is None:
        length = min(length, TRAIN_LENGTH)
    each = settings.batch_size * settings.gradient_accumulation
    wanted = settings.held_out + settings.max_steps * each
    share = -(-wanted // len(settings.data))
    corpora = [read_corpus(spec, "calibration") for spec in settings.data]
    parts = [token_blocks(c, tokenizer, share, length, settings.seed, fewer=True) for c in corpora]
    blocks = in_turn(parts)[:wanted]
    if len(blocks) < settings.held_out + each:
        raise InputError(
            f"{', '.join(settings.data)}: {len(blocks)} sequences of {length} tokens are too few "
            f"to hold {settings.held_out} out: give more text, or a smaller --held-out"
        )
    mark = fingerprint(settings.data, blocks, settings.seed)
    text = {"sequences": mark.num_samples, "length": length, "sha256": mark.sha256}
    return blocks, text | {"sketch": mark.sketch.to_dict()}


def _identity(source: ModelSettings, settings: FinetuneSettings, text: dict[str, Any]) -> str:
    state = stages.model_state(source)
    asked = settings.model_dump(mode="json", exclude={"tensorboard", "teacher_cache"})
    return stages.digest([state, asked, text])[:16]
