"""Loads a compressed checkpoint, trains it towards its dense teacher, saves the result."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from lrcompress import checkpoint, stages
from lrcompress.data import fingerprint, in_turn, read_corpus, token_blocks
from lrcompress.files import check_free
from lrcompress.models import locate
from lrcompress.processes import agreed, check_shared, from_main, group, is_main, share
from lrcompress.protocols import InputError, Progress, silent
from lrcompress.recovery import check_pair, train
from lrcompress.settings import FinetuneSettings, ModelSettings
from lrcompress.sharding import check as check_shardable
from lrcompress.sharding import check_tied, placement, whole_state
from lrcompress.sizes import sequence_length
from lrcompress.sources import load_settings, other_source

TRAIN_LENGTH = 512


def finetune_to(
    source: ModelSettings, settings: FinetuneSettings, out: Path, progress: Progress = silent
) -> dict[str, Any]:
    """Trains the checkpoint `source` and saves it to `out`; returns what lrcompress.json holds.

    Checkpoints are kept beside `out` until it is whole: the same command goes on from the last.
    Raises InputError if `out` exists, or where text, teacher or checkpoint do not fit.
    """
    with group(source.device):
        return _finetune(source, settings, out, progress if is_main() else silent)


def _finetune(
    source: ModelSettings, settings: FinetuneSettings, out: Path, progress: Progress
) -> dict[str, Any]:
    teacher_source, record = agreed(lambda: _checked(source, settings, out))
    model, tokenizer, teacher = agreed(lambda: _loaded(source, teacher_source, settings))
    tokens, text = from_main(lambda: training_tokens(model, tokenizer, settings))
    name = from_main(lambda: _identity(source, settings, text))
    work = out.with_name(f".{out.name}.finetune") / name
    check_shared(work)
    held = settings.held_out
    done = agreed(
        lambda: train(model, teacher, tokens[held:], tokens[:held], settings, work, progress)
    )
    record |= {"finetuned": asdict(done) | {"settings": settings.model_dump(mode="json")} | text}
    state = whole_state(model)
    saved = from_main(lambda: checkpoint.save(model, tokenizer, out, record, state=state))
    from_main(lambda: shutil.rmtree(work.parent, ignore_errors=True))
    return saved


def _checked(
    source: ModelSettings, settings: FinetuneSettings, out: Path
) -> tuple[ModelSettings, dict[str, Any]]:
    """The teacher's settings and the checkpoint's record, if nothing given is wrong."""
    check_free(out)
    if not settings.data:
        raise InputError("finetune needs text to train on: give --data FILE.txt or another SPEC")
    share(settings.batch_size, settings.gradient_accumulation)
    record = checkpoint.read_record(Path(locate(source.source).path)) or {}
    name = settings.teacher or record.get("source")
    if name is None:
        raise InputError(f"{source.source!r} names no source: give --teacher MODEL")
    teacher = other_source(source, name)
    for each in (source, teacher) if settings.shard else ():
        check_shardable(each)
    record.pop("metrics", None)  # they are of the model before training
    return teacher, record


def _loaded(
    source: ModelSettings, teacher: ModelSettings, settings: FinetuneSettings
) -> tuple[Any, Any, Any]:
    model, tokenizer = load_settings(source, **placement(source, settings.shard))
    check_tied(model, settings.train)
    dense, _ = load_settings(teacher, **placement(teacher, settings.shard))
    check_pair(model, dense)
    return model, tokenizer, dense


def training_tokens(
    model: Any, tokenizer: Any, settings: FinetuneSettings
) -> tuple[Tensor, dict[str, Any]]:
    """Blocks (sequences, length), the held-out ones first, and what identifies them.

    As many as the steps need, or as many whole steps as the texts hold; those are then read more
    than once.
    """
    if tokenizer is None:
        raise InputError("finetune reads text and the model has no tokenizer: add its files")
    length = sequence_length(model, settings.train_length)
    if settings.train_length is None:
        length = min(length, TRAIN_LENGTH)
    each = settings.batch_size
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
    blocks = blocks[: len(blocks) - (len(blocks) - settings.held_out) % each]
    mark = fingerprint(settings.data, blocks, settings.seed)
    return blocks, {"sequences": mark.num_samples, "length": length, "sha256": mark.sha256}


def _identity(source: ModelSettings, settings: FinetuneSettings, text: dict[str, Any]) -> str:
    state = stages.model_state(source)
    return stages.digest([state, settings.model_dump(mode="json"), text])[:16]
