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
from lrcompress.files import check_free
from lrcompress.models import locate
from lrcompress.protocols import InputError, Progress, silent
from lrcompress.recovery import check_pair, train
from lrcompress.settings import FinetuneSettings, ModelSettings
from lrcompress.sizes import sequence_length
from lrcompress.sources import Loaded, load_settings, other_source
from lrcompress.tables import learned

TRAIN_LENGTH = 512


def finetune_to(
    source: ModelSettings,
    settings: FinetuneSettings,
    out: Path,
    progress: Progress = silent,
    replace: bool = False,
    load_teacher: Callable[[ModelSettings], Loaded] = load_settings,
) -> dict[str, Any]:
    """Trains the checkpoint `source` and saves it to `out`; returns what lrcompress.json holds.

    Checkpoints are kept beside `out` until it is whole: the same command goes on from the last.
    Raises InputError if `out` exists, unless an older result there is to be replaced, or where
    text, teacher or checkpoint do not fit.
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
    teacher, _ = load_teacher(other_source(source, name))
    check_pair(model, teacher)
    tokens, text = training_tokens(model, tokenizer, settings)
    work = out.with_name(f".{out.name}.finetune") / _identity(source, settings, text)
    held = settings.held_out
    done = train(model, teacher, tokens[held:], tokens[:held], settings, work, progress)
    record.pop("metrics", None)  # they are of the model before training
    if "finetuned" in record:
        record["before"] = learned(record)
    record |= {"finetuned": asdict(done) | {"settings": settings.model_dump(mode="json")} | text}
    saved = checkpoint.save(model, tokenizer, out, record, replace)
    shutil.rmtree(work.parent, ignore_errors=True)
    return saved


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
    return stages.digest([state, settings.model_dump(mode="json"), text])[:16]
