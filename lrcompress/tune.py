"""Loads a compressed checkpoint, trains it towards its dense teacher, saves the result."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from lrcompress import checkpoint, processes, sharding, stages
from lrcompress.corpora import read_corpus
from lrcompress.data import fingerprint, in_turn, token_blocks
from lrcompress.distill import BlockDataset
from lrcompress.files import check_free
from lrcompress.models import locate
from lrcompress.processes import agreed, from_main
from lrcompress.protocols import InputError, Progress, silent
from lrcompress.recovery import Recovery, check_pair, train
from lrcompress.settings import FinetuneSettings, ModelSettings
from lrcompress.sizes import sequence_length
from lrcompress.sources import Loaded, load_settings, other_source
from lrcompress.tables import learned
from lrcompress.teacher import TeacherCache

TRAIN_LENGTH = 512

LoadTeacher = Callable[[ModelSettings], Loaded]


def finetune_to(
    source: ModelSettings,
    settings: FinetuneSettings,
    out: Path,
    progress: Progress = silent,
    *,
    resume: bool = True,
    replace: bool = False,
    load_teacher: LoadTeacher | None = None,
) -> dict[str, Any]:
    """Trains the checkpoint `source` and saves it to `out`; returns what lrcompress.json holds.

    Checkpoints are kept beside `out` until it is whole: the same call goes on from the last
    unless `resume` is off. Under torchrun every process calls it, and the main one writes. Raises
    InputError if `out` exists and is not to be replaced, where text, teacher or checkpoint do not
    fit, and where training diverged; the best weights before that are saved.
    """
    with processes.group(source.device):
        run = Finetuning(source, settings, progress if processes.is_main() else silent)
        return run.whole(out, resume, replace, load_teacher)


class Finetuning:
    """One training run. Whatever may fail does so in all processes alike."""

    def __init__(
        self, source: ModelSettings, settings: FinetuneSettings, progress: Progress
    ) -> None:
        self.source, self.settings, self.progress = source, settings, progress
        self.dense = source  # the teacher, once the checkpoint's record is read

    def whole(
        self, out: Path, resume: bool, replace: bool, load_teacher: LoadTeacher | None
    ) -> dict[str, Any]:
        self.dense, record = agreed(lambda: self._checked(None if replace else out))
        model, tokenizer, teacher = agreed(lambda: self._loaded(load_teacher))
        tokens, text = from_main(lambda: training_tokens(model, tokenizer, self.settings))
        work = out.with_name(f".{out.name}.finetune")
        if not resume:
            from_main(lambda: shutil.rmtree(work, ignore_errors=True))
        done = self._trained(model, teacher, tokens, text, work)
        record |= {"finetuned": asdict(done) | {"settings": self._asked()} | text}
        state = sharding.whole_state(model)
        saved = from_main(
            lambda: checkpoint.save(model, tokenizer, out, record, replace, state=state)
        )
        from_main(lambda: shutil.rmtree(work, ignore_errors=True))
        _refuse_divergence(done, out)
        return saved

    def _trained(
        self, model: Any, teacher: Any, tokens: Tensor, text: dict[str, Any], work: Path
    ) -> Recovery:
        """Checkpoints are in a folder of `work` that is this run's alone."""
        run = work / from_main(lambda: _identity(self.source, self.settings, text))
        processes.check_shared(run)
        try:
            return agreed(lambda: self._train(model, teacher, tokens, text["sha256"], run))
        except InputError:
            if processes.is_main():  # another try would end like this one
                shutil.rmtree(work, ignore_errors=True)
            raise

    def _asked(self) -> dict[str, Any]:
        return self.settings.model_dump(mode="json")

    def _checked(self, out: Path | None) -> tuple[ModelSettings, dict[str, Any]]:
        """The teacher's settings and the checkpoint's record, if nothing given is wrong."""
        source, settings = self.source, self.settings
        if out is not None:
            check_free(out)
        if not settings.data:
            raise InputError(
                "finetune needs text to train on: give --data FILE.txt or another SPEC"
            )
        check_settings(settings)
        record = checkpoint.read_record(Path(locate(source.source).path)) or {}
        name = settings.teacher or record.get("source")
        if name is None:
            raise InputError(f"{source.source!r} names no source: give --teacher MODEL")
        teacher = other_source(source, name)
        for each in (source, teacher) if settings.shard else ():
            sharding.check(each)
        self._check_device()
        record.pop("metrics", None)  # they are of the model before training
        if "finetuned" in record:
            record["before"] = learned(record)
        return teacher, record

    def _check_device(self) -> None:
        if self.source.device.startswith("cuda:") and self.source.device != "cuda:0":
            raise InputError(
                f"finetune takes the first GPU and the device is {self.source.device!r}: set "
                f"CUDA_VISIBLE_DEVICES={self.source.device[5:]} and use --device auto"
            )

    def _loaded(self, load_teacher: LoadTeacher | None) -> tuple[Any, Any, Any]:
        shard = self.settings.shard
        model, tokenizer = load_settings(self.source, **sharding.placement(self.source, shard))
        sharding.check_trainable(model, self.settings.train)
        if load_teacher is not None:
            teacher, _ = load_teacher(self.dense)
        else:
            teacher, _ = load_settings(self.dense, **sharding.placement(self.dense, shard))
        check_pair(model, teacher, self.settings.hidden_states > 0)
        return model, tokenizer, teacher

    def _train(self, model: Any, teacher: Any, tokens: Tensor, mark: str, run: Path) -> Recovery:
        settings, held = self.settings, self.settings.held_out
        cache = self._cache(teacher, tokens, mark)
        return train(
            model,
            teacher if cache is None or settings.self_guided != "off" else None,
            BlockDataset(tokens[held:], cache, held),
            BlockDataset(tokens[:held], cache),
            settings,
            run,
            self.progress,
        )

    def _cache(self, teacher: Any, tokens: Tensor, mark: str) -> TeacherCache | None:
        """The teacher's predictions for all sequences, if they are kept; made where missing.

        `mark` identifies the sequences.
        """
        settings = self.settings
        if settings.teacher_cache is None:
            return None
        kept = [settings.teacher_top_k, settings.temperature]
        name = stages.digest([stages.model_inputs(self.dense), mark, kept])[:16]
        folder = Path(settings.teacher_cache) / name
        cache = TeacherCache(folder, settings.teacher_top_k, settings.temperature)
        missing = from_main(lambda: cache.missing(len(tokens)))
        own = processes.own_part(missing)
        agreed(lambda: cache.fill(teacher, tokens, own, self.progress))
        return cache


def _refuse_divergence(done: Recovery, out: Path) -> None:
    if done.diverged:
        raise InputError(
            f"training diverged: {done.diverged}; {str(out)!r} holds the best weights before it, "
            f"of step {done.best_step}: use a smaller --learning-rate"
        )


def check_settings(settings: FinetuneSettings) -> None:
    """Raises InputError for what cannot work on this machine, before anything is loaded."""
    processes.share(settings.batch_size, settings.gradient_accumulation)
    if settings.shard:
        sharding.check_processes()
    for asked, package, extra in (
        (settings.train == "lora", "peft", "lora"),
        (settings.tensorboard is not None, "tensorboard", "tensorboard"),
    ):
        if asked and importlib.util.find_spec(package) is None:
            raise InputError(f"{extra} needs {package}: pip install 'lrcompress[{extra}]'")


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
    text = {"sequences": mark.num_samples, "length": length, "sha256": mark.sha256}
    return blocks, text | {"sketch": mark.sketch.to_dict()}


def _identity(source: ModelSettings, settings: FinetuneSettings, text: dict[str, Any]) -> str:
    """Of all that decides what training gives."""
    asked = settings.model_dump(mode="json", exclude={"tensorboard", "teacher_cache"})
    cached = settings.teacher_cache is not None  # its loss is another one, wherever it is
    return stages.digest([stages.model_inputs(source), asked, cached, text])[:16]
